"""This project's own checkpoints: `checkpoints/step_<n>/weights.safetensors`, what trained, under the model's names.

Stage two starts from stage one's: the Q-Former has the same names in both, and what only texts pass stays behind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.weights import manifest
from model.weights.checkpoint import Checkpoint, open_file
from model.weights.filling import LoadReport, Part, fill
from model.weights.manifest import fingerprint_of_file
from model.weights.names import ENCODER, QUERIES

_FILE = "weights.safetensors"
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")
_TEXT = ("embedding.", "language_head.", "text_feed_forward.")


def load(model: nn.Module, path: Path, *, only: str | None = None) -> LoadReport:
    """Fills what `model` and the checkpoint share.

    Args:
        path: a run's folder (its newest checkpoint), a checkpoint's folder, or the file.
        only: "vision" takes the image encoder alone, which stage one trained along and stage two kept frozen, so that
            a checkpoint of stage two has none.
    Raises:
        ValueError: no checkpoint there, a damaged one, one without a Q-Former (or encoder), or shapes that do not fit.
    """
    file = find(path)
    manifest.check(file)
    checkpoint = open_file(file).without_prefix("model.")
    own = [name for name, _ in model.named_parameters()]
    if only == "vision":
        encoder = [Part(name, (name,), ENCODER) for name in own if name.startswith("vision.")]
        return fill(model, checkpoint, encoder, must=(ENCODER,))
    parts = [Part(name, (name,), _block(name)) for name in own if _is_told(name, checkpoint)]
    report = fill(model, checkpoint, parts, must=(QUERIES,))
    left = [name for name in report.ignored if not any(part in name for part in _TEXT)]
    if left:
        report.notes.append(f"not part of this model: {', '.join(sorted({name.split('.')[0] for name in left}))}")
    return report


def load_trained(model: nn.Module, checkpoint: Checkpoint) -> LoadReport:
    """Everything that a run trained, adapters included, into a model built as the run's was.

    Raises:
        ValueError: a tensor that this model does not have, or of another shape; a damaged file.
    """
    manifest.check(Path(checkpoint.path))
    own = {name for name, _ in model.named_parameters()}
    strangers = sorted(set(checkpoint.shapes) - own)
    if strangers:
        raise ValueError(f"{checkpoint.path}: {len(strangers)} tensors are not in this model (first: {strangers[0]})")
    return fill(model, checkpoint, [Part(name, (name,), _block(name)) for name in own if name in checkpoint.shapes])


def frozen_fingerprint(
    module: nn.Module,
    prefix: str = "",
    *,
    whole: Callable[[nn.Parameter], AbstractContextManager[Tensor]] = nullcontext,
) -> dict[str, Any]:
    """Names and one hash of everything that does not train; no checkpoint has it, so whoever goes on from one must be
    given the same.

    Values are hashed as bf16, so that a run may go on where frozen weights are stored in another precision.

    Args:
        prefix: of the names, where the module is a part of what was hashed.
        whole: gives a parameter's tensor, for a while, where it may be divided among ranks.
    """
    digest = hashlib.sha256()
    names = []
    for name, parameter in module.named_parameters(prefix):
        if not parameter.requires_grad:
            names.append(name)
            digest.update(name.encode())
            with whole(parameter) as tensor:
                rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous().flatten()
            digest.update(rounded.view(torch.uint8).numpy().data)
    return {"names": names, "sha256": digest.hexdigest()}


def check_frozen(model: nn.Module, checkpoint: Path) -> None:
    """Raises ValueError where what does not train is not what it was when the checkpoint was written."""
    expected = json.loads((checkpoint / "state.json").read_text("utf-8")).get("frozen")
    if expected and expected != frozen_fingerprint(model, "model"):
        raise ValueError(
            f"the frozen weights are not those that {checkpoint} was trained with: weights that the run had drawn at "
            f"random come out differently here, or files that its config names have changed"
        )


def fingerprint_of_folder(path: Path) -> str:
    """Changes when anything does in a file, or for all files of weights in a folder, whoever wrote them."""
    files = (
        [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in _WEIGHT_FILES and f.is_file())
    )
    told = [f"{file.relative_to(path)} {fingerprint_of_file(file)}" for file in files]  # a file alone: "."
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def is_ours(path: Path) -> bool:
    """Whether it is a run, or a checkpoint's folder, of this project."""
    return (path / "checkpoints").is_dir() or (path / _FILE).is_file()


def find(path: Path, wish: str = "newest") -> Path:
    """The file of weights that `path` means.

    Args:
        wish: which checkpoint of a run: newest, best, or a name like step_300.
    """
    if path.is_file() and path.suffix == ".safetensors":
        return path
    runs = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if wish != "newest":
        if not (runs / wish / _FILE).is_file():
            there = sorted(folder.name for folder in runs.glob("*/") if (folder / _FILE).is_file())
            raise ValueError(f"{path} has no checkpoint {wish}; it has {', '.join(there) or 'none'}")
        return (runs / wish).resolve() / _FILE
    folder = (runs / "latest").resolve() if (runs / "latest").is_dir() else path
    if not (folder / _FILE).is_file():
        raise ValueError(f"{path} is no checkpoint of this project and no run: there is no {_FILE} in {folder}")
    return folder / _FILE


def _block(name: str) -> str:
    return QUERIES if name.startswith("qformer.") else name.split(".")[0]


def _is_told(name: str, checkpoint: Checkpoint) -> bool:
    """A Q-Former comes whole; of everything else, whatever trained."""
    return name.startswith("qformer.") or name in checkpoint.shapes
