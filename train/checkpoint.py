"""Checkpoints that are whole or not there, independent of ranks and ZeRO stage, without a pickle.

checkpoints/step_<n>/weights.safetensors      trainable weights by parameter name, fp32: the master weights
                     optimizer.safetensors    <parameter>.exp_avg, .exp_avg_sq, .step
                     random.safetensors       random states of every rank
                     state.json               step, data fingerprint, frozen weights' names and hash, versions
                     config.yaml              the resolved config
                     complete                 written last: sizes and hashes, so that a cut file and a flipped bit
                                              are noticed too (model/weights/manifest.py)
checkpoints/latest -> step_<n>
checkpoints/best -> step_<n>, by train.best_metric, kept however old it is
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.weights import manifest
from model.weights.checkpoint import require_finite
from model.weights.manifest import MARKER as MARKER
from model.weights.ours import frozen_fingerprint as frozen_fingerprint
from train.distributed import Ranks
from train.engine import Engine

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "numpy", "safetensors")


class Checkpoints:
    """The checkpoints of one run directory.  Every rank calls `save`; rank 0 writes."""

    def __init__(self, run_dir: Path, ranks: Ranks, *, keep: int):
        self.folder, self.ranks, self.keep = run_dir / "checkpoints", ranks, keep

    def newest(self) -> tuple[Path | None, list[str]]:
        """Newest complete checkpoint, and a sentence for each newer one that is not complete.  Same on every rank."""
        found: Path | None = None
        damaged: list[str] = []
        if self.ranks.is_first:
            for folder in sorted(self.folder.glob("step_*"), key=_step_of, reverse=True):
                fault = manifest.fault(folder)
                if fault is None:
                    found = folder
                    break
                damaged.append(f"{folder} is ignored: {fault}")
        return self.ranks.broadcast_object((found, damaged))

    def refuse_if_none_is_whole(self) -> None:
        """A run that has checkpoints is not begun anew over them: ValueError on every rank, naming each."""
        newest, damaged = self.newest()
        if newest is None and damaged:
            told = "\n".join(f"  {sentence.replace(' is ignored', '')}" for sentence in damaged)
            raise ValueError(
                f"cannot resume: no checkpoint in {self.folder} is whole, and starting at step 0 would overwrite this "
                f"run:\n{told}\nPut whole ones back, for instance from a copy, or say run.resume=never for a new run "
                f"beside it.  Nothing was changed"
            )

    def save(self, engine: Engine, step: int, state: Mapping[str, Any], config_yaml: str) -> Path:
        """Writes `step_<step>`; returns when it is on disk and all ranks know.  ValueError where it cannot be."""
        weights = self._collect(engine.full_weights())
        optimizer = self._collect(engine.full_optimizer_state())
        randoms = self.ranks.gather_objects(random_state())
        folder = self.folder / f"step_{step}"
        if self.ranks.is_first:
            tensors = {
                "weights": weights,
                "optimizer": optimizer,
                "random": {f"rank_{rank}.{name}": t for rank, (t_, _) in enumerate(randoms) for name, t in t_.items()},
            }
            whole = {
                "step": step,
                "loss_scale": engine.loss_scale_state(),
                "random": [plain for _, plain in randoms],
                "versions": _versions(),
                **state,
            }
            try:
                self._write(folder, tensors, whole, config_yaml)
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{folder} could not be written: {error}.  Checkpoints before it are untouched: make room, or mend "
                    f"the directory, and the same command goes on from the newest"
                ) from error
        self.ranks.barrier()
        return folder

    def _write(self, folder: Path, tensors: Mapping[str, Any], state: Mapping[str, Any], config_yaml: str) -> None:
        for left in self.folder.glob(".step_*"):  # of a save or a removal that was cut off: gigabytes at full size
            shutil.rmtree(left, ignore_errors=True)
        writing = self.folder / f".{folder.name}.writing"
        writing.mkdir(parents=True)
        for name, of_file in tensors.items():
            save_file(of_file, writing / f"{name}.safetensors")
        (writing / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        (writing / "config.yaml").write_text(config_yaml, encoding="utf-8")
        with manifest.described(writing):
            for file in writing.iterdir():
                _sync(file)
        _sync(writing / MARKER)
        _sync(writing)
        shutil.rmtree(folder, ignore_errors=True)
        writing.rename(folder)
        self._point("latest", folder)
        if (state.get("best") or {}).get("step") == state["step"]:
            self._point("best", folder)
        self._rotate(folder)

    def best_of(self, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What a checkpoint says of the best so far, where that one is whole; `best` leads to it again."""
        best = state.get("best")
        folder = self.folder / f"step_{best['step']}" if best else None
        found = folder is not None and self.ranks.is_first and manifest.fault(folder) is None
        is_whole = self.ranks.broadcast_object(found)
        if not is_whole or folder is None:
            return None
        if self.ranks.is_first:
            self._point("best", folder)
        return best

    def _collect(self, items: Any) -> dict[str, Tensor]:
        """Gathering is collective, so every rank walks through all; only rank 0 keeps them."""
        kept = {}
        for name, tensor in items:
            if self.ranks.is_first:
                kept[name] = tensor.contiguous()
        return kept

    def _point(self, name: str, folder: Path) -> None:
        link = self.folder / f".{name}.new"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        os.replace(link, self.folder / name)
        _sync(self.folder)

    def _rotate(self, newest: Path) -> None:
        """Deletes all but the newest `keep` complete checkpoints, and never the one just written nor the best."""
        best = (self.folder / "best").resolve().name
        newest_first = sorted(self.folder.glob("step_*"), key=_step_of, reverse=True)
        complete = [f for f in newest_first if manifest.fault(f, contents=False) is None]
        if self.keep:
            for folder in complete[self.keep :]:
                if folder != newest and folder.name != best:
                    doomed = self.folder / f".{folder.name}.deleting"
                    folder.rename(doomed)  # so that a half-deleted one is never taken for a checkpoint
                    shutil.rmtree(doomed, ignore_errors=True)


def load_weights(stage: nn.Module, folder: Path) -> None:
    """Trainable weights into the stage, before an engine divides them.

    Raises ValueError: names or shapes that are not the stage's; NaN or infinity.
    """
    trainable = {name: p for name, p in stage.named_parameters() if p.requires_grad}
    with safe_open(folder / "weights.safetensors", "pt") as file:
        names = set(file.keys())
        missing, unexpected = sorted(trainable.keys() - names), sorted(names - trainable.keys())
        if missing or unexpected:
            raise ValueError(
                f"{folder} does not fit this model: {len(missing)} trainable parameters are not in it ({missing[:5]}), "
                f"{len(unexpected)} of its tensors are not trained here ({unexpected[:5]})"
            )
        for name, parameter in trainable.items():
            tensor = file.get_tensor(name)
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{folder}: {name} has shape {tuple(tensor.shape)}, this model's has {tuple(parameter.shape)}"
                )
            parameter.data.copy_(tensor)
            require_finite(parameter.data, name, folder / "weights.safetensors")


def load_training_state(engine: Engine, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Optimizer, loss scale and random states into a freshly built engine; returns `state.json`.

    Raises ValueError: NaN or infinity among the optimizer's numbers.
    """
    state = read_state(folder)
    file = folder / "optimizer.safetensors"
    moments = load_file(file)
    for name, tensor in moments.items():
        require_finite(tensor, name, file)
    engine.load_optimizer_state(moments)
    engine.load_loss_scale_state(state["loss_scale"])
    if len(state["random"]) == ranks.count:
        tensors = load_file(folder / "random.safetensors")
        mine = f"rank_{ranks.rank}."
        set_random_state(
            {name.removeprefix(mine): t for name, t in tensors.items() if name.startswith(mine)},
            state["random"][ranks.rank],
        )
    return state


def read_state(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "state.json").read_text(encoding="utf-8")))


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], what: str, *, force: bool) -> list[str]:
    """Raises ValueError naming every value that differs between two fingerprints; with `force` returns the list."""
    old, new = _flat(before), _flat(json.loads(json.dumps(now)))
    changes = [
        f"{key}: {str(old.get(key, 'absent'))[:80]} -> {str(new.get(key, 'absent'))[:80]}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changes and not force:
        raise ValueError(
            f"cannot resume: {what} changed since the checkpoint: {'; '.join(changes[:8])}.  Put it back, or say "
            f"run.resume=never for a new run, or run.force_resume=true to go on nevertheless"
        )
    return changes


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Random states of this process: tensors for safetensors, the rest for JSON."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    python = random.getstate()
    plain = {
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "python": [python[0], list(python[1]), python[2]],
    }
    return tensors, plain


def set_random_state(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    kind, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version_, internal, gauss = plain["python"]
    random.setstate((version_, tuple(internal), gauss))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        flat = {}
        for key, inner in value.items():
            flat.update(_flat(inner, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: value}


def _step_of(folder: Path) -> int:
    number = folder.name.removeprefix("step_")
    return int(number) if number.isdigit() else -1


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
