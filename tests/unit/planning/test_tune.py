"""What the metrics of a run are read as, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cluster.config import ConfigError, load, to_yaml
from rlhf_cluster.planning.tune import Tuning, show, tune

IDLE = {"idle/generation": 0.4, "idle/reward": 0.9, "idle/reference": 0.95, "idle/learner": 0.5}
SECONDS = {"timing_s/step": 10.0, "timing_s/update": 3.0, "timing_s/update_weights": 0.5}


def run_dir(path: Path, metrics: dict[str, float], iterations: int = 5, cores: int = 4, *overrides: str) -> Path:
    """A run whose first iteration took a hundred times as long."""
    (path / "config").mkdir(parents=True)
    cfg = load(["recipe=smoke", "generation.resources.workers=2", *overrides], "pipeline")
    (path / "config" / "resolved.yaml").write_text(to_yaml(cfg))
    (path / "environment.json").write_text(json.dumps({"cores": cores}))
    lines = [("sft", 1, {"sft/loss": 1.0}), ("ppo", 0, {"eval/gold": 0.0})]
    lines += [
        ("ppo", step, metrics | {"timing_s/step": 1000.0} if step == 1 else metrics)
        for step in range(1, iterations + 1)
    ]
    with open(path / "metrics.jsonl", "w") as file:
        for stage, step, found in lines:
            file.write(json.dumps({"stage": stage, "step": step, "seconds": 1.0, "time": 1.0, "metrics": found}) + "\n")
    return path


def test_what_was_measured_is_told(tmp_path: Path) -> None:
    found = tune(run_dir(tmp_path / "run", IDLE | SECONDS))
    assert found.step_s == 10.0 and found.bottleneck == "generation"
    assert [(role.name, role.workers, round(role.busy, 2)) for role in found.roles] == [
        ("generation", 2, 0.6),
        ("reward", 1, 0.1),
        ("reference", 1, 0.05),
        ("learner", 1, 0.5),
    ]


def test_to_learn_one_version_behind_is_proposed_to_who_waits_in_turn(tmp_path: Path) -> None:
    """Generation works 2 x 0.6 x 10 s less the load, the learner 5 s: on four cores both fit beside each other."""
    found = tune(run_dir(tmp_path / "run", IDLE | SECONDS))
    best = found.advice[0]
    assert "ppo.max_staleness=1" in best.overrides
    assert best.seconds < 8


def test_a_run_that_is_behind_already_is_not_told_so(tmp_path: Path) -> None:
    found = tune(run_dir(tmp_path / "run", IDLE | SECONDS, 5, 4, "ppo.max_staleness=1"))
    assert all("ppo.max_staleness=1" not in one.overrides for one in found.advice)


def test_more_cores_are_made_use_of(tmp_path: Path) -> None:
    path = run_dir(tmp_path / "run", IDLE | SECONDS)
    few, many = tune(path, cpus=2).advice, tune(path, cpus=16).advice
    assert many[0].seconds < (few[0].seconds if few else 10.0)


def test_a_run_that_has_nothing_to_gain_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that it does is to sample, with all cores."""
    idle = {"idle/generation": 0.01, "idle/reward": 0.99, "idle/reference": 0.99, "idle/learner": 0.99}
    found = tune(run_dir(tmp_path / "run", idle | {"timing_s/step": 10.0, "timing_s/update": 0.01}, cores=2))
    assert found.advice == []
    show(found)
    assert "An iteration takes 10.00 s; generation has least rest. Nothing" in capsys.readouterr().out


def test_responses_that_wait_for_a_place_are_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_dir(tmp_path / "run", IDLE | SECONDS, 5, 4, "generation.max_num_seqs=4", "ppo.batch_size=32")
    found: Tuning = tune(path)
    assert found.advice[-1].overrides == ["generation.max_num_seqs=16"]
    show(found)
    said = " ".join(capsys.readouterr().out.split())
    assert "16 responses come to a worker, which samples 4 at once" in said and "times as fast" in said


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_too_few_iterations_are_refused(tmp_path: Path, iterations: int) -> None:
    path = run_dir(tmp_path / "run", IDLE | SECONDS, iterations)
    count = max(0, iterations - 1)
    with pytest.raises(
        ConfigError, match=rf"has {count} measured iterations of PPO after the first, 3 are needed: run"
    ):
        tune(path)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl: it is not the directory of a run that has begun"):
        tune(tmp_path)
