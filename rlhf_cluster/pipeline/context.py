"""What a stage sees of the run that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlhf_cluster import dpo, rm, sft
from rlhf_cluster.cluster.starter import Attempt
from rlhf_cluster.cluster.train import train_on_ranks
from rlhf_cluster.config import Resources, RunConfig
from rlhf_cluster.inputs import Inputs
from rlhf_cluster.ranking import Judge, make_judge
from rlhf_cluster.storage.run_directory import RunDirectory
from rlhf_cluster.telemetry.metrics import MetricsLog
from rlhf_cluster.telemetry.progress import Progress
from rlhf_cluster.telemetry.timer import Timeline


@dataclass(frozen=True)
class Run:
    """A run while it runs: its config, inputs, directory and displays."""

    cfg: RunConfig
    inputs: Inputs
    directory: RunDirectory
    progress: Progress
    metrics: MetricsLog
    timeline: Timeline

    @property
    def attempt(self) -> Attempt:
        name = self.directory.unique_name(self.cfg.name)
        return Attempt(name, self.directory.attempt, self.directory.attempt_logs, self.timeline, self.progress.note)

    def output(self, stage: str) -> Path | None:
        return self.directory.stage_output(stage)

    @property
    def start_policy(self) -> Path:
        """The policy that the reward model and DPO start from: SFT's, or the one that the config names."""
        trained = self.output(sft.STAGE)
        return trained / "policy" if trained else self.inputs.base_path

    @property
    def ppo_policy(self) -> Path:
        """The policy that PPO starts from: DPO's where there is that stage."""
        trained = self.output(dpo.STAGE)
        return trained / "policy" if trained else self.start_policy

    def judge(self, name: str) -> Judge:
        """The labeler of this name."""
        return make_judge(name, self.cfg.data.answer_column, self.inputs.text)

    def on_ranks(
        self, stage: str, train: Callable[..., None], job: sft.SFTJob | rm.RMJob | dpo.DPOJob, resources: Resources
    ) -> None:
        """Trains on the ranks of a stage; what they report of a step is the run's metrics of the step after."""
        with self.progress.stage(stage, job.steps()):
            train_on_ranks(
                stage,
                train,
                job,
                resources,
                self.cfg.cluster,
                self.directory.attempt_logs,
                lambda step, metrics: self.metrics.log(stage, step + 1, metrics),
            )
