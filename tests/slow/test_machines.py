"""Two machines of one process each, started by one command over a stand-in for pdsh, train what one process trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.ranks import free_port
from tests.train.hosts import stand_in_for_pdsh
from tests.train.test_pretrain import SMALL, TIMEOUT, assert_close, environment, metrics, pretrain


@pytest.mark.slow
def test_two_machines_train_what_one_process_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, run = tmp_path / "alone", tmp_path / "two machines"
    pretrain(expected)
    stand_in_for_pdsh(tmp_path / "bin", monkeypatch)
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    arguments = f"--no_ssh_check --master_addr 127.0.0.1 --master_port {free_port()}"
    done = subprocess.run(
        ["bash", "scripts/launch.sh", "--hostfile", str(tmp_path / "hosts"), "-m", "train.pretrain", *SMALL,
         f"run.dir={run}", "train/engine=zero2"],
        cwd=ROOT,
        env=environment(
            QUEQIAO_VENV=str(Path(sys.executable).parents[1]), QUEQIAO_DEEPSPEED_ARGS=arguments, DS_ACCELERATOR="cpu"
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert "= 2 rank(s) x 2 micro-step(s) x 2" in done.stdout
    assert len(metrics(run)) == len(metrics(expected))
    assert_close(run, expected, 1e-5)
