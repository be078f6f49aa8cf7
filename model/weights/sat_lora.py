"""LoRA as VisualGLM and XrayGLM trained it (SAT's `matrix_A`, `matrix_B`) -> an adapter in peft's own layout.

SAT gives query, key and value a pair of matrices each: `matrix_A.0..2` (r, D) and `matrix_B.0..2` (D, r), and `dense`
one (`sat/model/finetune/lora2.py`).  In peft a joint linear map has one pair: the three A one below the other, the
three B along the diagonal, at rank 3r.  Pair 0 is always the query, whatever the order of the base's rows (SAT 0.4.1
and later lays the outputs one after the other, XrayGLM's `lora_mixin.py` weaves them in by `head_first`), so an adapter
alone needs no `qkv_order`; its base does.  Our rows are head by head, and so is what is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.weights.checkpoint import Checkpoint
from model.weights.rows import head_by_head

_PAIR = re.compile(r"transformer\.layers\.(\d+)\.attention\.(query_key_value|dense)\.matrix_([AB])\.(\d)")
_ORIGINAL = ".original."
MARKS = ("matrix_A.", "matrix_B.")


@dataclass(frozen=True)
class Adapter:
    """peft's tensors and what their config has to say."""

    tensors: Mapping[str, Tensor]
    rank: int
    layers: tuple[int, ...]
    alpha: float


def read(tensors: Mapping[str, Tensor], *, num_heads: int, alpha: float = 1.0) -> Adapter:
    """From the tensors of a SAT checkpoint that holds a LoRA beside its base.

    Args:
        alpha: `lora_alpha` of the training; VisualGLM and XrayGLM leave it at 1, so that the scale is 1 / r.
    Raises:
        ValueError: no LoRA, a part of a pair missing, several ranks, or LoRA on something else than the attention.
    """
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _PAIR.fullmatch(name)
        if match is not None:
            found.setdefault((int(match[1]), match[2]), {})[match[3] + match[4]] = tensor
        elif any(mark in name for mark in MARKS):
            raise ValueError(f"{name}: a LoRA of SAT's on something else than query_key_value and dense is not known")
    if not found:
        raise ValueError("there is no LoRA of SAT's here (no ...query_key_value.matrix_A.0)")
    out: dict[str, Tensor] = {}
    ranks = set()
    for (layer, target), pair in sorted(found.items()):
        parts = "012" if target == "query_key_value" else "0"
        missing = [f"matrix_{kind}.{part}" for kind in "AB" for part in parts if kind + part not in pair]
        if missing:
            raise ValueError(f"layer {layer}, {target}: {', '.join(missing)} missing")
        a, b = ([pair[kind + part] for part in parts] for kind in "AB")
        ranks.add(a[0].shape[0])
        up = torch.block_diag(*b)
        place = f"base_model.model.transformer.layers.{layer}.attention.{target}"
        out[f"{place}.lora_A.weight"] = torch.cat(a).contiguous()
        out[f"{place}.lora_B.weight"] = (head_by_head(up, num_heads) if len(parts) == 3 else up).contiguous()
    if len(ranks) != 1:
        raise ValueError(f"the pairs have ranks {sorted(ranks)}; one was expected")
    return Adapter(out, ranks.pop(), tuple(sorted({layer for layer, _ in found})), alpha)


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
