"""Makes `.venv` and installs the pinned set and the package into it: what `make setup` runs. Standard library only.

    python3.11 requirements/install.py [cpu|gpu]

Run again it does nothing while the pins, `pyproject.toml` and the interpreter are the same. A set-up that was
interrupted is started over. What the tools print goes to `.venv/setup.log`, whose end is shown when a step fails.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STATE = VENV / "setup.state"
LOG = VENV / "setup.log"
LOG_LINES_SHOWN = 30

TORCH_CPU = "torch==2.13.0+cpu"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# Importing once writes the byte code of just what is used, a process per half: compiling all of the 27,000 installed
# files takes several times as long, and leaving it to the first run makes every worker do it at once. It also proves
# that the set works.
FIRST_IMPORTS = (
    "vllm.v1.engine.async_llm, vllm.v1.worker.gpu_worker, vllm.v1.worker.worker_base, vllm.model_executor.models.llama",
    "ray.train.torch, ray.serve, ray.job_submission, deepspeed, transformers.models.llama.modeling_llama, pandas,"
    "transformers.models.auto.modeling_auto, pyarrow.parquet, pyarrow.dataset, hydra, gguf, rich.live",
)


class SetupError(RuntimeError):
    """A step that failed; its message is what the user reads."""


def main(arguments: Sequence[str]) -> int:
    extra = arguments[0] if arguments else "cpu"
    if extra not in ("cpu", "gpu"):
        print(f"setup: there is no set {extra!r}; the sets are cpu and gpu", file=sys.stderr)
        return 2
    if read_state() == finished(extra):
        print("setup: nothing to do")
        return 0
    started = time.monotonic()
    try:
        set_up(extra)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    print(f"setup: done in {time.monotonic() - started:.0f} s")
    return 0


def set_up(extra: str) -> None:
    print(f"setup: Python {sys.version.split()[0]}, {extra} set, into .venv", flush=True)
    with timed("virtual environment and installer"):
        make_environment(extra)
        install_uv()
    settings = pip_settings()
    if extra == "cpu":
        with timed(f"{TORCH_CPU}"):
            install_torch(settings)
    pins = REQUIREMENTS / f"{extra}.txt"
    with timed(f"{count_pins(pins)} pinned packages and the development tools"):
        # The pins also hold for what builds the two packages that come as source.
        uv(
            "install",
            "--build-constraints",
            str(pins),
            "-r",
            str(pins),
            "-r",
            str(REQUIREMENTS / "dev.txt"),
            **settings,
        )
        if extra == "cpu":
            take_out()
    with timed("rlhf-cluster itself"):
        uv("install", "--no-build-isolation", "--editable", str(ROOT), **settings)
    with timed("first import of the large libraries"):
        import_once()
    STATE.write_text(finished(extra))


# --- what was done before


def identity(extra: str) -> str:
    """What an environment cannot change in its life: its set, its interpreter, and its place."""
    return f"{extra} {sys.version_info.major}.{sys.version_info.minor} {VENV}"


def finished(extra: str) -> str:
    digest = hashlib.sha256()
    inputs = [ROOT / "pyproject.toml", Path(__file__), *sorted(REQUIREMENTS.glob("*.txt"))]
    for path in inputs:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"finished {identity(extra)} {digest.hexdigest()}"


def unfinished(extra: str) -> str:
    return f"unfinished {identity(extra)}"


def read_state() -> str:
    return STATE.read_text() if STATE.is_file() else ""


# --- the steps


def make_environment(extra: str) -> None:
    state = read_state()
    if state and not state.startswith(f"finished {identity(extra)} "):
        discard_environment()
    VENV.mkdir(exist_ok=True)
    LOG.write_text("")
    if not PYTHON.is_file() or not read_state():
        run([sys.executable, "-m", "venv", str(VENV)], on_failure="install your Python's venv module and try again")
    STATE.write_text(unfinished(extra))


def discard_environment() -> None:
    """Renamed before it is removed, so that an interrupted removal is not taken for an environment."""
    discarded = ROOT / ".venv.discarded"
    shutil.rmtree(discarded, ignore_errors=True)
    VENV.rename(discarded)
    shutil.rmtree(discarded)


def install_uv() -> None:
    """pip installs the installer: uv fetches and unpacks in parallel, which is a minute against five."""
    pin = next(line for line in (REQUIREMENTS / "dev.txt").read_text().split() if line.startswith("uv=="))
    run([str(PYTHON), "-m", "pip", "install", "--no-deps", pin])


def install_torch(settings: dict[str, str]) -> None:
    """From a wheel folder or index that pip is configured with, where one has it; else from PyTorch's own index."""
    if uv_ran("install", TORCH_CPU, **settings):
        return
    if not uv_ran("install", "--default-index", PYTORCH_CPU_INDEX, TORCH_CPU, **without_indexes(settings)):
        places = settings.get("UV_FIND_LINKS", "none is set")
        raise SetupError(
            f"{TORCH_CPU} for Python {sys.version_info.major}.{sys.version_info.minor} is neither in the wheel folders "
            f"(PIP_FIND_LINKS: {places}) nor to be had from PyTorch's CPU index; put its wheel into a folder and set "
            f"PIP_FIND_LINKS to it (details in {LOG})"
        )


def take_out() -> None:
    """What an environment made in another way may hold, and the CPU set must not."""
    names = re.findall(r"^(\w+) ;", (REQUIREMENTS / "without-cpu.txt").read_text(), re.MULTILINE)
    uv("uninstall", *names)


def import_once() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with LOG.open("a") as log:
        halves = [
            subprocess.Popen([str(PYTHON), "-c", f"import {names}"], stdout=log, stderr=log, env=environment)
            for names in FIRST_IMPORTS
        ]
        failed = [half for half in halves if half.wait()]
    if failed:
        raise SetupError(f"the installed libraries do not import; the end of {LOG}:\n{end_of_log()}")


# --- running things


def pip_settings() -> dict[str, str]:
    """pip's configuration (files and environment) in uv's words, since uv reads none of it."""
    listed = subprocess.run([str(PYTHON), "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    configured: dict[str, str] = {}
    for section in ("global", "install", ":env:"):  # later ones win, as in pip
        for key, value in re.findall(rf"^{section}\.([\w-]+)='(.*)'$", listed.stdout, re.MULTILINE):
            configured[key] = value
    settings = {"UV_HTTP_TIMEOUT": "180", "UV_INDEX_STRATEGY": "unsafe-best-match", "DS_BUILD_OPS": "0"}
    for key, name, separator in (
        ("index-url", "UV_DEFAULT_INDEX", " "),
        ("extra-index-url", "UV_INDEX", " "),
        ("find-links", "UV_FIND_LINKS", ","),
        ("cert", "SSL_CERT_FILE", " "),
    ):
        if key in configured:
            settings[name] = separator.join(re.sub(r"\\n", " ", configured[key]).split())
    return settings


def without_indexes(settings: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in settings.items() if name not in ("UV_INDEX", "UV_DEFAULT_INDEX")}


def uv(verb: str, *arguments: str, **settings: str) -> None:
    if not uv_ran(verb, *arguments, **settings):
        raise SetupError(f"uv pip {verb} failed; the end of {LOG}:\n{end_of_log()}")


def uv_ran(verb: str, *arguments: str, **settings: str) -> bool:
    resolved = ["--no-deps"] if verb == "install" else []
    command = [str(VENV / "bin" / "uv"), "pip", verb, "--python", str(PYTHON), *resolved, *arguments]
    return logged(command, {**settings, **os.environ, "DS_BUILD_OPS": "0"})


def run(command: Sequence[str], on_failure: str = "") -> None:
    if not logged(command, dict(os.environ)):
        advice = f"; {on_failure}" if on_failure else ""
        raise SetupError(f"{' '.join(command)} failed{advice}; the end of {LOG}:\n{end_of_log()}")


def logged(command: Sequence[str], environment: dict[str, str]) -> bool:
    with LOG.open("a") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        return subprocess.run(command, stdout=log, stderr=log, env=environment).returncode == 0


def end_of_log() -> str:
    lines = [line for line in LOG.read_text(errors="replace").splitlines() if " is ignored: it is neither" not in line]
    return "\n".join(f"  | {line}" for line in lines[-LOG_LINES_SHOWN:])


def count_pins(path: Path) -> int:
    return sum("==" in line for line in path.read_text().splitlines())


@contextmanager
def timed(what: str) -> Iterator[None]:
    started = time.monotonic()
    print(f"  {what:<58}", end="", flush=True)
    try:
        yield
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"{time.monotonic() - started:4.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
