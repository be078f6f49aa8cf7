"""What `evaluate.py` does: a run's checkpoint through evaluators, and everything on disk.

<run>/eval/<name>/predictions.jsonl   every prediction, as it is made (`train/evaluator/predictions.py`)
                  matches.jsonl       while it is re-ranking: what ITM said so far
                  metrics.json        what was measured, of what, with which versions
                  config.yaml         as resolved, by which a restart knows that it is the same evaluation
                  *.png               the evaluators' pictures
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from model.build import build
from model.weights.ours import fingerprint_of_folder
from train.config_evaluate import config_of_run
from train.distributed import Ranks
from train.engine import PRECISIONS, resolve_precision, store_frozen
from train.evaluator import Evaluator
from train.evaluator.predictions import MATCHES, METRICS, PREDICTIONS, Predictions
from train.run import changed_keys, own_device

CONFIG = "config.yaml"
PACKAGES = ("torch", "transformers", "sacrebleu", "pycocoevalcap", "jieba")


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    model: nn.Module
    codec: Any
    checkpoint: str  # its name
    weights: str  # a fingerprint
    autocast: torch.dtype | None  # as in training; None where the model is in one precision
    precision: str


def evaluate(config: DictConfig) -> Path:
    """-> the folder of the results, which every rank waits for"""
    device = own_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    ranks = Ranks.connect(device)
    run = Path(config.run).expanduser()
    if not run.exists():
        raise ValueError(f"run={config.run!r}: there is no such folder; say run=outputs/NAME")
    subject = load_subject(config, run, device, ranks)
    evaluators = [
        build(node, codec=subject.codec, name=name) for name, node in config.train.evaluator.items() if node is not None
    ]
    if not evaluators:
        raise ValueError(f"{run} was trained without evaluators: choose some with train/evaluator=...")
    folder = results_folder(config, run, subject)
    about = _about(config, subject, evaluators, device)
    if ranks.is_first:
        _begin(folder, {**about, "evaluator": config.train.evaluator}, resume=config.resume)
        print(f"{run}, {subject.checkpoint}, {device.type}, {ranks.count} rank(s); results go to {folder}", flush=True)
    ranks.barrier()
    predictions = Predictions(ranks, folder / PREDICTIONS, lockstep=False, shown=True)
    found: dict[str, float] = {}
    with _precision(subject, device):
        for evaluator in evaluators:
            found |= _measure(evaluator, subject.model, device, ranks, predictions, folder)
    predictions.close()
    if ranks.is_first:
        _write(folder / METRICS, {**about, "ranks": ranks.count, "metrics": found})
        print(f"{len(found)} numbers in {folder / METRICS}, every prediction in {folder / PREDICTIONS}", flush=True)
    ranks.barrier()
    return folder


def _measure(
    evaluator: Evaluator,
    model: nn.Module,
    device: torch.device,
    ranks: Ranks,
    predictions: Predictions,
    folder: Path,
) -> dict[str, float]:
    found = evaluator(model, device=device, ranks=ranks, predictions=predictions)
    if ranks.is_first:
        print("\n".join(found.lines), flush=True)
        for name, picture in found.pictures.items():
            picture.save(folder / f"{evaluator.name}_{name}.png".replace("/", "_"))
    return {f"{evaluator.name}/{name}": value for name, value in found.metrics.items()}


# ------------------------------------------------------------------------------------------------------------ the model


def load_subject(config: DictConfig, run: Path, device: torch.device, ranks: Ranks) -> Subject:
    """Every rank loads the whole model.  Raises ValueError: no such run or checkpoint, other frozen weights."""
    of_run = config_of_run(run)
    precision = resolve_precision(config.precision, device)
    if of_run is not None and "image_text" in of_run.model:
        return _stage_one(config, of_run, run, precision, device, ranks)
    return _stage_two(config, run, precision, device, ranks)


def _stage_one(
    config: DictConfig, of_run: DictConfig, run: Path, precision: str, device: torch.device, ranks: Ranks
) -> Subject:
    from model.load_image_text import load

    if config.quantize:
        raise ValueError("quantize is for the language model of stage two; this is a run of stage one")
    plain: Any = OmegaConf.to_container(of_run, resolve=True)
    model, codec, file = load(plain, run, config.checkpoint)
    store_frozen(model, precision)
    autocast = None if precision == "fp32" else PRECISIONS[precision]
    return Subject(model.to(device), codec, *_named(file, run, ranks), autocast, precision)


def _stage_two(config: DictConfig, run: Path, precision: str, device: torch.device, ranks: Ranks) -> Subject:
    from model.load import load
    from model.weights import ours

    if config.checkpoint == "none":
        raise ValueError("checkpoint=none is for runs of stage one; name another folder, such as a merged model")
    file = ours.find(run, config.checkpoint) if ours.is_ours(run) else None
    dtype = str(PRECISIONS[precision]).removeprefix("torch.")
    quantize = config.quantize or None
    model = load(run, quantize=quantize, device=str(device), dtype=dtype, checkpoint=config.checkpoint)
    return Subject(model, model.llm.codec, *_named(file, run, ranks), None, precision)


def _named(file: Path | None, run: Path, ranks: Ranks) -> tuple[str, str]:
    """A checkpoint's name and the fingerprint of its weights; without one, of the whole folder's."""
    found = ranks.broadcast_object(fingerprint_of_folder(file or run) if ranks.is_first else "")
    return "as_loaded" if file is None else file.parent.name, found


@contextmanager
def _precision(subject: Subject, device: torch.device) -> Iterator[None]:
    if subject.autocast is None:
        yield
    else:
        with torch.autocast(device.type, dtype=subject.autocast):
            yield


# ---------------------------------------------------------------------------------------------------------- the results


def results_folder(config: DictConfig, run: Path, subject: Subject) -> Path:
    name = config.name.replace("{checkpoint}", subject.checkpoint)
    home = run.parent / run.stem if run.is_file() else run
    return Path(config.dir).expanduser() if config.dir else home / "eval" / name


def _begin(folder: Path, known: Mapping[str, Any], *, resume: str) -> None:
    """Makes the folder, or sees that it holds the same evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    about = OmegaConf.create(dict(known))
    if resume == "never" or not (folder / PREDICTIONS).exists():
        for name in (PREDICTIONS, MATCHES, METRICS):
            (folder / name).unlink(missing_ok=True)
    elif (folder / CONFIG).exists():
        changes = changed_keys(OmegaConf.load(folder / CONFIG), about)
        if changes:
            raise ValueError(
                f"{folder} holds predictions of another evaluation ({'; '.join(changes[:5])}): give this one a name of "
                f"its own (name=...), or make them again (resume=never)"
            )
    (folder / CONFIG).write_text(OmegaConf.to_yaml(about), encoding="utf-8")


def _about(
    config: DictConfig, subject: Subject, evaluators: Sequence[Evaluator], device: torch.device
) -> dict[str, Any]:
    """All that predictions depend on."""
    samples = {one.name: json.dumps(one.source.fingerprint(), sort_keys=True) for one in evaluators}
    return {
        "run": config.run,
        "checkpoint": subject.checkpoint,
        "weights": subject.weights,
        "samples": {name: hashlib.sha256(told.encode()).hexdigest()[:16] for name, told in samples.items()},
        "precision": subject.precision,
        "device": device.type,
        "quantize": config.quantize,
        "versions": {package: version(package) for package in PACKAGES},
    }


def _write(path: Path, value: Mapping[str, Any]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(new, path)
