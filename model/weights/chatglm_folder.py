"""Hugging Face folders of ChatGLM-6B and VisualGLM-6B: `config.json`, one file of weights or shards with an index.

No code of the folder is run.  The language model's names are ours; VisualGLM's `image_encoder.*` are SAT's
(`visualglm.md` 2.10).  ChatGLM-6B's own folders keep the query-key-value rows head by head, but a converter may have
made a folder of blocks: `qkv_order` says, or a known tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from model.weights import visualglm, writing
from model.weights.checkpoint import from_tensors, open_folder, read_config
from model.weights.filling import LoadReport
from model.weights.rows import head_by_head
from model.weights.visualglm import FIRST_QKV, LANGUAGE_MODEL, Entry, QkvOrder, Shape

IMAGE_PREFIX, HEAD = "image_encoder.", "lm_head.weight"


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `model.llm.chatglm.chatglm` for a `config.json` of ChatGLM-6B or VisualGLM-6B.

    Raises:
        ValueError: another model, by name.
    """
    if config.get("model_type") != "chatglm" or "inner_hidden_size" not in config:
        kind = config.get("model_type", "unknown")
        raise ValueError(f"the folder's config.json is of type {kind!r} and not ChatGLM-6B's (no inner_hidden_size)")
    found = {
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "inner_size": config["inner_hidden_size"],
        "vocab_size": config["vocab_size"],
        "layer_norm_eps": config.get("layernorm_epsilon", 1e-5),
    }
    roles = {"bos": "bos", "eos": "eos", "gmask": "gmask", "mask": "mask", "pad": "pad"}
    ids = {role: config.get(f"{name}_token_id") for role, name in roles.items()}
    return {**found, "ids": {role: number for role, number in ids.items() if number is not None}}


def load(model: nn.Module, folder: Path, *, qkv_order: QkvOrder | None, reference: Tensor | None = None) -> LoadReport:
    """Fills the language model of stage two's model, and the rest of it where the folder has it (VisualGLM).

    Raises:
        ValueError: see `visualglm.load`; sizes that no shape shows; a missing shard.
    """
    config = read_config(folder)
    theirs = sizes(config)
    llm: Any = getattr(model, "llm")  # noqa: B009 - nn.Module's attributes have no type
    if theirs["num_heads"] != llm.num_heads:
        raise ValueError(f"{folder} has {theirs['num_heads']} attention heads, model.llm {llm.num_heads}")
    checkpoint = open_folder(folder)
    order = visualglm.resolve_order(
        checkpoint, qkv_order, num_heads=llm.num_heads, reference=reference, recorded=visualglm.recorded_order(folder)
    )
    if any(name.startswith(IMAGE_PREFIX) for name in checkpoint.shapes):
        return visualglm.load(model, checkpoint, table(model), order)
    own = [entry for entry in table(model) if entry.block == LANGUAGE_MODEL]
    return visualglm.load(model, checkpoint, own, order, must=(LANGUAGE_MODEL,))


def known_rows(folder: Path) -> Tensor:
    """A ChatGLM-6B folder's first joint weight, head by head, to compare with (`visualglm.resolve_order`).

    Hugging Face's folders have it so; in one that a conversion of ours wrote in blocks it is turned.
    """
    checkpoint = open_folder(folder)
    if FIRST_QKV not in checkpoint.shapes:
        raise ValueError(f"{folder} has no {FIRST_QKV}: it is no Hugging Face folder of ChatGLM-6B")
    rows = checkpoint.read(FIRST_QKV)
    if visualglm.recorded_order(folder) == "blocks":
        return head_by_head(rows, sizes(read_config(folder))["num_heads"])
    return rows


def write(model: nn.Module, folder: Path, config: Mapping[str, Any], *, qkv_order: QkvOrder = "per_head") -> Path:
    """VisualGLM's Hugging Face layout in safetensors; `config` is what `config.json` shall hold.

    Raises ValueError where the folder is not empty.
    """
    own = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    tensors = visualglm.to_theirs(own, table(model), qkv_order)
    writing.write_folder(from_tensors(tensors), folder, metadata={"qkv_order": qkv_order})
    writing.write_json(folder / "config.json", config)
    return folder


def table(model: nn.Module) -> list[Entry]:
    return list(visualglm.entries(Shape.of_model(model), image_prefix=IMAGE_PREFIX, head=HEAD))
