"""What the pipeline decides before and around the stages; the stages themselves run in the cluster tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf_cluster import pipeline
from rlhf_cluster.config import ConfigError, load
from rlhf_cluster.inputs import load_inputs
from rlhf_cluster.pipeline import runner
from rlhf_cluster.storage.run_directory import RunLayout
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
