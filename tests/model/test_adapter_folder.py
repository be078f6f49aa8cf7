"""Adapters on disk: that peft alone reads what is saved, and that what does not fit or is damaged is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.adapter import Lora, QLora
from model.weights import adapter_folder, merging
from tests.model.glm_common import small_glm, train_sentencepieces, visual_chat
from tests.model.test_adapter import CPU, adapted, chat, learnt, logits, trained_names
from tests.tiny_chat import train_pieces


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces") / "ice_text.model")


KINDS = {
    "lora": Lora(rank=4),
    "rslora": Lora(rank=4, alpha=3.0, rslora=True, target_modules=["query_key_value"]),
    "dora": Lora(rank=4, dora=True, layer_range=(1, 3)),
    "qlora": QLora(rank=4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_alone_reads_what_was_saved(pieces: Path, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    from model.quantise import quantise_linears

    model = adapted(pieces, KINDS[kind], train_qformer=False, train_projection=False)
    before = logits(model)
    folder = adapter_folder.save(model, learnt(model), tmp_path / "adapter", base_model="weights/chatglm-6b")
    expected = logits(model)
    assert (expected - before).abs().max() > 0.1
    bare = chat(pieces)
    if kind == "qlora":
        quantise_linears(bare.llm.network, bare.llm.lora_targets, device=CPU)
    PeftModel.from_pretrained(bare.llm.network, str(folder))
    torch.testing.assert_close(logits(bare), expected, atol=1e-5, rtol=1e-5)
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "queqiao.json",
    }
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "weights/chatglm-6b"


def test_what_trained_beside_it_comes_along(pieces: Path, tmp_path: Path) -> None:
    adapter = Lora(rank=2, parts=("llm", "projection", "vision"))
    model = adapted(pieces, adapter)
    folder = adapter_folder.save(model, learnt(model), tmp_path / "adapter", base_model="base")
    about = json.loads((folder / "queqiao.json").read_text())
    assert about["adapters"] == {"llm": ".", "projection": "projection", "vision": "vision"}
    assert (about["template"], about["qkv_order"], about["base_model"]) == ("ChatGLMCodec", "per_head", "base")
    assert about["trained"]["parts"] == ["ln_vision", "qformer"]
    expected = logits(model)
    again = chat(pieces)
    adapter_folder.load(again, folder)
    torch.testing.assert_close(logits(again), expected, atol=0, rtol=0)
    going_on = adapted(pieces, Lora(rank=2, parts=adapter.parts, start=str(folder)))
    torch.testing.assert_close(logits(going_on), expected, atol=0, rtol=0)
    assert trained_names(going_on) == trained_names(model)


def test_adapters_that_do_not_fit_are_refused(pieces: Path, tmp_path: Path) -> None:
    model = adapted(pieces, Lora(rank=2))
    folder = adapter_folder.save(model, learnt(model), tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not fit this model's llm: .*lora_A.weight is .2, 64.; .2, 32. was"):
        adapter_folder.load(chat(pieces, llm={}), folder)
    with pytest.raises(ValueError, match="holds no adapter"):
        adapter_folder.load(chat(pieces), tmp_path)
    about = json.loads((folder / "queqiao.json").read_text())
    (folder / "queqiao.json").write_text(json.dumps({**about, "qkv_order": "blocks"}))
    with pytest.raises(ValueError, match="rows 'blocks', this model has 'per_head'"):
        adapter_folder.load(chat(pieces), folder)


def test_an_adapter_of_another_family_is_refused_though_its_shapes_fit(tmp_path: Path) -> None:
    """ChatGLM2 and ChatGLM3 have the same names and shapes, and other prompts and weights."""
    tokenizer = train_sentencepieces(tmp_path / "tokenizer.model")
    model = visual_chat(small_glm("chatglm2", tokenizer))
    Lora(rank=2).attach(model, device=CPU)
    folder = adapter_folder.save(model, learnt(model), tmp_path / "adapter", base_model="weights/chatglm2-6b")
    expected = "for prompt template 'ChatGLM2Codec', this model has 'ChatGLM3Codec' .it was trained on weights/chatglm2"
    with pytest.raises(ValueError, match=expected):
        adapter_folder.load(visual_chat(small_glm("chatglm3", tokenizer)), folder)
    about = json.loads((folder / "queqiao.json").read_text())
    for change, expected in (
        ({"num_image_tokens": 32}, "for number of image tokens 32, this model has 5"),
        ({"language_model": "ChatGLM"}, "for language model 'ChatGLM', this model has 'Glm'"),
    ):
        (folder / "queqiao.json").write_text(json.dumps({**about, **change}))
        with pytest.raises(ValueError, match=expected):
            adapter_folder.load(visual_chat(small_glm("chatglm2", tokenizer)), folder)
    (folder / "queqiao.json").unlink()  # peft alone says nothing of these
    again = visual_chat(small_glm("chatglm2", tokenizer))
    assert len(adapter_folder.load(again, folder).loaded) == len([n for n in trained_names(model) if "lora_" in n])


def test_another_base_is_said_and_a_moved_one_may_be_right(
    pieces: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(pieces, Lora(rank=2))
    folder = adapter_folder.save(model, learnt(model), tmp_path / "adapter", base_model=str(tmp_path / "run/llm"))
    for place, warns in ((None, False), (tmp_path / "x/../run/llm", False), (tmp_path / "moved/llm", True)):
        caplog.clear()
        again = chat(pieces)
        again.llm.loaded_from = None if place is None else str(place)
        adapter_folder.load(again, folder)
        expected = [f"{folder} was trained on {tmp_path}/run/llm and is put on {place}: wrong, unless that is the same"]
        assert [record.getMessage()[: len(expected[0])] for record in caplog.records] == expected * warns


WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize(
    ("file", "damage", "expected"),
    [
        (WEIGHTS, None, f"holds no adapter: it has no {WEIGHTS}"),
        (SETTINGS, None, f"holds no adapter: it has no {SETTINGS}"),
        (WEIGHTS, lambda content: content[:50], f"{WEIGHTS} is no readable safetensors file"),
        (WEIGHTS, lambda content: content[:-1], f"{WEIGHTS} is no readable safetensors file"),
        (WEIGHTS, lambda content: b"", f"{WEIGHTS} is no readable safetensors file"),
        (SETTINGS, lambda content: b"{", f"{SETTINGS} is no readable JSON"),
        (SETTINGS, lambda content: b"[]", f"{SETTINGS} holds a list"),
        (SETTINGS, lambda content: b"{}", "of kind None: only LoRA is read"),
        (SETTINGS, lambda content: content.replace(b'"LORA"', b'"IA3"'), "of kind IA3: only LoRA is read"),
        (SETTINGS, lambda content: content.replace(b'"LORA"', b'"NEW"'), "of kind NEW: only LoRA is read"),
        (SETTINGS, lambda content: content.replace(b'"r": 2', b'"r": 0'), f"peft does not read .*{SETTINGS} .r is 0"),
        (
            SETTINGS,
            lambda content: content.replace(b'"lora_alpha": 4', b'"lora_alpha": "4"'),
            "lora_alpha is '4'; a numb",
        ),
        (
            SETTINGS,
            lambda content: content.replace(b'"lora_alpha": 4', b'"lora_alpha": NaN'),
            "lora_alpha is nan; a numb",
        ),
        (
            SETTINGS,
            lambda content: content.replace(b'"rank_pattern": {}', b'"rank_pattern": [1]'),
            r"rank_pattern is \[1\]",
        ),
        (
            SETTINGS,
            lambda content: content.replace(b'"alpha_pattern": {}', b'"alpha_pattern": {"dense": null}'),
            "alpha_pattern is {'dense': None}; names with numbers",
        ),
        (
            SETTINGS,
            lambda content: content.replace(b'"layers_pattern": null', b'"layers_pattern": "layers"'),
            f"peft does not read .*{SETTINGS}",
        ),
    ],
)
def test_a_damaged_folder_is_told_and_nobody_is_asked_for_another(
    pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, damage: Any, expected: str
) -> None:
    model = adapted(pieces, Lora(rank=2), train_qformer=False, train_projection=False)
    folder = adapter_folder.save(model, learnt(model), tmp_path / "adapter")
    before = (folder / file).read_bytes()
    (folder / file).unlink() if damage is None else (folder / file).write_bytes(damage(before))
    assert damage is None or damage(before) != before
    monkeypatch.setattr("peft.config.hf_hub_download", lambda *_, **__: pytest.fail("the path was sent to the Hub"))
    again = chat(pieces)
    names = [name for name, _ in again.named_parameters()]
    for read in (lambda: adapter_folder.load(again, folder), lambda: merging.read_updates(folder)):
        with pytest.raises(ValueError, match=expected):
            read()
    assert [name for name, _ in again.named_parameters()] == names, "half an adapter was put on"


def test_what_trained_beside_it_and_is_damaged_is_told(pieces: Path, tmp_path: Path) -> None:
    model = adapted(pieces, Lora(rank=2))
    folder = adapter_folder.save(model, learnt(model), tmp_path / "adapter")
    for name, content, expected in (
        ("queqiao.json", b"{", "queqiao.json is no readable JSON"),
        ("queqiao.json", b"{}", "queqiao.json has no adapters"),
        (
            "queqiao.json",
            b'{"adapters": ["llm"]}',
            "queqiao.json: adapters is .*; parts with their folders were expected",
        ),
        ("queqiao.json", b'{"adapters": {"llm": 3}}', "queqiao.json: adapters is {'llm': 3}; parts"),
        ("queqiao.json", b'{"adapters": {}, "trained": 3}', "queqiao.json: trained is 3; {'file': ...} was expected"),
        ("trained.safetensors", b"short", "trained.safetensors is no readable safetensors file"),
        ("trained.safetensors", None, "no checkpoint at .*trained.safetensors"),
    ):
        before = (folder / name).read_bytes()
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        for read in (
            lambda: adapter_folder.load(chat(pieces), folder),
            lambda: merging.merged(tmp_path, folder, qkv_order=None),
        ):
            with pytest.raises(ValueError, match=expected):
                read()
        (folder / name).write_bytes(before)
