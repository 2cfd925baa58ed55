"""What the pipeline decides before and around the stages; the stages themselves run in the cluster tests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_cluster import pipeline
from rlhf_cluster.cluster.starter import Attempt, Starter
from rlhf_cluster.config import ConfigError, load
from rlhf_cluster.evaluation.heldout import HeldOutError
from rlhf_cluster.inputs import load_inputs
from rlhf_cluster.pipeline import runner, supervised
from rlhf_cluster.pipeline.supervised import selection_prompts
from rlhf_cluster.records import Demonstrations, Pretraining, Prompts
from rlhf_cluster.storage.run_directory import RunDirectory, RunLayout
from rlhf_cluster.weights.snapshot import store_directory


def test_runs_of_one_name_in_two_directories_share_no_memory(tmp_path: Path) -> None:
    names = [RunLayout(tmp_path / place).unique_name("smoke") for place in ("a", "b", "a")]
    assert names[0] == names[2] != names[1]
    assert store_directory(names[0], 1).name.startswith("rlhf-cluster-smoke-")


def test_a_run_that_the_cluster_cannot_hold_leaves_its_directory_free(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Corrected, the same command must not be told of another run's config."""

    @contextmanager
    def too_small(*_: Any) -> Iterator[None]:
        raise ConfigError("stage ppo asks for more than the cluster has")
        yield

    monkeypatch.setattr(runner, "ray_session", too_small)
    monkeypatch.setenv("RLHF_CLUSTER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="asks for more"):
        pipeline.run(load(["recipe=smoke", f"dir={tmp_path / 'run'}"]), [])
    assert not RunLayout(tmp_path / "run").holds_run


def test_a_policy_named_from_here_is_found_from_everywhere(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train's workers stand in a directory of their own."""
    monkeypatch.chdir(tiny.parent)
    given = load(["recipe=smoke", "stages=[rm]", f"policy_path={tiny.name}"])
    assert load_inputs(given).base_path == tiny.resolve()


def test_rewards_named_from_here_are_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a cluster that was there before stand where it was started."""
    given: list[Any] = []
    monkeypatch.setattr(Starter, "crew", lambda starter, role, resources, hiring: given.append(hiring.arguments(0)[0]))
    monkeypatch.chdir(tmp_path)
    cfg = load(["recipe=smoke", "reward.parts=[{kind: function, path: mine.py:score}]", "reward.path=rm"])
    Starter(cfg, Attempt("run", 1, tmp_path)).reward_crew(tmp_path, None)
    (reward,) = given
    assert (reward.path, reward.parts[0].path) == (f"{tmp_path}/rm", f"{tmp_path}/mine.py:score")
    assert (cfg.reward.path, cfg.reward.parts[0].path) == ("rm", "mine.py:score")


def test_epochs_are_told_apart_on_prompts_that_judge_nothing_and_that_nobody_answered() -> None:
    names = {"prompts": list("abcdef"), "heldout_prompts": list("uvwxyz")}
    given = {kind: Prompts.of({"prompt_id": ids, "prompt_ids": [[1]] * 6}) for kind, ids in names.items()}
    shown = Demonstrations.of({"prompt_id": list("abcx"), "prompt_ids": [[1]] * 4, "response_ids": [[2]] * 4})
    inputs: Any = SimpleNamespace(**given, demonstrations=shown)

    def chosen(*overrides: str) -> list[str]:
        return selection_prompts(inputs, load(["recipe=smoke", *overrides])).prompt_id

    assert chosen("sft.select_prompts=3") == ["d", "e", "f"]
    assert set(chosen("sft.select_prompts=4")) > {"d", "e", "f"}
    alone = [set(chosen("stages=[sft]", "sft.select_prompts=2", f"seed={seed}")) for seed in (0, 1)]
    assert all(found < set("uvwyz") for found in alone) and alone[0] != alone[1]
    assert chosen() == names["prompts"]  # 64 where there are as many


def test_the_epoch_of_the_highest_score_goes_on_and_outlives_a_reward_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {"epoch-1": 0.5, "epoch-2": math.nan, "epoch-3": -1.0}
    trained, said = [], []

    async def mean_score(run: Any, prompts: Any, policy: Path) -> float:
        if math.isnan(score := scores[policy.name]):
            raise HeldOutError("the server is down")
        return score

    def on_ranks(stage: str, train: Any, job: Any, resources: Any) -> None:
        trained.append(stage)
        for epoch in (1, 2, 3):
            job.epoch_output(epoch).mkdir()
            (job.epoch_output(epoch) / "config.json").write_text(str(epoch))

    monkeypatch.setattr(supervised, "_mean_score", mean_score)
    cfg = load(["recipe=smoke", "sft.select=reward", "sft.epochs=3", "reward=random"])
    empty = Prompts.of({"prompt_id": ["a"], "prompt_ids": [[1]]})
    shown = Demonstrations.of({"prompt_id": ["b"], "prompt_ids": [[1]], "response_ids": [[2]]})
    inputs = SimpleNamespace(prompts=empty, demonstrations=shown, pretraining=Pretraining.empty(), base_path=tmp_path)
    metrics = SimpleNamespace(cut=lambda *_: None, log=lambda stage, step, told: said.append((step, told)))
    with RunDirectory(tmp_path / "run") as directory:
        directory.begin_attempt()
        run: Any = SimpleNamespace(cfg=cfg, inputs=inputs, directory=directory, metrics=metrics, on_ranks=on_ranks)
        run.output, run.progress = directory.stage_output, SimpleNamespace(note=lambda sentence: None)
        with pytest.raises(HeldOutError):
            supervised.run_sft(run)
        assert directory.stage_output("sft") is None
        scores["epoch-2"] = 0.75
        supervised.run_sft(run)
        policy = directory.stage_output("sft")
        assert policy is not None and (policy / "policy" / "config.json").read_text() == "2"
        assert trained == ["sft"] and said == [(n, {"sft/selection_score": scores[f"epoch-{n}"]}) for n in (1, 2, 3)]
        assert directory.stage_output(supervised.EPOCHS) is None
