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

from model.weights import names, visualglm, writing
from model.weights.checkpoint import from_tensors, open_folder, read_config
from model.weights.filling import LoadReport
from model.weights.rows import head_by_head
from model.weights.visualglm import FIRST_QKV, LANGUAGE_MODEL, Entry, QkvOrder, Shape

IMAGE_PREFIX, HEAD = "image_encoder.", "lm_head.weight"
_SEEING = {"vision": "eva_config", "qformer": "qformer_config"}  # VisualGLM's parts of config.json


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `model.llm.chatglm.chatglm` for a `config.json` of ChatGLM-6B or VisualGLM-6B.

    Raises:
        ValueError: another model, by name; a key that is missing, or whose value cannot be, with the file.
    """
    if config.get("model_type") != "chatglm" or "inner_hidden_size" not in config:
        kind = config.get("model_type", "unknown")
        raise ValueError(f"the folder's config.json is of type {kind!r} and not ChatGLM-6B's (no inner_hidden_size)")
    told = [role for role in ("bos", "eos", "gmask", "mask", "pad") if config.get(f"{role}_token_id") is not None]
    return {
        "hidden_size": names.whole_number(config, "hidden_size"),
        "num_layers": names.whole_number(config, "num_layers"),
        "num_heads": names.divides(config, "num_attention_heads", "hidden_size"),
        "inner_size": names.whole_number(config, "inner_hidden_size"),
        "vocab_size": names.whole_number(config, "vocab_size"),
        "layer_norm_eps": visualglm.norm_eps(config),
        "ids": {role: names.whole_number(config, f"{role}_token_id", least=0) for role in told},
    }


def load(model: nn.Module, folder: Path, *, qkv_order: QkvOrder | None, reference: Tensor | None = None) -> LoadReport:
    """Fills the language model of stage two's model, and the rest of it where the folder has it (VisualGLM).

    Raises:
        ValueError: see `visualglm.check_numbers`, `visualglm.load`; another model's config; a missing shard.
    """
    config = read_config(folder)
    sees = {part: config[key] for part, key in _SEEING.items() if isinstance(config.get(key), dict)}
    num_heads = sizes(config)["num_heads"]
    visualglm.check_numbers(model, {"llm": config, **sees})
    checkpoint = open_folder(folder)
    order = visualglm.resolve_order(
        checkpoint, qkv_order, num_heads=num_heads, reference=reference, recorded=visualglm.recorded_order(folder)
    )
    if any(name.startswith(IMAGE_PREFIX) for name in checkpoint.shapes):
        report = visualglm.load(model, checkpoint, table(model), order)
        untold = [part for part in _SEEING if part not in sees]
        if untold:
            report.notes.append(
                f"{config.place} has no {' and no '.join(_SEEING[part] for part in untold)}: whether the heads and the "
                f"eps of {' and '.join(f'model.{part}' for part in untold)} are those of the weights is not known"
            )
        return report
    own = visualglm.language_model_entries(model, head=HEAD)
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
