"""Two GPUs over NCCL train what one trains: both stages, every ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import test_finetune, test_pretrain
from tests.train.test_finetune import finetune
from tests.train.test_pretrain import pretrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs two GPUs, there are {torch.cuda.device_count()}"),
]


def numbers(lines: list[dict[str, Any]]) -> list[float]:
    return [line[name] for line in lines for name in ("loss", "grad_norm")]


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3"])
def test_pretraining(tmp_path: Path, engine: str) -> None:
    overrides = ["run.device=cuda", f"train/engine={engine}", "train.precision=fp32"]
    pretrain(tmp_path / "one", *overrides)
    pretrain(tmp_path / "two", *overrides, ranks=2)
    one, two = (numbers(test_pretrain.metrics(tmp_path / name)) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4) and len(set(one)) > 2


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3"])
def test_finetuning(tmp_path: Path, engine: str) -> None:
    """Rows with pictures and without, and ranks that see lengths of their own."""
    overrides = ["run.device=cuda", f"train/engine={engine}", "train.precision=fp32"]
    finetune(tmp_path / "one", *overrides)
    llm = f"model.llm.folder={tmp_path / 'one/llm'}"
    finetune(tmp_path / "two", *overrides, llm, ranks=2)
    one, two = (numbers(test_finetune.metrics(tmp_path / name)) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3) and len(set(one)) > 2
