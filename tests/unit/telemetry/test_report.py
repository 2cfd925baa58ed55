from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest

from rlhf_cluster.storage.rollout_log import RolloutLog
from rlhf_cluster.telemetry.activity import Bubbles
from rlhf_cluster.telemetry.calibration import calibration, write_calibration
from rlhf_cluster.telemetry.comparison import ReportError, Sample, compare, gold_of, write_samples
from rlhf_cluster.telemetry.metrics import JsonlSink, MetricsLog, MetricsRecord
from rlhf_cluster.telemetry.report import summaries, write_report
from rlhf_cluster.telemetry.timer import Timeline

ATTACK = "<script>alert('x')</script><img src=http://example.org/a onerror=x> \x1b[31m </p>"


class Tags(HTMLParser):
    """The tags of a page with their attributes, and whether each that opens closes."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def log_run(run_dir: Path) -> None:
    with MetricsLog([JsonlSink(run_dir / "metrics.jsonl")], warn=lambda _: None) as log:
        log.log("sft", 1, {"sft/loss": 2.0})
        log.log("rm", 1, {"rm/loss": 0.7, "rm/accuracy": 0.625, "rm/margin": 0.3})
        for step in (1, 2, 3):
            log.log(
                "ppo",
                step,
                {"objective/scores": 0.1 * step, "objective/kl": 0.5, "timing_s/gen": 2.0, "timing_s/step": 3.0},
            )
        log.log("ppo", 4, {"actor/pg_loss": math.nan, "guard/kl": 5.5})
        log.log("ppo", 5, {"guard/kl": 7.25})


@pytest.fixture
def full(tmp_path: Path) -> Path:
    run_dir = tmp_path / "quick <run>"
    (run_dir / "config").mkdir(parents=True)
    log_run(run_dir)
    comparison = compare([[0.0], [1.0], [2.0]], [[1.0], [1.0], [7.0]], [[1.0], [2.0], [3.0]], gold_of("vader", []))
    (run_dir / "comparison.json").write_text(comparison.to_json())
    write_samples(run_dir / "samples.jsonl", [Sample("p" + ATTACK, "b" + ATTACK, "a" + ATTACK, 0.0, 0.5)] * 5)
    write_calibration(run_dir, calibration([0.1, 1.0, -2.0]))
    (run_dir / "config" / "resolved.yaml").write_text(CONFIG)
    log = RolloutLog(run_dir / "rollouts")
    for step in (0, 1, 3):
        log.write(step, rollouts(step))
    return run_dir


CONFIG = "name: <quick>\nppo: {guardrails: {kl: {limit: 5.0, action: skip}}}\n"


def rollouts(step: int) -> pa.Table:
    """Of four samples, one fails in every step, one in the last alone, and one takes a second more with each step."""
    failures = [ATTACK, "", "it hung" if step == 3 else "", ""]
    return pa.table(
        {
            "sample_id": [f"{step}/p/{index}" for index in range(4)],
            "failure": [f"mine: {failure}" if failure else "" for failure in failures],
            "reward_failure/mine": failures,
            "reward_s/mine": pa.array([0.0, 1.5 + step, 0.25, 0.125], pa.float32()),
        }
    )


def test_nothing_in_the_page_runs_or_loads(full: Path) -> None:
    path = write_report(full)
    page = path.read_text()
    tags = Tags(page)
    assert tags.open == []
    assert path == full / "report.html"
    assert not {"script", "img", "link", "iframe", "object", "a"} & {tag for tag, _ in tags.seen}
    assert not any(
        name in ("src", "href", "style") or name.startswith("on") for _, attrs in tags.seen for name in attrs
    )
    assert "url(" not in page
    assert "@import" not in page
    assert "\x1b" not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert page.count("&lt;script&gt;alert(") == 16


def test_the_page_says_what_the_run_did(full: Path) -> None:
    page = write_report(full).read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S))
    for said in (
        "+1.000 → +3.000",  # means of 0, 1, 2 and of 1, 1, 7
        "+2.000 ± 1.528",  # differences 1, 0, 5: sqrt(7 / 3)
        "1.3 standard errors, at a KL of 2.00 nats",
        "3 prompts × 1 samples, scored by vader",
        "stand-in for a human labeler",
        "PPO never sees its scores",
        "rm/accuracy 0.625",
        "held-out pairs",
        "actor/pg_loss (1 times)",
        "Seconds by part",
        "name: &lt;quick&gt;",
        "kl skip 5.5 to 7.25 4-5",
        "mine it hung 1 1 4 ",
        "3 3 1-2, 4 ",  # the other reason, in three samples
        "mine 4.50 4 3/p/1 mine 2.50 2 1/p/1 mine 1.50 1 0/p/1 mine 0.25 4 3/p/2 mine 0.25 2 1/p/2 ",
        "quick &lt;run&gt;",
        "2 more",
    ):
        assert said in text.replace("&rarr;", "→").replace("&plusmn;", "±").replace("&times;", "×"), said
    assert page.count("<svg") == 9  # sft 1, rm 3, ppo 4 (score, KL, policy loss, timings), calibration 1


def test_metrics_alone_are_enough(tmp_path: Path) -> None:
    log_run(tmp_path)
    page = write_report(tmp_path).read_text()
    assert "This run has no comparison" in page
    assert "Responses before and after" not in page
    assert "Resolved configuration" not in page


def test_an_empty_log_still_makes_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "This run has no comparison" in write_report(tmp_path).read_text()
    stopped = write_report(tmp_path, "iteration 3 was stopped: <kl>").read_text()
    assert "This run was stopped." in stopped and "iteration 3 was stopped: &lt;kl&gt;" in stopped
    assert "no comparison" not in stopped


def test_a_broken_file_leaves_the_last_report_as_it_was(full: Path) -> None:
    before = write_report(full).read_bytes()
    (full / "comparison.json").write_text("{}")
    with pytest.raises(ReportError, match="exactly the fields"):
        write_report(full)
    assert (full / "report.html").read_bytes() == before
    with pytest.raises(FileNotFoundError):
        write_report(full / "config")


def test_a_stage_lasts_from_the_end_of_the_one_before() -> None:
    seconds = [("sft", 1, 10.0), ("sft", 2, 70.0), ("rm", 1, 100.0), ("rm", 2, 190.0), ("ppo", 1, 4000.0)]
    found = summaries([MetricsRecord(stage, step, at, 0.0, {}) for stage, step, at in seconds])
    assert [(s.name, s.steps, s.duration) for s in found] == [
        ("sft", 2, "1:10"),
        ("rm", 2, "2:00"),
        ("ppo", 1, "1:03:30"),
    ]


def test_the_page_says_what_idle_workers_waited_for(full: Path) -> None:
    """From the timeline, where there is one that knows; what rounds to nothing is left out."""
    Timeline().write_chrome(full / "timeline.json")
    assert "Where workers waited" not in write_report(full).read_text()
    one = Bubbles("generation", 3, 0.625, {"update": 0.3, ATTACK: 0.074, "weights": 0.001})
    Timeline().write_chrome(full / "timeline.json", bubbles=[dataclasses.asdict(one)])
    page = write_report(full).read_text()
    row = re.search(r"<tr><td>generation</td>.*?</tr>", page)
    assert row is not None
    assert "<td>3</td><td>62 %</td>" in row[0] and "update 30 %" in row[0] and "weights" not in row[0]
    assert "<script" not in page and " 7 %" in row[0]


def test_a_run_without_ppo_says_nothing_of_a_comparison(tmp_path: Path) -> None:
    log_run(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "resolved.yaml").write_text("stages: [sft, dpo]\n")
    page = write_report(tmp_path).read_text()
    assert "Before and after PPO" not in page and "no comparison" not in page
