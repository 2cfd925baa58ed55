"""An interrupt ends a coroutine with its clean-up, and never finds only half of its loop."""

from __future__ import annotations

import asyncio
import signal
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest

from rlhf_cluster.interrupts import SIGNALS, run_async


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Signals as a shell's foreground command has them; the tests' own afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def complaints(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What Python would print of objects that were dropped half made."""
    heard: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    with warnings.catch_warnings(record=True, action="always") as caught:
        yield heard
    heard.extend(caught)


async def nine() -> int:
    return 9


def test_the_result_is_returned_and_the_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    assert run_async(nine) == 9
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_an_error_rises_and_the_handlers_are_given_back() -> None:
    async def fail() -> None:
        raise ValueError("no")

    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ValueError, match="no"):
        run_async(fail)
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_loop_is_made_waits_until_it_is(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, complaints: list[object]
) -> None:
    """Between the socket pair and its registration: what asyncio.run leaves behind here, Python prints."""
    began = []
    made = asyncio.selector_events.BaseSelectorEventLoop._make_self_pipe

    def interrupted(loop: asyncio.selector_events.BaseSelectorEventLoop) -> None:
        signal.raise_signal(number)
        made(loop)

    async def main() -> None:
        began.append(True)

    monkeypatch.setattr(asyncio.selector_events.BaseSelectorEventLoop, "_make_self_pipe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_async(main)
    assert not began and not complaints


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_cancels_and_the_clean_up_runs(number: signal.Signals) -> None:
    cleaned = []

    async def main() -> None:
        signal.raise_signal(number)
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    with pytest.raises(KeyboardInterrupt):
        run_async(main)
    assert cleaned


def test_a_second_signal_interrupts_the_clean_up() -> None:
    async def main() -> None:
        signal.raise_signal(signal.SIGINT)
        try:
            await asyncio.sleep(60)
        finally:
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        run_async(main)


def test_a_cancellation_that_no_signal_asked_for_is_no_interrupt() -> None:
    async def main() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run_async(main)


def test_what_a_shell_ignores_for_a_job_in_the_background_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def main() -> Callable[..., object] | int | None:
        signal.raise_signal(signal.SIGINT)
        return signal.getsignal(signal.SIGINT)

    assert run_async(main) == signal.SIG_IGN
