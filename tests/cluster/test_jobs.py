"""Ray jobs against a real head node with token authentication: submit, follow, stop, and every refusal."""

from __future__ import annotations

import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from ray_head import Head, free_ports

from rlhf_cluster.cluster import jobs


@pytest.fixture(autouse=True)
def token(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_the_config_arrives_the_log_is_followed_and_the_exit_code_returns(head: Head) -> None:
    code = "import sys; print(open('resolved.yaml').read()); print('two  words \"quoted\"'); sys.exit(3)"
    job = jobs.submit("ppo:\n  steps: 7\n", head.address, "follow-me", entrypoint=python(code))
    assert job == "follow-me"
    written: list[str] = []
    assert jobs.follow(job, head.address, written.append) == 3
    assert "ppo:\n  steps: 7\n" in "".join(written)
    assert 'two  words "quoted"' in "".join(written)
    assert jobs.status(job, head.address).startswith("FAILED")
    assert "".join(written).strip() in jobs.logs(job, head.address)


def test_a_silent_job_is_followed_to_its_end(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "SILENCE_S", 0.2)
    job = jobs.submit("", head.address, entrypoint=python("import time; time.sleep(3); print('late')"))
    written: list[str] = []
    assert jobs.follow(job, head.address, written.append) == 0
    assert "".join(written).count("late") == 1


def test_a_stopped_driver_has_time_to_finish_what_it_does(head: Head) -> None:
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n    time.sleep(5); print('checkpoint written', flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('started', flush=True)\n"
        "while True: time.sleep(0.1)"
    )
    job = jobs.submit("", head.address, entrypoint=python(code))
    deadline = time.monotonic() + 60
    while "started" not in jobs.logs(job, head.address):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert jobs.status(job, head.address).startswith("RUNNING")
    assert jobs.stop(job, head.address) == "STOPPED"
    assert "checkpoint written" in jobs.logs(job, head.address)
    assert jobs.follow(job, head.address, lambda _: None) == jobs.STOPPED_BY_HAND


def test_an_id_is_taken_once(head: Head) -> None:
    jobs.submit("", head.address, "once", entrypoint=("true",))
    with pytest.raises(jobs.JobError, match="has a job 'once' already"):
        jobs.submit("", head.address, "once", entrypoint=("true",))


def test_an_unknown_job_is_named(head: Head) -> None:
    for ask in (jobs.status, jobs.logs, jobs.stop, jobs.follow):
        with pytest.raises(jobs.JobError, match="knows no job 'nobody'"):
            ask("nobody", head.address)


def test_without_a_token_or_with_another_the_head_node_answers_401_or_403(
    head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=10)
    assert refused.value.code == 401
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    with pytest.raises(jobs.JobError, match="the token was not accepted"):
        jobs.submit("", head.address)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(jobs.JobError, match="no token was given; set RAY_AUTH_TOKEN"):
        jobs.submit("", head.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(jobs.JobError, match="is not a file"):
        jobs.submit("", head.address)


def test_a_token_file_is_read(head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{head.token}\n")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(jobs.JobError, match="knows no job"):
        jobs.status("nobody", head.address)


def test_an_address_where_nobody_listens_is_named() -> None:
    (port,) = free_ports(1)
    with pytest.raises(jobs.JobError, match=f"127.0.0.1:{port} cannot be reached"):
        jobs.submit("", f"http://127.0.0.1:{port}")


def test_an_address_of_another_kind_is_refused() -> None:
    with pytest.raises(jobs.JobError, match="give http://HOST:8265"):
        jobs.submit("", "head:6379")
