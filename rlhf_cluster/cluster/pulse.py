"""Signs of life: a worker answers beside whatever it is at, so that one that hangs is told from one that computes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil
import ray

from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.waits import WorkerSilent, answer, last_lines

LOOK_S = 10.0  # that a look at a process' stack may take
SHOWN = 8  # of its frames, the innermost


@dataclass(frozen=True)
class Pulse:
    """`every_s`: between an answer and the next question; `silence_s`: without an answer the worker is lost."""

    every_s: float = 10.0
    silence_s: float = 60.0
    seen: dict[str, tuple[int, str]] = field(default_factory=dict)  # process and node, by worker

    async def once(self, host: Host) -> tuple[int, str]:
        """Process and node of a worker that lives. Raises WorkerLost."""
        doing = host.activity.doing(host.name) or "pulse"  # what it dies in, if it does
        return await answer(host.actor.pulse.remote(), host.call(doing), self.silence_s)

    async def follow(self, host: Host) -> NoReturn:
        """Until it is lost: raises WorkerDied, or WorkerSilent with where it stands."""
        process, node, last = 0, "", time.monotonic()
        while True:
            try:
                process, node = self.seen[host.name] = await self.once(host)
            except WorkerSilent as error:
                stack = await asyncio.to_thread(where_it_stands, process, node)
                ago = time.monotonic() - last
                raise WorkerSilent(
                    f"{host.name} hangs in `{host.activity.doing(host.name) or 'pulse'}`: its last sign of life was "
                    f"{ago:.0f} s ago (cluster.silence_s={self.silence_s:g}){stack}{last_lines(host.log)}"
                ) from error
            last = time.monotonic()
            await asyncio.sleep(self.every_s)

    def kill(self, host: Host) -> None:
        """Its process and those that it started, where they are on this node."""
        process, node = self.seen.get(host.name, (0, ""))
        if process and node == ray.get_runtime_context().get_node_id():
            with suppress(psutil.NoSuchProcess):
                own = psutil.Process(process)
                for one in [*own.children(recursive=True), own]:
                    one.kill()


def where_it_stands(process: int, node: str) -> str:
    """The innermost frames of its main thread, where it lives on this node; else nothing."""
    if not process or node != ray.get_runtime_context().get_node_id():
        return ""
    command = [str(Path(sys.executable).with_name("py-spy")), "dump", "--nonblocking", "--pid", str(process)]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"; where it stands could not be seen ({error})"
    frames = innermost(told)
    return f"; it stands in {' < '.join(frames)}" if frames else ""


def innermost(dump: str) -> list[str]:
    """Of py-spy's dump, the main thread's frames from within."""
    threads = [block.splitlines() for block in dump.split("\nThread ")[1:]]
    main = next((lines for lines in threads if "MainThread" in lines[0]), threads[0] if threads else [])
    return [line.strip() for line in main[1 : SHOWN + 1]]
