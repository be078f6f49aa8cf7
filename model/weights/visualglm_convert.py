"""VisualGLM from SAT's layout to Hugging Face's and back, tensor by tensor, without building a model.

What is written records its row order in `conversion.json`, so that nobody has to ask again, and which tables of the
source it left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.weights import chatglm_folder, names, sat, visualglm, writing
from model.weights.checkpoint import Checkpoint, Config, open_folder
from model.weights.checkpoint import read_config as read_huggingface_config
from model.weights.visualglm import FREQUENCIES, RECORD, Entry, QkvOrder, Shape, holds_nothing_learned

Layout = Literal["sat", "huggingface"]
USUAL_ORDER: Mapping[str, QkvOrder] = {"sat": "blocks", "huggingface": "per_head"}
_SAME_KEYS = {  # SAT's model_config.json <-> Hugging Face's config.json
    "hidden_size": "hidden_size",
    "num_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "inner_hidden_size": "inner_hidden_size",
    "vocab_size": "vocab_size",
    "layernorm_epsilon": "layernorm_epsilon",
    "max_sequence_length": "max_sequence_length",
    "image_length": "image_length",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "mask_token_id": "mask_token_id",
    "gmask_token_id": "gmask_token_id",
    "pad_token_id": "pad_token_id",
    "eva_args": "eva_config",
    "qformer_args": "qformer_config",
}
_COMES_ALONG = ("ice_text.model", "tokenizer_config.json", "LICENSE*", "MODEL_LICENSE*")


def layout_of(folder: Path) -> Layout:
    if (folder / "model_config.json").is_file():
        return "sat"
    if (folder / "config.json").is_file():
        return "huggingface"
    raise ValueError(f"{folder} is neither SAT's (model_config.json) nor Hugging Face's (config.json)")


def convert(
    source: Path,
    target: Path,
    *,
    to: Layout,
    qkv_order: QkvOrder | None,
    reference: Tensor | None = None,
    target_order: QkvOrder | None = None,
    leave_lora: bool = False,
    max_shard_bytes: int = writing.MAX_SHARD_BYTES,
) -> Path:
    """Writes VisualGLM's folder `source`, of either layout, as `target`.  Numbers keep their precision.

    Args:
        qkv_order, reference: of the source; see `visualglm.resolve_order`.
        target_order: blocks for SAT 0.4.1 and later, per_head for Hugging Face, unless another is asked for.
        leave_lora: take the base alone of a SAT checkpoint with a LoRA.
    Raises:
        ValueError: a target that is not empty, an order that nobody names, or tensors that are missing, unexpected or
            of another shape than the config says, by name.
    """
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty: nothing was written")
    layout, config = layout_of(source), read_config(source)
    checkpoint = sat.open_folder(source, leave_lora=leave_lora) if layout == "sat" else open_folder(source)
    sizes = sat.sizes(config)
    _check(checkpoint, layout, sizes)
    order = visualglm.resolve_order(
        checkpoint,
        qkv_order,
        num_heads=config["num_attention_heads"],
        reference=reference,
        recorded=visualglm.recorded_order(source),
    )
    new_order = target_order or USUAL_ORDER[to]
    converted = renamed(checkpoint, Shape.of_sizes(sizes), (layout, order), (to, new_order))
    metadata = {"source": str(source), "qkv_order": new_order, "source_qkv_order": order}
    left_out = _by_kind([name for name in checkpoint.shapes if holds_nothing_learned(name)])
    if to == "huggingface":
        writing.write_folder(converted, target, max_shard_bytes=max_shard_bytes, metadata=metadata)
        writing.write_json(target / "config.json", _config(config, to))
    else:
        # SAT knows one file; ours are mapped
        tensors = {name: writing.read_finite(converted, name) for name in converted.shapes}
        sat.write_tensors(tensors, target, _config(config, to), num_heads=config["num_attention_heads"])
    writing.write_json(target / RECORD, {**metadata, "left_out": left_out})
    writing.copy_files(source, target, _COMES_ALONG)
    return target


def renamed(
    checkpoint: Checkpoint, shape: Shape, there: tuple[Layout, QkvOrder], here: tuple[Layout, QkvOrder]
) -> Checkpoint:
    """A whole VisualGLM under the other layout's names, in the other order, each tensor read when it is asked for."""
    (layout, order), (to, new_order) = there, here
    pairs = zip(_table(shape, layout), _table(shape, to), strict=True)
    where = {new.theirs: (old, new) for old, new in pairs}

    def read(name: str) -> Tensor:
        old, new = where[name]
        tensor = checkpoint.read(old.theirs)
        if old.num_heads is None or order == new_order:
            return tensor
        return new.to_theirs([torch.cat(old.to_ours(tensor, order))], new_order)

    return Checkpoint(checkpoint.path, {new: checkpoint.shapes[old.theirs] for new, (old, _) in where.items()}, read)


def read_config(folder: Path) -> Config:
    """In SAT's keys, of either layout.

    Raises:
        ValueError: a folder of something else, by name.
    """
    if layout_of(folder) == "sat":
        return sat.read_config(folder)
    config = read_huggingface_config(folder)
    chatglm_folder.sizes(config)
    missing = [key for key in ("eva_config", "qformer_config") if not isinstance(config.get(key), dict)]
    missing += ["image_length"] if "image_length" not in config else []
    if missing:
        raise ValueError(f"{folder}/config.json is not VisualGLM's: it has no {', '.join(missing)}")
    in_sats_keys = {ours: config[theirs] for ours, theirs in _SAME_KEYS.items() if theirs in config}
    return sat.with_defaults(Config(in_sats_keys, config.place))


def _check(checkpoint: Checkpoint, layout: Layout, sizes: visualglm.Sizes) -> None:
    expected = {entry.theirs: visualglm.shape_there(entry, sizes) for entry in _table(Shape.of_sizes(sizes), layout)}
    # the number of heads is in the shape of no weight, but in that of the table of frequencies
    num_frequencies = len(range(0, sizes["llm"]["hidden_size"] // sizes["llm"]["num_heads"] // 2, 2))
    tables = [name for name in checkpoint.shapes if name.endswith(FREQUENCIES)]
    expected |= dict.fromkeys(tables, (num_frequencies,))
    names.check_whole(checkpoint, expected, computed=holds_nothing_learned)


def _by_kind(names: list[str]) -> dict[str, int]:
    """Names with a star for the number of a layer -> how many of them there are."""
    return dict(Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))


def _config(config: Mapping[str, Any], to: Layout) -> dict[str, Any]:
    """From SAT's keys."""
    usual_eos = {"eos_token_id": config["bos_token_id"] + 1}  # SAT's files leave it out
    if to == "sat":
        names = {"model_class": "VisualGLMModel", "tokenizer_type": "THUDM/chatglm-6b", "layernorm_order": "post"}
        told = {key: value for key, value in config.items() if (key, value) not in usual_eos.items()}
        return {**names, "model_parallel_size": 1, **told}
    own: dict[str, Any] = {"model_type": "chatglm", "architectures": ["ChatGLMForConditionalGenerationWithImage"]}
    shared = {theirs: config[ours] for ours, theirs in _SAME_KEYS.items() if ours in config}
    return {**own, "position_encoding_2d": True, **usual_eos, **shared}


def _module(layout: Layout) -> Any:
    return {"sat": sat, "huggingface": chatglm_folder}[layout]


def _table(shape: Shape, layout: Layout) -> list[Entry]:
    module = _module(layout)
    return list(visualglm.entries(shape, image_prefix=module.IMAGE_PREFIX, head=module.HEAD))
