"""The learner's models on one rank, policy and critic, and what they say of a batch before an update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from rlhf_cluster.algo.logprobs import logprobs_from_logits
from rlhf_cluster.config import GuardrailsConfig, LearnerConfig, ModelConfig
from rlhf_cluster.engine.average import WeightAverage
from rlhf_cluster.engine.engine import TrainEngine
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.learner.critic import Critic, NoCritic
from rlhf_cluster.learner.experience import Evaluation
from rlhf_cluster.learner.step import Step, guarded_step
from rlhf_cluster.models.batching import PackedBatch, filled_up, in_order, micro_batches, pack, share, singles
from rlhf_cluster.models.forward import PolicyModule, attends_to_all
from rlhf_cluster.models.load import compute_device, load_policy, resolve_attention, resolve_dtype
from rlhf_cluster.models.lora import Adapters
from rlhf_cluster.models.score_head import ScalarHeadModel
from rlhf_cluster.weights.adapter import HEADER


@dataclass(frozen=True, eq=False)
class Published:
    """What a snapshot is made of: its tensors one at a time, by name, and its header."""

    shapes: Mapping[str, tuple[int, ...]]
    tensors: Iterable[tuple[str, torch.Tensor]]
    header: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def whole(cls, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> Published:
        return cls({name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.items(), header)


class ActorCritic:
    """Policy and critic, a DeepSpeed engine each, in one process.

    The critic starts as the reward model (InstructGPT section 3.5); without one, as the policy's body under a head of
    zeros.
    `entropy_gradient`: the entropies of the policy's forward are to be trained on. `critic`: advantages need one.
    `ema_decay`: of the policy's average; 0: none is kept. `share_prompts`: responses to one prompt stand in one row.
    """

    def __init__(
        self,
        policy_path: Path,
        critic_path: Path | None,
        cfg: LearnerConfig,
        model: ModelConfig,
        ranks: Ranks,
        entropy_gradient: bool = False,
        critic: bool = True,
        ema_decay: float = 0.0,
        share_prompts: bool = False,
    ) -> None:
        dtype, attention = resolve_dtype(model.dtype), resolve_attention(model.attention)
        self.ranks = ranks
        self.device = compute_device()
        self._packing = cfg.packing
        self.tokens_per_micro_batch = cfg.engine.tokens_per_micro_batch
        self._context = model.context
        logprobs = partial(logprobs_from_logits, entropy_gradient=entropy_gradient)
        language_model = load_policy(policy_path, None, attention)
        self._adapters = Adapters(language_model, cfg.lora)
        policy = PolicyModule(language_model, logprobs)
        self.policy_config = language_model.config
        self._shares = share_prompts and attends_to_all(language_model)
        self.policy = TrainEngine(policy, cfg.engine, cfg.policy, dtype, ranks)
        self.average = WeightAverage(self.policy, ema_decay) if ema_decay else None
        self.critic: Critic | NoCritic = NoCritic()
        if critic:
            if critic_path is None:
                value = ScalarHeadModel.silent(policy_path, None, attention)
            else:
                value = ScalarHeadModel.from_directory(critic_path, None, attention)
            adapters = Adapters(value.body, cfg.lora)
            self.critic = Critic(value, adapters, TrainEngine(value, cfg.engine, cfg.critic, dtype, ranks))

    def step_policy(
        self, rate: float, guardrails: GuardrailsConfig, scale: float = 1.0, withheld: bool = False
    ) -> Step:
        """One optimizer step on the gradient times `scale`, which the average follows. A collective."""
        step = guarded_step(self.policy, rate, guardrails, scale, withheld)
        if step.taken and self.average is not None:
            self.average.update()
        return step

    def published(self, averaged: bool) -> Published:
        """What generation is to load of the policy or of its average. Every rank must go through its tensors, which
        rank 0 alone has need of. A collective."""
        if not averaged and not self._adapters.cfg.rank:
            shapes = {PolicyModule.hf_name(name): shape for name, shape in self.policy.shapes().items()}
            return Published(shapes, ((PolicyModule.hf_name(n), t) for n, t in self.policy.full_parameters()))
        if self._adapters.cfg.publish == "merged":
            return Published.whole(self.average_weights() if averaged else self.policy_weights(), {})
        of_average = self.average if averaged else None
        learnt = self.policy.learning_on_rank_0() if of_average is None else of_average.weights_on_rank_0()
        alone = self._adapters.alone(PolicyModule.hf_names(learnt))
        return Published.whole(alone, {HEADER: self._adapters.description()})

    def policy_weights(self) -> dict[str, torch.Tensor]:
        """By Hugging Face names, adapters merged, on rank 0; nothing on the others. A collective."""
        return self._plain(self.policy.weights_on_rank_0())

    def average_weights(self) -> dict[str, torch.Tensor]:
        """As `policy_weights`, of the average."""
        assert self.average is not None
        return self._plain(self.average.weights_on_rank_0())

    def _plain(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self._adapters.merged(PolicyModule.hf_names(weights))

    def save_adapter(self, directory: Path) -> None:
        """What `peft` opens, where there are adapters. A collective."""
        if self._adapters.cfg.rank:
            weights = PolicyModule.hf_names(self.policy.masters_on_rank_0())
            if self.ranks.rank == 0:
                self._adapters.save(weights, directory)

    @property
    def engines(self) -> dict[str, TrainEngine]:
        return {"policy": self.policy, **self.critic.engines}

    def micro_batches(
        self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], text: bool = False
    ) -> list[PackedBatch]:
        """This rank's micro-batches, filled up with dummies to the number of the busiest rank. `text`: there are no
        prompts that could be shared. A collective."""
        rows = singles(len(prompts))
        if self._shares and not text:
            rows = share(prompts, responses, min(self._context, self.tokens_per_micro_batch))
        shared = len(rows) < len(prompts)
        if self._packing and not shared:
            lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
            rows = pack(lengths, max([min(self._context, self.tokens_per_micro_batch), *lengths]))
        own = micro_batches(prompts, responses, rows, self.tokens_per_micro_batch, shared)
        return [batch.to(self.device) for batch in filled_up(own, int(self.ranks.max(len(own))))]

    def flat(self, batch: PackedBatch, ragged: Sequence[np.ndarray]) -> torch.Tensor:
        """Per-token arrays, one for each sequence of the caller's, in the micro-batch's order: f32 [N]."""
        return torch.from_numpy(np.concatenate(batch.select(ragged))).to(self.device)

    def token_mask(self, batch: PackedBatch) -> torch.Tensor:
        """1 for each response token, 0 for those of a dummy: f32 [N]."""
        real = np.repeat(batch.sequences >= 0, batch.response_lengths).astype(np.float32)
        return torch.from_numpy(real).to(self.device)

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
            values.append(self.critic.values(batch))
        count = len(prompts)
        return Evaluation(*(in_order(batches, parts, count) for parts in (logprobs, entropies, values)))
