"""What a person sees in the terminal while a run works, and the table at its end.

Takes metrics by their names, notes, samples, the comparison; gives a live display on a terminal, or one readable line
per iteration where there is none or progress is off. It alone writes to the terminal: library noise goes elsewhere
(`quiet.py`). Responses are untrusted text and lose their control characters here.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf_cluster.telemetry.comparison import Comparison, printable
from rlhf_cluster.telemetry.metrics import MetricsRecord

SHOWN = (  # metric, label, format: those that an iteration has, in this order
    ("objective/scores", "score", "{:+.3f}"),
    ("objective/gold", "gold", "{:+.3f}"),
    ("objective/kl", "KL", "{:.3f}"),
    ("sft/loss", "loss", "{:.4f}"),
    ("rm/loss", "loss", "{:.4f}"),
    ("rm/accuracy", "accuracy", "{:.3f}"),
    ("dpo/loss", "loss", "{:.4f}"),
    ("dpo/accuracy", "accuracy", "{:.3f}"),
    ("rm/margin", "margin", "{:.3f}"),
    ("response_length/mean", "length", "{:.1f}"),
    ("perf/throughput", "tokens/s", "{:,.0f}"),
)
TIMING = "timing_s/"
SPARKS = "▁▂▃▄▅▆▇█"
TREND = ("objective/scores", "rm/loss", "sft/loss")  # the first that the stage has is drawn small
WINDOW = 20  # iterations that the time left is estimated from


class StageView:
    """What is known of the stage that runs: pure state and its renderings, without a terminal."""

    def __init__(self, name: str, total_steps: int, clock: Callable[[], float]) -> None:
        self.name = name
        self.total = total_steps
        self.step = 0
        self.metrics: Mapping[str, float | None] = {}
        self._clock = clock
        self._start = clock()
        self._ends: deque[tuple[int, float]] = deque(maxlen=WINDOW + 1)
        self._trend: deque[float] = deque(maxlen=32)

    def advance(self, step: int, metrics: Mapping[str, float | None]) -> None:
        if not self._ends:  # a resumed stage starts at step - 1, not at 0
            self._ends.append((step - 1, self._start))
        self.step, self.metrics = step, metrics
        self._ends.append((step, self._clock()))
        value = next((metrics[name] for name in TREND if metrics.get(name) is not None), None)
        if value is not None:
            self._trend.append(value)

    def elapsed(self) -> float:
        return self._clock() - self._start

    def seconds_left(self) -> float | None:
        """From the mean of the last iterations; None before the first has ended."""
        if len(self._ends) < 2:
            return None
        (first, start), (last, end) = self._ends[0], self._ends[-1]
        return max(0, self.total - self.step) * (end - start) / max(1, last - first)

    def shown(self) -> list[tuple[str, str]]:
        """(label, text) of the metrics that a person follows."""
        return [
            (label, "not finite" if (value := self.metrics[name]) is None else form.format(value))
            for name, label, form in SHOWN
            if name in self.metrics
        ]

    def timings(self) -> list[tuple[str, float]]:
        """(part, seconds) of the iteration, without its total."""
        parts = [(name.removeprefix(TIMING), value) for name, value in self.metrics.items() if name.startswith(TIMING)]
        return [(part, value) for part, value in parts if part != "step" and value is not None]

    def trend(self) -> str:
        low, high = min(self._trend, default=0.0), max(self._trend, default=0.0)
        scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
        return "".join(SPARKS[round((value - low) * scale)] for value in self._trend)

    def line(self) -> str:
        """One iteration as one line."""
        left = self.seconds_left()
        words = [f"{self.name} {self.step}/{self.total}", *(f"{label} {text}" for label, text in self.shown())]
        parts = " ".join(f"{part} {seconds:.1f}s" for part, seconds in self.timings())
        step = self.metrics.get(TIMING + "step")
        words += [f"[{parts}]"] if parts else []
        words += [f"step {step:.1f}s"] if step is not None else []
        return "  ".join([*words, f"left {clock_text(left)}"] if left is not None else words)


class Progress:
    """The one display of a process. `live` redraws in place; without it every event is a line or block of text."""

    def __init__(self, console: Console, live: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._live_wanted = live
        self._clock = clock
        self._view: StageView | None = None

    @classmethod
    def on(cls, terminal: TextIO, progress: bool) -> Progress:
        """Live on a terminal where `progress` is wished for; else plain lines."""
        is_tty = terminal.isatty()
        console = Console(file=terminal, force_terminal=is_tty, width=_width(terminal), highlight=False)
        return cls(console, live=progress and is_tty and not console.is_dumb_terminal)

    @property
    def current_stage(self) -> str | None:
        return self._view.name if self._view else None

    @contextmanager
    def stage(self, name: str, total_steps: int) -> Iterator[None]:
        """The time of a stage. On leaving it says how far the stage came and how long it took."""
        self._view = view = StageView(name, total_steps, self._clock)
        self.note(f"{name}: {total_steps} iterations")
        word = "stopped"
        try:
            with self._display(view):
                yield
            word = "ended"
        finally:
            self._view = None
            self._line(f"{name}: {word} at {view.step}/{view.total} after {clock_text(view.elapsed())}")

    def advance(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Shows iteration `step` (the first is 1) of the stage that runs. Raises RuntimeError outside of a stage."""
        if self._view is None:
            raise RuntimeError(f"advance({step}) outside of a stage; call it inside `with progress.stage(...)`")
        self._view.advance(step, metrics)
        if not self._live_wanted:
            self._line(self._view.line())

    def note(self, text: str) -> None:
        self._line(printable(text))

    def sample(self, prompt: str, response: str, score: float) -> None:
        """Shows a response of the policy."""
        body = Group(Text(printable(prompt).strip(), style="dim"), Text(printable(response).strip()))
        self._console.print(Panel(body, title=f"a sample, score {score:+.3f}", title_align="left"))

    def comparison(self, comparison: Comparison) -> None:
        c = comparison
        self._console.print()
        self.note(f"Before, after: {c.prompts} held-out prompts x {c.samples_per_prompt} samples, scored by {c.gold}")
        self._console.print(comparison_table(c))
        self.note("Standard errors are over prompts; KL per response, in nats, from the policy before PPO.")
        self.note(c.about_gold)

    def _line(self, text: str) -> None:
        """Unbroken however long where it may go to a file; folded on a live terminal."""
        self._console.print(Text(text), soft_wrap=not self._console.is_terminal)

    @contextmanager
    def _display(self, view: StageView) -> Iterator[None]:
        if not self._live_wanted:
            yield
            return
        # The streams are not redirected: rich would draw what libraries print, which belongs in the log files.
        with Live(
            get_renderable=lambda: render(view),
            console=self._console,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ):
            yield


class ConsoleSink:
    """A sink of the metrics log: the records of the stage that runs advance its display."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def write(self, record: MetricsRecord) -> None:
        if record.stage == self._progress.current_stage:
            self._progress.advance(record.step, record.metrics)

    def cut(self, stage: str, after_step: int) -> None:
        """What was shown stays shown."""

    def close(self) -> None:
        """The terminal is not ours to close."""


def render(view: StageView) -> RenderableType:
    """The live block: bar and time left, the metrics with the trend of the first, seconds by part."""
    head = Table.grid(padding=(0, 2))
    left = view.seconds_left()
    head.add_row(
        Text(view.name, style="bold"),
        Text(f"{view.step}/{view.total}"),
        ProgressBar(total=max(1, view.total), completed=view.step, width=30),
        Text(clock_text(view.elapsed())),
        Text("" if left is None else f"left {clock_text(left)}", style="dim"),
    )
    values = Text("  ").join(Text.assemble((label + " ", "dim"), (text, "bold")) for label, text in view.shown())
    values.append("  " + view.trend(), style="cyan")
    parts = Text("  ").join(Text(f"{part} {seconds:.1f}s", style="dim") for part, seconds in view.timings())
    return Group(head, *(text for text in (values, parts) if text.plain.strip()))


def comparison_table(comparison: Comparison) -> Table:
    """Before, after, paired difference and KL, each with its standard error over prompts."""
    c = comparison
    table = Table()
    for name, justify in (("", "left"), ("mean", "right"), ("standard error", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_row("before", f"{c.before_mean:+.4f}", f"{c.before_se:.4f}")
    table.add_row("after", f"{c.after_mean:+.4f}", f"{c.after_se:.4f}")
    table.add_row("difference (paired)", f"{c.difference:+.4f}", f"{c.difference_se:.4f}", style="bold")
    table.add_row("difference / its error", f"{c.standard_errors:+.1f}", "")
    kl = ("not measured", "") if c.kl_mean is None else (f"{c.kl_mean:.4f}", f"{c.kl_se:.4f}")
    table.add_row("KL", *kl)
    return table


def clock_text(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _width(terminal: TextIO) -> int | None:
    """None lets rich follow the terminal, which it looks for at descriptors 0 to 2 only: 1 and 2 may be log files."""
    if not terminal.isatty():
        return 100
    return None if os.isatty(0) else os.get_terminal_size(terminal.fileno()).columns or None
