"""scripts/launch.sh: torchrun on one machine (real runs are in test_pretrain.py), DeepSpeed's with a hostfile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.ranks import free_port
from tests.train.hosts import stand_in_for_pdsh


def launch(*arguments: str, path: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "QUEQIAO_VENV": str(Path(sys.executable).parents[1]), "DS_ACCELERATOR": "cpu", **more}
    if path is not None:
        env["QUEQIAO_VENV"] = str(path)
    return subprocess.run(
        ["bash", "scripts/launch.sh", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
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


# What a shell would change on the way to another machine.
WORDS = [
    "run.name=two words",
    "a={00000..00031}.tar",
    "~data.x",
    "b=$HOME",
    'c="q w" `id`',
    "d='e'",
    "f=[g,h]",
    "i=*",
    "k=\\",
]


def two_hosts(folder: Path, monkeypatch: pytest.MonkeyPatch, more: str) -> Path:
    monkeypatch.setenv("QUEQIAO_DEEPSPEED_ARGS", f"--master_addr 127.0.0.1 --master_port {free_port()} {more}")
    hostfile = folder / "hosts"
    hostfile.write_text("# two machines\nnode1 slots=1\nnode2 slots=1\n")
    return hostfile


def test_two_hosts_over_pdsh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command; only the hop over ssh is left out: a stand-in for pdsh has both machines in this one."""
    stand_in_for_pdsh(tmp_path / "bin", monkeypatch)
    hostfile = two_hosts(tmp_path, monkeypatch, "--no_ssh_check")
    done = launch("--hostfile", str(hostfile), "-m", "tests.train.say_ranks", str(tmp_path), *WORDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name: json.loads(p.read_text()) for p in tmp_path.glob("rank*")} == {
        "rank0of2": WORDS,
        "rank1of2": WORDS,
    }


def test_two_hosts_without_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--no_ssh: the same command on each machine, with its number."""
    hostfile = two_hosts(tmp_path, monkeypatch, "--no_ssh --node_rank")
    start, command = os.environ["QUEQIAO_DEEPSPEED_ARGS"], ["--hostfile", str(hostfile), "-m", "tests.train.say_ranks"]
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(launch, *command, str(tmp_path), *WORDS, QUEQIAO_DEEPSPEED_ARGS=f"{start} {k}") for k in (0, 1)
        ]
    assert [job.result().returncode for job in jobs] == [0, 0], [job.result().stderr for job in jobs]
    found = {p.name: json.loads(p.read_text()) for p in tmp_path.glob("rank*")}
    assert found == {"rank0of2": WORDS, "rank1of2": WORDS}


def test_several_hosts_without_pdsh_are_told_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    if shutil.which("pdsh"):
        pytest.skip("this machine has pdsh")
    done = launch("--hostfile", str(two_hosts(tmp_path, monkeypatch, "")), "-m", "tests.train.say_ranks", "x")
    assert done.returncode == 2 and "2 hosts need pdsh" in done.stderr


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
