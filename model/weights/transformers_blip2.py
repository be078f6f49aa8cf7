"""BLIP-2 folders of transformers (`Salesforce/blip2-*`): `Blip2ForImageTextRetrieval`, `Blip2Model` and
`Blip2ForConditionalGeneration` (whose language model is left alone), in one file or in shards.

Names: transformers `models/blip_2/modeling_blip_2.py`.  It has no language head and no temperature: those stay new.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from model.weights import names
from model.weights.checkpoint import open_folder, read_config
from model.weights.filling import LoadReport, Part, fill
from model.weights.names import ENCODER, QUERIES, TEXT

_VISION = "vision_model."
_OTHER_MODELS = ("language_model.", "language_projection.", "model.language_model.", "model.language_projection.")


def load(model: nn.Module, path: Path, *, only: str | None = None) -> LoadReport:
    """Fill `model` from a folder.

    Args:
        only: "vision" or "qformer" (with what is around it); None for whatever the folder has.
    Raises:
        ValueError: another kind of model, other numbers of heads or layers, a shape that does not fit.
    """
    config = read_config(path)
    if config.get("model_type") not in ("blip-2", "blip_2"):
        raise ValueError(f"{path} holds a model of type {config.get('model_type')!r}, not BLIP-2")
    checkpoint = open_folder(path).without_prefix("model.", "blip2.")
    if only != "qformer":
        _check_vision(model, str(path), config.get("vision_config") or {})
        names.check_depth(checkpoint, f"{_VISION}encoder.layers.", len(names.encoder_layers(model)), "image encoder")
    if only != "vision":
        _check_qformer(model, str(path), config.get("qformer_config") or {})
        names.check_depth(checkpoint, "qformer.encoder.layer.", len(names.qformer_layers(model)), "Q-Former")
    wanted = [part for part in parts(model) if only is None or (part.block == ENCODER) == (only == "vision")]
    if only is None:
        must = [QUERIES, ENCODER] if names.encoder_layers(model) else [QUERIES]
    else:
        must = [ENCODER if only == "vision" else QUERIES]
    report = fill(model, checkpoint, wanted, must=must)
    if "ln_vision.weight" in report.loaded:
        # its post_layernorm, which has the eps of the encoder's norms
        eps = float((config.get("vision_config") or {}).get("layer_norm_eps", 1e-6))
        names.set_ln_vision_eps(model, eps, report)
    _note_other_models(report)
    return report


def parts(model: nn.Module) -> Iterator[Part]:
    """transformers' names for everything that stage one's model, or a part of it, can have."""
    layers = names.encoder_layers(model)
    if layers:
        ours = "vision.network."
        for name in ("class_embedding", "position_embedding"):
            yield Part(f"{ours}embeddings.{name}", (f"{_VISION}embeddings.{name}",), ENCODER)
        yield from names.linear(f"{ours}embeddings.patch_embedding", f"{_VISION}embeddings.patch_embedding", ENCODER)
        for index in range(len(layers)):
            for name in ("self_attn.qkv", "self_attn.projection", "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"):
                layer = f"encoder.layers.{index}.{name}"
                yield from names.linear(ours + layer, _VISION + layer, ENCODER)
    yield from names.linear("ln_vision", f"{_VISION}post_layernorm", "ln_vision")
    yield Part("qformer.query_tokens.tokens", ("query_tokens",), QUERIES)
    yield from names.linear("qformer.embedding_norm", "qformer.layernorm", QUERIES)
    yield Part("qformer.embedding.word.weight", ("embeddings.word_embeddings.weight",), TEXT, grow=True)
    yield Part("qformer.embedding.position.weight", ("embeddings.position_embeddings.weight",), TEXT)
    for index in range(len(names.qformer_layers(model))):
        to, of = f"qformer.layers.{index}.", f"qformer.encoder.layer.{index}."
        yield from names.qformer_layer(to, of, inner="attention")
    for mine, theirs in (("vision_proj", "vision_projection"), ("text_proj", "text_projection"), ("itm_head",) * 2):
        yield from names.linear(mine, theirs, mine)


def _check_vision(model: nn.Module, path: str, theirs: dict[str, Any]) -> None:
    if not names.encoder_layers(model):
        return
    ours = getattr(model, "vision").network.config  # noqa: B009 - nn.Module's attributes have no type
    for key, default in (("num_attention_heads", 16), ("layer_norm_eps", 1e-6), ("patch_size", 14)):
        names.check_equal(path, theirs.get(key, default), getattr(ours, key), f"vision_config.{key}", "the encoder's")
    act = theirs.get("hidden_act", "gelu")
    names.check_equal(path, act, ours.hidden_act, "vision_config.hidden_act", "the encoder's")


def _check_qformer(model: nn.Module, path: str, theirs: dict[str, Any]) -> None:
    qformer = getattr(model, "qformer", None)
    if qformer is None:
        return
    heads, eps = theirs.get("num_attention_heads", 12), theirs.get("layer_norm_eps", 1e-12)
    names.check_equal(path, heads, qformer.num_heads, "qformer_config.num_attention_heads", "qformer.num_heads")
    names.check_equal(path, eps, qformer.embedding_norm.eps, "qformer_config.layer_norm_eps", "qformer.layer_norm_eps")
    frequency = theirs.get("cross_attention_frequency", 2)
    looking = [index for index, layer in enumerate(qformer.layers) if layer.cross_attention is not None]
    expected = list(range(0, len(qformer.layers), frequency))
    names.check_equal(path, expected, looking, "cross-attention in layers", "it in layers")


def _note_other_models(report: LoadReport) -> None:
    other = [name for name in report.ignored if name.startswith(_OTHER_MODELS)]
    if other:
        report.notes.append(f"{len(other)} tensors belong to the language model of stage two and were not read")
