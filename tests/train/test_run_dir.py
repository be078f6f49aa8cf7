"""A run's directory belongs to one run, and what cannot be written is told in a sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from train.config import compose
from train.run import start
from train.run_dir import open_run_dir

HOLD = "import sys, time; from pathlib import Path; from train.run_dir import open_run_dir\n" + (
    "open_run_dir(Path(sys.argv[1]), 'a: 1'); print('claimed', flush=True); time.sleep(20)"
)


def test_a_directory_in_use_is_refused_and_free_once_its_run_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "claimed\n"
        with pytest.raises(ValueError, match=r"at work in run.dir=.*run.resume=never"):
            open_run_dir(tmp_path / "run", "a: 2")
        assert (tmp_path / "run/config.yaml").read_text() == "a: 1", "nothing of the other run's was changed"
        other.send_signal(signal.SIGKILL)
    open_run_dir(tmp_path / "run", "a: 2")
    assert (tmp_path / "run/config.yaml").read_text() == "a: 2"


def test_a_forked_data_worker_that_outlives_its_run_holds_nothing(tmp_path: Path) -> None:
    outlive = HOLD.replace("print('claimed'", "import os; pid = os.fork(); pid and print(pid")
    with subprocess.Popen(
        [sys.executable, "-c", outlive, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        child = int(other.stdout.readline())
        other.kill()
        other.wait()
        open_run_dir(tmp_path, "a: 2")
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/run"])
def test_a_directory_that_cannot_be_made_is_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run.dir=.* cannot be written \(.*\): name another directory"):
        open_run_dir(tmp_path / name, "")


def test_a_precision_that_this_machine_lacks_ends_a_run_before_it_begins(tmp_path: Path) -> None:
    wish = ["run.device=cpu", "train.precision=fp16", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        start(compose("pretrain", ["experiment=smoke", *wish]))
    assert not (tmp_path / "run").exists()
