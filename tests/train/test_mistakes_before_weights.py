"""What a config gets wrong about adapters and learning rates is told before any file of weights is opened."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import finetune
from tests.model.llm_common import small_chatglm, train_pieces
from train import pretrain
from train.config import compose
from train.distributed import Ranks

RUN = SimpleNamespace(device=torch.device("cpu"), ranks=Ranks.alone(), say=lambda text: None)
ABSENT = "/nowhere/weights"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces") / "ice_text.model")


def stage_two(pieces: Path, *overrides: str) -> Any:
    """As finetune.py does it, of weights that are not there: who opens them says so."""
    words = [
        "experiment=smoke_stage_two",
        "model/adapter=lora",
        f"model.weights.llm={ABSENT}",
        "train.optim.part_lr={}",
    ]
    config = compose("finetune", [*words, *overrides])
    finetune.check_adapter(config)
    llm = small_chatglm(
        pieces, num_image_tokens=config.model.qformer.num_query_tokens, device="meta", initial_std=None, frozen=True
    )
    return finetune.build_stage(config, RUN, llm)


RATE = "+train.optim.part_lr."


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], f"there is nothing at {ABSENT}"),  # nothing is wrong but this
        ([f"{RATE}model.projection=1e-3", f"{RATE}model.llm=1e-4"], f"there is nothing at {ABSENT}"),
        (["model.adapter.rank=0"], "model.adapter.rank is 0; it has to be 1 or more"),
        (["model.adapter.rank=-4"], "model.adapter.rank is -4"),
        (["model.adapter.target_modules=[query_key_values]"], r"target_modules: .*\(perhaps query_key_value\)"),
        (["model.adapter.layer_range=[0,99]"], r"model.adapter.layer_range is \[0, 99\)"),
        (["model.adapter.parts=[lm]"], r"model.adapter.parts is \['lm'\]; it can hold llm"),
        (["model.adapter.start=/nowhere/adapter"], "/nowhere/adapter holds no adapter"),
        (["model/adapter=qlora", "train/engine=zero3"], "model.adapter=qlora does not go with ZeRO-3"),
        ([f"{RATE}model.projektion=1e-3"], r"part_lr: \['model.projektion'\] .*\(perhaps model.projection\)"),
        ([f"{RATE}model.vision=1e-3"], r"\['model.vision'\] .*\(model.vision is frozen\)"),
        (["model/adapter=none", f"{RATE}model.llm=1e-3"], r"\(model.llm is frozen\)"),
        (["model.adapter.parts=[projection]", f"{RATE}model.ln_visoin=1e-3"], r"\(perhaps model.ln_vision\)"),
    ],
)
def test_stage_two(pieces: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        stage_two(pieces, *overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([f"{RATE}model.qformer=1e-4"], f"there is nothing at {ABSENT}"),
        ([f"{RATE}model.qfromer=1e-4"], r"part_lr: \['model.qfromer'\] .*\(perhaps model.qformer\)"),
    ],
)
def test_stage_one(overrides: list[str], expected: str) -> None:
    config = compose("pretrain", ["experiment=smoke", f"model.weights.all={ABSENT}", *overrides])
    with pytest.raises(ValueError, match=expected):
        pretrain.build_stage(config, RUN, SimpleNamespace(vocab_size=99, pad_id=0))
