"""Redirection is tried in processes of its own: it concerns the descriptors that the test runner itself writes to."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_cluster.telemetry.quiet import ENVIRONMENT, quiet_libraries

ROOT = Path(__file__).parents[3]
SPEAK = """
import logging, os, subprocess, sys, warnings
def speak(mark):
    print(f"print {mark}")
    print(f"stderr {mark}", file=sys.stderr)
    os.write(1, f"descriptor {mark}\\n".encode())
    subprocess.run([sys.executable, "-c", f"print('child {mark}')"], check=True)
    logging.getLogger("some.library").info(f"logging {mark}")
    warnings.warn(f"warning {mark}")
"""
KINDS = ("print", "stderr", "descriptor", "child", "logging", "warning")


def run(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", SPEAK + code, *argv],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )


def test_a_worker_says_all_to_its_file(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "attempt-2" / "generation-0.log"
    code = """
from pathlib import Path
from rlhf_cluster.telemetry.quiet import log_to_file
log_to_file(Path(sys.argv[1])); speak("one"); raise KeyError("the end")
"""
    done = run(code, str(path))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    said = path.read_text()
    assert [kind for kind in KINDS if f"{kind} one" not in said] == []
    assert "INFO some.library: logging one" in said
    assert "WARNING py.warnings" in said
    assert "KeyError: 'the end'" in said
    assert path == tmp_path / "logs" / "attempt-2" / "generation-0.log"
    run(code, str(path))
    assert path.read_text().count("print one") == 2  # a second life appends


def test_the_driver_keeps_the_terminal_and_gets_it_back(tmp_path: Path) -> None:
    code = """
from pathlib import Path
from rlhf_cluster.telemetry.quiet import driver_log
try:
    with driver_log(Path(sys.argv[1])) as terminal:
        speak("inside"); terminal.write("ours\\n"); raise KeyError("inside")
except KeyError:
    speak("after")
"""
    done = run(code, str(tmp_path / "driver.log"))
    inside = (tmp_path / "driver.log").read_text()
    seen = done.stdout + done.stderr
    assert done.returncode == 0, seen
    assert [kind for kind in KINDS if f"{kind} inside" not in inside] == []
    assert "after" not in inside
    assert "ours\n" in done.stdout
    assert "inside" not in seen
    assert [kind for kind in KINDS if kind != "logging" and f"{kind} after" not in seen] == []


def test_quiet_sets_what_is_unset_and_leaves_the_user_s_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*ENVIRONMENT, "TRANSFORMERS_VERBOSITY", "RAY_LOGGER_LEVEL"]:
        monkeypatch.setenv(name, "")  # so that monkeypatch puts them back
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setattr("warnings.simplefilter", lambda *_: None)
    quiet_libraries(logging.ERROR)
    assert os.environ["TRANSFORMERS_VERBOSITY"] == os.environ["RAY_LOGGER_LEVEL"] == "error"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert "NO_COLOR" not in ENVIRONMENT  # it would take our own colours
    assert {name: os.environ[name] for name in ENVIRONMENT} == dict(ENVIRONMENT)
    assert logging.getLogger("transformers").level == logging.ERROR
