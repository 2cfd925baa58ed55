"""The learner's two models on one rank: what a forward of each says, and one optimizer step of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from rlhf_cluster.algo.logprobs import logprobs_from_logits
from rlhf_cluster.config import LearnerConfig, ModelConfig
from rlhf_cluster.engine.engine import TrainEngine
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.models.batching import PackedBatch, filled_up, in_order, micro_batches, singles
from rlhf_cluster.models.forward import PolicyModule
from rlhf_cluster.models.load import load_policy, resolve_attention, resolve_dtype
from rlhf_cluster.models.score_head import ScalarHeadModel


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Per response token, one f32 [R] per row."""

    logprobs: list[np.ndarray]
    entropies: list[np.ndarray]
    values: list[np.ndarray]


class ActorCritic:
    """Policy and critic, a DeepSpeed engine each, in one process.

    The critic starts as the reward model (InstructGPT section 3.5); without one, as the policy's body under a new head.
    `entropy_gradient`: the entropies of the policy's forward are to be trained on.
    """

    def __init__(
        self,
        policy_path: Path,
        critic_path: Path | None,
        cfg: LearnerConfig,
        model: ModelConfig,
        seed: int,
        ranks: Ranks,
        entropy_gradient: bool = False,
    ) -> None:
        dtype, attention = resolve_dtype(model.dtype), resolve_attention(model.attention)
        self.ranks = ranks
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokens_per_micro_batch = cfg.engine.tokens_per_micro_batch
        logprobs = partial(logprobs_from_logits, entropy_gradient=entropy_gradient)
        policy = PolicyModule(load_policy(policy_path, None, attention), logprobs)
        if critic_path is None:
            critic = ScalarHeadModel.from_policy(policy_path, None, attention, seed)
        else:
            critic = ScalarHeadModel.from_directory(critic_path, None, attention)
        self.policy_config, self.critic_config = policy.model.config, critic.config
        self.policy = TrainEngine(policy, cfg.engine, cfg.policy, dtype, ranks)
        self.critic = TrainEngine(critic, cfg.engine, cfg.critic, dtype, ranks)

    def micro_batches(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> list[PackedBatch]:
        """This rank's micro-batches, filled up with dummies to the number of the busiest rank. A collective."""
        own = micro_batches(prompts, responses, singles(len(prompts)), self._tokens_per_micro_batch)
        return [batch.to(self.device) for batch in filled_up(own, int(self.ranks.max(len(own))))]

    @torch.no_grad()
    def evaluate(
        self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], temperature: float
    ) -> Evaluation:
        """What policy and critic say before an update. A collective."""
        batches = self.micro_batches(prompts, responses)
        logprobs, entropies, values = [], [], []
        for batch in batches:
            of_tokens = self.policy(*batch.policy_arguments(), temperature)
            logprobs.append(batch.split(of_tokens[0]))
            entropies.append(batch.split(of_tokens[1]))
            values.append(batch.split(self.critic(*batch.value_arguments())))
        count = len(prompts)
        return Evaluation(*(in_order(batches, parts, count) for parts in (logprobs, entropies, values)))
