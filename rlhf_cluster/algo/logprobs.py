"""Log-probabilities of sampled tokens, and the entropy of the distribution that they were sampled from.

Takes logits at the positions that predict response tokens; gives one number of each kind per token. It knows nothing of
models or padding; `models.forward` calls it a chunk of tokens at a time, for vocabularies are large.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logprobs_from_logits(
    logits: Tensor, ids: Tensor, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target id, and the entropy, under the tempered softmax; both float32.

        log pi(a) = z_a / T - logsumexp(z / T)        H = -sum_v pi(v) log pi(v)

    logits [..., V] finite, ids [...] int64 -> (logprobs [...], entropy [...]). The entropy carries no gradient unless
    asked for: usually it is watched, not trained on. Dividing by the sampling temperature everywhere keeps old, new and
    reference logprobs comparable (Ziegler et al. 2019, arXiv:1909.08593, their code). Raises ValueError unless
    temperature > 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} has no distribution; it must be greater than 0")
    log_pi = (logits.float() / temperature).log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -torch.linalg.vecdot(log_pi.exp(), log_pi)
    return log_pi.gather(-1, ids.unsqueeze(-1)).squeeze(-1), entropy
