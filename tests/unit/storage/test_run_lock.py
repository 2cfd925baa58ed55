"""The lock of a run directory: one holder, named; gone with its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_cluster.storage.durable import StorageError
from rlhf_cluster.storage.run_lock import RunLock

HOLDER = """
import pathlib, sys, time
from rlhf_cluster.storage.run_lock import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_the_second_is_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "driver.lock"
    lock = RunLock(path)
    with pytest.raises(StorageError, match=rf"{tmp_path} is in use by process {os.getpid()} on ") as caught:
        RunLock(path)
    assert "\n" not in str(caught.value)
    lock.release()
    lock.release()
    RunLock(path).release()


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "driver.lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match=f"process {child.pid} on "):
            RunLock(path)
        child.send_signal(signal.SIGKILL)
        child.wait()
    RunLock(path).release()
    assert path.exists()


def test_a_path_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be locked"):
        RunLock(tmp_path / "absent" / "driver.lock")
