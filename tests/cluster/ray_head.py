"""A head node of its own for the tests: `ray start --head` with a token that nothing else on the machine knows."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_DEADLINE_S = 120.0


@dataclass(frozen=True)
class Head:
    """Where a head node answers: its dashboard for jobs, its GCS for drivers."""

    address: str
    gcs: str
    token: str


def free_ports(count: int) -> list[int]:
    """All held at once, so that no two are the same."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@contextmanager
def started_head(num_cpus: int, **given: str) -> Iterator[Head]:
    """`ray start --head --block` in a session of its own, ended with all its processes; jobs see the variables
    `given`."""
    gcs, dashboard, agent, metrics, client = free_ports(5)
    token = secrets.token_hex(32)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as temp_dir:  # Ray's socket paths must be short
        environment = {
            **os.environ,
            **given,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
            environment.pop(name, None)
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--num-cpus={num_cpus}"),
            *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--disable-usage-stats"),
            *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            *(f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}"),
            *(f"--temp-dir={temp_dir}", f"--object-store-memory={100 << 20}"),
        ]
        with Path(temp_dir, "start.log").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{dashboard}"
            _await_dashboard(address, process, Path(temp_dir, "start.log"))
            yield Head(address, f"127.0.0.1:{gcs}", token)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=90)
            finally:
                _end_session(process.pid)


def _await_dashboard(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while not _answers(address):
        assert process.poll() is None, f"ray start ended: {log.read_text()}"
        assert time.monotonic() < deadline, f"no dashboard after {START_DEADLINE_S} s: {log.read_text()}"
        time.sleep(0.5)


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=2)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _end_session(session: int) -> None:
    """Kills what is left of the session that the head node was started in."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                os.kill(int(stat.parent.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended by itself meanwhile
