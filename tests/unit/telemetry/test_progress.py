from __future__ import annotations

import io

import pytest
from rich.console import Console

from rlhf_cluster.telemetry.comparison import VADER_NOTE, Comparison
from rlhf_cluster.telemetry.metrics import MetricsRecord
from rlhf_cluster.telemetry.progress import ConsoleSink, Progress, StageView, clock_text, render

METRICS = {
    "perf/throughput": 1234.4,
    "objective/scores": 0.5,
    "objective/kl": None,
    "actor/pg_loss": 0.1,
    "timing_s/gen": 4.06,
    "timing_s/update": 2.0,
    "timing_s/step": 6.5,
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock, width: int = 60) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(Console(file=out, force_terminal=False, width=width), live=False, clock=clock), out


def test_one_line_per_iteration_however_narrow() -> None:
    clock = Clock()
    progress, out = plain(clock)
    with progress.stage("ppo", 4):
        clock.now = 6.0
        progress.advance(1, METRICS)
    assert out.getvalue().splitlines() == [
        "ppo: 4 iterations",
        "ppo 1/4  score +0.500  KL not finite  tokens/s 1,234  [gen 4.1s update 2.0s]  step 6.5s  left 0:18",
        "ppo: ended at 1/4 after 0:06",
    ]


def test_time_left_of_a_resumed_stage_counts_only_what_was_done_now() -> None:
    clock = Clock()
    view = StageView("ppo", 10, clock)
    assert view.seconds_left() is None
    clock.now = 5.0
    view.advance(7, {})  # resumed at 6
    assert view.seconds_left() == 15.0
    clock.now = 6.0
    view.advance(8, {})
    assert view.seconds_left() == 6.0
    view.advance(10, {})
    assert view.seconds_left() == 0.0


def test_an_interrupted_stage_says_how_far_it_came() -> None:
    progress, out = plain(Clock())

    def interrupted() -> None:
        with progress.stage("sft", 9):
            progress.advance(2, {"sft/loss": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert out.getvalue().splitlines()[-1] == "sft: stopped at 2/9 after 0:00"
    assert progress.current_stage is None
    with pytest.raises(RuntimeError, match="outside of a stage"):
        progress.advance(3, {})


def test_untrusted_text_neither_steers_nor_is_markup() -> None:
    progress, out = plain(Clock())
    progress.sample("say \x1b[2J it", "[bold]x[/bold] \x1b]0;title\x07 [/nope]", 0.25)
    said = out.getvalue()
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "[bold]x[/bold]" in said
    assert "[/nope]" in said
    assert "score +0.250" in said


def test_live_draws_in_place_and_leaves_notes_and_the_cursor() -> None:
    out = io.StringIO()
    progress = Progress(Console(file=out, force_terminal=True, width=80, color_system=None), live=True, clock=Clock())
    with progress.stage("ppo", 4):
        progress.advance(1, METRICS)
        progress.note("a note")
    said = out.getvalue()
    assert "a note" in said
    assert "ppo 1/4  score" not in said  # no line per iteration there
    assert said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l")


def test_the_live_block_has_all_that_a_person_follows() -> None:
    clock = Clock()
    view = StageView("ppo", 4, clock)
    for step, score in enumerate((0.0, 0.5, 1.0), 1):
        clock.now += 2.0
        view.advance(step, {**METRICS, "objective/scores": score})
    out = io.StringIO()
    Console(file=out, width=100, color_system=None).print(render(view))
    said = out.getvalue()
    for part in ("ppo", "3/4", "0:06", "left 0:02", "score +1.000", "tokens/s 1,234", "gen 4.1s", "▁▅█"):
        assert part in said
    assert len(said.splitlines()) == 3


def test_on_a_pipe_it_is_plain() -> None:
    out = io.StringIO()
    with Progress.on(out, progress=True).stage("rm", 1):
        pass
    assert "\x1b" not in out.getvalue()


def test_the_sink_advances_only_the_stage_that_runs() -> None:
    progress, out = plain(Clock())
    sink = ConsoleSink(progress)
    sink.write(MetricsRecord("ppo", 1, 0.0, 0.0, {}))
    with progress.stage("ppo", 2):
        sink.write(MetricsRecord("eval", 9, 0.0, 0.0, {}))
        sink.write(MetricsRecord("ppo", 2, 0.0, 0.0, {}))
    assert [line for line in out.getvalue().splitlines() if "/" in line] == [
        "ppo 2/2  left 0:00",
        "ppo: ended at 2/2 after 0:00",
    ]


def test_the_comparison_has_its_errors_and_says_who_scored() -> None:
    progress, out = plain(Clock(), width=90)
    progress.comparison(Comparison("vader", VADER_NOTE, 64, 4, 0.2, 0.02, 0.5, 0.03, 0.3, 0.015, 2.5, 0.1))
    said = out.getvalue()
    for part in ("64 held-out prompts x 4 samples", "+0.2000", "0.0200", "+0.3000", "0.0150", "+20.0", "2.5000"):
        assert part in said
    assert "stand-in for a human labeler" in said


def test_clock() -> None:
    assert [clock_text(s) for s in (0, 59.6, 61, 3599, 3661)] == ["0:00", "1:00", "1:01", "59:59", "1:01:01"]
