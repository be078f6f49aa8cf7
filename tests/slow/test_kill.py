"""kill -9 at every moment of a save: what is there afterwards is whole, and the run ends in the same bits."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slow.killed_pretrain import MOMENTS
from tests.train.test_pretrain import SMALL, TIMEOUT, environment, metrics, pretrain

STEPS = 2 * len(MOMENTS)
SETTINGS = [f"train.steps={STEPS}", "train.save_every=1", "train.keep_checkpoints=1"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_while_it_saves_ends_in_the_same_bits(tmp_path: Path) -> None:
    expected, run = tmp_path / "straight", tmp_path / "killed"
    pretrain(expected, *SETTINGS)
    done = 0
    for moment in MOMENTS:
        killed = subprocess.run(
            [sys.executable, "-m", "tests.slow.killed_pretrain", moment, *SMALL, *SETTINGS, f"run.dir={run}"],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )
        assert killed.returncode == -signal.SIGKILL, f"{moment}: {killed.stdout[-3000:]}"
        assert done == 0 or f"resuming after step {done} from" in killed.stdout, f"before {moment}"
        # one whole checkpoint more, or two where the second was in its place already
        done += 2 if moment in ("in its place but not the latest", "an old one half deleted") else 1
    said = pretrain(run, *SETTINGS)
    assert f"resuming after step {done} from" in said
    assert metrics(run) == metrics(expected)
    for file in ("weights.safetensors", "optimizer.safetensors", "random.safetensors"):
        path = f"checkpoints/step_{STEPS}/{file}"
        assert (run / path).read_bytes() == (expected / path).read_bytes(), file
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["latest", f"step_{STEPS}"], "nothing half-written or half-deleted stays"
