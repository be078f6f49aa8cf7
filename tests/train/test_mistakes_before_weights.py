"""What a config gets wrong about adapters, learning rates and sizes is told before any file of weights is opened."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig

import finetune
from tests.model.llm_common import small_chatglm, train_pieces
from train import pretrain
from train.config import compose
from train.distributed import Ranks
from train.loading import build_evaluators, build_sources, check_image_sizes

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


@pytest.mark.parametrize(("main", "experiment"), [(pretrain.main, "smoke"), (finetune.main, "smoke_stage_two")])
def test_pictures_of_another_size_than_the_encoders_leave_nothing_behind(
    main: Any, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model.vision.image_size=56", "data.transform.image_size=70", f"run.dir={tmp_path / 'run'}"]
    monkeypatch.setattr("sys.argv", ["x", f"experiment={experiment}", *words])
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr().err
    assert "data.transform.image_size is 70 and the image encoder (model.vision.image_size) takes" in told
    assert "56 x 56 pixels" in told and not (tmp_path / "run").exists()


def test_sizes_of_evaluators_and_of_a_folder_are_compared_too(tmp_path: Path) -> None:
    CLIPVisionConfig(image_size=64).save_pretrained(tmp_path)  # and no weights
    of_folder = ["model/vision=from_folder", f"model.vision.folder={tmp_path}", "~model.vision.num_layers"]
    words = ["experiment=smoke", "train/evaluator=scenes", *of_folder]
    check_image_sizes(compose("pretrain", words))
    with pytest.raises(
        ValueError, match=r"train\.evaluator\.retrieval\.transform\.image_size is 60 and .* 64 x 64 pix"
    ):
        check_image_sizes(compose("pretrain", [*words, "train.evaluator.retrieval.transform.image_size=60"]))
    with pytest.raises(ValueError, match=r"data\.transform\.image_size is 64 and .* 32 x 32 pixels"):
        check_image_sizes(compose("pretrain", [*words, "model.vision.image_size=32"]))
    defaults = ["model/vision=eva_vit_g", "~model.vision.image_size", "data.transform.image_size=224"]
    check_image_sizes(compose("pretrain", ["experiment=smoke", *defaults]))


def test_a_run_without_a_source_is_told_how_to_choose_one() -> None:
    config = compose("pretrain", ["experiment=smoke", "data.source.scenes=null"])
    with pytest.raises(ValueError, match=r"data\.source has no source: choose one, data/source=\.\.\."):
        build_sources(config)


def test_an_evaluator_set_to_null_is_none_in_stage_one_too() -> None:
    config = compose("pretrain", ["experiment=smoke", "train/evaluator=scenes", "train.evaluator.caption=null"])
    codec = SimpleNamespace(vocab_size=99, pad_id=0)
    assert [evaluator.name for evaluator in build_evaluators(config, codec)] == ["retrieval"]
