"""The same on a GPU: every precision, every ZeRO stage, offload, and resuming."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.train.test_pretrain import STEPS, metrics, pretrain

pytestmark = pytest.mark.gpu

KINDS = [
    ("zero0", "fp32"),
    ("zero0", "bf16"),
    ("zero0", "fp16"),
    ("zero1", "auto"),
    ("zero2", "bf16"),
    ("zero3", "bf16"),
    ("offload", "bf16"),
]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("cpu") / "run"
    pretrain(run)
    return run


@pytest.mark.parametrize(("engine", "precision"), KINDS)
def test_gpu_agrees_with_cpu_and_resumes(on_cpu: Path, tmp_path: Path, engine: str, precision: str) -> None:
    overrides = ["run.device=cuda", f"train/engine={engine}", f"train.precision={precision}"]
    run = tmp_path / "run"
    pretrain(run, *overrides)
    losses = [line["loss"] for line in metrics(run)]
    expected = [line["loss"] for line in metrics(on_cpu)]
    assert losses == pytest.approx(expected, rel=1e-5 if precision == "fp32" else 1e-2)
    assert metrics(run)[0]["memory_gib"] > 0

    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed, symlinks=True)
    shutil.rmtree(resumed / f"checkpoints/step_{STEPS}")
    pretrain(resumed, *overrides)
    assert [line["loss"] for line in metrics(resumed)] == pytest.approx(losses, rel=1e-6)
