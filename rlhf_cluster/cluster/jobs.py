"""A run as a Ray job: send its resolved config to a head node, follow it, ask after it, stop it.

Takes the config as text and the address of the head node's dashboard (http://HOST:8265). The package itself is expected
to be installed on the cluster; only the config travels. Knows nothing of what is in the config.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from rlhf_cluster.interrupts import run_async

RESOLVED_CONFIG = "resolved.yaml"
RUN_FROM_CONFIG = ("python", "-m", "rlhf_cluster.cli", "run", "--config", RESOLVED_CONFIG)

JOB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
REQUEST_DEADLINE_S = 60.0  # one answer of the head node; the first job on a node waits for its agent
END_DEADLINE_S = 90.0  # from a job's last log line, or from `stop`, to its final state
STOP_WAIT_S = 60  # what a stopped driver has to end its workers; Ray's own 3 s are too few
SILENCE_S = 20.0  # without a log line for so long, the head node is asked whether the job still runs
POLL_S = 0.5
RECONNECTS = 5  # lost log streams in a row that are taken up again

STOPPED_BY_HAND = 130


class JobError(RuntimeError):
    """The head node cannot be reached, refuses, or does not know the job."""


def submit(
    resolved_yaml: str, address: str, submission_id: str = "", entrypoint: Sequence[str] = RUN_FROM_CONFIG
) -> str:
    """Starts a run of `resolved_yaml` on the cluster; returns the job's id.

    The job's working directory holds that one file and is thrown away by Ray, so paths in the config must be absolute.
    Raises JobError, also when `submission_id` is taken.
    """
    if submission_id and not JOB_ID.fullmatch(submission_id):
        raise JobError(f"--id {submission_id}: only letters, digits, ., _ and -, since files are named after it")
    client = _connect(address)
    with tempfile.TemporaryDirectory(prefix="rlhf-cluster-job-") as working_dir, _clear_errors(address, submission_id):
        Path(working_dir, RESOLVED_CONFIG).write_text(resolved_yaml)
        return str(
            client.submit_job(
                entrypoint=shlex.join(entrypoint),
                submission_id=submission_id or None,
                runtime_env={
                    "working_dir": working_dir,
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), "PYTHONUNBUFFERED": "1"},
                },
            )
        )


def status(job_id: str, address: str) -> str:
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED, and what Ray says of it."""
    details = _details(_connect(address), job_id, address)
    return f"{details.status.value}: {details.message}" if details.message else details.status.value


def logs(job_id: str, address: str) -> str:
    """Everything that the job has printed so far."""
    client = _connect(address)
    with _clear_errors(address, job_id):
        return str(client.get_job_logs(job_id))


def stop(job_id: str, address: str) -> str:
    """Asks the driver to end (SIGTERM, then SIGKILL after `STOP_WAIT_S`) and returns the job's final state."""
    client = _connect(address)
    with _clear_errors(address, job_id):
        client.stop_job(job_id)
    return _await_end(client, job_id, address).status.value


def follow(job_id: str, address: str, write: Callable[[str], Any] = sys.stdout.write) -> int:
    """Passes the job's output to `write` until it ends; returns the driver's exit code.

    A driver killed by signal N gives 128 + N, a stopped job 130, one that never started 1 (and its reason is written).
    """
    client = _connect(address)
    _details(client, job_id, address)
    run_async(lambda: _tail(client, job_id, address, write))
    return _exit_code(_await_end(client, job_id, address), write)


async def _tail(client: _Client, job_id: str, address: str, write: Callable[[str], Any]) -> None:
    """Each new stream begins with the log's first line: what was written already is skipped."""
    written, lost = 0, 0
    while True:
        position = 0
        try:
            async for chunk in _chunks(client, job_id, address):
                write(chunk[max(0, written - position) :])
                position += len(chunk)
                written, lost = max(written, position), 0
        except (RuntimeError, aiohttp.ClientError) as error:
            lost += 1
            if lost > RECONNECTS:
                raise JobError(f"the log of job {job_id} at {address} broke off {lost} times: {error}") from error
        if (await asyncio.to_thread(_details, client, job_id, address)).status.is_terminal():
            return
        await asyncio.sleep(POLL_S)


async def _chunks(client: _Client, job_id: str, address: str) -> AsyncIterator[str]:
    """The log as it grows. Ends also when the job did: a half-open connection is silent for ever."""
    stream = client.tail_job_logs(job_id)
    while True:
        upcoming = asyncio.ensure_future(anext(stream, None))
        try:
            while not (await asyncio.wait({upcoming}, timeout=SILENCE_S))[0]:
                if (await asyncio.to_thread(_details, client, job_id, address)).status.is_terminal():
                    return
        finally:
            upcoming.cancel()
        if (chunk := upcoming.result()) is None:
            return
        yield chunk


def _await_end(client: _Client, job_id: str, address: str) -> JobDetails:
    deadline = time.monotonic() + END_DEADLINE_S
    while not (details := _details(client, job_id, address)).status.is_terminal():
        if time.monotonic() > deadline:
            raise JobError(f"job {job_id} at {address} is still {details.status.value} after {END_DEADLINE_S:g} s")
        time.sleep(POLL_S)
    return details


def _exit_code(details: JobDetails, write: Callable[[str], Any]) -> int:
    code = details.driver_exit_code
    if details.status == JobStatus.STOPPED:
        return STOPPED_BY_HAND
    if details.status == JobStatus.FAILED and code is None:
        write(f"{details.message}\n")
    if code is None:
        return 0 if details.status == JobStatus.SUCCEEDED else 1
    return code if code >= 0 else 128 - code


# --- the head node


class _Client(JobSubmissionClient):
    """Ray's client with a deadline on every request: its own would wait for ever on a host that swallows packets."""

    def _do_request(self, *args: Any, **kwargs: Any) -> requests.Response:
        return super()._do_request(*args, timeout=REQUEST_DEADLINE_S, **kwargs)


def _connect(address: str) -> _Client:
    if not address.startswith(("http://", "https://")):
        raise JobError(f"{address!r} is not the address of a head node's dashboard; give http://HOST:8265")
    with _clear_errors(address):
        return _Client(address, headers=_authorization())


def _authorization() -> dict[str, str]:
    """The token that is set, sent whether or not Ray's authentication is switched on for this process."""
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    if not token and path:
        if not Path(path).is_file():
            raise JobError(f"RAY_AUTH_TOKEN_PATH={path} is not a file; it must hold the cluster's token")
        token = Path(path).read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _details(client: _Client, job_id: str, address: str) -> JobDetails:
    with _clear_errors(address, job_id):
        return client.get_job_info(job_id)


@contextmanager
def _clear_errors(address: str, job_id: str = "") -> Iterator[None]:
    """Ray's client raises bare RuntimeErrors with the status in the text, and its own ConnectionError."""
    try:
        yield
    except AuthenticationError as error:
        given = "the token was not accepted" if _authorization() else "no token was given"
        raise JobError(
            f"{address} asks for a token and {given}; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's"
        ) from error
    except requests.exceptions.Timeout as error:
        raise JobError(f"{address} did not answer within {REQUEST_DEADLINE_S:g} s; is it the head node?") from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise JobError(
            f"{address} cannot be reached; is the head node up and its dashboard port open? ({error})"
        ) from error
    except RuntimeError as error:
        if "status code 404" in str(error):
            raise JobError(f"{address} knows no job {job_id!r}; `rlhf-cluster submit` prints a job's id") from error
        if "already exists" in str(error):
            raise JobError(f"{address} has a job {job_id!r} already; choose another submission id") from error
        if "No available agent" in str(error):
            raise JobError(
                f"{address} has no agent that could start a job; where another Ray runs on that machine, give the head "
                "node a port of its own: ray start --dashboard-agent-listen-port"
            ) from error
        raise JobError(f"{address} refused: {str(error).splitlines()[0]}") from error
