"""The command line as a person uses it: real processes, their output, Ctrl-C, and what they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

COMMAND = str(Path(sys.executable).parent / "rlhf-cluster")
TAG = "RLHF_CLUSTER_TEST_COMMAND"  # every process that a command starts inherits it, whatever session it moves to
GONE_WITHIN_S = 20.0  # an idle worker of Ray notices within seconds that its node is gone


@dataclass(frozen=True)
class Ended:
    """How a command ended, and all that it said."""

    code: int
    out: str
    err: str


@dataclass
class Started:
    """A command that runs, in a process group of its own as under a shell."""

    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)

    def until(self, words: str) -> None:
        """Reads on until a line of the output holds `words`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if words in line:
                return
        raise AssertionError(f"{words!r} was never said; it ended with: {''.join(self.said)}{self._errors()}")

    def interrupt(self) -> None:
        """Ctrl-C: the terminal sends SIGINT to the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def terminate(self) -> None:
        """SIGTERM to the whole group."""
        os.killpg(self.process.pid, signal.SIGTERM)

    def end(self) -> Ended:
        assert self.process.stdout is not None
        self.said.extend(self.process.stdout)
        errors = self._errors()
        return Ended(self.process.wait(), "".join(self.said), errors)

    def _errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()


def _heed_ctrl_c() -> None:
    """A shell starts background jobs with SIGINT ignored, which would pass from the tests to their commands."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class User:
    """Types `rlhf-cluster ...`; `environment` is added to this process's own."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._tag = uuid.uuid4().hex
        self._environment = {**os.environ, **environment, TAG: self._tag}

    @contextmanager
    def starts(
        self, *arguments: str, deadline_s: float = 400, before: Sequence[str] = (), **environment: str
    ) -> Iterator[Started]:
        """A running command; killed, so that its output ends, when it is still there after `deadline_s`."""
        process = subprocess.Popen(
            [*before, COMMAND, *arguments],
            env=self._environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_heed_ctrl_c,
        )
        watchdog = threading.Timer(deadline_s, process.kill)
        watchdog.start()
        try:
            yield Started(process)
        finally:
            watchdog.cancel()
            process.kill()
            process.communicate()

    def types(self, *arguments: str, deadline_s: float = 400, before: Sequence[str] = (), **environment: str) -> Ended:
        with self.starts(*arguments, deadline_s=deadline_s, before=before, **environment) as command:
            return command.end()

    def talks(self, *arguments: str, lines: str) -> Ended:
        """A command with `lines` piped into it."""
        done = subprocess.run(
            [COMMAND, *arguments], env=self._environment, input=lines, capture_output=True, text=True, timeout=200
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def processes(self, name: str) -> list[int]:
        """Living processes of commands with `name` in their command line."""
        return [process.pid for process in self._processes() if name in " ".join(process.cmdline())]

    def left_behind(self) -> list[str]:
        """Processes of commands that have ended, after a while to end by themselves; they are killed."""
        deadline = time.monotonic() + GONE_WITHIN_S
        while (left := list(self._processes())) and time.monotonic() < deadline:
            time.sleep(0.2)
        described = []
        for process in left:
            described.append(f"{process.pid} {' '.join(process.cmdline())}" if process.is_running() else "")
            process.kill()
        return described

    def _processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                ours = process.environ().get(TAG) == self._tag and process.status() != psutil.STATUS_ZOMBIE
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # it ended meanwhile, or is another user's
            if ours:
                yield process
