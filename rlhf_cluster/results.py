"""What a run left: its config and the policy to talk to."""

from __future__ import annotations

from pathlib import Path

from rlhf_cluster.config import ConfigError, RunConfig, load_file
from rlhf_cluster.storage.checkpoints import Checkpoints
from rlhf_cluster.storage.run_directory import RunLayout


def result_policy(run_dir: Path) -> Path:
    """The newest policy of a run: PPO's last checkpoint (its average where the config says so), else what
    DPO or SFT made.
    Raises ConfigError where there is none."""
    layout = _layout(run_dir)
    if checkpoint := Checkpoints(layout.checkpoints).latest():
        return checkpoint.path / result_config(run_dir).ppo.result
    for stage in ("dpo", "sft"):
        if trained := layout.stage_output(stage):
            return trained / "policy"
    raise ConfigError(
        f"{run_dir} holds no policy yet; let the run go on: SFT and DPO leave one at their end, PPO with each "
        "checkpoint (ppo.save_every) and at its end"
    )


def result_config(run_dir: Path) -> RunConfig:
    """The resolved config that the run was started with."""
    return load_file(_layout(run_dir).resolved_config)


def _layout(run_dir: Path) -> RunLayout:
    layout = RunLayout(run_dir)
    if not layout.holds_run:
        raise ConfigError(f"{run_dir} holds no run; name the directory that `rlhf-cluster run` wrote")
    return layout
