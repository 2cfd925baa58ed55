"""One reference worker."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_cluster.algo.logprobs import logprobs_from_logits
from rlhf_cluster.models.batching import Layout, in_order
from rlhf_cluster.models.forward import PolicyModule, attends_to_all
from rlhf_cluster.models.load import compute_device, load_policy, resolve_attention, resolve_dtype
from rlhf_cluster.records import RefLogprobs, Rollouts


class ReferenceWorker:
    """A causal LM that only evaluates. `policy_path` is a plain Hugging Face directory."""

    def __init__(self, policy_path: str, dtype: str, attention: str, tokens_per_micro_batch: int) -> None:
        self._device = compute_device()
        model = load_policy(Path(policy_path), resolve_dtype(dtype), resolve_attention(attention))
        self._policy = PolicyModule(model, logprobs_from_logits).to(self._device)
        self._layout = Layout(tokens_per_micro_batch, tokens_per_micro_batch if attends_to_all(model) else 0)

    @torch.no_grad()
    def logprobs(self, rollouts: Rollouts) -> RefLogprobs:
        """Logprobs of every response token at the temperature it was sampled with."""
        ids = rollouts.prompt_ids, rollouts.response_ids
        batches = self._layout.batches(*ids, self._layout.rows(*ids))
        temperature = float(rollouts.temperature[0])
        parts = []
        for batch in batches:
            logprobs, _ = self._policy(*batch.to(self._device).policy_arguments(), temperature)
            parts.append(batch.split(logprobs))
        return RefLogprobs.of(
            {"sample_id": rollouts.sample_id, "ref_logprobs": in_order(batches, parts, len(rollouts))}
        )
