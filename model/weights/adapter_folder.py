"""A trained adapter as a folder that peft reads, with everything else that trained beside it.

adapter/adapter_config.json, adapter_model.safetensors   on the language model: peft's own layout
        qformer/, projection/, vision/                   the same, where adapters sit there too
        trained.safetensors                              every other trained tensor, whole, under this project's names
        queqiao.json                                     base model, template, row order, and which of these are there

The language model's adapter has the names and rows of its family's Hugging Face folder, so
`PeftModel.from_pretrained(language_model, folder)` works without this project.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from model.adapter import NAME, ROOTS, put
from model.llm.base import LanguageModel
from model.visual_chat import VisualChatModel
from model.weights.checkpoint import Checkpoint, examining, open_file, read_json
from model.weights.filling import LoadReport, Part, fill

log = logging.getLogger(__name__)

WEIGHTS, CONFIG, TRAINED, ABOUT = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "trained.safetensors",
    "queqiao.json",
)
_PEFT = "base_model.model."  # what a PeftModel puts before the names of what it wraps
_WORDS = {
    "language_model": "language model",
    "template": "prompt template",
    "num_image_tokens": "number of image tokens",
    "qkv_order": "query-key-value rows",
}


def save(model: VisualChatModel, trained: Mapping[str, Tensor], folder: Path, *, base_model: str | None = None) -> Path:
    """Writes the folder.

    Args:
        model: with its adapters; only names are looked at, so its weights may be divided among ranks.
        trained: every trained tensor by the model's names, as `weights.safetensors` of a checkpoint has them.
        base_model: what the adapter belongs on, a path or a name; it is only recorded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    left = dict(trained)
    parts = {}
    for part, config in adapted(model).items():
        prefix = "" if part == "projection" else f"{ROOTS[part]}."
        own = {name.removeprefix(prefix): left.pop(name) for name in list(left) if _belongs(name, prefix, part)}
        place = folder if part == "llm" else folder / part
        _save_peft(model, part, config, own, place, base_model)
        parts[part] = "." if part == "llm" else part
    if left:
        save_file({name: tensor.contiguous() for name, tensor in left.items()}, folder / TRAINED)
    about = {
        "format": 1,
        "base_model": base_model,
        **_kind(model.llm),
        "quantised": "nf4" if getattr(model.llm.network, "is_loaded_in_4bit", False) else None,
        "adapters": parts,
        "trained": {"file": TRAINED, "parts": sorted({name.split(".")[0] for name in left})} if left else None,
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False), "utf-8")
    return folder


def load(model: VisualChatModel, folder: Path) -> LoadReport:
    """Puts a saved adapter on the model, whole tensors included, to go on training or to answer with.

    Args:
        folder: from `save`, or any of peft's that was made for the bare language model.
    Raises:
        ValueError: no adapter there, one for another family, prompt, rows, names or shapes.
    """
    about = read_about(folder)
    _check_kind(model.llm, about, folder)
    warn_of_other_base(about, model.llm.loaded_from, folder)
    report = LoadReport(str(folder))
    for part, place in about["adapters"].items():
        _load_peft(model, part, folder / place, report)
    if about.get("trained"):
        checkpoint = open_file(folder / about["trained"]["file"])
        names = [name for name, _ in model.named_parameters()]
        strangers = sorted(set(checkpoint.shapes) - set(names))
        if strangers:
            raise ValueError(f"{folder}: {len(strangers)} tensors are not in this model (first: {strangers[0]})")
        whole = fill(model, checkpoint, [Part(n, (n,), n.split(".")[0]) for n in names if n in checkpoint.shapes])
        report.loaded |= whole.loaded
    return report


def check(llm: LanguageModel, folder: Path) -> None:
    """Whether training can go on from a saved adapter, as far as that is known before there is a model to put it on.

    Raises:
        ValueError: see `load`; more in it than `save` has a place for.
    """
    about = read_about(folder)
    _check_kind(llm, about, folder)
    for place in about["adapters"].values():
        _require_lora_alone(read_peft(folder / place)[0], folder / place)
    if about.get("trained"):
        open_file(folder / about["trained"]["file"])


def require_fit(model: VisualChatModel, folder: Path) -> None:
    """Raises ValueError: matrices of a saved adapter have no place in those of the model, or another shape.

    Shapes are enough, so the model may be without memory.
    """
    for part, place in read_about(folder)["adapters"].items():
        _require_fit(model, part, folder / place, open_file(folder / place / WEIGHTS).shapes)


def read_about(folder: Path) -> dict[str, Any]:
    """`queqiao.json`; of a folder that peft alone wrote, what it says as well.

    Raises ValueError: neither is there, or the file is damaged.
    """
    if (folder / ABOUT).is_file():
        about = read_json(folder / ABOUT)
        parts, trained = about["adapters"], about.get("trained")
        if not (isinstance(parts, dict) and all(isinstance(place, str) for place in parts.values())):
            raise ValueError(f"{folder / ABOUT}: adapters is {parts!r}; parts with their folders were expected")
        if trained and not (isinstance(trained, dict) and isinstance(trained.get("file"), str)):
            raise ValueError(f"{folder / ABOUT}: trained is {trained!r}; {{'file': ...}} was expected")
        return about
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no adapter: there is neither {ABOUT} nor {CONFIG}")
    return {"adapters": {"llm": "."}}


def read_peft(place: Path) -> tuple[Any, dict[str, Tensor]]:
    """What peft wrote: its config, and the tensors by the names of the wrapped network.

    Raises:
        ValueError: a file is missing, damaged or holds NaN or infinity, a matrix has another rank than the config
            says, or the adapter is of another kind than LoRA.
    """
    config, checkpoint = read_config(place), open_file(place / WEIGHTS)
    _require_ranks(config, checkpoint)
    with examining():
        return config, {name.removeprefix(_PEFT): checkpoint.read(name) for name in checkpoint.shapes}


def read_config(place: Path) -> Any:
    """peft's own configuration.  Raises ValueError: see `read_peft`."""
    from peft import LoraConfig

    absent = [name for name in (CONFIG, WEIGHTS) if not (place / name).is_file()]
    if absent:  # peft would take the path for a name on the Hub, and ask there
        raise ValueError(f"{place} holds no adapter: it has no {' and no '.join(absent)}")
    kind = read_json(place / CONFIG).get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{place} is an adapter of kind {kind}: only LoRA is read")
    try:
        config = LoraConfig.from_pretrained(str(place))
        if config.r < 1:
            raise ValueError(f"r is {config.r}; it has to be 1 or more")
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft does not read {place / CONFIG} ({error})") from error
    config.rank_pattern, config.alpha_pattern = config.rank_pattern or {}, config.alpha_pattern or {}
    wrong = {} if _is_number(config.lora_alpha) else {"lora_alpha": "a number was expected"}
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, key)
        if not (isinstance(pattern, dict) and all(map(_is_number, pattern.values()))):
            wrong[key] = "names with numbers were expected"
    for key, expected in wrong.items():
        raise ValueError(f"{place / CONFIG}: {key} is {getattr(config, key)!r}; {expected}")
    return config


def read_configs(folder: Path) -> dict[str, Any]:
    """part -> peft's configuration of the adapter saved for it"""
    return {part: read_config(folder / place) for part, place in read_about(folder)["adapters"].items()}


def rank_and_alpha(config: Any, module: str) -> tuple[int, float]:
    """Of one map: peft's config has them for all, and in patterns for those that differ."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.rank_pattern, config.alpha_pattern
    rank = ranks.get(get_pattern_key(ranks, module), config.r)
    return rank, alphas.get(get_pattern_key(alphas, module), config.lora_alpha)


def _require_ranks(config: Any, checkpoint: Checkpoint) -> None:
    """The scale is alpha / rank: with another rank than the matrices have, the update would be another."""
    for name, shape in checkpoint.shapes.items():
        module, _, kind = name.removeprefix(_PEFT).removesuffix(".weight").rpartition(".")
        if kind not in ("lora_A", "lora_B"):
            continue
        rank, side = rank_and_alpha(config, module)[0], int(kind == "lora_B")
        if len(shape) < 2 or shape[side] != rank:
            raise ValueError(
                f"{checkpoint.path}: {name.removeprefix(_PEFT)} is {list(shape)}; {rank} {('rows', 'columns')[side]} "
                f"were expected, rank {rank} as {CONFIG} beside it says: one of the two is damaged, or of another run"
            )


def warn_of_other_base(about: Mapping[str, Any], base: str | Path | None, folder: Path) -> None:
    """Another path may hold other weights of equal shapes, or the same ones moved: only people know."""
    told = about.get("base_model")
    if told and base and Path(told).expanduser().resolve() != Path(base).expanduser().resolve():
        log.warning("%s was trained on %s and is put on %s: wrong, unless that is the same, moved", folder, told, base)


def adapted(model: VisualChatModel) -> dict[str, Any]:
    """part -> peft's config of the adapter that sits there"""
    found = {part: getattr(model.get_submodule(root), "peft_config", None) for part, root in ROOTS.items()}
    found["projection"] = getattr(model, "adapted_projection", None)
    return {part: configs[NAME] for part, configs in found.items() if configs}


def qkv_order(llm: LanguageModel) -> str:
    """`per_head` where query, key and value share one map (ChatGLM-6B), `separate` where each has its own."""
    joint = any(name.endswith("query_key_value") for name, _ in llm.network.named_modules())
    return "per_head" if joint else "separate"


def _kind(llm: LanguageModel) -> dict[str, Any]:
    """What a model has to have in common with the one that an adapter was trained on, by its names in queqiao.json."""
    codec = llm.codec
    return {
        "language_model": type(llm).__name__,
        "template": None if codec is None else type(codec).__name__,
        "num_image_tokens": None if codec is None else codec.num_image_tokens,
        "qkv_order": qkv_order(llm),
    }


def _check_kind(llm: LanguageModel, about: Mapping[str, Any], folder: Path) -> None:
    """Equal names and shapes are not enough: ChatGLM2's fit ChatGLM3.  What peft alone wrote says nothing of these."""
    differing = [
        f"{_WORDS[key]} {about[key]!r}, this model has {own!r}"
        for key, own in _kind(llm).items()
        if own is not None and about.get(key) not in (None, own)
    ]
    if differing:
        base = f" (it was trained on {about['base_model']})" if about.get("base_model") else ""
        raise ValueError(f"{folder} was made for {'; for '.join(differing)}{base}")


def _belongs(name: str, prefix: str, part: str) -> bool:
    return "lora_" in name and name.startswith("projection." if part == "projection" else prefix)


def _save_peft(
    model: VisualChatModel, part: str, config: Any, own: dict[str, Tensor], place: Path, base_model: str | None
) -> None:
    from peft.utils import get_peft_model_state_dict

    place.mkdir(exist_ok=True)
    tensors = get_peft_model_state_dict(_root(model, part, config), own, NAME, save_embedding_layers=False)
    assert len(tensors) == len(own) > 0, f"{part}: {len(own)} adapter tensors, peft names {len(tensors)}"
    save_file({_PEFT + name: t.contiguous() for name, t in tensors.items()}, place / WEIGHTS, {"format": "pt"})
    before = config.base_model_name_or_path, config.inference_mode
    config.base_model_name_or_path, config.inference_mode = base_model, True
    config.save_pretrained(str(place))
    config.base_model_name_or_path, config.inference_mode = before


def _load_peft(model: VisualChatModel, part: str, place: Path, report: LoadReport) -> None:
    from peft.utils import set_peft_model_state_dict

    config, tensors = read_peft(place)
    config.inference_mode = False
    own = adapted(model).get(part)
    if own is None:
        put(model, part, config)
    else:
        _require_equal_scale(own, config, part, place)
    _require_fit(model, part, place, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    try:
        outcome = set_peft_model_state_dict(_root(model, part, config), tensors, NAME)
    except RuntimeError as error:  # of a magnitude
        raise ValueError(f"{place} does not fit this model's {part}: {error}") from error
    missing = [name for name in outcome.missing_keys if "lora_" in name]
    if missing or outcome.unexpected_keys:
        raise ValueError(_misfit(place, part, missing, list(outcome.unexpected_keys)))
    report.loaded |= {f"{part}: {name}": tensor.numel() for name, tensor in tensors.items()}


def _require_lora_alone(config: Any, place: Path) -> None:
    """peft can train more beside its matrices, which chat reads."""
    kinds = {
        "biases": config.bias != "none",
        f"whole modules {config.modules_to_save}": config.modules_to_save,
        f"parameters {getattr(config, 'target_parameters', None)}": getattr(config, "target_parameters", None),
    }
    for what, is_there in kinds.items():
        if is_there:
            raise ValueError(f"{place} trains {what} too: training goes on from LoRA's matrices alone (chat reads it)")


def _require_equal_scale(own: Any, config: Any, part: str, place: Path) -> None:
    """Equal matrices add something else where alpha, rank or their use differ."""
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"):
        if getattr(own, key) != getattr(config, key):
            raise ValueError(
                f"{place / CONFIG} has {key} {getattr(config, key)}; the adapter on this model's {part} has "
                f"{getattr(own, key)}"
            )


def _require_fit(model: VisualChatModel, part: str, place: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Of matrices alone: peft itself knows what else there can be."""
    own = {
        name.replace(f".{NAME}.", "."): tuple(parameter.shape)
        for name, parameter in _root(model, part, adapted(model)[part]).named_parameters()
        if _is_matrix(name)
    }
    there = {name.removeprefix(_PEFT): shape for name, shape in shapes.items() if _is_matrix(name)}
    missing, unknown = (sorted(set(a) - set(b)) for a, b in ((own, there), (there, own)))
    if missing or unknown:
        raise ValueError(_misfit(place, part, missing, unknown))
    for name, shape in own.items():
        if there[name] != shape:
            raise ValueError(
                f"{place} does not fit this model's {part}: {name} is {list(there[name])}; {list(shape)} was expected"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_matrix(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _misfit(place: Path, part: str, missing: list[str], unknown: list[str]) -> str:
    found = ((missing, "are missing"), (unknown, "are not known"))
    told = ", ".join(f"{len(names)} tensors {what} (first: {names[0]})" for names, what in found if names)
    return f"{place} does not fit this model's {part}: {told}"


def _root(model: VisualChatModel, part: str, config: Any) -> nn.Module:
    """What peft was given, or for the projection something that looks like it."""
    if part != "projection":
        return model.get_submodule(ROOTS[part])
    parent = nn.ModuleDict({"projection": model.projection})
    parent.peft_config = {NAME: config}  # type: ignore[assignment]
    return parent
