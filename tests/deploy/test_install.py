"""The set-up script: when it has nothing to do, when it starts over, and how it passes on pip's configuration."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "requirements" / "install.py"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script in a made-up checkout."""
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    (requirements / "cpu.txt").write_text("ray==2.60.0\n")
    (requirements / "dev.txt").write_text("uv==0.13.9\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    venv = tmp_path / ".venv"
    for name, value in (
        ("ROOT", tmp_path),
        ("REQUIREMENTS", requirements),
        ("VENV", venv),
        ("PYTHON", venv / "bin" / "python"),
        ("STATE", venv / "setup.state"),
        ("LOG", venv / "setup.log"),
    ):
        monkeypatch.setattr(module, name, value)
    return module


def commands_of(install: ModuleType, monkeypatch: pytest.MonkeyPatch, returncode: int = 0) -> list[list[str]]:
    ran: list[list[str]] = []

    def run(command: list[str], environment: dict[str, str]) -> bool:
        ran.append(list(command))
        return returncode == 0

    monkeypatch.setattr(install, "logged", run)
    return ran


def test_done_once_is_done_until_a_pin_changes(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = commands_of(install, monkeypatch)
    install.VENV.mkdir()
    install.STATE.write_text(install.finished("cpu"))
    assert install.main(["cpu"]) == 0
    assert ran == []
    before = install.finished("cpu")
    (install.REQUIREMENTS / "cpu.txt").write_text("ray==2.61.0\n")
    assert install.finished("cpu") != before


@pytest.mark.parametrize(
    ("left_by", "kept"),
    [("", True), ("finished cpu", True), ("unfinished cpu", False), ("finished gpu", False)],
)
def test_an_interrupted_or_other_environment_is_started_over(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, left_by: str, kept: bool
) -> None:
    commands_of(install, monkeypatch)
    install.VENV.mkdir()
    (install.VENV / "leftover").touch()
    if left_by:
        state, extra = left_by.split()
        install.STATE.write_text(f"{state} {install.identity(extra)} an-older-digest")
    install.make_environment("cpu")
    assert (install.VENV / "leftover").exists() == kept
    assert install.STATE.read_text() == install.unfinished("cpu")
    assert not (install.ROOT / ".venv.discarded").exists()


def test_a_failed_step_leaves_an_unfinished_environment_and_says_so(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], environment: dict[str, str]) -> bool:
        with install.LOG.open("a") as log:
            log.write("WARNING: Location 'x' is ignored: it is neither a file nor a directory.\nno such host\n")
        return "venv" in command

    monkeypatch.setattr(install, "logged", run)
    assert install.main(["cpu"]) == 1
    said = capsys.readouterr()
    assert "failed" in said.out
    assert "no such host" in said.err
    assert "is ignored" not in said.err
    assert install.read_state() == install.unfinished("cpu")


def test_torch_comes_from_the_wheel_folder_or_alone_from_its_own_index(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = commands_of(install, monkeypatch)
    install.install_torch({"UV_FIND_LINKS": "/wheels"})
    assert len(found) == 1
    assert install.PYTORCH_CPU_INDEX not in found[0]
    install.VENV.mkdir()
    missing = commands_of(install, monkeypatch, returncode=1)
    with pytest.raises(install.SetupError, match=r"/wheels.*set PIP_FIND_LINKS"):
        install.install_torch({"UV_FIND_LINKS": "/wheels"})
    assert missing[1][-3:] == ["--default-index", install.PYTORCH_CPU_INDEX, install.TORCH_CPU]
    assert "--no-deps" in missing[1]


def test_pip_configuration_is_passed_on(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = (
        ":env:.find-links='/a /b'\nglobal.extra-index-url='https://one.example\\nhttps://two.example'\n"
        "global.index-url='https://global.example'\ninstall.index-url='https://install.example'\n"
        "global.timeout='3'\n"
    )
    answer = subprocess.CompletedProcess([], 0, stdout=listed)
    monkeypatch.setattr(install.subprocess, "run", lambda *_, **__: answer)
    settings = install.pip_settings()
    assert settings["UV_DEFAULT_INDEX"] == "https://install.example"
    assert settings["UV_INDEX"] == "https://one.example https://two.example"
    assert settings["UV_FIND_LINKS"] == "/a,/b"
    assert "SSL_CERT_FILE" not in settings


def test_an_unknown_set_is_refused() -> None:
    result = subprocess.run([sys.executable, str(SCRIPT), "tpu"], capture_output=True, text=True, timeout=30)
    assert result.returncode == 2
    assert "the sets are cpu and gpu" in result.stderr
