"""The Dockerfile: linted, in step with the pins, and made of files that its context holds. It is not built here."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
LINT_DEADLINE_S = 60


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).parent / "hadolint"
    return subprocess.run([str(tool), str(path)], capture_output=True, text=True, timeout=LINT_DEADLINE_S)


def test_the_dockerfile_is_clean() -> None:
    result = lint(DOCKERFILE)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_linter_finds_a_fault(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.read_text() + "RUN cd /tmp && sudo pip install ray\n")
    assert lint(tmp_path / "Dockerfile").returncode != 0


def test_both_targets_are_there() -> None:
    targets = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert {"cpu", "cuda"} <= set(targets)


def test_pins_are_those_of_the_requirements() -> None:
    text = DOCKERFILE.read_text()
    installer = (ROOT / "requirements" / "install.py").read_text()
    (torch,) = re.findall(r'^TORCH_CPU = "(\S+)"', installer, re.MULTILINE)
    assert f" {torch} " in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (major_minor,) = set(re.findall(r"^FROM python:(\d\.\d+)-", text, re.MULTILINE))
    assert project["requires-python"].startswith(f">={major_minor}")
    assert all(f"rlhf-cluster:{project['version']}-{kind}" in text for kind in ("cpu", "cuda"))


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_the_resolved_sets_are_in_step_with_pyproject(extra: str) -> None:
    """Every pin of pyproject.toml stands in the resolved set as it is, and no line holds an address or a hash."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements" / f"{extra}.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.+]+", line) for line in lines)
    pins = dict(line.split("==") for line in lines)
    for requirement in [*project["dependencies"], *project["optional-dependencies"][extra]]:
        if exact := re.fullmatch(r"([\w-]+)(?:\[.*\])?==(\S+)", requirement):
            assert pins[exact[1].lower()] == exact[2]
        elif (name := re.split(r"[\[<>=]", requirement)[0].lower()) != "torch":
            assert name in pins
    assert ("torch" in pins) == (extra == "gpu")
    assert extra == "gpu" or not pins.keys() & {"torchvision", "torchaudio", "torchcodec", "triton", "vllm"}


def test_copied_files_are_in_the_build_context() -> None:
    kept = {line[1:] for line in Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE.read_text(), re.MULTILINE)
    sources = {name for line in copied for name in line.split()[:-1]}
    assert sources <= kept
    assert all((ROOT / name).exists() for name in kept)
