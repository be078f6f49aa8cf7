"""Going on from an adapter (`model.adapter.start`): what is given equals what its folder has, or is taken from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.adapter import Lora, QLora
from model.rehearsal import rehearse
from model.visual_chat import VisualChatModel
from model.weights import adapter_folder, sat_lora
from tests.model.llm_common import small_chatglm
from tests.model.test_adapter import CPU, adapted, chat, learnt, logits, trained_names
from tests.model.test_sat_lora import lora_tensors
from tests.tiny_chat import batch_of, train_pieces
from tests.train.test_mistakes_before_weights import ABSENT, stage_two

PREFIX = "base_model.model.transformer.layers."
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces") / "ice_text.model")


def folder_of(pieces: Path, folder: Path, adapter: Lora, **options: Any) -> tuple[Path, VisualChatModel]:
    """What a run with this adapter saves, and its model."""
    model = adapted(pieces, adapter, **options)
    return adapter_folder.save(model, learnt(model), folder), model


@pytest.fixture(scope="module")
def earlier(pieces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 10 at alpha 20 on two maps of blocks 1 and 2."""
    adapter = Lora(rank=10, target_modules=["dense", "query_key_value"], layer_range=(1, 3))
    return folder_of(pieces, tmp_path_factory.mktemp("earlier") / "adapter", adapter)[0]


CONFLICTS: list[tuple[dict[str, Any], str]] = [
    ({"rank": 4}, "model.adapter.rank is 4; .* in {} has 10"),
    ({"alpha": 5}, "model.adapter.alpha is 5; .* in {} has 20"),
    ({"rslora": True}, "model.adapter.rslora is True; .* in {} has False"),
    ({"dora": True}, "model.adapter.dora is True; .* in {} has False"),
    (
        {"target_modules": ["dense"]},
        r"model.adapter.target_modules is \['dense'\]; .* in {} has \['dense', 'query_key_value'\]",
    ),
    ({"layer_range": [0, 2]}, "model.adapter.layer_range is blocks 0, 1; .* in {} has blocks 1, 2"),
    ({"parts": ["qformer"]}, r"model.adapter.parts is \['qformer'\]; .* has adapters on llm"),
]


@pytest.mark.parametrize(("options", "expected"), CONFLICTS)
def test_what_is_given_and_another_is_refused_with_key_values_and_folder(
    pieces: Path, earlier: Path, options: dict[str, Any], expected: str
) -> None:
    adapter = Lora(start=str(earlier), **options)
    with pytest.raises(ValueError, match=expected.format(earlier)):
        adapter.check(small_chatglm(pieces, device="meta", initial_std=None))
    with pytest.raises(ValueError, match=expected.format(earlier)):  # and by who did not ask before
        adapter.attach(chat(pieces), device=CPU)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 10, "alpha": 20.0, "rslora": False, "dora": False, "layer_range": [1, 3]},
        {"target_modules": ["query_key_value", "dense"], "dropout": 0.5},
    ],
)
def test_what_is_left_out_is_taken_from_the_folder(pieces: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = Lora(rank=10, target_modules=["dense", "query_key_value"], layer_range=(1, 3))
    folder, model = folder_of(pieces, tmp_path / "adapter", adapter)
    expected = logits(model)
    found = adapted(pieces, Lora(start=str(folder), **options))
    torch.testing.assert_close(logits(found), expected, atol=0, rtol=0)
    assert trained_names(found) == trained_names(model)
    own = adapter_folder.adapted(found)["llm"]
    assert (own.r, own.lora_alpha, own.lora_dropout) == (10, 20, options.get("dropout", 0.0))


@pytest.mark.parametrize("kind", [{"rslora": True, "alpha": 3.0}, {"dora": True}])
def test_other_scales_are_taken_too_and_the_rehearsal_knows(pieces: Path, tmp_path: Path, kind: dict[str, Any]) -> None:
    folder, model = folder_of(pieces, tmp_path / "adapter", Lora(rank=2, **kind))
    expected = logits(model)
    adapter = Lora(start=str(folder))
    torch.testing.assert_close(logits(adapted(pieces, adapter)), expected, atol=0, rtol=0)
    named = trained_names(rehearse(chat(pieces), adapter))
    assert named == {name for name in trained_names(model) if "magnitude" not in name}
    for given in ({"rslora": False}, {"dora": False}) if kind.get("dora") else ({"rslora": False},):
        if set(given) & set(kind):
            with pytest.raises(ValueError, match=f"model.adapter.{next(iter(given))} is False; .* has True"):
                Lora(start=str(folder), **given).check(chat(pieces).llm)
    if kind.get("dora"):
        with pytest.raises(ValueError, match="dora"):
            adapter.check_zero3()


def test_parts_that_the_folder_lacks_begin_anew(pieces: Path, tmp_path: Path) -> None:
    folder, model = folder_of(
        pieces, tmp_path / "adapter", Lora(rank=3, parts=("llm", "vision")), train_projection=False
    )
    found = adapted(pieces, Lora(start=str(folder), parts=("llm", "vision", "projection")))
    ranks = {part: config.r for part, config in adapter_folder.adapted(found).items()}
    assert ranks == {"llm": 3, "vision": 3, "projection": 8}
    own = dict(found.named_parameters())
    for name, expected in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(own[name], expected), name


def test_conflicts_are_told_before_weights_are_asked_for(pieces: Path, earlier: Path) -> None:
    for overrides, expected in (
        (["model.adapter.rank=4"], f"model.adapter.rank is 4; .* in {earlier} has 10"),
        (["model.adapter.alpha=5"], f"model.adapter.alpha is 5; .* in {earlier} has 20"),
        (["model.adapter.layer_range=1"], "model.adapter.layer_range.*expected a list|two numbers"),
        (
            ["model.adapter.target_modules=query_key_value"],
            "model.adapter.target_modules.*expected a list|list of names",
        ),
        (["model.adapter.dropout=1.5"], "model.adapter.dropout is 1.5; .* below 1"),
    ):
        with pytest.raises(ValueError, match=expected):
            stage_two(pieces, f"model.adapter.start={earlier}", *overrides)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t | {f"{PREFIX}1.attention.dense.lora_A.weight": torch.ones(10, 33)},
         r"1.attention.dense.lora_A.weight is \[10, 33\]; \[10, 32\] was expected"),
        (lambda t: {n: v for n, v in t.items() if "layers.2" not in n}, "4 tensors are missing .first: .*layers.2"),
        (lambda t: t | {n.replace("layers.2", "layers.7"): v.clone() for n, v in t.items() if "layers.2" in n},
         "4 tensors are not known .first: .*layers.7"),
        (lambda t: {n: v * float("nan") for n, v in t.items()}, "NaN"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_told_before_weights_are_asked_for(
    pieces: Path, tmp_path: Path, change: Any, expected: str
) -> None:
    """The language model of the smoke test is 32 wide."""
    model = chat(pieces, llm={})
    adapter = Lora(rank=10, target_modules=["dense", "query_key_value"], layer_range=(1, 3))
    adapter.attach(model, device=CPU)
    folder = adapter_folder.save(model, learnt(model), tmp_path / "adapter")
    (folder / "trained.safetensors").unlink()
    about = json.loads((folder / "queqiao.json").read_text())
    (folder / "queqiao.json").write_text(json.dumps({**about, "trained": None, "num_image_tokens": None}))
    with pytest.raises(ValueError, match=f"there is nothing at {ABSENT}"):
        stage_two(pieces, f"model.adapter.start={folder}")
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"{folder}.*{expected}"):
        stage_two(pieces, f"model.adapter.start={folder}")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"bias": "lora_only"}, "trains biases"),
        ({"modules_to_save": ["lm_head"]}, r"trains whole modules \['lm_head'\]"),
        ({}, None),
    ],
)
def test_chat_reads_what_peft_alone_made_and_training_goes_on_from_lora_alone(
    pieces: Path, tmp_path: Path, more: dict[str, Any], expected: str | None
) -> None:
    from peft import LoraConfig, get_peft_model

    theirs = chat(pieces, train_qformer=False, train_projection=False)
    wrapped = get_peft_model(theirs.llm.network, LoraConfig(r=2, target_modules=["dense"], **more))  # type: ignore[arg-type]
    learnt(theirs)
    wrapped.save_pretrained(tmp_path)
    model = chat(pieces)
    adapter_folder.load(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    start = Lora(start=str(tmp_path))
    if expected is None:
        start.check(chat(pieces).llm)
        return
    with pytest.raises(ValueError, match=f"{tmp_path} {expected}"):
        start.check(chat(pieces).llm)


def test_an_adapter_of_another_family_is_told_before_weights_are_asked_for(pieces: Path, tmp_path: Path) -> None:
    folder, _ = folder_of(pieces, tmp_path / "adapter", Lora(rank=2))
    about = json.loads((folder / "queqiao.json").read_text())
    (folder / "queqiao.json").write_text(json.dumps({**about, "template": "ChatGLM2Codec"}))
    with pytest.raises(ValueError, match="prompt template 'ChatGLM2Codec'"):
        Lora(start=str(folder)).check(chat(pieces).llm)


def test_a_model_with_another_adapter_on_it_is_not_filled(pieces: Path, earlier: Path) -> None:
    adapter = Lora(rank=10, alpha=5, target_modules=["dense", "query_key_value"], layer_range=(1, 3))
    with pytest.raises(ValueError, match="lora_alpha 20.*5"):
        adapter_folder.load(adapted(pieces, adapter), earlier)


# -------------------------------------------------------------------------------------------- VisualGLM's and XrayGLM's


@pytest.mark.parametrize("adapter", [Lora, QLora])
def test_training_goes_on_from_a_converted_visualglm(pieces: Path, tmp_path: Path, adapter: type[Lora]) -> None:
    """Joined query, key and value have three times the rank of `dense`; that stays so, and peft alone reads it."""
    from peft import PeftModel

    from model.quantise import quantise_linears

    config = {"hidden_size": 64, "num_attention_heads": 4, "num_layers": 3}
    lora = {name: 0.2 * tensor for name, tensor in lora_tensors(width=64).items()}
    converted = sat_lora.write(sat_lora.read(lora, config), tmp_path / "converted", base="visualglm-6b")
    start = adapter(start=str(converted))
    start.check(chat(pieces).llm)
    model = adapted(pieces, start, train_qformer=False, train_projection=False)
    scales = {name: m.scaling["default"] for name, m in model.named_modules() if hasattr(m, "scaling")}
    assert len(scales) == 4 and set(scales.values()) == {0.5}, "alpha 1, rank 2"
    shapes = {p.shape for n, p in model.named_parameters() if "lora_A" in n}
    assert shapes == {(6, 64), (2, 64)}

    before, batch = logits(model), batch_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    found = model.train().predict(batch)
    nn.functional.cross_entropy(found.logits_TV, found.label_T).backward()
    optimizer.step()
    expected = logits(model)
    assert (expected - before).abs().max() > 1e-3, "nothing was learnt"

    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    folder = adapter_folder.save(model, trained, tmp_path / "adapter", base_model="visualglm-6b")
    said, told = (json.loads((place / SETTINGS).read_text()) for place in (folder, converted))
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"):
        assert said[key] == told[key], key
    assert said["rank_pattern"] == {"query_key_value": 6}
    bare = chat(pieces)
    if adapter is QLora:
        quantise_linears(bare.llm.network, bare.llm.lora_targets, device=CPU)
    PeftModel.from_pretrained(bare.llm.network, str(folder))
    torch.testing.assert_close(logits(bare), expected, atol=1e-5, rtol=1e-5)
    again = adapted(pieces, adapter(start=str(folder), rank=2, alpha=1.0))
    torch.testing.assert_close(logits(again), expected, atol=0, rtol=0)
