"""Numbers of VisualGLM's and ChatGLM-6B's configs that no shape shows: the model has to compute with them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.llm.chatglm import SPECIAL
from model.llm.pieces import Pieces
from model.load import load
from model.qformer import QFormer
from model.vision.encoder import eva_vit, vision_from_folder
from model.visual_chat import VisualChatModel
from model.weights import chatglm_folder, sat, sat_lora, stage_two, visualglm_convert, writing
from model.weights.checkpoint import from_tensors
from tests.model.glm_common import small_glm, train_sentencepieces
from tests.model.llm_common import codec_of, small_chatglm, train_pieces
from tests.model.test_sat_lora import lora_tensors
from tests.model.test_weights_sat import CONFIG, HF_CONFIG, chat_model, equal
from tests.model.weights_common import QFORMER, VISION

WHOLE_HF = {**HF_CONFIG, "image_length": 5, "eva_config": CONFIG["eva_args"], "qformer_config": CONFIG["qformer_args"]}
LAYOUTS = {
    "sat": ("model_config.json", "blocks", {"vision": "eva_args", "qformer": "qformer_args"}),
    "huggingface": ("config.json", "per_head", {"vision": "eva_config", "qformer": "qformer_config"}),
}
CONFIG_OF = LAYOUTS["sat"][2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("theirs")
    return {
        "sat": sat.write(chat_model(1), place / "sat", CONFIG),
        "huggingface": chatglm_folder.write(chat_model(1), place / "hf", WHOLE_HF),
    }


def other_model(part: str, **changes: Any) -> VisualChatModel:
    settings: dict[str, dict[str, Any]] = {"vision": VISION, "qformer": QFORMER, "llm": {}}
    settings = {**settings, part: {**settings[part], **changes}}
    torch.manual_seed(0)
    llm = small_chatglm(None, **settings["llm"])
    return VisualChatModel(eva_vit(**settings["vision"]), QFormer(**settings["qformer"]), llm)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", ["vision", "qformer", "llm"])
@pytest.mark.parametrize(
    ("name", "value", "key"), [("num_heads", 8, "num_attention_heads"), ("layer_norm_eps", 1e-2, "layernorm_epsilon")]
)
def test_heads_and_eps_have_to_be_the_configs(
    folders: dict[str, Path], layout: str, part: str, name: str, value: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, order, sections = LAYOUTS[layout]
    folder = folders[layout]
    theirs = {"num_heads": 4, "layer_norm_eps": {"vision": 1e-6, "qformer": 1e-12, "llm": 1e-5}[part]}[name]
    stage_two.initialise(other_model(part), visualglm=str(folder), qkv_order=order)  # type: ignore[arg-type]
    for module in (sat, chatglm_folder):  # before any weight is read
        monkeypatch.setattr(module, "open_folder", lambda *_, **__: pytest.fail("weights were opened"))
    model = other_model(part, **{name: value})
    with pytest.raises(ValueError) as caught:
        stage_two.initialise(model, visualglm=str(folder), qkv_order=order)  # type: ignore[arg-type]
    section = f", {sections[part]}" if part in sections else ""
    expected = f"{folder / file}{section} has {key} {theirs}, the model has model.{part}.{name} {value}"
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "key"), [("num_heads", 8, "num_attention_heads"), ("layer_norm_eps", 1e-2, "layernorm_epsilon")]
)
def test_of_a_language_model_alone(tmp_path: Path, name: str, value: Any, key: str) -> None:
    """layernorm_epsilon is not in this config: ChatGLM-6B's own default counts."""
    source = chat_model(1).llm.network
    torch.save({name: p.detach() for name, p in source.named_parameters()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    with pytest.raises(ValueError, match=rf"config.json has {key} .*, the model has model.llm.{name} {value}"):
        stage_two.initialise(other_model("llm", **{name: value}), llm=str(tmp_path), qkv_order="per_head")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ln_vision_has_the_eps_that_visualglm_computes_with(folders: dict[str, Path], layout: str) -> None:
    """1e-5 in its code (`model/blip2.py:11-17`), in no config."""
    model = other_model("vision", ln_eps=0.1)
    report = stage_two.initialise(model, visualglm=str(folders[layout]), qkv_order=LAYOUTS[layout][1])  # type: ignore[arg-type]
    assert model.ln_vision.eps == 1e-5 and "ln_vision now has the eps of its weights: 1e-05, not 0.1" in str(report)


def test_a_config_that_does_not_tell_is_noted(tmp_path: Path) -> None:
    chatglm_folder.write(chat_model(1), tmp_path / "hf", HF_CONFIG)
    model = other_model("vision")
    report = stage_two.initialise(model, visualglm=str(tmp_path / "hf"), qkv_order="per_head")
    assert equal(model, chat_model(1))
    assert "has no eva_config and no qformer_config: whether the heads and the eps of model.vision" in str(report)


def test_a_language_model_stands_behind_any_encoder_but_visualglm_does_not(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    import transformers as t

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    t.CLIPVisionModel(t.CLIPVisionConfig(**sizes, image_size=28, patch_size=14)).save_pretrained(tmp_path / "clip")
    encoder = vision_from_folder(str(tmp_path / "clip"), pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3)
    model = VisualChatModel(encoder, QFormer(**QFORMER), small_chatglm(None, seed=3))  # type: ignore[arg-type]
    expected = chat_model(1).llm
    tensors = {name: parameter.detach() for name, parameter in expected.network.named_parameters()}
    writing.write_folder(from_tensors(tensors), tmp_path / "llm", metadata={})
    writing.write_json(tmp_path / "llm" / "config.json", HF_CONFIG)
    stage_two.initialise(model, llm=str(tmp_path / "llm"), qkv_order="per_head")
    assert equal(model.llm, expected)
    for layout, (_, order, _) in LAYOUTS.items():
        with pytest.raises(ValueError, match="VisualGLM's image encoder is the EVA-ViT"):
            stage_two.initialise(model, visualglm=str(folders[layout]), qkv_order=order)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_language_model_is_named(folders: dict[str, Path], layout: str, tmp_path: Path) -> None:
    glm = small_glm("chatglm3", train_sentencepieces(tmp_path / "tokenizer.model"), num_image_tokens=5)
    model = VisualChatModel(eva_vit(**VISION), QFormer(**QFORMER), glm)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is ChatGLM-6B \(model/llm=chatglm_6b\); this model has a Glm"):
        stage_two.initialise(model, visualglm=str(folders[layout]), qkv_order=LAYOUTS[layout][1])  # type: ignore[arg-type]


def test_the_end_of_an_answer_is_told_by_the_config(folders: dict[str, Path], tmp_path: Path) -> None:
    """The tokenizer of this folder has no piece <eop>."""
    pieces = train_pieces(tmp_path / "ice_text.model", special=["[MASK]", "[gMASK]", "[sMASK]", "<sop>"])
    known = Pieces(pieces, special=SPECIAL.values())
    ids = {f"{role}_token_id": known.id_of(SPECIAL[role]) for role in ("bos", "gmask", "mask", "pad")}
    folder = chatglm_folder.write(chat_model(1), tmp_path / "hf", {**WHOLE_HF, **ids, "eos_token_id": 251})
    model = load(folder, tokenizer=pieces, qkv_order="per_head")
    assert codec_of(model.llm).stop_ids == (251,)  # type: ignore[arg-type]
    out = visualglm_convert.convert(folder, tmp_path / "sat", to="sat", qkv_order="per_head")
    assert codec_of(load(out, tokenizer=pieces).llm).stop_ids == (251,)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- configs that are broken

BROKEN: list[tuple[tuple[str, ...], Any, str]] = [
    (("num_layers",), "3", "has num_layers '3': expected a whole number of at least 1"),
    (("num_attention_heads",), 0, "has num_attention_heads 0: expected a whole"),
    (("num_attention_heads",), 5, "has num_attention_heads 5, which does not divide hidden_size 32"),
    (("hidden_size",), 32.0, "has hidden_size 32.0: expected a whole"),
    (("vocab_size",), True, "has vocab_size True: expected a whole"),
    (("image_length",), None, "has image_length None: expected a whole"),
    (("layernorm_epsilon",), "1e-5", "has layernorm_epsilon '1e-5': expected a number above 0"),
    (("bos_token_id",), "250", "has bos_token_id '250': expected a whole number of at least 0"),
    (("eva_args", "hidden_size"), "32", ", eva_args has hidden_size '32': expected a whole"),
    (("eva_args", "num_attention_heads"), 0, ", eva_args has num_attention_heads 0: expected a whole"),
    (("eva_args", "num_attention_heads"), 3, ", eva_args has num_attention_heads 3, which does not divide"),
    (("eva_args", "inner_hidden_size"), "64", ", eva_args has inner_hidden_size '64': expected a whole"),
    (("eva_args", "layernorm_epsilon"), -1e-6, ", eva_args has layernorm_epsilon -1e-06: expected a number"),
    (("eva_args", "image_size"), [], ", eva_args has image_size []: expected"),
    (("eva_args", "image_size"), [28, 56], ", eva_args has image_size [28, 56]: expected"),
    (("eva_args", "image_size"), "28", ", eva_args has image_size '28': expected"),
    (("eva_args", "image_size"), 27, ", eva_args has image_size 27, which patch_size 14 does not divide"),
    (("eva_args", "patch_size"), 0, ", eva_args has patch_size 0: expected a whole"),
    (("qformer_args", "is_decoder"), False, ", qformer_args has is_decoder False: expected a list"),
    (("qformer_args", "is_decoder"), [True, False], ", qformer_args has is_decoder [True, False]: expected a list"),
    (("qformer_args", "num_attention_heads"), 5, ", qformer_args has num_attention_heads 5, which does not"),
    (("qformer_args", "cross_attn_hidden_size"), {}, ", qformer_args has cross_attn_hidden_size {}: expected a whole"),
]


def changed(config: dict[str, Any], keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    out = copy.deepcopy(config)
    place = out
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("keys", "value", "expected"), BROKEN)
def test_a_value_that_cannot_be_is_named(
    tmp_path: Path, layout: str, keys: tuple[str, ...], value: Any, expected: str
) -> None:
    file, _, sections = LAYOUTS[layout]
    theirs = {CONFIG_OF[part]: name for part, name in sections.items()}
    keys = tuple(theirs.get(key, key) for key in keys)
    config = changed(CONFIG if layout == "sat" else WHOLE_HF, keys, value)
    (tmp_path / file).write_text(json.dumps(config))
    (tmp_path / "ice_text.model").touch()
    for old, new in theirs.items():
        expected = expected.replace(old, new)
    for read in (lambda: sat.sizes(visualglm_convert.read_config(tmp_path)), lambda: load(tmp_path)):
        with pytest.raises(ValueError) as caught:
            read()
        assert f"{tmp_path / file}{'' if expected[0] == ',' else ' '}{expected}" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_layers", "3"), ("num_attention_heads", 0), ("num_attention_heads", 5), ("hidden_size", None)],
)
def test_of_a_checkpoint_with_a_lora_too(tmp_path: Path, key: str, value: Any) -> None:
    file = tmp_path / "model_config.json"
    file.write_text(json.dumps({**CONFIG, "inner_hidden_size": 48, key: value}))
    with pytest.raises(ValueError, match=f"{file} has {key} {value!r}"):
        sat_lora.read(lora_tensors(), sat.read_config(tmp_path))
