"""LoRA as VisualGLM and XrayGLM trained it (SAT's `matrix_A`, `matrix_B`) -> an adapter in peft's own layout.

SAT gives query, key and value a pair of matrices each: `matrix_A.0..2` (r, D) and `matrix_B.0..2` (D, r), and `dense`
one (`sat/model/finetune/lora2.py`).  In peft a joint linear map has one pair: the three A one below the other, the
three B along the diagonal, at rank 3r.  Pair 0 is always the query, whatever the order of the base's rows (SAT 0.4.1
and later lays the outputs one after the other, XrayGLM's `lora_mixin.py` weaves them in by `head_first`), so an adapter
alone needs no `qkv_order`; its base does.  Our rows are head by head, and so is what is written.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.weights.checkpoint import Checkpoint, require_finite
from model.weights.names import divides, whole_number
from model.weights.rows import head_by_head

_PAIR = re.compile(r"transformer\.layers\.(\d+)\.attention\.(query_key_value|dense)\.matrix_([AB])\.(\d+)")
_PARTS = {"query_key_value": "012", "dense": "0"}
_MEANING = {"query_key_value": "pairs 0, 1, 2 (query, key, value)", "dense": "pair 0 alone"}
_ORIGINAL = ".original."
MARKS = ("matrix_A.", "matrix_B.")


@dataclass(frozen=True)
class Adapter:
    """peft's tensors and what their config has to say."""

    tensors: Mapping[str, Tensor]
    rank: int
    layers: tuple[int, ...]
    alpha: float


def read(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, alpha: float = 1.0, file: str | Path = "the checkpoint"
) -> Adapter:
    """From the tensors of a SAT checkpoint that holds a LoRA beside its base.

    Args:
        config: its `model_config.json`: hidden_size, num_attention_heads, num_layers.
        alpha: `lora_alpha` of the training; VisualGLM and XrayGLM leave it at 1, so that the scale is 1 / r.
        file: where the tensors are, for messages.
    Raises:
        ValueError: no LoRA; a part of a pair missing, of another shape or rank than the others, or not finite; a pair
            that is none of query's, key's, value's and dense's; a config whose numbers cannot be.
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha}; it has to be a number above 0")
    width, num_heads = whole_number(config, "hidden_size"), divides(config, "num_attention_heads", "hidden_size")
    found = _pairs(tensors, whole_number(config, "num_layers"), file)
    rank = _common_rank(found)
    out: dict[str, Tensor] = {}
    for (layer, target), pair in sorted(found.items()):
        parts = _PARTS[target]
        missing = [f"matrix_{kind}.{part}" for kind in "AB" for part in parts if kind + part not in pair]
        if missing:
            raise ValueError(f"{file}: layer {layer}, {target}: {', '.join(missing)} missing")
        place = f"transformer.layers.{layer}.attention.{target}"
        for part, tensor in pair.items():
            name = f"{place}.matrix_{part[0]}.{part[1:]}"
            _require_shape(tensor, name, part[0], rank, width, file)
        a, b = ([pair[kind + part] for part in parts] for kind in "AB")
        up = torch.block_diag(*b)
        if len(parts) == 3:
            up = head_by_head(up, num_heads)
        out[f"base_model.model.{place}.lora_A.weight"] = torch.cat(a).contiguous()
        out[f"base_model.model.{place}.lora_B.weight"] = up.contiguous()
    return Adapter(out, rank, tuple(sorted({layer for layer, _ in found})), alpha)


def _pairs(
    tensors: Mapping[str, Tensor], num_layers: int, file: str | Path
) -> dict[tuple[int, str], dict[str, Tensor]]:
    """(layer, map) -> A0, B0, ... of it"""
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if not any(mark in name for mark in MARKS):
            continue
        match = _PAIR.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{file}: {name}: a LoRA of SAT's on something else than query_key_value and dense is not known"
            )
        layer, target, kind, part = int(match[1]), match[2], match[3], match[4]
        if part not in _PARTS[target]:
            raise ValueError(f"{file}: {name} was not expected: {target} has {_MEANING[target]}")
        if layer >= num_layers:
            raise ValueError(f"{file}: {name} was not expected: the model has blocks 0 to {num_layers - 1}")
        found.setdefault((layer, target), {})[kind + part] = tensor
    if not found:
        raise ValueError(f"{file}: there is no LoRA of SAT's here (no ...query_key_value.matrix_A.0)")
    return found


def _common_rank(found: Mapping[tuple[int, str], Mapping[str, Tensor]]) -> int:
    """What most A have: where one differs, it is the one to name."""
    ranks = [t.shape[0] for pair in found.values() for part, t in pair.items() if part[0] == "A" and t.ndim == 2]
    return Counter(rank for rank in ranks if rank > 0).most_common(1)[0][0] if any(ranks) else 1


def _require_shape(tensor: Tensor, name: str, kind: str, rank: int, width: int, file: str | Path) -> None:
    expected = (rank, width) if kind == "A" else (width, rank)
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{file}: {name} is {list(tensor.shape)}; {list(expected)} was expected, in a model {width} wide whose "
            f"LoRA has rank {rank}: the file is damaged, or of another training"
        )
    if not tensor.is_floating_point():
        raise ValueError(f"{file}: {name} is of {tensor.dtype}; numbers with a fraction were expected")
    require_finite(tensor, name, file)


def write(adapter: Adapter, folder: Path, *, base: str) -> Path:
    """`adapter_config.json` and `adapter_model.safetensors`, as peft writes them.

    Args:
        base: what the adapter belongs to, for people and for peft (`base_model_name_or_path`).
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        rank_pattern={"query_key_value": 3 * adapter.rank},
        alpha_pattern={"query_key_value": 3 * adapter.alpha},
        target_modules=sorted({name.split(".")[-3] for name in adapter.tensors}),
        layers_to_transform=list(adapter.layers),
        layers_pattern="layers",
        lora_dropout=0.0,
        bias="none",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(adapter.tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return folder


def base_of(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint without its LoRA: what the adapter sits on."""
    names: dict[str, str] = {
        name.replace(_ORIGINAL, "."): name for name in checkpoint.shapes if not any(mark in name for mark in MARKS)
    }
    shapes = {short: checkpoint.shapes[name] for short, name in names.items()}
    return Checkpoint(checkpoint.path, shapes, lambda short: checkpoint.read(names[short]))
