"""Starting weights from other people's checkpoints, one file per format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from model.weights import bert, lavis, ours, transformers_blip2
from model.weights.checkpoint import read_config, require_finite
from model.weights.filling import LoadReport

__all__ = ["LoadReport", "initialise"]

_FILES = (".pth", ".pt", ".bin", ".safetensors")


def initialise(
    model: nn.Module,
    *,
    all: str | None = None,  # noqa: A002 - the name that users type
    vision: str | None = None,
    qformer: str | None = None,
    token_type: str = "drop",
) -> LoadReport:
    """Fill stage one's model, built and on the CPU, before it is handed to the engine (`configs/model/weights/`).

    Frozen weights are in no checkpoint of a run, so this runs at every start, also at a resume.

    Args:
        all: a BLIP-2 folder of transformers or a LAVIS file: whatever of the model it has.
        vision: the same formats, LAVIS's `eva_vit_g.pth`, or a run of our own that trained it: the image encoder alone.
        qformer: a BERT-like folder, or the formats of `all`: the Q-Former alone.  Later ones replace earlier ones.
        token_type: see `bert.load`.
    Returns:
        What became of every tensor; print it.
    Raises:
        ValueError: a path that does not exist, a format that is not known, or weights that do not fit.
    """
    report = LoadReport("random initialisation", new={name: p.numel() for name, p in model.named_parameters()})
    _credit_encoder(model, report)
    for key, path in (("all", all), ("vision", vision), ("qformer", qformer)):
        if path is not None:
            report = report.then(_load(model, Path(path).expanduser(), key, token_type))
    _warn_of_random_encoder(model, report)
    return report


def _load(model: nn.Module, path: Path, key: str, token_type: str) -> LoadReport:
    if not path.exists():
        raise ValueError(
            f"model.weights.{key}: there is nothing at {path}. docs/weights.md says where weights are, "
            f"scripts/fetch_weights.py fetches them"
        )
    if key == "vision" and ours.is_ours(path):
        return ours.load(model, path, only=key)
    only = None if key == "all" else key
    if path.is_file():
        if path.suffix not in _FILES:
            raise ValueError(f"model.weights.{key}: {path} is no weights file ({', '.join(_FILES)})")
        return lavis.load(model, path, only=only)
    family: Any = read_config(path).get("model_type")
    if family in ("blip-2", "blip_2"):
        return transformers_blip2.load(model, path, only=only)
    if key == "qformer":
        return bert.load(model, path, token_type=token_type)
    raise ValueError(
        f"model.weights.{key}: {path} is of type {family!r}, not BLIP-2. Other image encoders are built and loaded by "
        f"model/vision=from_folder; a BERT belongs in model.weights.qformer"
    )


def _credit_encoder(model: nn.Module, report: LoadReport) -> None:
    """`vision_from_folder` has loaded its own weights while it was built, and so has a language model warmed up.

    Raises ValueError: NaN or infinity among them.
    """
    credited = []
    for part in ("vision", "llm"):
        source = getattr(getattr(model, part, None), "loaded_from", None)
        if source is not None:
            for name, parameter in getattr(model, part).named_parameters():
                require_finite(parameter, name.removeprefix("network."), source)
            credited.append(f"{source} ({'image encoder' if part == 'vision' else 'language model'})")
            for name in [name for name in report.new if name.startswith(f"{part}.")]:
                report.loaded[name] = report.new.pop(name)
    if credited:
        report.source = ", ".join(credited)


def _warn_of_random_encoder(model: nn.Module, report: LoadReport) -> None:
    if getattr(getattr(model, "vision", None), "frozen", False) and any(n.startswith("vision.") for n in report.new):
        report.notes.append(
            "THE IMAGE ENCODER IS FROZEN AND RANDOM: nothing can be learned from its features. "
            "Set model.weights.vision (or all); random weights are good for benchmarks only"
        )
