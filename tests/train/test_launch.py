"""scripts/launch.sh: torchrun on one machine (real runs are in test_pretrain.py), DeepSpeed's with a hostfile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def launch(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "QUEQIAO_VENV": str(Path(sys.executable).parents[1]), "DS_ACCELERATOR": "cpu"}
    if path is not None:
        env["QUEQIAO_VENV"] = str(path)
    return subprocess.run(
        ["bash", "scripts/launch.sh", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "arguments", [(), ("two", "-m", "train.pretrain"), ("0", "-m", "x"), ("2", "train.pretrain", "x")]
)
def test_wrong_use_is_explained(arguments: tuple[str, ...]) -> None:
    done = launch(*arguments)
    assert done.returncode == 2
    assert "bash scripts/launch.sh N -m train.pretrain" in done.stderr


def test_missing_hostfile() -> None:
    done = launch("--hostfile", "/no/such/file", "-m", "train.pretrain")
    assert done.returncode == 2 and "no hostfile at /no/such/file" in done.stderr


def test_hostfile_starts_the_module_without_local_rank(tmp_path: Path) -> None:
    """The command line that DeepSpeed's launcher gets; a stand-in for it prints what it was given."""
    (tmp_path / "bin").mkdir()
    for name, body in {"python": "exit 0", "deepspeed": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=2\n")
    done = launch(
        "--hostfile", str(hostfile), "-m", "train.pretrain", "experiment=smoke", "run.name=two words", path=tmp_path
    )
    expected = ["--hostfile", str(hostfile), "--no_local_rank", "--module", "train.pretrain", "experiment=smoke"]
    assert done.stdout.splitlines() == [*expected, "run.name=two words"], done.stderr


def test_deepspeeds_launcher_runs_the_module_on_two_cpu_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real launcher; only its questions over ssh to this very machine are left out."""
    monkeypatch.setenv("QUEQIAO_DEEPSPEED_ARGS", "--no_ssh_check --master_addr 127.0.0.1")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=2\n")
    done = launch("--hostfile", str(hostfile), "-m", "tests.train.say_ranks", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(p.name for p in tmp_path.glob("rank*")) == ["rank0of2", "rank1of2"]
