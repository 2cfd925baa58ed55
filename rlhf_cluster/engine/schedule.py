"""Learning-rate schedules as plain functions of the step."""

from __future__ import annotations

import math

from rlhf_cluster.config import OptimizerConfig

WARMUP_START = 0.1  # InstructGPT C.4: the warm-up begins at a tenth of the peak


def learning_rate(cfg: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (0-based) of `total_steps`.

    Linear warm-up from `WARMUP_START * lr` over `warmup_steps`, then constant, or down to `final_lr_ratio * lr`: as a
    cosine that is there at the last step (InstructGPT, appendix C), or in a straight line that is there one step later
    (lm-human-preferences), so that a line to 0 has no step in vain.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (WARMUP_START + (1 - WARMUP_START) * step / cfg.warmup_steps)
    if cfg.schedule == "constant":
        return cfg.lr
    done, span = step - cfg.warmup_steps, total_steps - cfg.warmup_steps
    if cfg.schedule == "linear":
        left = 1 - min(done / max(span, 1), 1.0)
    else:
        left = 0.5 * (1 + math.cos(math.pi * min(done / max(span - 1, 1), 1.0)))
    return cfg.lr * (cfg.final_lr_ratio + (1 - cfg.final_lr_ratio) * left)
