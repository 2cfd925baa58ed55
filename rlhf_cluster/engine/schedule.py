"""Learning-rate schedules as plain functions of the step."""

from __future__ import annotations

import math

from rlhf_cluster.config import OptimizerConfig

WARMUP_START = 0.1  # InstructGPT C.4: the warm-up begins at a tenth of the peak


def learning_rate(cfg: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (0-based) of `total_steps`.

    Linear warm-up from `WARMUP_START * lr` over `warmup_steps`, then constant, or down to `final_lr_ratio * lr` at the
    last step: as a cosine (InstructGPT, appendix C) or in a straight line (lm-human-preferences).
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (WARMUP_START + (1 - WARMUP_START) * step / cfg.warmup_steps)
    if cfg.schedule == "constant":
        return cfg.lr
    span = max(total_steps - 1 - cfg.warmup_steps, 1)
    progress = min((step - cfg.warmup_steps) / span, 1.0)
    left = 1 - progress if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.lr * (cfg.final_lr_ratio + (1 - cfg.final_lr_ratio) * left)
