"""VisualGLM's tensors under our names and back: one table, for SAT's files and for the Hugging Face folder.

Both keep the image encoder and the Q-Former as SAT names them (`visualglm.md` 2.7, 2.8, 2.10).  SAT's Q-Former hangs
the norm after a feed-forward on the next layer's input.  The language model's joint query-key-value rows come in blocks
or head by head, which no file says: `qkv_order` has to, or a tensor known from elsewhere.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model.llm.chatglm import ChatGLM
from model.weights import names
from model.weights.checkpoint import Checkpoint, read_json
from model.weights.filling import LoadReport, Part, fill
from model.weights.names import ENCODER, QUERIES
from model.weights.rows import head_by_head, in_blocks

QkvOrder = Literal["blocks", "per_head"]
ORDERS = typing.get_args(QkvOrder)
Sizes = Mapping[str, Mapping[str, Any]]  # of vision, qformer and llm, as `sat.sizes` gives them
LANGUAGE_MODEL, PROJECTION, LN_VISION = "language model", "projection", "ln_vision"
LAYER_NORM_EPS = 1e-5
LN_VISION_EPS = 1e-5  # of VisualGLM's code (`model/blip2.py`); no config has it
RECORD = "conversion.json"
FIRST_QKV = "transformer.layers.0.attention.query_key_value.weight"
FREQUENCIES = ".rotary_emb.inv_freq"  # SAT's once, Hugging Face's in every layer
_COUNTED = ".position_ids"  # 0, 1, 2, ..., which older transformers saved with ViTs and BERTs
_OLD_POSITIONS = "transformer.position_embeddings.weight"  # of SAT before it left out what ChatGLM does not use


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs: ours one below the other; `num_heads` where it may have to be permuted."""

    theirs: str
    ours: tuple[str, ...]
    block: str
    num_heads: int | None = None

    def to_ours(self, tensor: Tensor, order: QkvOrder) -> tuple[Tensor, ...]:
        if self.num_heads is not None and order == "blocks":
            tensor = head_by_head(tensor, self.num_heads)
        return tensor.chunk(len(self.ours)) if len(self.ours) > 1 else (tensor,)

    def to_theirs(self, tensors: list[Tensor], order: QkvOrder) -> Tensor:
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if self.num_heads is not None and order == "blocks":
            tensor = in_blocks(tensor, self.num_heads)
        leading = (self.ours[0].endswith(_WITH_LEADING_ONE)) and tensor.dim() == 3
        return tensor.reshape(-1, tensor.shape[-1]) if leading else tensor


@dataclass(frozen=True)
class Shape:
    """What the table depends on."""

    vision_layers: int
    looking: tuple[bool, ...]  # for each layer of the Q-Former, whether it looks at the image
    llm_layers: int
    num_heads: int  # of the language model

    @classmethod
    def of_model(cls, model: nn.Module) -> Shape:
        llm = _chatglm(model)
        looking = tuple(layer.cross_attention is not None for layer in names.qformer_layers(model))
        return cls(len(_eva_layers(model)), looking, len(llm.layers), llm.num_heads)

    @classmethod
    def of_sizes(cls, sizes: Sizes) -> Shape:
        qformer, llm = sizes["qformer"], sizes["llm"]
        looking = tuple(index % qformer["cross_attention_frequency"] == 0 for index in range(qformer["num_layers"]))
        return cls(sizes["vision"]["num_layers"], looking, llm["num_layers"], llm["num_heads"])

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, image_prefix: str, num_heads: int) -> Shape:
        def layers(prefix: str) -> set[int]:
            found = (re.match(re.escape(prefix) + r"layers\.(\d+)\.", name) for name in checkpoint.shapes)
            return {int(match[1]) for match in found if match}

        qformer = f"{image_prefix}qformer.transformer."
        looking = tuple(
            f"{qformer}layers.{index}.cross_attention.query.weight" in checkpoint.shapes
            for index in range(len(layers(qformer)))
        )
        return cls(len(layers(f"{image_prefix}vit.transformer.")), looking, len(layers("transformer.")), num_heads)


def _eva_layers(model: nn.Module) -> Any:
    layers = names.encoder_layers(model)
    if not layers:
        raise ValueError(
            "VisualGLM's image encoder is the EVA-ViT (model/vision=eva_vit_g); this model has another one"
        )
    return layers


def _chatglm(model: nn.Module) -> Any:
    llm = model.get_submodule("llm")
    if not isinstance(llm, ChatGLM):
        raise ValueError(
            f"VisualGLM's language model is ChatGLM-6B (model/llm=chatglm_6b); this model has a {type(llm).__name__}"
        )
    return llm


_WITH_LEADING_ONE = ("class_embedding", "position_embedding", "query_tokens.tokens")  # (1, n, W) here, (n, W) there


def entries(shape: Shape, *, image_prefix: str, head: str) -> Iterator[Entry]:
    """The table, always in the same order.

    Args:
        image_prefix: `mixins.eva.model.` in SAT's files, `image_encoder.` in Hugging Face's.
        head: the name of the output head there.
    """
    yield from _vision(shape.vision_layers, f"{image_prefix}vit.")
    yield from _qformer(shape.looking, f"{image_prefix}qformer.transformer.")
    yield from _pair("projection", f"{image_prefix}glm_proj", PROJECTION)
    yield from _language_model(shape.llm_layers, shape.num_heads, head)


def language_model_entries(model: nn.Module, *, head: str) -> list[Entry]:
    """The language model's alone, which may stand behind any image encoder."""
    llm = _chatglm(model)
    return list(_language_model(len(llm.layers), llm.num_heads, head))


def shape_there(entry: Entry, sizes: Sizes) -> tuple[int, ...]:
    """The shape that a tensor of the table has in a model of these sizes; the layers of all three parts are alike."""
    vision, qformer, llm = sizes["vision"], sizes["qformer"], sizes["llm"]
    encoder = (vision["width"], vision["mlp_width"], 1)  # one "word": the class token
    queries = (qformer["hidden_size"], qformer["intermediate_size"], qformer["num_query_tokens"])
    width, inner, num_words = {
        ENCODER: encoder,
        LN_VISION: encoder,
        QUERIES: queries,
        PROJECTION: queries,
        LANGUAGE_MODEL: (llm["hidden_size"], llm["inner_size"], llm["vocab_size"]),
    }[entry.block]
    patch = vision["patch_size"]
    weights = {
        "word_embeddings": (num_words, width),
        "position_embeddings": (1 + (vision["image_size"] // patch) ** 2, width),
        "patch_embedding.proj": (width, 3, patch, patch),
        "attention.query_key_value": (3 * width, width),
        "cross_attention.query": (width, width),
        "cross_attention.key_value": (2 * width, qformer["image_width"]),
        "attention.dense": (width, width),
        "mlp.dense_h_to_4h": (inner, width),
        "mlp.dense_4h_to_h": (width, inner),
        "glm_proj": (llm["hidden_size"], width),
        "lm_head": (num_words, width),
    }
    module, _, kind = entry.theirs.rpartition(".")
    weight = next((shape for end, shape in weights.items() if module.endswith(end)), (width,))  # else a norm
    return weight if kind == "weight" else weight[:1]


def holds_nothing_learned(name: str) -> bool:
    """Tables that published checkpoints keep beside the weights: computed from the config, or never used."""
    return name.endswith((FREQUENCIES, _COUNTED)) or name == _OLD_POSITIONS


def in_our_names(checkpoint: Checkpoint, table: list[Entry], model: nn.Module, order: QkvOrder) -> Checkpoint:
    """The same checkpoint as the model would name it, every tensor still read when it is asked for."""
    targets = dict(model.named_parameters())
    shapes: dict[str, tuple[int, ...]] = {}
    where: dict[str, tuple[Entry, int]] = {}
    known = set()
    for entry in table:
        known.add(entry.theirs)
        shape = checkpoint.shapes.get(entry.theirs)
        for index, ours in enumerate(entry.ours if shape is not None else ()):
            assert shape is not None
            where[ours] = (entry, index)
            own = (shape[0] // len(entry.ours), *shape[1:])
            leading = ours.endswith(_WITH_LEADING_ONE) and ours in targets and targets[ours].dim() == len(own) + 1
            shapes[ours] = (1, *own) if leading else own
    shapes |= {name: shape for name, shape in checkpoint.shapes.items() if name not in known}

    def read(name: str) -> Tensor:
        if name not in where:
            return checkpoint.read(name)
        entry, index = where[name]
        return entry.to_ours(checkpoint.read(entry.theirs), order)[index].reshape(shapes[name])

    return Checkpoint(checkpoint.path, shapes, read)


def check_numbers(model: nn.Module, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """That the model computes with the numbers of a config that no shape shows.

    Args:
        parts: what the config says of `vision`, `qformer` and `llm`, in SAT's keys.
    Raises:
        ValueError: two that differ, with the file, its key and the model's.
    """
    for part, config in parts.items():
        module: Any = model.get_submodule(part)
        if part == "vision":
            _eva_layers(model)
            own = module.network.config.num_attention_heads, module.network.config.layer_norm_eps
        elif part == "qformer":
            own = module.num_heads, module.embedding_norm.eps
        else:
            norm: Any = _chatglm(model).network.get_submodule("transformer.final_layernorm")
            own = module.num_heads, norm.eps
        found = names.whole_number(config, "num_attention_heads"), norm_eps(config)
        keys = ("num_attention_heads", "num_heads"), ("layernorm_epsilon", "layer_norm_eps")
        for theirs, ours, (key, name) in zip(found, own, keys, strict=True):
            names.check_equal(names.place_of(config), theirs, ours, key, f"model.{part}.{name}")


def norm_eps(config: Mapping[str, Any]) -> float:
    """Of the norms of one part; SAT and ChatGLM-6B take 1e-5 where a config names none."""
    return names.positive(config, "layernorm_epsilon") if "layernorm_epsilon" in config else LAYER_NORM_EPS


def load(
    model: nn.Module,
    checkpoint: Checkpoint,
    table: list[Entry],
    order: QkvOrder,
    *,
    must: tuple[str, ...] = (ENCODER, LN_VISION, QUERIES, PROJECTION, LANGUAGE_MODEL),
) -> LoadReport:
    """Fills stage two's model, tensor by tensor.

    Raises:
        ValueError: a part that is missing, whole or by half, another depth, or a shape that does not fit.
    """
    _check_depths(model, checkpoint, table)
    parts = [Part(ours, (ours,), entry.block) for entry in table for ours in entry.ours]
    report = fill(model, in_our_names(checkpoint, table, model, order), parts, must=must)
    if "ln_vision.weight" in report.loaded:
        names.set_ln_vision_eps(model, LN_VISION_EPS, report)
    report.notes.append(f"the language model's query-key-value rows were read as {order!r}")
    left = [name for name in report.ignored if not holds_nothing_learned(name)]
    if left:
        report.notes.append(f"not part of this model: {', '.join(sorted(left)[:5])}{' ...' if len(left) > 5 else ''}")
    return report


def to_theirs(tensors: Mapping[str, Tensor], table: list[Entry], order: QkvOrder) -> dict[str, Tensor]:
    """Our tensors under their names, shapes and rows."""
    missing = [ours for entry in table for ours in entry.ours if ours not in tensors]
    if missing:
        raise ValueError(f"the model lacks {len(missing)} tensors that VisualGLM has (first: {missing[:3]})")
    return {entry.theirs: entry.to_theirs([tensors[ours] for ours in entry.ours], order) for entry in table}


def recorded_order(folder: Path) -> QkvOrder | None:
    """What a conversion of ours wrote beside the weights (`conversion.json`)."""
    file = folder / RECORD
    order: QkvOrder | None = read_json(file).get("qkv_order") if file.is_file() else None
    if order not in (None, *ORDERS):
        raise ValueError(f"{file} has qkv_order {order!r}; it can be {' or '.join(ORDERS)}")
    return order


def resolve_order(
    checkpoint: Checkpoint,
    order: QkvOrder | None,
    *,
    num_heads: int,
    reference: Tensor | None = None,
    recorded: QkvOrder | None = None,
) -> QkvOrder:
    """What `--qkv-order` says; or what `reference`, the first layer's joint weight head by head, shows; or what a
    conversion of ours recorded.

    Raises:
        ValueError: none of them is there, the reference is of other weights, or they disagree.
    """
    if order not in (None, *ORDERS):
        raise ValueError(f"qkv_order is {order!r}; it can be blocks (SAT 0.4.1 and later) or per_head (Hugging Face)")
    if reference is None:
        if recorded is not None and order not in (None, recorded):
            raise ValueError(f"{checkpoint.path} was written in order {recorded!r}, as {RECORD} says, not {order!r}")
        order = order or recorded
        if order is None:
            raise ValueError(
                f"{checkpoint.path} does not say in which order the rows of query_key_value are. Give --qkv-order (of a "
                f"run: model.weights.qkv_order): blocks (SAT 0.4.1 and later, VisualGLM-6B as released since) or "
                f"per_head (Hugging Face folders, SAT before 0.4.1, XrayGLM); the wrong one loads without an error and "
                f"answers nonsense"
            )
        return order
    shown = _shown_order(checkpoint, reference, num_heads)
    for said, by in ((order, ""), (recorded, f", as {RECORD} says")):
        if said not in (None, shown):
            raise ValueError(
                f"{checkpoint.path} has its rows in order {shown!r}, as the reference shows, not {said!r}{by}"
            )
    return shown


def _shown_order(checkpoint: Checkpoint, reference: Tensor, num_heads: int) -> QkvOrder:
    found = checkpoint.read(FIRST_QKV)
    if found.shape == reference.shape:
        known = reference.to(found.dtype)
        if torch.equal(found, known):
            return "per_head"
        if torch.equal(found, in_blocks(known, num_heads)):
            return "blocks"
    raise ValueError(
        f"{FIRST_QKV} of {checkpoint.path} is the reference's in neither order: other weights, or fine-tuned"
    )


# ---------------------------------------------------------------------------------------------------------- the table


def _pair(ours: str, theirs: str, block: str, *, num_heads: int | None = None) -> Iterator[Entry]:
    for kind in ("weight", "bias"):
        yield Entry(f"{theirs}.{kind}", (f"{ours}.{kind}",), block, num_heads)


def _joint(ours: tuple[str, ...], theirs: str, block: str) -> Iterator[Entry]:
    for kind in ("weight", "bias"):
        yield Entry(f"{theirs}.{kind}", tuple(f"{name}.{kind}" for name in ours), block)


def _vision(num_layers: int, vit: str) -> Iterator[Entry]:
    network = "vision.network."
    words, places = f"{network}embeddings.class_embedding", f"{network}embeddings.position_embedding"
    yield Entry(f"{vit}transformer.word_embeddings.weight", (words,), ENCODER)
    yield Entry(f"{vit}transformer.position_embeddings.weight", (places,), ENCODER)
    yield from _pair(f"{network}embeddings.patch_embedding", f"{vit}mixins.patch_embedding.proj", ENCODER)
    for index in range(num_layers):
        ours, theirs = f"{network}encoder.layers.{index}.", f"{vit}transformer.layers.{index}."
        for mine, name in (
            ("layer_norm1", "input_layernorm"),
            ("self_attn.qkv", "attention.query_key_value"),
            ("self_attn.projection", "attention.dense"),
            ("layer_norm2", "post_attention_layernorm"),
            ("mlp.fc1", "mlp.dense_h_to_4h"),
            ("mlp.fc2", "mlp.dense_4h_to_h"),
        ):
            yield from _pair(ours + mine, theirs + name, ENCODER)
    yield from _pair("ln_vision", f"{vit}mixins.cls.ln_vision", LN_VISION)


def _qformer(looking: tuple[bool, ...], theirs: str) -> Iterator[Entry]:
    yield Entry(f"{theirs}word_embeddings.weight", ("qformer.query_tokens.tokens",), QUERIES)
    yield from _pair("qformer.embedding_norm", f"{theirs}layers.0.input_layernorm", QUERIES)
    for index, looks in enumerate(looking):
        ours, layer = f"qformer.layers.{index}.", f"{theirs}layers.{index}."
        attention = tuple(f"{ours}self_attention.{name}" for name in ("query", "key", "value"))
        yield from _joint(attention, f"{layer}attention.query_key_value", QUERIES)
        yield from _pair(f"{ours}self_attention.output.dense", f"{layer}attention.dense", QUERIES)
        yield from _pair(f"{ours}self_attention.output.norm", f"{layer}post_attention_layernorm", QUERIES)
        if looks:
            cross, image = f"{ours}cross_attention.", f"{ours}cross_attention.image."
            yield from _pair(f"{cross}query", f"{layer}cross_attention.query", QUERIES)
            yield from _joint((f"{image}key", f"{image}value"), f"{layer}cross_attention.key_value", QUERIES)
            yield from _pair(f"{cross}output.dense", f"{layer}cross_attention.dense", QUERIES)
            yield from _pair(f"{cross}output.norm", f"{layer}post_cross_attention_layernorm", QUERIES)
        yield from _pair(f"{ours}query_feed_forward.dense", f"{layer}mlp.dense_h_to_4h", QUERIES)
        yield from _pair(f"{ours}query_feed_forward.output.dense", f"{layer}mlp.dense_4h_to_h", QUERIES)
        after = f"layers.{index + 1}.input_layernorm" if index + 1 < len(looking) else "final_layernorm"
        yield from _pair(f"{ours}query_feed_forward.output.norm", theirs + after, QUERIES)


def _language_model(num_layers: int, num_heads: int, head: str) -> Iterator[Entry]:
    ours = "llm.network."
    yield Entry("transformer.word_embeddings.weight", (f"{ours}transformer.word_embeddings.weight",), LANGUAGE_MODEL)
    for index in range(num_layers):
        layer = f"transformer.layers.{index}."
        for name in ("input_layernorm", "post_attention_layernorm", "attention.dense"):
            yield from _pair(ours + layer + name, layer + name, LANGUAGE_MODEL)
        joint = f"{layer}attention.query_key_value"
        yield from _pair(ours + joint, joint, LANGUAGE_MODEL, num_heads=num_heads)
        for name in ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"):
            yield from _pair(ours + layer + name, layer + name, LANGUAGE_MODEL)
    yield from _pair(f"{ours}transformer.final_layernorm", "transformer.final_layernorm", LANGUAGE_MODEL)
    yield Entry(head, (f"{ours}lm_head.weight",), LANGUAGE_MODEL)


def _check_depths(model: nn.Module, checkpoint: Checkpoint, table: list[Entry]) -> None:
    """More layers there than here would be left out without a word."""
    known = {entry.theirs for entry in table}
    deeper = [name for name in checkpoint.shapes if ".layers." in f".{name}" and name not in known]
    deeper = [name for name in deeper if "lora" not in name and "matrix_" not in name]
    deeper = [name for name in deeper if not holds_nothing_learned(name)]
    if deeper:
        raise ValueError(
            f"{checkpoint.path} has layers that this model does not: {len(deeper)} tensors (first: {min(deeper)}). Set "
            f"the depths of model.vision, model.qformer and model.llm as its config has them"
        )
