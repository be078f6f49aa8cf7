"""SwissArmyTransformer's checkpoints of VisualGLM: `model_config.json`, `latest`, `<n>/mp_rank_00_model_states.pt`.

Read without SAT and without unpickling anything but tensors, numbers and the numpy random state that SAT's trainer
saves beside the weights; written so that VisualGLM's own code loads the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.weights import names, sat_lora, visualglm
from model.weights.checkpoint import Checkpoint, Config, from_tensors, load_torch, read_json
from model.weights.filling import LoadReport
from model.weights.visualglm import Entry, QkvOrder, Shape

IMAGE_PREFIX, HEAD = "mixins.eva.model.", "mixins.chatglm-final.lm_head.weight"
INV_FREQ = "mixins.chatglm-attn.rotary_emb.inv_freq"
PAD_ID = 3  # what SAT's ChatGLM has meant since its checkpoints name it; older ones do not


def read_config(folder: Path) -> Config:
    """`model_config.json`, with what older ones leave out filled in.

    Raises:
        ValueError: no such file, another model, or one that is cut among GPUs.
    """
    file = folder / "model_config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is no checkpoint of SwissArmyTransformer: it has no model_config.json")
    config = read_json(file)
    missing = [key for key in ("hidden_size", "bos_token_id") if key not in config]
    missing += [key for key in ("eva_args", "qformer_args") if not isinstance(config.get(key), dict)]
    if missing:
        raise ValueError(f"{file} is of {config.get('model_class', 'some model')}, not of VisualGLM: no {missing}")
    if config.get("model_parallel_size", 1) != 1:
        raise ValueError(
            f"{file}: model_parallel_size is {config['model_parallel_size']}; merge the parts with SAT first "
            f"(from_pretrained with overwrite_args={{'model_parallel_size': 1}})"
        )
    return with_defaults(config)


def with_defaults(config: Config) -> Config:
    """The same config with SAT's own values where it names none."""
    config.setdefault("pad_token_id", PAD_ID)
    for part in (config, config["eva_args"], config["qformer_args"]):
        part["inner_hidden_size"] = part.get("inner_hidden_size") or 4 * names.whole_number(part, "hidden_size")
        part.setdefault("layernorm_epsilon", visualglm.LAYER_NORM_EPS)
    return config


def sizes(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments of `eva_vit`, `QFormer` and `chatglm` for the model of this config.

    Raises:
        ValueError: a key that is missing, or whose value cannot be, with the file.
    """
    eva, qformer = config["eva_args"], config["qformer_args"]
    frequency = _frequency(qformer)
    num_image_tokens = names.whole_number(config, "image_length")
    ids = ["bos", "gmask", "mask", "pad"] + ["eos"] * ("eos_token_id" in config)  # which SAT's files leave out
    return {
        "vision": {
            "image_size": _image_size(eva),
            "patch_size": names.whole_number(eva, "patch_size"),
            "width": names.whole_number(eva, "hidden_size"),
            "mlp_width": names.whole_number(eva, "inner_hidden_size"),
            **_depth_and_unseen(eva),
        },
        "qformer": {
            "image_width": names.whole_number(qformer, "cross_attn_hidden_size"),
            "hidden_size": names.whole_number(qformer, "hidden_size"),
            "intermediate_size": names.whole_number(qformer, "inner_hidden_size"),
            "num_query_tokens": num_image_tokens,
            "cross_attention_frequency": frequency,
            **_depth_and_unseen(qformer),
        },
        "llm": {
            "hidden_size": names.whole_number(config, "hidden_size"),
            "inner_size": names.whole_number(config, "inner_hidden_size"),
            "vocab_size": names.whole_number(config, "vocab_size"),
            "num_image_tokens": num_image_tokens,
            "ids": {name: names.whole_number(config, f"{name}_token_id", least=0) for name in ids},
            **_depth_and_unseen(config),
        },
    }


def _depth_and_unseen(part: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_layers": names.whole_number(part, "num_layers"),
        "num_heads": names.divides(part, "num_attention_heads", "hidden_size"),
        "layer_norm_eps": names.positive(part, "layernorm_epsilon"),
    }


def _image_size(eva: Mapping[str, Any]) -> int:
    """A number, or height and width, which are equal."""
    found = eva["image_size"]
    if isinstance(found, list) and len(found) == 2 and found[0] == found[1]:
        found = found[0]
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(
            f"{names.place_of(eva)} has image_size {eva['image_size']!r}: expected a whole number, or a list of height "
            f"and width, which are equal"
        )
    if found % names.whole_number(eva, "patch_size"):
        raise ValueError(
            f"{names.place_of(eva)} has image_size {found}, which patch_size {eva['patch_size']} does not divide"
        )
    return found


def _frequency(qformer: Mapping[str, Any]) -> int:
    """The Q-Former looks at the image in one of so many layers."""
    looks, num_layers = qformer["is_decoder"], names.whole_number(qformer, "num_layers")
    if not isinstance(looks, list) or len(looks) != num_layers:
        raise ValueError(
            f"{names.place_of(qformer)} has is_decoder {looks!r}: expected a list of {num_layers} times true or false, "
            f"one for each layer"
        )
    looking = [index for index, there in enumerate(looks) if there]
    frequency = looking[1] if len(looking) > 1 else num_layers
    if looking != list(range(0, num_layers, frequency)):
        raise ValueError(
            f"{names.place_of(qformer)} has cross-attention in layers {looking} (is_decoder): not one in every "
            f"{frequency}"
        )
    return frequency


def open_folder(folder: Path, *, leave_lora: bool = False) -> Checkpoint:
    """The tensors of the newest checkpoint in `folder`, under SAT's names, paged in one by one.

    `leave_lora` gives the base of a checkpoint that holds a LoRA; the LoRA is `sat_lora`'s.

    Raises:
        ValueError: no checkpoint, something in it that is no plain data, or an adapter that is not merged.
    """
    file = newest_file(folder)
    tensors = read_module(file)
    adapter = [name for name in tensors if any(mark in name for mark in sat_lora.MARKS)]
    if adapter and not leave_lora:
        raise ValueError(
            f"{folder} holds a LoRA that is not merged ({len(adapter)} tensors, first: {adapter[0]}): convert it as an "
            f"adapter (scripts/convert_weights.py adapter), and its base with --leave-lora"
        )
    checkpoint = from_tensors(tensors, str(folder), file=file)
    return sat_lora.base_of(checkpoint) if adapter else checkpoint


def read_newest(folder: Path) -> dict[str, Tensor]:
    """The tensors that `latest` points to, a LoRA's included."""
    return read_module(newest_file(folder))


def newest_file(folder: Path) -> Path:
    """Raises ValueError where there is none, or one of several."""
    latest = folder / "latest"
    if not latest.is_file():
        raise ValueError(f"{folder} has no file `latest`, which names the checkpoint to read")
    name = latest.read_text("utf-8", errors="replace").strip()
    if PureWindowsPath(name).name != name:
        raise ValueError(f"{latest} names {name!r}: expected a folder beside it")
    place = folder / name
    files = sorted(place.glob("mp_rank_*_model_states.pt"))
    if [file.name for file in files] != ["mp_rank_00_model_states.pt"]:
        raise ValueError(f"{place} holds {[file.name for file in files]}; expected mp_rank_00_model_states.pt alone")
    return files[0]


def read_module(file: Path) -> dict[str, Tensor]:
    """The `module` of a file of SAT's or DeepSpeed's, mapped, not read."""
    loaded = load_torch(file, allowed=_numpy_random_state(), expected="weights and random states")
    module = loaded.get("module") if isinstance(loaded, dict) else None
    if not isinstance(module, dict):
        raise ValueError(f"{file} has no weights under 'module', as SAT's checkpoints do")
    return {name: tensor for name, tensor in module.items() if isinstance(tensor, Tensor)}


def load(
    model: nn.Module,
    folder: Path,
    *,
    qkv_order: QkvOrder | None,
    reference: Tensor | None = None,
    leave_lora: bool = False,
) -> LoadReport:
    """Fills stage two's model, which has to compute with the numbers of `model_config.json`.

    Args:
        leave_lora: see `open_folder`.
        qkv_order, reference: see `visualglm.resolve_order`.
    Raises:
        ValueError: see `visualglm.check_numbers`, `visualglm.load`, `read_config`, `open_folder`.
    """
    entries, config = table(model), read_config(folder)
    parts = {"llm": config, "vision": config["eva_args"], "qformer": config["qformer_args"]}
    visualglm.check_numbers(model, parts)
    checkpoint = open_folder(folder, leave_lora=leave_lora)
    num_heads: Any = getattr(model, "llm").num_heads  # noqa: B009 - nn.Module's attributes have no type
    order = visualglm.resolve_order(
        checkpoint, qkv_order, num_heads=num_heads, reference=reference, recorded=visualglm.recorded_order(folder)
    )
    return visualglm.load(model, checkpoint, entries, order)


def write(
    model: nn.Module, folder: Path, config: Mapping[str, Any], *, qkv_order: QkvOrder = "blocks", iteration: int = 1
) -> Path:
    """A folder that SAT loads (`from_pretrained(folder)`); `config` is what `model_config.json` shall hold.

    `blocks` is the order of SAT 0.4.1 and later.  Raises ValueError where the folder is not empty.
    """
    llm: Any = getattr(model, "llm")  # noqa: B009
    own = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    tensors = visualglm.to_theirs(own, table(model), qkv_order)
    return write_tensors(tensors, folder, config, num_heads=llm.num_heads, iteration=iteration)


def write_tensors(
    tensors: dict[str, Tensor], folder: Path, config: Mapping[str, Any], *, num_heads: int, iteration: int = 1
) -> Path:
    """The same from tensors under SAT's names; the table of frequencies, which SAT counts as one, is added."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: nothing was written")
    place = folder / str(iteration)
    place.mkdir(parents=True)
    head = tensors[HEAD]
    half = head.shape[1] // (2 * num_heads)
    frequency = 1.0 / (10000 ** (torch.arange(0, half, 2).float() / half))
    module = {name: tensor.contiguous() for name, tensor in tensors.items()} | {INV_FREQ: frequency.to(head.dtype)}
    torch.save({"module": module, "iteration": iteration}, place / "mp_rank_00_model_states.pt")
    (folder / "model_config.json").write_text(json.dumps(dict(config), indent=1, ensure_ascii=False), "utf-8")
    (folder / "latest").write_text(str(iteration), "utf-8")
    return folder


def table(model: nn.Module) -> list[Entry]:
    return list(visualglm.entries(Shape.of_model(model), image_prefix=IMAGE_PREFIX, head=HEAD))


def _numpy_random_state() -> list[Any]:
    """What `np.random.get_state()` is pickled with, under numpy 1's names and numpy 2's: arrays of numbers."""
    rebuild = np.empty(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in ("uint32", "int64", "float64")]
    module = "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"
    return [np.ndarray, np.dtype, *dtypes, *((rebuild, name) for name in module)]
