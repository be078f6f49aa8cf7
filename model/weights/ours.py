"""This project's own checkpoints: `checkpoints/step_<n>/weights.safetensors`, what trained, under the model's names.

Stage two starts from stage one's: the Q-Former has the same names in both, and what only texts pass stays behind.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from model.weights.checkpoint import Checkpoint, open_file
from model.weights.filling import LoadReport, Part, fill
from model.weights.names import ENCODER, QUERIES

_FILE = "weights.safetensors"
_TEXT = ("embedding.", "language_head.", "text_feed_forward.")


def load(model: nn.Module, path: Path, *, only: str | None = None) -> LoadReport:
    """Fills what `model` and the checkpoint share.

    Args:
        path: a run's folder (its newest checkpoint), a checkpoint's folder, or the file.
        only: "vision" takes the image encoder alone, which stage one trained along and stage two kept frozen, so that
            a checkpoint of stage two has none.
    Raises:
        ValueError: no checkpoint there, one without a Q-Former (or encoder), or shapes that do not fit.
    """
    checkpoint = open_file(find(path)).without_prefix("model.")
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


def is_ours(path: Path) -> bool:
    """Whether it is a run, or a checkpoint's folder, of this project."""
    return (path / "checkpoints").is_dir() or (path / _FILE).is_file()


def find(path: Path) -> Path:
    """The file of weights that `path` means."""
    if path.is_file() and path.suffix == ".safetensors":
        return path
    runs = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    folder = runs / "latest" if (runs / "latest").is_dir() else path
    if not (folder / _FILE).is_file():
        raise ValueError(f"{path} is no checkpoint of this project and no run: there is no {_FILE} in {folder}")
    return folder / _FILE


def _block(name: str) -> str:
    return QUERIES if name.startswith("qformer.") else name.split(".")[0]


def _is_told(name: str, checkpoint: Checkpoint) -> bool:
    """A Q-Former comes whole; of everything else, whatever trained."""
    return name.startswith("qformer.") or name in checkpoint.shapes
