"""How Ctrl-C and SIGTERM reach the work: as KeyboardInterrupt, and inside a coroutine as its cancellation.

A stopped job thus ends as one that was interrupted: cleanly, with its last checkpoint intact. And what it was that
ended one, of all that task groups wrapped around it.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def heed_sigterm() -> None:
    """From here on SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _interrupt)


def run_async(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """`asyncio.run(main())`, of which an interrupt never finds only half.

    asyncio takes Ctrl-C once its loop is there, and SIGTERM never: an interrupt that comes earlier leaves half a loop
    and a coroutine that nobody awaits, and both complain when they are collected. Here it waits until `main` begins. A
    first signal cancels `main`, whose clean-up runs; a second one interrupts that too.
    """
    if threading.current_thread() is not threading.main_thread():
        return asyncio.run(main())  # signals are the main thread's
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = [number for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)]

    async def begun() -> T:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None

        def cancel(number: int, _: object) -> None:
            came.append(number)
            if len(came) > 1:
                raise KeyboardInterrupt
            loop.call_soon_threadsafe(task.cancel)

        _handle(heeded, cancel)
        if came:
            raise KeyboardInterrupt
        return await main()

    _handle(heeded, lambda number, _: came.append(number))
    try:
        return asyncio.run(begun())
    except asyncio.CancelledError:
        if came:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number in heeded:
            signal.signal(number, handlers[number])


def _handle(numbers: list[signal.Signals], handler: Callable[[int, Any], None]) -> None:
    for number in numbers:
        signal.signal(number, handler)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def first_cause(error: BaseException) -> BaseException:
    """The first real error: task groups wrap what went wrong."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
