"""A Python function as a reward, in a process of its own: one that hangs or dies is replaced, and costs its samples."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from rlhf_cluster.scoring.function_process import READY, SCORES, FunctionSpec
from rlhf_cluster.scoring.samples import Answer, CallFailed, Sample

START_S = 120.0  # at most, to import what the function's module imports


class FunctionLoadError(ValueError):
    """A function that cannot be loaded, in its own words."""


class FunctionCall:
    """Calls the function with a deadline. The process starts with the first call, or with `start`."""

    def __init__(self, spec: FunctionSpec, start_s: float = START_S) -> None:
        self._spec, self._start_s = spec, start_s
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Connection | None = None
        self._finalizer: Callable[[], object] = lambda: None

    def start(self) -> None:
        """Raises FunctionLoadError."""
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "rlhf_cluster.scoring.function_process"]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # what the function starts belongs to the same group, and ends with it
            )
        self._channel = Connection(ours.detach())
        self._finalizer = weakref.finalize(self, _end, self._process, self._channel)
        try:
            what, value = self._ask(self._spec, self._start_s)
        except CallFailed as error:
            raise FunctionLoadError(str(error)) from error
        if what != READY:
            self.close()
            raise FunctionLoadError(value)

    def __call__(self, samples: Sequence[Sample], deadline_s: float) -> Sequence[Answer]:
        if self._process is None:
            try:
                self.start()
            except FunctionLoadError as error:
                raise CallFailed(str(error)) from error
        what, value = self._ask(list(samples), deadline_s)
        if what != SCORES:
            raise CallFailed(value)
        return value  # type: ignore[no-any-return]

    def close(self) -> None:
        """Ends the process."""
        self._finalizer()
        self._process = self._channel = None

    def _ask(self, message: Any, deadline_s: float) -> tuple[str, Any]:
        """The answer to a message; without one in time the process is ended."""
        assert self._process is not None and self._channel is not None
        try:
            self._channel.send(message)
            if self._channel.poll(deadline_s):
                return self._channel.recv()  # type: ignore[no-any-return]
            failure = f"it gave no answer within {deadline_s:g} s"
        except (OSError, EOFError):
            failure = f"its process ended{self._exit_code()}"
        self.close()
        raise CallFailed(failure)

    def _exit_code(self) -> str:
        """Unknown where the process closed its channel and lives on, as with a thread that does not end."""
        assert self._process is not None
        try:
            return f" with code {self._process.wait(5.0)}"
        except subprocess.TimeoutExpired:
            return " its answers, but not itself"


def _end(process: subprocess.Popen[bytes], channel: Connection) -> None:
    channel.close()
    with suppress(ProcessLookupError):  # it ended by itself and left nothing behind
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
