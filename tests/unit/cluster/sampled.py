"""What a sampler adds to members, as far as who holds them matters: a token each."""

from __future__ import annotations

from typing import Any


def sampled(count: int) -> dict[str, list[Any]]:
    return {
        "response_ids": [[1]] * count,
        "rollout_logprobs": [[-1.0]] * count,
        "weight_versions": [[0]] * count,
        "finish_reason": ["stop"] * count,
        "temperature": [1.0] * count,
        "incarnation": ["test"] * count,
    }
