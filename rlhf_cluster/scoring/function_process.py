"""The process that reward functions run in: `python -m rlhf_cluster.scoring.function_process FD PARENT`.

Over the socket FD it is told which function to load, says whether that went well, and then answers batches of samples
until the other end closes. What the function prints goes where the worker's own output goes. The process leads a
session of its own (so Ctrl-C does not reach it), and whatever the function started in it ends with it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rlhf_cluster.scoring.signatures import Adapted, NoNumber, adapt
from rlhf_cluster.scoring.verifiers import make_verifier

READY, SCORES, FAILED = "ready", "scores", "failed"


@dataclass(frozen=True)
class FunctionSpec:
    """What to load: `path` is FILE.py:NAME or package.module:NAME, empty for a verifier of our own."""

    kind: str
    path: str = ""
    column: str = "answer"
    pattern: str = ""
    schema: str = ""


def load(spec: FunctionSpec) -> Adapted:
    """Raises whatever the user's module raises, ValueError where there is no such function."""
    if spec.kind != "function":
        return make_verifier(spec.kind, spec.column, spec.pattern, spec.schema)
    return adapt(find(spec.path), spec.column)


def find(path: str) -> Callable[..., Any]:
    where, _, name = path.rpartition(":")
    if not where or not name:
        raise ValueError(f"{path!r} is neither FILE.py:NAME nor package.module:NAME")
    function = getattr(_file(Path(where)) if where.endswith(".py") else importlib.import_module(where), name, None)
    if not callable(function):
        found = "" if function is None else f", but a {type(function).__name__} of that name"
        raise ValueError(f"{where} has no function {name}{found}")
    return function  # type: ignore[no-any-return]


def _file(path: Path) -> Any:
    """A file as a module; what lies beside it can be imported, as when it is run."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    sys.path.insert(0, str(path.resolve().parent))
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    specification.loader.exec_module(module)
    return module


def serve(channel: Connection) -> None:
    """Until the other end is closed. An answer is (what, value)."""
    function: Adapted | None = None
    while True:
        try:
            asked = channel.recv()
        except EOFError:
            return
        try:
            if function is None:
                function = load(asked)
                channel.send((READY, None))
            else:
                channel.send((SCORES, list(function(asked))))
        except Exception as error:  # the user's code may raise anything: it is said, not survived in silence
            said = str(error).partition("\n")[0]
            told = said if isinstance(error, NoNumber) else f"it raised {type(error).__name__}: {said}"
            channel.send((FAILED, told))


def _end_with(parent: int) -> None:
    """A function that hangs would outlive its worker: nobody asks it whether the other end is still there."""
    while os.getppid() == parent:
        time.sleep(1.0)
    _end_group()


def _end_group() -> None:
    os.killpg(os.getpid(), signal.SIGKILL)


def main() -> None:
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    serve(Connection(int(sys.argv[1])))
    sys.stdout.flush()
    _end_group()


if __name__ == "__main__":
    main()
