"""A folder that holds a model, of any kind that this project writes or reads -> the model, ready to answer.

- a run of finetune.py: `config.yaml`, `checkpoints/`, and the weights that the config names;
- VisualGLM-6B as SwissArmyTransformer's folder (`model_config.json`) or Hugging Face's (`config.json` with
  `eva_config`), so also what scripts/convert_weights.py and scripts/merge_adapter.py make of it;
- what scripts/merge_adapter.py makes of a run whose base is a language model: the run's `config.yaml` comes along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.assemble import assemble, language_model
from model.llm.base import LanguageModel
from model.quantise import quantise_linears, shape_like_quantised
from model.spread import gpus, spread
from model.visual_chat import VisualChatModel
from model.weights import adapter_folder, ours, sat, stage_two, visualglm, visualglm_convert
from model.weights.adapter_folder import ABOUT, TRAINED
from model.weights.checkpoint import in_precision, open_file
from model.weights.filling import Home, send_home

CONFIG, TOKENIZER = "config.yaml", "ice_text.model"
BITS = {None: None, "none": None, "4": 4, 4: 4, "8": 8, 8: 8}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    folder: str | Path,
    adapter: str | Path | None = None,
    *,
    quantize: int | str | None = None,
    device: str = "auto",
    device_map: str | None = None,
    dtype: str = "auto",
    tokenizer: str | Path | None = None,
    qkv_order: visualglm.QkvOrder | None = None,
    checkpoint: str = "newest",
) -> VisualChatModel:
    """In eval mode, on its device, all of it in one precision but for what is quantised.

    Args:
        folder: see above.
        adapter: `adapter/` of a run, or what peft saved for the language model; it replaces the run's own.
        quantize: 4 or 8: linear maps of the language model's blocks in so many bits, through bitsandbytes.  Encoder and
            Q-Former stay as they are, which 8 bits would hurt.
        device: "auto" takes the GPU where there is one.
        device_map: "auto" spreads the language model's blocks over all GPUs, by the memory that is free there.
        dtype: "auto" is bfloat16 on a GPU and float32 on a CPU.
        tokenizer: `ice_text.model`, where the folder has none.
        qkv_order: "blocks" or "per_head", where the folder does not say it; see `visualglm.resolve_order`.
        checkpoint: of a run: newest, best, or a name like step_300.
    Raises:
        ValueError: a folder of another kind, something missing in it, an adapter for another model.
    """
    path = Path(folder).expanduser()
    if quantize not in BITS:
        raise ValueError(f"quantize is {quantize!r}; it can be 4, 8 or none")
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype is {dtype!r}; it can be auto, {', '.join(DTYPES)}")
    if device_map not in (None, "auto"):
        raise ValueError(f"device_map is {device_map!r}; it can be auto")
    on = device_of(device)
    name = ("bfloat16" if on.type == "cuda" else "float32") if dtype == "auto" else dtype
    # a model to be spread is quantised on the CPU, so that all of a GPU's room is still there for the plan
    how = _How(BITS[quantize], torch.device("cpu") if device_map else on, name)
    if (path / CONFIG).is_file():
        model = _run(path, how, checkpoint, keep_adapter=adapter is None)
    else:
        model = _visualglm(path, how, tokenizer, qkv_order)
    if adapter is not None:
        adapter_folder.load(model, Path(adapter).expanduser())
    in_one_precision(model, DTYPES[name])
    model.requires_grad_(False).eval()
    if device_map is not None:
        return spread(model, gpus())
    return model.to(on)


@dataclass(frozen=True)
class _How:
    bits: int | None
    device: torch.device
    dtype: str

    @property
    def home(self) -> Home:
        return Home(self.device, DTYPES[self.dtype])


def device_of(wish: str) -> torch.device:
    """Raises ValueError where there is no such device."""
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(wish)
    except RuntimeError:
        raise ValueError(f"device is {wish!r}; it can be auto, cpu, cuda or cuda:0, ...") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {wish}, but torch sees {torch.cuda.device_count()} GPUs")
    return found


def in_one_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights only: means, angles and what is quantised keep theirs.

    Raises:
        ValueError: a number that the precision cannot hold.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = in_precision(parameter.data, dtype, name)


# ------------------------------------------------------------------------------------------------- a run of finetune.py


def _run(path: Path, how: _How, checkpoint: str, *, keep_adapter: bool) -> VisualChatModel:
    from omegaconf import OmegaConf

    config: Any = OmegaConf.to_container(OmegaConf.load(path / CONFIG), resolve=True)
    nodes = moved(config["model"], config["run"]["dir"], path)
    if "visual_chat" not in nodes:
        raise ValueError(f"{path} is a run of stage one: it has no language model to talk to; finetune.py gives it one")
    is_merged = not ours.is_ours(path) and (path / TRAINED).is_file()
    if is_merged:
        nodes["weights"] = {**nodes["weights"], "llm": str(path), "visualglm": None}
    as_trained = how.bits is None and not is_merged and keep_adapter
    if is_merged or not keep_adapter:
        nodes["adapter"] = {"_target_": "model.adapter.NoAdapter"}
    own = path / "adapter"
    if nodes["adapter"].get("start") and (own / "adapter_config.json").is_file():
        nodes["adapter"]["start"] = str(own)  # of the same shapes; what the run went on from may be gone
    absent = {key: place for key in STANDS_IN if (place := nodes["weights"].get(key)) and not Path(place).exists()}
    nodes["weights"] = {**nodes["weights"], **dict.fromkeys(absent)}
    trained = open_file(path / TRAINED if is_merged else ours.find(path, checkpoint)).without_prefix("model.")
    if not keep_adapter:
        trained = trained.only(lambda name: ".lora_" not in name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["run"]["seed"])  # what no file has was drawn so when the run began
        model, report = assemble(nodes, _language_model(nodes, how), device=how.device, home=how.home)
    left = [name for name in report.new if name not in trained.shapes]
    if absent and left:
        raise ValueError(
            f"{path} began with weights that are not there any more ({', '.join(map(str, absent.values()))}), and "
            f"{len(left)} of them are in no checkpoint (first: {left[0]}): put them back"
        )
    if left and as_trained:  # hashing a whole ChatGLM would take a minute, and it comes from files
        ours.check_frozen(model, ours.find(path, checkpoint).parent)
    ours.load_trained(model, trained)
    return model


STANDS_IN = ("stage_one", "qformer")  # starting weights that training replaced, all or some


def moved(node: Any, before: str, now: Path) -> Any:
    """The node with everything that was in the run's folder where that folder is now."""
    if isinstance(node, dict):
        return {name: moved(value, before, now) for name, value in node.items()}
    if isinstance(node, list):
        return [moved(value, before, now) for value in node]
    if isinstance(node, str) and (node == before or node.startswith(before.rstrip("/") + "/")):
        return str(now / Path(node).relative_to(before))
    return node


def _language_model(nodes: Mapping[str, Any], how: _How) -> LanguageModel:
    llm = language_model(nodes, dtype=how.dtype)
    if isinstance(llm, partial):  # one that the run warmed up
        from model.llm.warm_up import load as load_warm

        llm = load_warm(Path(nodes["llm"]["folder"]))
    quantises_itself = str(nodes["adapter"]["_target_"]).endswith("QLora")
    if how.bits is not None and not quantises_itself:
        quantise(llm, how)
    if how.bits == 8 and quantises_itself:
        raise ValueError("this run was trained on a language model in 4 bits (QLoRA): quantize has to be 4 or none")
    return llm


def quantise(llm: LanguageModel, how: _How) -> None:
    """Weights that are there already at once, others when they arrive."""
    assert how.bits is not None
    shape_like_quantised(llm.network, llm.lora_targets, device=how.device, bits=how.bits)
    quantise_linears(llm.network, llm.lora_targets, device=how.device, bits=how.bits)


# ------------------------------------------------------------------------------------------------------------ VisualGLM


def _visualglm(
    path: Path, how: _How, tokenizer: str | Path | None, qkv_order: visualglm.QkvOrder | None
) -> VisualChatModel:
    from model.llm.chatglm import chatglm
    from model.qformer import QFormer
    from model.vision.encoder import eva_vit

    sizes = sat.sizes(visualglm_convert.read_config(_a_folder(path)))
    place = Path(tokenizer).expanduser() if tokenizer is not None else path
    if not (place / TOKENIZER).is_file() and not place.is_file():
        raise ValueError(
            f"{place} holds no {TOKENIZER}: it is published with ChatGLM-6B and VisualGLM-6B (Hugging Face); put it "
            f"there, or name it (--tokenizer)"
        )
    llm = chatglm(**sizes["llm"], tokenizer=str(place), dtype=how.dtype, device="meta", initial_std=None)
    if how.bits is not None:
        quantise(llm, how)
    qformer = QFormer(vocab_size=1, pad_id=0, dropout=0.0, **sizes["qformer"])
    model = VisualChatModel(eva_vit(**sizes["vision"], device="meta"), qformer, llm)
    send_home(model, how.home)
    stage_two.initialise(model, visualglm=str(path), qkv_order=qkv_order)
    return model


def _a_folder(path: Path) -> Path:
    """With a sentence about what is wanted where it is something else."""
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}")
    if (path / ABOUT).is_file() or (path / "adapter_config.json").is_file():
        raise ValueError(f"{path} is an adapter: give the model it belongs to, and this as --adapter")
    if not (path / "model_config.json").is_file() and not (path / "config.json").is_file():
        raise ValueError(
            f"{path} holds no model that is known here: a run of finetune.py has {CONFIG}, VisualGLM-6B has "
            f"model_config.json (SAT) or config.json (Hugging Face)"
        )
    return path
