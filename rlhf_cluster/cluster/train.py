"""SFT and the reward model under Ray Train: starts the ranks, passes their reports on, waits with deadlines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rlhf_cluster.cluster.hosts import environment, reserved, set_apart, spawn
from rlhf_cluster.cluster.waits import Call, WorkerError, get, out_of_memory
from rlhf_cluster.config import ClusterConfig, Resources

POLL_S = 0.5


class Mailbox:
    """Reports of the ranks, in the order they came: Ray Train's own reports end with the run."""

    def __init__(self) -> None:
        self._reports: list[tuple[int, dict[str, float]]] = []
        self._started = 0

    def start(self) -> None:
        """A rank has joined the others."""
        self._started += 1

    def put(self, step: int, metrics: dict[str, float]) -> None:
        self._reports.append((step, metrics))

    def since(self, count: int) -> tuple[int, list[tuple[int, dict[str, float]]]]:
        """(ranks that have started, the reports after the first `count`)"""
        return self._started, self._reports[count:]


def train_on_ranks(
    stage: str,
    train: Callable[[Any, Any, Callable[[int, Mapping[str, float]], None]], None],
    job: Any,
    resources: Resources,
    cfg: ClusterConfig,
    logs: Path,
    on_report: Callable[[int, Mapping[str, float]], None],
) -> None:
    """Runs `train(ranks, job, report)` on every rank; `on_report` is called here, in this thread.

    `fit` runs in a thread of its own: in the main thread it would leave a signal handler installed that later turns
    Ctrl-C into a clean exit without clean-up.
    """
    mailbox = spawn(Mailbox, "mailbox", logs / f"{stage}-mailbox.log", Resources(num_cpus=0.0))
    trainer = TorchTrainer(
        _on_rank,
        train_loop_config={
            "stage": stage,
            # Put away, so that Ray Train's controller does not load what only ranks need.
            "work": ray.put((train, job)),
            "mailbox": mailbox.actor,
            "logs": str(logs),
            "threads": resources.threads,
        },
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if resources.num_gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.num_gpus > 0,
            resources_per_worker=reserved(resources) | set_apart(stage),
        ),
        run_config=RunConfig(
            name=stage, storage_path=str(logs / "ray_train"), worker_runtime_env={"env_vars": environment(resources)}
        ),
    )
    failure: list[BaseException] = []
    fitting = threading.Thread(target=_fit, args=(trainer, failure), daemon=True, name=f"{stage}-fit")
    fitting.start()
    _follow(fitting, mailbox.actor, cfg, stage, on_report)
    ray.kill(mailbox.actor)
    if failure:
        raise WorkerError(f"stage {stage} failed: {cause_of(failure[0])}") from failure[0]


def _on_rank(config: dict[str, Any]) -> None:
    """Runs inside Ray Train's worker process."""
    import torch

    from rlhf_cluster.engine.ranks import adopt_ranks
    from rlhf_cluster.telemetry.quiet import log_to_file, quiet_libraries

    rank = ray.train.get_context().get_world_rank()
    quiet_libraries()
    log_to_file(Path(config["logs"]) / f"{config['stage']}-{rank}.log")
    torch.set_num_threads(config["threads"])

    def report(step: int, metrics: Mapping[str, float]) -> None:
        config["mailbox"].put.remote(step, dict(metrics))

    train, job = get(config["work"], Call("object store", "job"), 300)
    ranks = adopt_ranks()
    config["mailbox"].start.remote()
    train(ranks, job, report)


def _fit(trainer: TorchTrainer, failure: list[BaseException]) -> None:
    try:
        trainer.fit()
    except BaseException as error:  # handed to the thread that waits, which raises it
        failure.append(error)


def _follow(
    fitting: threading.Thread,
    mailbox: Any,
    cfg: ClusterConfig,
    stage: str,
    on_report: Callable[[int, Mapping[str, float]], None],
) -> None:
    """Passes reports on until the fit ends. Ranks must start within `start_timeout_s`, each report must come within
    `call_timeout_s`."""
    seen, started, last = 0, 0, time.monotonic()
    while True:
        running = fitting.is_alive()
        joined, fresh = get(mailbox.since.remote(seen), Call("mailbox", "since"), cfg.call_timeout_s)
        for step, metrics in fresh:
            on_report(step, metrics)
        seen += len(fresh)
        if fresh or joined > started:
            last = time.monotonic()
        started = joined
        if not running:
            return
        limit = cfg.call_timeout_s if started else cfg.start_timeout_s
        if time.monotonic() - last > limit:
            raise WorkerError(
                f"stage {stage} made no progress for {limit:g} s, {started} ranks started, {seen} steps reported"
            )
        fitting.join(POLL_S)


def cause_of(error: BaseException) -> str:
    """What went wrong on the first rank that failed, in one line, out of Ray Train's nested report."""
    if memory := out_of_memory(error):
        return memory
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.endswith("Error Snippet]:")]
    return next((line for line in reversed(told) if "Error" in line), told[-1] if told else repr(error))
