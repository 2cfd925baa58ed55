"""The terminal is ours: what libraries say goes to log files.

`quiet_libraries` tells them to say less (before they are imported), `log_to_file` sends all that a worker process says
to its file, `driver_log` does so for the driver and hands back the terminal. Redirection works on file descriptors,
because much of the noise is printed by C++ code, by child processes, or by `print`, which no logging level reaches.
Knows nothing of Ray or of which libraries are really there.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

# Read when the library is imported, and inherited by child processes.
ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # Transformers' own bars (loading weights) follow it
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",  # bars that do not set `disable` themselves
    "TOKENIZERS_PARALLELISM": "false",  # else a warning at every fork
    "VLLM_LOGGING_COLOR": "0",  # not NO_COLOR, which would take the colours of our own display
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TQDM": "0",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
LOGGERS = (
    *("transformers", "huggingface_hub", "vllm", "DeepSpeed", "hydra", "torch"),
    # Those of Ray's that set a level of their own.
    *("ray", "ray.train", "ray.serve", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"),
)
# DeepSpeed warns of this on every machine without a GPU, as it is imported: `doctor` says what a machine has.
NO_GPU = "Setting accelerator to CPU"


def quiet_libraries(level: int = logging.WARNING) -> None:
    """Sets what libraries read from the environment, and their loggers to `level`. Call it before importing them.

    A variable that the user has set stays as it is. VLLM_CONFIGURE_LOGGING stays on: without its own handler vLLM
    would lose the level that its variable sets. Ray is the exception: it sets its logger to INFO on import, and to
    RAY_LOGGER_LEVEL only in `ray.init` (the default of `logging_level` there).
    """
    name = logging.getLevelName(level)
    by_level = {"TRANSFORMERS_VERBOSITY": name.lower(), "VLLM_LOGGING_LEVEL": name, "RAY_LOGGER_LEVEL": name.lower()}
    for variable, value in {**ENVIRONMENT, **by_level}.items():
        os.environ.setdefault(variable, value)
    for logger in LOGGERS:
        logging.getLogger(logger).setLevel(level)
    logging.getLogger("DeepSpeed").addFilter(_not_about_the_missing_gpu)
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)


def _not_about_the_missing_gpu(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NO_GPU)


def log_to_file(path: Path) -> None:
    """Sends descriptors 1 and 2 of this process, for good, and its Python logging into `path` (appended to)."""
    _redirect(path)
    _log_to_stderr()


@contextmanager
def driver_log(path: Path) -> Iterator[TextIO]:
    """Sends all output of this process to `path` while inside, and yields the terminal (the former stdout).

    Only what is written to the yielded stream is seen by the person; on leaving, also after an error, descriptors and
    root logging are as before, so that a traceback appears where it is looked for.
    """
    _flush()
    kept = os.dup(1), os.dup(2)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    terminal = os.fdopen(os.dup(kept[0]), "w", encoding=encoding, errors="replace", buffering=1)
    try:
        _redirect(path)
        _log_to_stderr()
        yield terminal
    finally:
        _flush()
        terminal.close()
        _close_added(root, handlers)
        for descriptor, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, descriptor)
            os.close(saved)
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)


def _redirect(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)  # append: writers of one file never overwrite
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def _log_to_stderr() -> None:
    """Root logging to descriptor 2, which is the file: one writer, so lines stay in order with printed ones."""
    handler = logging.StreamHandler(os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace", buffering=1))
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)


def _close_added(root: logging.Logger, before: list[logging.Handler]) -> None:
    for handler in root.handlers:
        if handler not in before and isinstance(handler, logging.StreamHandler):
            handler.stream.close()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
