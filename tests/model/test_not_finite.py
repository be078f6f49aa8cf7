"""NaN and infinity in a checkpoint, of whatever format, are refused with the tensor's own name and its file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.adapter import Lora
from model.assemble import assemble, language_model
from model.image_text import ImageTextModel
from model.llm.chatglm import SPECIAL
from model.llm.pieces import Pieces
from model.load import load
from model.qformer import QFormer
from model.quantise import shape_like_quantised
from model.vision.encoder import vision_from_folder
from model.weights import (
    adapter_folder,
    chatglm_folder,
    glm,
    initialise,
    lavis,
    merging,
    sat,
    stage_two,
    visualglm_convert,
    writing,
)
from model.weights.checkpoint import from_tensors, is_finite
from model.weights.filling import Home, Part, fill, send_home
from tests.model import test_weights_bert as bert_reference
from tests.model import test_weights_transformers_blip2 as blip2_reference
from tests.model.glm_common import train_sentencepieces
from tests.model.test_weights_sat import CONFIG, HF_CONFIG, chat_model
from tests.model.weights_common import QFORMER, small_model
from tests.tiny_chat import tiny_chat, train_pieces
from tests.tiny_run import SIZES, chatglm_nodes, glm_nodes

NAN, INFINITE = float("nan"), float("inf")


def spoil(folder: Path, name: str, value: float = NAN) -> Path:
    """One number of a tensor, in whichever file of the folder has it.  -> the file"""
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors" and name in (tensors := load_file(file)):
            tensors[name].flatten()[-1] = value
            save_file(tensors, file, {"format": "pt"})
            return file
        if file.suffix in (".pt", ".pth"):
            whole = torch.load(file, weights_only=True)
            whole.get("model", whole.get("module"))[name].flatten()[-1] = value
            torch.save(whole, file)
            return file
    raise AssertionError(f"{name} is nowhere in {folder}")


def refused(file: Path, name: str, load: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{file}: {name} holds 1 of ") + r".* NaN or infinite"):
        load()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("size", [1, 3, 64, 1000])
def test_every_place_of_a_tensor_counts(dtype: torch.dtype, size: int) -> None:
    largest = torch.finfo(dtype).max
    whole = torch.tensor([largest, -largest, 0.0, 1e-9] * size, dtype=torch.float64).to(dtype)
    assert is_finite(whole) and is_finite(whole[:0])
    values = (NAN,) if dtype is torch.float8_e4m3fn else (NAN, INFINITE, -INFINITE)  # which has no infinity
    for value in values:
        for place in {0, 1, size, len(whole) - 1}:
            spoilt = whole.clone()
            spoilt[place] = value
            assert not is_finite(spoilt), (value, place)


def test_what_has_no_such_numbers_passes() -> None:
    for tensor in (torch.zeros(2, dtype=torch.uint8), torch.ones(2, dtype=torch.bool), torch.zeros(3, device="meta")):
        assert is_finite(tensor)


@pytest.mark.parametrize("value", [NAN, INFINITE, -INFINITE])
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_bert(tmp_path: Path, value: float, shards: str) -> None:
    bert_reference.reference("BertForMaskedLM").save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "20KB")
    file = spoil(tmp_path, "bert.encoder.layer.1.attention.self.value.weight", value)
    load = lambda: initialise(small_model(), qformer=str(tmp_path))  # noqa: E731
    refused(file, "bert.encoder.layer.1.attention.self.value.weight", load)


def test_token_types_only_where_they_are_used(tmp_path: Path) -> None:
    bert_reference.reference("BertForMaskedLM").save_pretrained(tmp_path)
    name = "bert.embeddings.token_type_embeddings.weight"
    file = spoil(tmp_path, name)
    refused(file, name, lambda: initialise(small_model(), qformer=str(tmp_path), token_type="fold"))
    initialise(small_model(), qformer=str(tmp_path))


def test_lavis(tmp_path: Path) -> None:
    source = small_model(seed=1)
    torch.save({"model": lavis.to_lavis(source, dict(source.named_parameters()))}, tmp_path / "blip2.pth")
    file = spoil(tmp_path, "visual_encoder.blocks.1.attn.v_bias")
    refused(file, "visual_encoder.blocks.1.attn.v_bias", lambda: initialise(small_model(), all=str(file)))


def test_transformers_blip2(tmp_path: Path) -> None:
    blip2_reference.reference().save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    name = next(name for name in load_file(file) if name.endswith("qformer.encoder.layer.1.output_query.dense.weight"))
    spoil(tmp_path, name)
    refused(file, name, lambda: initialise(small_model(), all=str(tmp_path)))


def test_ours(tmp_path: Path) -> None:
    tensors = {f"model.{name}": p.detach().clone() for name, p in small_model().named_parameters()}
    save_file(tensors, tmp_path / "weights.safetensors")
    file = spoil(tmp_path, "model.qformer.layers.0.self_attention.query.bias")
    load = lambda: stage_two.initialise(chat_model(), stage_one=str(tmp_path))  # noqa: E731
    refused(file, "model.qformer.layers.0.self_attention.query.bias", load)


@pytest.mark.parametrize(("layout", "order"), [("sat", "blocks"), ("huggingface", "per_head")])
def test_visualglm_and_chatglm(tmp_path: Path, layout: str, order: Any) -> None:
    """The rows that are turned, and a tensor whose halves go to two places."""
    if layout == "sat":
        sat.write(chat_model(1), tmp_path / "theirs", CONFIG)
    else:
        chatglm_folder.write(chat_model(1), tmp_path / "theirs", HF_CONFIG)
    names = [entry.theirs for entry in (sat if layout == "sat" else chatglm_folder).table(chat_model())]
    load = lambda: stage_two.initialise(chat_model(), visualglm=str(tmp_path / "theirs"), qkv_order=order)  # noqa: E731
    load()
    for end in (".layers.0.cross_attention.key_value.bias", ".layers.2.attention.query_key_value.weight"):
        spoilt = [name for name in names if name.endswith(end)][-1]
        file = spoil(tmp_path / "theirs", spoilt)
        refused(file, spoilt, load)
        spoil(tmp_path / "theirs", spoilt, 0.0)


@pytest.mark.parametrize("family", ["chatglm", "chatglm3"])
def test_what_goes_straight_to_its_home(tmp_path: Path, family: str) -> None:
    if family == "chatglm":
        nodes = chatglm_nodes(train_pieces(tmp_path / "ice_text.model"), tmp_path / "base")
        name = "transformer.layers.1.mlp.dense_h_to_4h.weight"
    else:
        nodes = glm_nodes(train_sentencepieces(tmp_path / "tokenizer.model"), tmp_path / "base")
        name = "model.layers.1.mlp.gate_up_proj.weight"
    file = spoil(tmp_path / "base", name)
    home = Home(keep=lambda parameter: None)
    refused(file, name, lambda: assemble(nodes, language_model(nodes), device=torch.device("cpu"), home=home))


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_quantised_as_it_arrives(bits: int) -> None:
    """NaN in so few bits is a number like any other."""
    network = nn.Sequential()
    network.add_module("map", nn.Linear(64, 64, device="meta"))
    shape_like_quantised(network, ("map",), device=torch.device("cpu"), bits=bits)
    tensors = {"w": torch.ones(64, 64), "b": torch.ones(64)}
    tensors["w"][3, 5] = NAN
    parts = [Part("map.weight", ("w",), "all"), Part("map.bias", ("b",), "all")]
    refused(Path("a.pth"), "w", lambda: fill(network, from_tensors(tensors, "a.pth"), parts))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "trained.safetensors"])
def test_an_adapter(tmp_path: Path, file: str) -> None:
    pieces = train_pieces(tmp_path / "ice_text.model")
    model = tiny_chat(pieces)
    Lora(rank=2).attach(model, device=torch.device("cpu"))
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    adapter_folder.save(model, trained, tmp_path / "adapter")
    adapter_folder.load(tiny_chat(pieces), tmp_path / "adapter")
    name = sorted(load_file(tmp_path / "adapter" / file))[0]
    spoil(tmp_path / "adapter", name, INFINITE)
    refused(tmp_path / "adapter" / file, name, lambda: adapter_folder.load(tiny_chat(pieces), tmp_path / "adapter"))


def test_an_encoder_that_transformers_loads(tmp_path: Path) -> None:
    import transformers as t

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    t.CLIPVisionModel(t.CLIPVisionConfig(**sizes, image_size=28, patch_size=14)).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    name = next(name for name in load_file(file) if name.endswith("layers.1.mlp.fc1.weight"))
    spoil(tmp_path, name)
    encoder = vision_from_folder(str(tmp_path), pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3)
    model = ImageTextModel(encoder, QFormer(**QFORMER), embed_dim=12)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{tmp_path}: .*layers.1.mlp.fc1.weight holds 1 of 2048"):
        initialise(model)


def test_a_number_too_large_for_the_precision_is_told_apart() -> None:
    """The file is sound: another precision is the way out."""
    linear = nn.Linear(2, 1, bias=False, device="meta").requires_grad_(False)
    send_home(linear, Home(dtype=torch.float16))
    tensors = {"w": torch.tensor([[1.0, -7e4]])}
    with pytest.raises(ValueError, match=r"w of a\.pth has -70000, weight is kept in float16, which ends at 65504"):
        fill(linear, from_tensors(tensors, "a.pth"), [Part("weight", ("w",), "all")])


def too_large_for_fp16(folder: Path, pieces: Path) -> Path:
    """VisualGLM whose Q-Former has 70000 somewhere, which bfloat16 and float32 hold."""
    model = chat_model(1)
    model.get_parameter(NORM).data[3] = 7e4
    known = Pieces(pieces, special=SPECIAL.values())
    ids = {f"{role}_token_id": known.id_of(piece) for role, piece in SPECIAL.items()}
    sections = {"eva_config": CONFIG["eva_args"], "qformer_config": CONFIG["qformer_args"]}
    return chatglm_folder.write(model, folder, {**HF_CONFIG, **ids, **sections, "image_length": 5})


NORM = "qformer.layers.1.self_attention.output.norm.weight"


def test_what_is_converted_after_it_has_arrived(tmp_path: Path) -> None:
    pieces = train_pieces(tmp_path / "ice_text.model")
    folder = too_large_for_fp16(tmp_path / "hf", pieces)
    for dtype in ("bfloat16", "float32"):
        found = load(folder, tokenizer=pieces, qkv_order="per_head", device="cpu", dtype=dtype)
        assert all(is_finite(parameter) for parameter in found.parameters())
    with pytest.raises(ValueError, match=f"{NORM} has 70000, it is kept in float16, which ends at 65504"):
        load(folder, tokenizer=pieces, qkv_order="per_head", device="cpu", dtype="float16")


@pytest.mark.parametrize("to", ["sat", "huggingface"])
@pytest.mark.parametrize("value", [NAN, INFINITE])
def test_a_conversion_of_visualglm(tmp_path: Path, to: Any, value: float) -> None:
    """In the second shard: the first is taken away again."""
    sat.write(chat_model(1), tmp_path / "theirs", CONFIG)
    name = "transformer.layers.2.attention.query_key_value.weight"
    file = spoil(tmp_path / "theirs", name, value)
    out = tmp_path / "out"
    convert = lambda: visualglm_convert.convert(  # noqa: E731
        tmp_path / "theirs", out, to=to, qkv_order="blocks", target_order="per_head", max_shard_bytes=30_000
    )
    refused(file, name, convert)
    assert not out.exists()
    spoil(tmp_path / "theirs", name, 0.0)
    convert()
    assert any(out.iterdir())


def test_a_conversion_of_chatglm3(tmp_path: Path) -> None:
    nodes = glm_nodes(train_sentencepieces(tmp_path / "tokenizer.model"), tmp_path / "base")
    assert nodes
    name = "model.layers.1.mlp.gate_up_proj.weight"
    file = spoil(tmp_path / "base", name)
    out = tmp_path / "out"
    out.mkdir()
    refused(file, name, lambda: glm.convert(tmp_path / "base", out, family="chatglm3"))
    assert list(out.iterdir()) == []


def test_the_base_of_a_merge(tmp_path: Path) -> None:
    pieces = train_pieces(tmp_path / "ice_text.model")
    chatglm_nodes(pieces, tmp_path / "base")
    model = tiny_chat(pieces, llm=SIZES)
    Lora(rank=2).attach(model, device=torch.device("cpu"))
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    adapter_folder.save(model, trained, tmp_path / "adapter")
    name = "transformer.layers.1.attention.query_key_value.weight"

    def merge(dtype: torch.dtype) -> torch.dtype:
        checkpoint = merging.merged(tmp_path / "base", tmp_path / "adapter", qkv_order="per_head", dtype=dtype)
        return writing.write_folder(checkpoint, tmp_path / "merged", metadata={})

    file = spoil(tmp_path / "base", name)
    refused(file, name, lambda: merge(torch.bfloat16))
    spoil(tmp_path / "base", name, 7e4)
    with pytest.raises(ValueError, match=f"{name} of .* do not fit into float16, which ends at 65504: take bfloat16"):
        merge(torch.float16)
    assert not (tmp_path / "merged").exists()
    assert merge(torch.bfloat16) == torch.bfloat16


def test_what_the_model_does_not_take_may_be_anything() -> None:
    linear = nn.Linear(2, 1, bias=False)
    tensors = {"w": torch.ones(1, 2), "other": torch.tensor([NAN])}
    report = fill(linear, from_tensors(tensors, "a.pth"), [Part("weight", ("w",), "all")])
    assert report.ignored == {"other": 1}
