"""An adapter added into the weights it was trained on, tensor by tensor: W + scale B A, in fp32, stored in 16 bits.

After QLoRA too the base is the unquantised one: adding into 4 bits and quantising again changes answers
(huggingface/peft issues 1043 and 2321).
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.weights import adapter_folder, chatglm_folder, glm, visualglm
from model.weights.adapter_folder import TRAINED
from model.weights.checkpoint import Checkpoint, open_file, open_folder, read_config
from model.weights.rows import head_by_head, in_blocks
from model.weights.visualglm import LANGUAGE_MODEL, QkvOrder

_JOINT = "query_key_value"
_FAMILIES = typing.get_args(glm.Family)


@dataclass(frozen=True)
class Update:
    """What peft adds to one linear map, in our row order."""

    down_RI: Tensor  # R = rank, I and O = inputs and outputs
    up_OR: Tensor
    scale: float
    magnitude_O: Tensor | None = None  # DoRA's

    def merge(self, weight_OI: Tensor) -> Tensor:
        merged_OI = weight_OI.float() + self.scale * (self.up_OR.float() @ self.down_RI.float())
        if self.magnitude_O is not None:
            merged_OI *= (self.magnitude_O.float() / merged_OI.norm(dim=1))[:, None]
        return merged_OI


def read_updates(folder: Path) -> dict[str, Update]:
    """Module name -> update, from peft's own files.

    Raises:
        ValueError: no adapter, a damaged one, or one of another kind than LoRA without biases.
    """
    config, tensors = adapter_folder.read_peft(folder)
    if config.fan_in_fan_out or config.bias != "none":
        raise ValueError(f"{folder} has biases, or maps of transposed weights: only LoRA without them is merged")
    ends = [".lora_A.weight", ".lora_B.weight"] + [".lora_magnitude_vector"] * bool(config.use_dora)
    modules = [name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0])]
    if set(tensors) != {module + end for module in modules for end in ends}:
        raise ValueError(f"{folder}: {len(tensors)} tensors are not {len(ends)} for each of {len(modules)} linear maps")
    updates = {}
    for module in modules:
        rank, alpha = adapter_folder.rank_and_alpha(config, module)
        scale = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
        magnitude_O = tensors.get(f"{module}.lora_magnitude_vector")
        down_RI, up_OR = (tensors[module + end] for end in ends[:2])
        updates[module] = Update(down_RI, up_OR, scale, magnitude_O)
    return updates


def merged(
    base: Path, adapter: Path, *, qkv_order: QkvOrder | None, dtype: torch.dtype | None = torch.bfloat16
) -> Checkpoint:
    """`base` (a Hugging Face folder) with the adapter in it, each tensor worked out when it is asked for.

    Its names are the base's, or transformers' where `renamed` says so.  Projection, Q-Former and `ln_vision` that trained beside it replace VisualGLM's where the base is VisualGLM.

    Args:
        qkv_order: of the base's `query_key_value`, where it has one; None where `conversion.json` tells.
        dtype: of every floating-point tensor; None keeps the base's.
    Raises:
        ValueError: a map of the adapter that the base lacks, other shapes, or adapters elsewhere than on the language
            model.
    """
    about = adapter_folder.read_about(adapter)
    elsewhere = sorted(set(about["adapters"]) - {"llm"})
    if elsewhere:
        raise ValueError(f"{adapter} has adapters on {', '.join(elsewhere)}; only the language model's are merged")
    if about.get("trained"):
        open_file(adapter / about["trained"]["file"])  # before anything is written: one that is missing or damaged
    if (base / "model_config.json").is_file():
        raise ValueError(
            f"{base} is SAT's folder: python scripts/convert_weights.py visualglm {base} TARGET --to huggingface ..."
        )
    adapter_folder.warn_of_other_base(about, base, adapter)
    checkpoint, config = open_folder(base), read_config(base)
    updates = read_updates(adapter) if "llm" in about["adapters"] else {}
    new_config = renamed(base, adapter)
    if new_config is not None:
        checkpoint = glm.whole(checkpoint, new_config)  # only names change, and q, k and v are cut apart
    _check(checkpoint, updates, base)
    num_heads, order = 0, "per_head"
    is_chatglm = config.get("model_type") == "chatglm" and not glm.is_original(config)  # whose q, k and v are in blocks
    if any(module.endswith(_JOINT) for module in updates) and is_chatglm:
        num_heads = config["num_attention_heads"]
        recorded = visualglm.recorded_order(base)
        order = visualglm.resolve_order(checkpoint, qkv_order, num_heads=num_heads, recorded=recorded)
    replaced = _replaced(checkpoint, config, adapter)

    def read(name: str) -> Tensor:
        if name in replaced:
            tensor = replaced[name]()
        else:
            tensor = checkpoint.read(name)
            update = updates.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if update is not None:
                blocks = num_heads > 0 and order == "blocks" and name.endswith(f"{_JOINT}.weight")
                ours = head_by_head(tensor, num_heads) if blocks else tensor
                whole = update.merge(ours)
                tensor = (in_blocks(whole, num_heads) if blocks else whole).to(tensor.dtype if dtype is None else dtype)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    return Checkpoint(f"{base} with {adapter}", checkpoint.shapes, read)


def renamed(base: Path, adapter: Path) -> Any:
    """transformers' configuration where the base is the original folder of ChatGLM2, ChatGLM3 or GLM-4 and the adapter
    was trained on transformers' GLM, as here, which keeps q, k and v apart: the merged model is one of transformers'.

    Everywhere else None: the merged model has the base's names and `config.json`.

    Raises:
        ValueError: numbers that only the family tells, which the adapter does not.
    """
    about, config = adapter_folder.read_about(adapter), read_config(base)
    if "llm" not in about["adapters"] or not glm.is_original(config):
        return None
    if not any(module.startswith(glm.LAYERS["transformers"]) for module in read_updates(adapter)):
        return None  # peft's own, on the original code
    family = str(about.get("template")).removesuffix("Codec").lower()
    try:
        return glm.full_config(config, family if family in _FAMILIES else None)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(
            f"{base}: {error}; convert it first: python scripts/convert_weights.py glm {base} TARGET --family "
            f"{'|'.join(_FAMILIES)} --to transformers"
        ) from error


def left_over(base: Path, adapter: Path) -> bool:
    """Whether tensors trained beside the adapter have no place in the base (a language model alone)."""
    checkpoint = open_folder(base)
    has_trained = (adapter / TRAINED).is_file()
    return has_trained and not any(name.startswith(chatglm_folder.IMAGE_PREFIX) for name in checkpoint.shapes)


def _replaced(checkpoint: Checkpoint, config: Mapping[str, Any], adapter: Path) -> dict[str, Callable[[], Tensor]]:
    """VisualGLM's names of what trained whole -> how to get it."""
    prefix = chatglm_folder.IMAGE_PREFIX
    if not (adapter / TRAINED).is_file() or not any(name.startswith(prefix) for name in checkpoint.shapes):
        return {}
    trained = open_file(adapter / TRAINED)
    shape = visualglm.Shape.of_checkpoint(checkpoint, prefix, config["num_attention_heads"])
    table = visualglm.entries(shape, image_prefix=prefix, head=chatglm_folder.HEAD)
    found: dict[str, Callable[[], Tensor]] = {}
    used: set[str] = set()
    for entry in table:
        if entry.block != LANGUAGE_MODEL and all(name in trained.shapes for name in entry.ours):
            tensor = entry.to_theirs([trained.read(name) for name in entry.ours], "per_head")
            if tuple(tensor.shape) != checkpoint.shapes[entry.theirs]:
                raise ValueError(
                    f"{entry.theirs} is {list(checkpoint.shapes[entry.theirs])} in {checkpoint.path}, "
                    f"{list(tensor.shape)} in {adapter}: another model"
                )
            found[entry.theirs] = lambda tensor=tensor: tensor  # type: ignore[misc]
            used |= set(entry.ours)
    strangers = sorted(set(trained.shapes) - used)
    if strangers:
        raise ValueError(f"{adapter}: {len(strangers)} trained tensors have no place in VisualGLM ({strangers[0]})")
    return found


def _check(checkpoint: Checkpoint, updates: Mapping[str, Update], base: Path) -> None:
    for module, update in updates.items():
        shape = checkpoint.shapes.get(f"{module}.weight")
        if shape is None:
            raise ValueError(f"{base} has no {module}.weight, which the adapter is for: it belongs to another model")
        if shape != (update.up_OR.shape[0], update.down_RI.shape[1]):
            raise ValueError(
                f"{module}.weight is {list(shape)} in {base}, the adapter is for "
                f"[{update.up_OR.shape[0]}, {update.down_RI.shape[1]}]: it belongs to another model"
            )
        if update.magnitude_O is not None and update.magnitude_O.shape != shape[:1]:
            raise ValueError(
                f"{module}.lora_magnitude_vector is {list(update.magnitude_O.shape)}; {list(shape[:1])} was expected, "
                f"the rows of {module}.weight in {base}"
            )
