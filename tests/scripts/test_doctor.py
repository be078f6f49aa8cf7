"""The doctor on this machine, and on machines made up for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts import doctor

ROOT = Path(__file__).resolve().parents[2]


def english(text: str, _: str) -> str:
    return text


def chinese(_: str, text: str) -> str:
    return text


def run(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ, PYTHONUTF8="1")
    if path is not None:
        env["PATH"] = path + os.pathsep + env["PATH"]
    command = [sys.executable, str(ROOT / "scripts/doctor.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=200, check=False)


def test_this_machine_is_fit_and_every_finding_has_a_verdict() -> None:
    done = run("--json")
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["ok"] else 1), done.stderr
    checks = {check["name"]: check for check in found["checks"]}
    expected = {"python", "machine", "driver", "torch", "cudnn", "bf16", "attention", "nccl"}
    expected |= {"packages", "compiler", "disk", "shared memory"}
    expected |= {f"gpu {i}" for i in range(torch.cuda.device_count())}
    assert set(checks) == expected
    assert {check["verdict"] for check in checks.values()} <= {"ok", "warning", "problem"}
    assert checks["torch"]["values"]["version"] == torch.__version__
    assert checks["packages"]["values"]["versions"]["deepspeed"] == metadata.version("deepspeed")
    assert "math" not in checks["attention"]["values"]["works"], "the plain kernel is what the others are compared with"
    assert all(check["advice"] for check in checks.values() if check["verdict"] != "ok"), (
        "a complaint without a way out"
    )


def test_a_gpu_that_torch_cannot_use_is_a_problem_with_exit_code_1(tmp_path: Path) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch is a CUDA build, so a GPU is no surprise to it")
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.82.07, 81559, 4'\n")
    fake.chmod(0o755)
    done = run("--lang", "zh", path=str(tmp_path))
    assert done.returncode == 1
    assert "NVIDIA 580.82.07，1 块 GPU" in done.stdout
    assert "requirements/torch.txt" in done.stdout
    assert "处故障" in done.stdout


@pytest.mark.parametrize(
    ("version", "cuda", "available", "has_driver", "expected"),
    [
        ("2.13.0+cpu", None, False, False, "ok"),
        ("2.13.0+cu130", "13.0", True, True, "ok"),
        ("2.13.0+cu130", "13.0", False, False, "ok"),  # a CUDA build on a laptop
        ("2.13.0+cu130", "13.0", False, True, "problem"),  # driver too old
        ("2.13.0+cpu", None, False, True, "problem"),  # wrong build
        ("2.9.1+cu128", "12.8", True, True, "problem"),  # unsafe torch.load
        ("2.10.0", "12.8", True, True, "ok"),
    ],
)
def test_torch_against_the_driver(
    version: str, cuda: str | None, available: bool, has_driver: bool, expected: str
) -> None:
    assert doctor.check_torch(english, version, cuda, available, has_driver).verdict == expected


@pytest.mark.parametrize(
    ("version", "expected"), [((3, 10, 9), "problem"), ((3, 11, 0), "ok"), ((3, 14, 0), "problem")]
)
def test_python_versions(version: tuple[int, int, int], expected: str) -> None:
    assert doctor.check_python(english, version).verdict == expected


def test_the_driver_in_a_container_without_nvidia_smi() -> None:
    assert doctor.check_driver(english, None, seen_by_torch=2).verdict == "ok"
    assert doctor.check_driver(english, None).verdict == "warning"


def test_a_gpu_that_somebody_else_uses() -> None:
    facts = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    memory = [(70 * doctor.GIB, 80 * doctor.GIB), (60 * doctor.GIB, 80 * doctor.GIB)]  # free, total
    cuda = SimpleNamespace(
        device_count=lambda: 2, get_device_properties=lambda i: facts, mem_get_info=lambda i: memory[i]
    )
    expected = [("gpu 0", "ok"), ("gpu 1", "warning")]
    found = list(doctor.check_gpus(english, SimpleNamespace(cuda=cuda)))
    assert [(check.name, check.verdict) for check in found] == expected
    assert found[1].finding == "NVIDIA H100 (sm_90), 80.0 GiB: 20.0 used, 60.0 free"


def test_space_is_judged_by_its_limits(tmp_path: Path) -> None:
    def judge(warn: float, stop: float) -> str:
        return doctor.check_space(english, "disk", str(tmp_path), warn, stop, "make room").verdict

    huge = 1e9  # GiB
    assert [judge(0, 0), judge(huge, 0), judge(huge, huge)] == ["ok", "warning", "problem"]
    assert doctor.check_space(english, "shm", str(tmp_path / "none"), 1, 0, "make room").verdict == "warning"


def test_a_missing_or_wrong_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "webdataset":
            raise metadata.PackageNotFoundError(name)
        return "1.4.0" if name == "hydra-core" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = doctor.check_packages(english)
    assert found.verdict == "problem"
    assert "webdataset missing" in found.finding and "hydra-core 1.4.0" in found.finding
    assert "numpy" not in found.finding


def test_a_check_that_breaks_is_a_finding() -> None:
    def broken() -> doctor.Check:
        raise OSError("no such device")

    (found,) = doctor.guarded(english, "gpu", broken)
    assert (found.verdict, found.finding) == ("problem", "OSError: no such device")


def test_the_report_speaks_chinese() -> None:
    checks = [doctor.Check("disk", "problem", "满", "清理"), doctor.Check("torch", "ok", "2.13.0")]
    assert doctor.report(checks, chinese).splitlines()[-1] == "有 1 处故障，请先解决。"
    assert doctor.report(checks[1:], english).splitlines()[-1] == "Fit to train (0 warning(s))."
