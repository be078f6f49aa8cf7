"""LAVIS's BLIP-2 checkpoints (`blip2_pretrained.pth` and its kin, stage one and two), and the bare `eva_vit_g.pth`.

Names: LAVIS `lavis/models/blip2_models/{blip2_qformer,Qformer}.py`, `lavis/models/eva_vit.py`.  Its files hold the
weights under "model", beside the optimizer or not, and sometimes leave the frozen encoder out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from model.weights import names
from model.weights.checkpoint import Checkpoint, from_tensors, open_file
from model.weights.filling import LoadReport, Part, fill
from model.weights.names import ENCODER, LANGUAGE_HEAD, QUERIES, TEXT

LN_VISION_EPS = 1e-5
_VISION = "visual_encoder."
_HEAD = "Qformer.cls.predictions."
_LAYERS = "Qformer.bert.encoder.layer."
_TIED = {  # LAVIS stores these twice
    f"{_HEAD}decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    f"{_HEAD}decoder.bias": f"{_HEAD}bias",
}


def load(model: nn.Module, path: Path, *, only: str | None = None) -> LoadReport:
    """Fill `model` from a LAVIS file (`.pth`, or `.safetensors` under the same names).

    Args:
        only: "vision" or "qformer" (with what is around it); None for whatever the file has.
    Raises:
        ValueError: see `filling.fill`.
    """
    return _load(model, open_file(path), only)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> LoadReport:
    """The same from tensors in memory."""
    return _load(model, from_tensors(tensors), None)


def to_lavis(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names, weights or gradients, whole or some of them -> under LAVIS's names and shapes."""
    out: dict[str, Tensor] = {}
    for part in parts(model):
        if part.target in tensors:
            tensor = tensors[part.target]
            out[part.sources[0]] = tensor[slice(*part.target_rows)] if part.target_rows else tensor
    if "temp" in out:
        out["temp"] = out["temp"].reshape(())
    return out | {copy: out[name] for copy, name in _TIED.items() if name in out}


def parts(model: nn.Module) -> Iterator[Part]:
    """LAVIS's names for everything that stage one's model, or a part of it, can have."""
    yield from _encoder(model)
    yield Part("qformer.query_tokens.tokens", ("query_tokens",), QUERIES)
    embeddings = "Qformer.bert.embeddings."
    yield from names.linear("qformer.embedding_norm", f"{embeddings}LayerNorm", QUERIES)
    word, position = f"{embeddings}word_embeddings.weight", f"{embeddings}position_embeddings.weight"
    yield Part("qformer.embedding.word.weight", (word,), TEXT, grow=True)
    yield Part("qformer.embedding.position.weight", (position,), TEXT)
    for index in range(len(names.qformer_layers(model))):
        yield from names.qformer_layer(f"qformer.layers.{index}.", f"{_LAYERS}{index}.", inner="self")
    yield from names.linear("qformer.language_head.dense", f"{_HEAD}transform.dense", LANGUAGE_HEAD)
    yield from names.linear("qformer.language_head.norm", f"{_HEAD}transform.LayerNorm", LANGUAGE_HEAD)
    bias = (f"{_HEAD}bias", f"{_HEAD}decoder.bias")
    yield Part("qformer.language_head.decoder.bias", bias, LANGUAGE_HEAD, grow=True)
    for name in ("ln_vision", "vision_proj", "text_proj", "itm_head"):
        yield from names.linear(name, name, name)
    yield Part("temperature.value", ("temp",), "temperature")


def _encoder(model: nn.Module) -> Iterator[Part]:
    layers = names.encoder_layers(model)
    if not layers:
        return
    width = int(getattr(model, "vision").width)  # noqa: B009 - nn.Module's attributes have no type
    ours = "vision.network."
    yield Part(f"{ours}embeddings.class_embedding", (f"{_VISION}cls_token",), ENCODER)
    yield Part(f"{ours}embeddings.position_embedding", (f"{_VISION}pos_embed",), ENCODER)
    yield from names.linear(f"{ours}embeddings.patch_embedding", f"{_VISION}patch_embed.proj", ENCODER)
    for index in range(len(layers)):
        to, of = f"{ours}encoder.layers.{index}.", f"{_VISION}blocks.{index}."
        yield Part(f"{to}self_attn.qkv.weight", (f"{of}attn.qkv.weight",), ENCODER)
        yield Part(f"{to}self_attn.qkv.bias", (f"{of}attn.q_bias",), ENCODER, target_rows=(0, width))
        yield Part(f"{to}self_attn.qkv.bias", (f"{of}attn.v_bias",), ENCODER, target_rows=(2 * width, 3 * width))
        yield from names.linear(f"{to}self_attn.projection", f"{of}attn.proj", ENCODER)
        for mine, theirs in (("layer_norm1", "norm1"), ("layer_norm2", "norm2"), ("mlp.fc1", "mlp.fc1")):
            yield from names.linear(to + mine, of + theirs, ENCODER)
        yield from names.linear(f"{to}mlp.fc2", f"{of}mlp.fc2", ENCODER)


def _load(model: nn.Module, checkpoint: Checkpoint, only: str | None) -> LoadReport:
    bare = "blocks.0.attn.qkv.weight" in checkpoint.shapes  # eva_vit_g.pth: the encoder without the name of its place
    if bare:
        checkpoint = checkpoint.with_prefix(_VISION)
    wanted = [part for part in parts(model) if only is None or (part.block == ENCODER) == (only == "vision")]
    num_layers = len(names.encoder_layers(model))
    if only != "qformer":
        # EVA-CLIP has a 40th block, which BLIP-2 leaves out
        theirs = names.check_depth(checkpoint, f"{_VISION}blocks.", num_layers, "image encoder", spare=int(bare))
    if only != "vision":
        names.check_depth(checkpoint, _LAYERS, len(names.qformer_layers(model)), "Q-Former")
    must = {"vision": [ENCODER], "qformer": [QUERIES]}.get(only or "", [])
    report = fill(model, checkpoint, wanted, must=must)
    if not report.loaded:
        raise ValueError(f"{checkpoint.path} holds nothing of this model under LAVIS's names")
    if bare and theirs > num_layers:
        report.notes.append(f"block {num_layers} of EVA-CLIP is not part of BLIP-2's encoder and was left out")
    if any(name.startswith("vision.") for name in report.loaded):
        _zero_key_bias(model)
    if "ln_vision.weight" in report.loaded:
        names.set_ln_vision_eps(model, LN_VISION_EPS, report)
    return report


@torch.no_grad()
def _zero_key_bias(model: nn.Module) -> None:
    """LAVIS has no such bias (a shift of all keys changes no softmax)."""
    for layer in names.encoder_layers(model):
        width = layer.self_attn.qkv.bias.shape[0] // 3
        layer.self_attn.qkv.bias[width : 2 * width].zero_()
