"""Log-probabilities of sampled tokens, and the entropy of the distribution that they were sampled from.

Takes hidden states at the positions that predict response tokens, flattened to real tokens only, and the output
embedding; gives one number of each kind per token. Vocabularies are large: full logits never exist for all tokens at
once. It knows nothing of models, padding or how the hidden states came about.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint


def logprobs_from_logits(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each target id, and the entropy, under the tempered softmax; both float32.

        log pi(a) = z_a / T - logsumexp(z / T)        H = -sum_v pi(v) log pi(v)

    logits [..., V] finite, ids [...] int64 -> (logprobs [...], entropy [...]). The entropy carries no gradient: it is
    watched, not trained on. Dividing by the sampling temperature everywhere keeps old, new and reference logprobs
    comparable (Ziegler et al. 2019, arXiv:1909.08593, their code). Raises ValueError unless temperature > 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} has no distribution; it must be greater than 0")
    log_pi = (logits.float() / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -torch.linalg.vecdot(log_pi.exp(), log_pi)
    return log_pi.gather(-1, ids.unsqueeze(-1)).squeeze(-1), entropy


def response_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    response_ids: Tensor,
    temperature: float,
    chunk: int,
    lm_head_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`logprobs_from_logits` of `hidden @ lm_head_weight.T + bias`, at most `chunk` tokens at a time.

    hidden [N, H] (row i predicts response_ids[i]), lm_head_weight [V, H], response_ids [N] int64, lm_head_bias [V] ->
    (logprobs [N], entropy [N]), float32. Peak memory is a few chunk * V floats instead of N * V, with gradient as well:
    logits are then computed again in the backward pass (Chen et al. 2016, arXiv:1604.06174), chunk by chunk.

    The product is taken in the dtype of `hidden`, as samplers take it; all that follows is float32. Hand in float32 for
    float32 logits. Raises ValueError for chunk < 1, temperature <= 0, or hidden and ids of unequal length.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} tokens; it must be at least 1")
    if hidden.shape[0] != response_ids.shape[0]:
        raise ValueError(f"{len(hidden)} hidden states for {len(response_ids)} response tokens; give one for each")

    def of_chunk(states: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return logprobs_from_logits(linear(states, weight, bias), ids, temperature)

    if hidden.shape[0] <= chunk:
        return of_chunk(hidden, lm_head_weight, response_ids, lm_head_bias)
    again = _needs_grad(hidden, lm_head_weight, lm_head_bias)
    parts = []
    for states, ids in zip(torch.split(hidden, chunk), torch.split(response_ids, chunk), strict=True):
        inputs = (states, lm_head_weight, ids, lm_head_bias)
        # Nothing here is random, so the random state need not be kept for the second computation.
        parts.append(
            checkpoint(of_chunk, *inputs, use_reentrant=False, preserve_rng_state=False) if again else of_chunk(*inputs)
        )
    logprobs, entropy = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
