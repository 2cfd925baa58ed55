"""Plain workers as Ray actors: a log file, a number of threads, and the few things that only the host process knows."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray

from rlhf_cluster.cluster.waits import Call, answer, answers
from rlhf_cluster.config import Resources
from rlhf_cluster.telemetry.activity import Activity
from rlhf_cluster.telemetry.quiet import log_to_file, quiet_libraries
from rlhf_cluster.telemetry.timer import Timeline

PULSE = "pulse"  # answers on a thread of its own
TRACE = 0.001  # of a node's custom resource: it says where a worker lives, not how many may


@dataclass(frozen=True)
class Host:
    """A worker's handle with its name and its log."""

    name: str
    actor: Any
    log: Path
    activity: Activity = field(default_factory=lambda: Activity(Timeline()))

    def call(self, verb: str) -> Call:
        return Call(self.name, verb, self.log)

    async def ask(self, verb: str, *args: Any, deadline_s: float) -> Any:
        """The answer of one of its verbs."""
        with self.activity.at(self.name, verb):
            return await answer(getattr(self.actor, verb).remote(*args), self.call(verb), deadline_s)

    async def stream(self, verb: str, *args: Any, deadline_s: float) -> AsyncIterator[Any]:
        """The items that a verb yields, each within the deadline."""
        with self.activity.at(self.name, verb):
            items = getattr(self.actor, verb).options(num_returns="streaming").remote(*args)
            async for item in answers(items, self.call(verb), deadline_s):
                yield item


def reserved(resources: Resources) -> dict[str, float]:
    """What Ray sets aside for one worker, by Ray's names; what is not asked for is not in it."""
    asked = {"CPU": resources.num_cpus, "GPU": resources.num_gpus, "memory": float(resources.memory)}
    return {kind: amount for kind, amount in asked.items() if amount}


def set_apart(role: str) -> dict[str, float]:
    """A trace of the custom resource that nodes for `role` bear, where the cluster has such nodes: its workers then go
    there and nowhere else (`deploy/kuberay`). SFT and the reward model train where the learner does."""
    has = ray.cluster_resources()
    names = (role, "learner") if role in ("sft", "rm", "dpo") else (role,)
    return next(({name: TRACE} for name in names if has.get(name)), {})


def environment(resources: Resources) -> dict[str, str]:
    """Variables that a worker process is born with.

    Threads that spin at barriers make processes that share cores ten times slower: idle ones must sleep. Without a GPU
    nothing gains from compilation, and vLLM's first request would wait half a minute for it.
    """
    threads = resources.threads
    on_cpu = {} if resources.num_gpus else {"TORCHDYNAMO_DISABLE": "1"}
    return {
        **on_cpu,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "KMP_BLOCKTIME": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


class Hosted:
    """What every worker process adds to its plain worker; mixed in before it."""

    def __init__(self, log: str, *args: Any, **named: Any) -> None:
        quiet_libraries()
        log_to_file(Path(log))
        super().__init__(*args, **named)

    def ready(self) -> str:
        """Answers once construction is done: with the node that the process lives on."""
        return ray.get_runtime_context().get_node_id()

    @ray.method(concurrency_group=PULSE)
    def pulse(self) -> tuple[int, str]:
        """This process and its node, beside whatever else it is at."""
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def endpoint(self) -> tuple[str, int]:
        """This node's address and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def peak_memory(self) -> int:
        """Bytes: the largest resident sizes so far of this process and its living children, added up."""
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        return sum(_high_water_mark(process.pid) for process in family)


def _high_water_mark(pid: int) -> int:
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def hosted(worker: type) -> type:
    """The worker's class with `Hosted` in front."""
    return worker if issubclass(worker, Hosted) else type(worker.__name__, (Hosted, worker), {})


def spawn(
    worker: type,
    name: str,
    log: Path,
    resources: Resources,
    args: tuple[Any, ...] = (),
    place: Any = None,
    role: str = "",
    activity: Activity | None = None,
) -> Host:
    """Starts one actor, at `place` (Ray's scheduling strategy), on a node for `role` where there are such; returns at
    once. It shares the driver's fate and is
    never restarted behind our back."""
    options: dict[str, Any] = {
        "num_cpus": resources.num_cpus,
        "num_gpus": resources.num_gpus,
        "resources": set_apart(role),
        "max_restarts": 0,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": environment(resources)},
    }
    if resources.memory:
        options["memory"] = resources.memory
    if place is not None:
        options["scheduling_strategy"] = place
    actor = ray.remote(concurrency_groups={PULSE: 1})(hosted(worker)).options(**options).remote(str(log), *args)
    activity = activity or Activity(Timeline())
    activity.know(name)
    return Host(name, actor, log, activity)
