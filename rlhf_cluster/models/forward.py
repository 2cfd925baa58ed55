"""The policy's forward: hidden states once, logits only for the response tokens, a chunk at a time.

Takes a causal LM of transformers and the tensors of a `PackedBatch`; gives per-token logprobs and entropies through a
function that the caller brings. It refuses to know losses and DeepSpeed, but is shaped so that ZeRO-3 may wrap it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# (logits f32 [n, V], ids i64 [n], temperature) -> (logprobs f32 [n], entropies f32 [n])
LogprobFunction = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor | None = None
) -> Tensor:
    """The body alone, final norm included: [B, T] -> [B*T, H]. Takes a causal LM or a body.

    No cache, and no attention mask unless a prompt is shared: see `batching` for how transformers then reads
    `position_ids`.
    """
    body = model.base_model
    mask = None if segment_ids is None else shared_prompt_mask(segment_ids, model.dtype)
    output = body(input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


def shared_prompt_mask(segment_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the attention's logits, [B, 1, T, T]: 0 where token q sees token k, the lowest number elsewhere.

    It sees what stands before it in its own response and in the prompt, segment 0.
    """
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    seen = ((key == query) | (key == 0)).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def attends_to_all(model: PreTrainedModel) -> bool:
    """Whether every layer lets a token see all before it, so that `shared_prompt_mask` says all that there is: no
    sliding window, no recurrent state."""
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    windowed = getattr(model.config, "sliding_window", None) and not hasattr(model.config, "layer_types")
    return kinds == {"full_attention"} and not windowed and not model._is_stateful


def lm_head(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """(weight [V, H], bias [V] or None) of the layer that gives logits."""
    head = model.get_output_embeddings()
    return head.weight, head.bias


class LogprobHead(nn.Module):
    """The LM head as one module call: hidden states to logprobs and entropies of given tokens.

    It holds the LM head's own parameters (the same objects, also where they are tied to the embedding), because ZeRO-3
    gathers a parameter when a module that owns it runs. Calling `lm_head` once per chunk instead would gather once per
    chunk, and ranks with different numbers of tokens would then wait for each other for ever.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, logprob_fn: LogprobFunction, chunk: int) -> None:
        super().__init__()
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.logprob_fn = logprob_fn
        self.chunk = chunk

    def forward(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """hidden [N, H], targets i64 [N] -> (logprobs f32 [N], entropies f32 [N]); at most `chunk` x V logits live.

        Several chunks are recomputed in the backward pass: autograd would otherwise keep the logits of them all.
        """
        parts = list(zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            pairs = [self._chunk(rows, ids, temperature) for rows, ids in parts]
        else:
            pairs = [checkpoint(self._chunk, rows, ids, temperature, use_reentrant=False) for rows, ids in parts]
        logprobs, entropies = zip(*pairs, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _chunk(self, hidden: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logits = functional.linear(hidden, self.weight, self.bias)
        return self.logprob_fn(logits.float(), ids, temperature)


class PolicyModule(nn.Module):
    """What DeepSpeed wraps: the causal LM, with a forward that gives logprobs instead of logits."""

    def __init__(self, model: PreTrainedModel, logprob_fn: LogprobFunction, chunk: int = 1024) -> None:
        super().__init__()
        self.model = model
        self.head = LogprobHead(*lm_head(model), logprob_fn, chunk)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor | None,
        positions: Tensor,
        targets: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """`PackedBatch.policy_arguments()` and the sampling temperature -> (logprobs f32 [N], entropies f32 [N])."""
        hidden = hidden_states(self.model, input_ids, position_ids, segment_ids)
        return self.head(hidden[positions], targets, temperature)

    @staticmethod
    def hf_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by this module's parameter names -> by their Hugging Face names."""
        return {PolicyModule.hf_name(name): tensor for name, tensor in weights.items()}

    @staticmethod
    def hf_name(name: str) -> str:
        return name.removeprefix("model.")
