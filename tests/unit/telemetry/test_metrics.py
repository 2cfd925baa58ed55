from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlhf_cluster.telemetry.metrics import JsonlSink, MetricError, MetricsLog, MetricsRecord, read_metrics


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ListSink:
    def __init__(self) -> None:
        self.records: list[MetricsRecord] = []
        self.cuts: list[tuple[str, int]] = []
        self.closed = False

    def write(self, record: MetricsRecord) -> None:
        self.records.append(record)

    def cut(self, stage: str, after_step: int) -> None:
        self.cuts.append((stage, after_step))

    def close(self) -> None:
        self.closed = True


def test_every_sink_gets_the_record_with_the_run_s_seconds() -> None:
    clock, one, two = Clock(), ListSink(), ListSink()
    with MetricsLog([one, two], warn=pytest.fail, elapsed=100.0, clock=clock, wall=lambda: 7.0) as log:
        clock.now = 2.5
        log.log("ppo", 3, {"objective/kl": 1})
        log.cut("ppo", 2)
    assert one.records == two.records == [MetricsRecord("ppo", 3, 102.5, 7.0, {"objective/kl": 1.0})]
    assert one.cuts == [("ppo", 2)]
    assert one.closed
    assert two.closed


@pytest.mark.parametrize(("first", "second"), [("a/b", "a/b/c"), ("a/b/c", "a/b"), ("a", "a/b/c"), ("a/b/c", "a")])
def test_a_number_beside_a_folder_of_its_name_is_refused(first: str, second: str) -> None:
    sink = ListSink()
    log = MetricsLog([sink], warn=pytest.fail)
    log.log("ppo", 1, {first: 1.0})
    with pytest.raises(MetricError, match="folder"):
        log.log("ppo", 2, {second: 1.0})
    with pytest.raises(MetricError, match="folder"):
        MetricsLog([sink], warn=pytest.fail).log("ppo", 1, {first: 1.0, second: 1.0})
    assert len(sink.records) == 1


def test_names_that_only_begin_alike_are_fine() -> None:
    MetricsLog([], warn=pytest.fail).log("ppo", 1, {"a/b": 1.0, "a/bc": 1.0, "a/b_c/d": 1.0, "a/c/d": 1.0})


@pytest.mark.parametrize("metrics", [{"a b": 1.0}, {"/a": 1.0}, {"a/": 1.0}, {"": 1.0}, {"a": "1"}, {"a": None}])
def test_bad_names_and_values_are_refused(metrics: dict[str, float]) -> None:
    with pytest.raises(MetricError):
        MetricsLog([], warn=pytest.fail).log("ppo", 1, metrics)


def test_not_finite_is_null_counted_and_warned_of_once_per_name(tmp_path: Path) -> None:
    warned: list[str] = []
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog([JsonlSink(path)], warned.append)
    for step, value in enumerate([math.nan, 1.0, math.inf, -math.inf], 1):
        log.log("ppo", step, {"actor/pg_loss": value})
    assert [json.loads(line)["metrics"]["actor/pg_loss"] for line in path.read_text().splitlines()] == [
        None,
        1.0,
        None,
        None,
    ]
    assert log.non_finite == {"actor/pg_loss": 3}
    assert len(warned) == 1
    assert "nan at step 1 of ppo" in warned[0]
    log.close()
    assert warned[1:] == ["actor/pg_loss was not finite 3 times in this attempt"]


def fill(path: Path, steps: list[tuple[str, int]]) -> None:
    sink = JsonlSink(path)
    for i, (stage, step) in enumerate(steps):
        sink.write(MetricsRecord(stage, step, float(i), 0.0, {"x": 1.0}))
    sink.close()


def steps_of(path: Path) -> list[tuple[str, int]]:
    return [(record.stage, record.step) for record in read_metrics(path)]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(MetricsRecord("sft", 1, 1.0, 2.0, {"sft/loss": 3.0}))
    line = {"stage": "sft", "step": 1, "seconds": 1.0, "time": 2.0, "metrics": {"sft/loss": 3.0}}
    assert [json.loads(text) for text in path.read_text().splitlines()] == [line]


def test_cut_keeps_the_committed_and_all_before_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, [("rm", 1), ("rm", 2), ("ppo", 1), ("ppo", 2), ("ppo", 3), ("eval", 3)])
    sink = JsonlSink(path)
    sink.cut("ppo", 2)
    sink.write(MetricsRecord("ppo", 3, 9.0, 0.0, {}))
    sink.close()
    assert steps_of(path) == [("rm", 1), ("rm", 2), ("ppo", 1), ("ppo", 2), ("ppo", 3)]
    assert read_metrics(path)[-1].seconds == 9.0


def test_cut_past_the_end_changes_nothing_and_cut_at_zero_drops_the_stage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, [("rm", 1), ("ppo", 1)])
    sink = JsonlSink(path)
    sink.cut("ppo", 1)
    assert steps_of(path) == [("rm", 1), ("ppo", 1)]
    sink.cut("ppo", 0)
    assert steps_of(path) == [("rm", 1)]
    assert sink.elapsed() == 0.0  # the record that is left was written at second 0


def test_a_torn_last_line_goes_and_elapsed_is_the_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, [("ppo", 1), ("ppo", 2)])
    with path.open("a") as file:
        file.write('{"stage": "ppo", "st')
    assert steps_of(path) == [("ppo", 1), ("ppo", 2)]
    sink = JsonlSink(path)
    assert sink.elapsed() == 1.0
    sink.write(MetricsRecord("ppo", 3, 5.0, 0.0, {}))
    assert steps_of(path) == [("ppo", 1), ("ppo", 2), ("ppo", 3)]


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "ppo"}\n')
    with pytest.raises(MetricError, match="line 1"):
        read_metrics(path)
