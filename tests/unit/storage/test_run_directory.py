"""A run's directory: its tree, its attempts, its one driver, and stages that are finished or not there."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf_cluster.storage.durable import StorageError
from rlhf_cluster.storage.run_directory import DONE, RunDirectory, RunLayout

KILLED_IN_STAGE = """
import os, pathlib, signal, sys
from rlhf_cluster.storage.run_directory import RunDirectory
with RunDirectory(pathlib.Path(sys.argv[1])) as run, run.commit_stage("rm") as temp:
    (temp / "model").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write_half(run: RunDirectory, stage: str, error: type[BaseException]) -> None:
    with run.commit_stage(stage) as temp:
        (temp / "half").write_text("x")
        raise error


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_the_tree(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "runs" / "a") as run:
        assert names(run.path) == {"config", "checkpoints", "driver.lock", "rollouts", "stages"}
        run.begin_attempt()
        assert run.attempt_logs == run.path / "logs" / "attempt-1"
        assert run.attempt_logs.is_dir()


def test_a_layout_makes_nothing(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path / "a")
    assert layout.stage_output("sft") is None
    assert layout.attempts() == []
    assert not layout.holds_run
    assert not layout.path.exists()


def test_attempts_are_counted_and_a_claim_alone_is_none(tmp_path: Path) -> None:
    for expected in (1, 2, 3):
        with RunDirectory(tmp_path) as run:
            run.begin_attempt()
            assert run.attempt == expected
    (tmp_path / "logs" / "attempt-11").mkdir()
    with RunDirectory(tmp_path) as run:
        assert run.attempts() == [1, 2, 3, 11]
        run.begin_attempt()
        assert run.attempt == 12
        assert run.attempts() == [1, 2, 3, 11, 12]


def test_one_driver(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        with pytest.raises(StorageError, match=f"in use by process {os.getpid()} on "):
            RunDirectory(tmp_path)
        run.begin_attempt()
        assert RunLayout(tmp_path).attempts() == [1]  # readers need no lock
    RunDirectory(tmp_path).close()


def test_config_and_environment(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        assert not run.holds_run
        overrides = ["ppo.kl.coef=0.05", 'name="a: b"', "data.path=ä"]
        run.write_config("seed: 3\n", overrides)
        run.write_environment({"python": "3.11", "cpus": 2, "commit": None})
    assert RunLayout(tmp_path).holds_run
    assert (tmp_path / "config" / "resolved.yaml").read_text() == "seed: 3\n"
    assert yaml.safe_load((tmp_path / "config" / "overrides.yaml").read_text()) == overrides
    assert json.loads((tmp_path / "environment.json").read_text()) == {"python": "3.11", "cpus": 2, "commit": None}
    with RunDirectory(tmp_path) as run:
        run.write_config("seed: 4\n", [])
    assert yaml.safe_load((tmp_path / "config" / "overrides.yaml").read_text()) == []


def test_a_stage_is_finished_or_not_there(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        run.begin_attempt()
        with run.commit_stage("sft") as temp:
            (temp / "policy").mkdir()
            (temp / "policy" / "model").write_text("weights")
            assert run.stage_output("sft") is None
        output = run.stage_output("sft")
        assert output == tmp_path / "stages" / "sft"
        assert (output / "policy" / "model").read_text() == "weights"
        assert json.loads((output / DONE).read_text()) == {"stage": "sft", "attempt": 1}
        for error in (RuntimeError, KeyboardInterrupt):
            for stage in ("sft", "rm"):
                with pytest.raises(error):
                    write_half(run, stage, error)
        assert run.stage_output("rm") is None
        assert names(run.stages) == {"sft"}
    assert (RunLayout(tmp_path).stage_output("sft") or tmp_path) == output


def test_a_stage_done_again_replaces_its_output(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        for text in ("one", "two"):
            with run.commit_stage("ppo") as temp:
                (temp / "f").write_text(text)
        assert (run.stages / "ppo" / "f").read_text() == "two"
        assert names(run.stages) == {"ppo"}


def test_an_output_of_which_nothing_arrived_is_none(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        shared = pytest.raises(StorageError, match=r"nothing of stage rm arrived .* storage that all nodes share")
        with shared, run.commit_stage("rm") as temp:
            (temp / "reward_model").mkdir()
        assert run.stage_output("rm") is None
        assert names(run.stages) == set()


def test_without_its_mark_a_directory_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "stages" / "sft").mkdir(parents=True)
    assert RunLayout(tmp_path).stage_output("sft") is None


def test_a_killed_stage_is_swept_by_the_next_driver(tmp_path: Path) -> None:
    child = subprocess.run([sys.executable, "-c", KILLED_IN_STAGE, str(tmp_path)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert len(names(tmp_path / "stages")) == 1
    with RunDirectory(tmp_path) as run:
        assert names(run.stages) == set()
        assert run.stage_output("rm") is None


@pytest.mark.parametrize("name", ["", "..", "a/b", "a.tmp-1"])
def test_refuses_names_that_are_no_stage(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="stage name"):
        RunLayout(tmp_path).stage_output(name)


def test_a_full_disk_in_a_stage(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        with pytest.raises(StorageError, match="could not take the output of stage sft"), run.commit_stage("sft"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert names(run.stages) == set()


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        RunDirectory(tmp_path / "file")
    with pytest.raises(StorageError, match="cannot be made"):
        RunDirectory(tmp_path / "file" / "run")


def test_a_directory_with_files_of_no_run_is_left_alone(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name).write_text("mine")
    with pytest.raises(StorageError, match=r"holds files that are of no run \(a, b, c, \.\.\.\); name a new directory"):
        RunDirectory(tmp_path)
    assert names(tmp_path) == set("abcd")
    begun = tmp_path / "begun"
    with RunDirectory(begun):
        pass
    (begun / "notes").write_text("mine")
    RunDirectory(begun).close()
