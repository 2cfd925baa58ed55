from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from rlhf_cluster.config import load, to_yaml
from rlhf_cluster.storage.rollout_log import RolloutLog
from rlhf_cluster.telemetry.incidents import REASONS, SLOWEST, incidents, range_text, steps_text
from rlhf_cluster.telemetry.metrics import MetricsRecord


def test_a_run_without_incidents_has_none(tmp_path: Path) -> None:
    found = incidents([MetricsRecord("ppo", 1, 0.0, 0.0, {"objective/kl": 1.0})], tmp_path / "absent", {})
    assert (found.guardrails, found.failures, found.others, found.slowest) == ((), (), 0, ())


def test_a_guardrail_is_told_with_its_action_and_where_it_was_passed() -> None:
    metrics = [{"guard/kl": 6.0}, {}, {"guard/kl": None, "guard/entropy": 0.1}]
    records = [MetricsRecord("ppo", step, 0.0, 0.0, own) for step, own in enumerate(metrics, 1)]
    rails = yaml.safe_load(to_yaml(load(["ppo.guardrails.kl={limit: 5, action: skip}"])))["ppo"]["guardrails"]
    entropy, kl = incidents(records, Path("absent"), rails).guardrails
    assert (kl.name, kl.action, kl.steps, kl.values) == ("kl", "skip", (1, 3), (6.0, None))
    assert (entropy.name, entropy.action, entropy.steps) == ("entropy", "warn", (3,))
    last = MetricsRecord("ppo", 9, 0.0, 0.0, {"guard/max_skips": 10.0, "guard/not_finite": 1.0})
    skips, not_finite = incidents([last], Path("absent"), rails | {"not_finite": "skip"}).guardrails
    assert (skips.name, skips.action, skips.values) == ("max_skips", "stop", (10.0,))
    assert (not_finite.name, not_finite.action) == ("not_finite", "skip")


def test_the_page_names_the_most_frequent_and_the_slowest_alone(tmp_path: Path) -> None:
    reasons = [f"reason {number:02}" for number in range(REASONS + 2) for _ in range(number + 1)]
    count = len(reasons)
    lost = ["mine: reason 00", *("" if index else "another: reason 01" for index in range(count - 1))]
    columns = {"sample_id": [f"0/p/{index}" for index in range(count)], "reward_failure/mine": reasons, "failure": lost}
    RolloutLog(tmp_path).write(0, pa.table(columns | {"reward_s/mine": [float(index) for index in range(count)]}))
    found = incidents([], tmp_path, {})
    assert [one.count for one in found.failures] == [1, *range(REASONS + 2, 3, -1)], "what cost a sample comes first"
    assert [one.dropped for one in found.failures] == [1, *[0] * (REASONS - 1)]
    assert found.others == 2 + 3
    assert [one.seconds for one in found.slowest] == [float(count - 1 - index) for index in range(SLOWEST)]
    assert found.slowest[0].sample_id == f"0/p/{count - 1}"


@pytest.mark.parametrize(("steps", "text"), [((), ""), ((4,), "4"), ((3, 1, 2, 7, 9, 10), "1-3, 7, 9-10")])
def test_steps_in_few_words(steps: tuple[int, ...], text: str) -> None:
    assert steps_text(steps) == text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((1.0,), "1"),
        ((2.0, 1.0), "1 to 2"),
        ((None,), "not finite"),
        ((2.0, None, 1.0), "1 to 2, not finite"),
        ((math.inf, 3.0), "3, not finite"),
    ],
)
def test_values_from_the_least_to_the_largest(values: tuple[float | None, ...], text: str) -> None:
    assert range_text(values) == text
