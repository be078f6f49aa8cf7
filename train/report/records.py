"""A run's folder -> what a report can tell of it.  Reads whatever is there: a run that is still going, that was
resumed, that was never evaluated, or whose last line was cut off."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.evaluation import CONFIG
from train.evaluator.predictions import FIRST, METRICS, NEWEST, PREDICTIONS
from train.json_lines import json_lines

NO_METRIC = ("kind", "step", "evaluator", "time")
NOT_CLINICAL = "Not for clinical use"


@dataclass(frozen=True)
class PredictionSet:
    """What one evaluation predicted.

    nodes   evaluator -> its config, by which samples are found again
    parts   (evaluator, part) -> index -> what was predicted
    """

    folder: Path
    checkpoint: str
    nodes: Mapping[str, Any]
    parts: Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]]
    metrics: Mapping[str, float]

    @property
    def in_training(self) -> bool:
        return self.folder.name in (FIRST, NEWEST)

    @property
    def step(self) -> int:
        """Of a checkpoint named step_<n>; the weights that a run begins with are step 0."""
        found = re.fullmatch(r"step_(\d+)", self.checkpoint)
        return int(found[1]) if found else 0


@dataclass(frozen=True)
class RunRecord:
    """A run, as its files tell it.

    train, evals, events   the lines of metrics.jsonl, by step; of train lines the last written of each step
    broken                 lines that could not be read
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    train: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    predictions: Sequence[PredictionSet] = ()
    broken: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def last_step(self) -> int:
        return max((int(line["step"]) for line in (*self.train, *self.evals, *self.events)), default=0)

    @property
    def wanted_steps(self) -> int | None:
        steps = self.setting("train.steps")
        return int(steps) if isinstance(steps, int) else None

    def setting(self, path: str, default: Any = None) -> Any:
        """A value of the config, by its dotted name."""
        node: Any = self.config
        for name in path.split("."):
            if not isinstance(node, Mapping) or name not in node:
                return default
            node = node[name]
        return node

    def parts(self) -> dict[str, list[str]]:
        """Loss -> its languages, in the order of the log: {"itc": ["en", "zh"], ...}, and "loss" where it has none."""
        found: dict[str, list[str]] = {}
        for line in (*self.train[:1], *self.train[-1:]):
            for key in line:
                part, _, language = key.partition("/")
                if language and part in line and re.fullmatch("[a-z]{2}", language):
                    languages = found.setdefault(part, [])
                    if language not in languages:
                        languages.append(language)
        order = [key for key in self.train[-1] if key in found] if self.train else []
        return {part: found[part] for part in dict.fromkeys([*order, *found])} or ({"loss": []} if self.train else {})

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of the train lines that have it."""
        pairs = [(int(line["step"]), float(line[key])) for line in self.train if is_number(line.get(key))]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def loss_weight(self, part: str) -> float:
        """metrics.jsonl has what is back-propagated, times the weight; by language it has the loss itself."""
        weight = self.setting(f"train.loss.{part}.weight", 1.0)
        return float(weight) if is_number(weight) and weight else 1.0

    def measured(self) -> dict[str, list[Mapping[str, Any]]]:
        """Evaluator -> its lines, by step."""
        found: dict[str, list[Mapping[str, Any]]] = {}
        for line in self.evals:
            found.setdefault(str(line.get("evaluator", "?")), []).append(line)
        return found


def read_run(folder: Path) -> RunRecord:
    """Raises ValueError where there is no run."""
    folder = folder.expanduser()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: name the directory of a run, such as outputs/demo")
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{folder} is no directory of a run: it holds no metrics.jsonl")
    lines, broken = json_lines(file)
    usable = [line for line in lines if "kind" in line and is_number(line.get("step"))]
    config = read_config(folder / "config.yaml")
    evaluators = (config.get("train") or {}).get("evaluator") or {}
    made = sorted(read_predictions(folder, evaluators), key=lambda found: (found.step, found.folder.name))
    return RunRecord(
        folder=folder,
        name=folder.resolve().name,
        config=config,
        train=_last_of_each_step(usable, "train"),
        evals=_last_of_each_step(usable, "eval"),
        events=[line for line in usable if line["kind"] == "event"],
        predictions=tuple(one for one in made if not _made_again(one, made)),
        broken=broken + len(lines) - len(usable),
        notes=notes_of([config, *(found.nodes for found in made)]),
    )


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Each once, under names that tell them apart."""
    runs = [read_run(folder) for folder in dict.fromkeys(path.expanduser().resolve() for path in folders)]
    names = [run.name for run in runs]
    return [RunRecord(**{**vars(run), "name": str(run.folder)}) if names.count(run.name) > 1 else run for run in runs]


def read_predictions(folder: Path, evaluators: Mapping[str, Any]) -> list[PredictionSet]:
    """Every evaluation in <run>/eval; `evaluators` are the nodes of the run itself."""
    found = []
    for file in sorted(folder.glob(f"eval/*/{PREDICTIONS}")):
        parts: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
        for row in json_lines(file)[0]:
            if {"evaluator", "part"} <= row.keys() and isinstance(row.get("index"), int):
                parts.setdefault((str(row["evaluator"]), str(row["part"])), {})[row["index"]] = row
        about, measured = read_config(file.parent / CONFIG), _read_json(file.parent / METRICS)
        if file.parent.name in (FIRST, NEWEST):  # training's own, with its own evaluators
            about = {"checkpoint": measured.get("checkpoint", "?"), "evaluator": evaluators}
        checkpoint = str(about.get("checkpoint", file.parent.name))
        nodes = {name: node for name, node in (about.get("evaluator") or {}).items() if isinstance(node, Mapping)}
        found.append(PredictionSet(file.parent, checkpoint, nodes, parts, measured.get("metrics", {})))
    return found


def _made_again(made: PredictionSet, by_all: Sequence[PredictionSet]) -> bool:
    """Whether evaluate.py predicted everything that training predicted of the same weights."""
    others = [one for one in by_all if one.step == made.step and not one.in_training]
    return made.in_training and any(made.parts.keys() <= one.parts.keys() for one in others)


def read_config(file: Path) -> dict[str, Any]:
    """Resolved where that is possible; {} where there is none."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not file.is_file():
        return {}
    try:
        config = OmegaConf.load(file)
    except YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:
        plain = OmegaConf.to_container(config, resolve=False)
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


def notes_of(configs: Sequence[Any]) -> tuple[str, ...]:
    """What evaluators ask to be printed under their results, and the warning that belongs to every X-ray."""
    found: dict[str, None] = {}
    texts = _texts(list(configs))
    for key, value in texts:
        if key == "note" and value:
            found[value[:1].upper() + value[1:]] = None
    named = " ".join(found).casefold()
    if NOT_CLINICAL.casefold() not in named and any(re.search(r"x-?ray", text.casefold()) for _, text in texts):
        found[NOT_CLINICAL] = None
    return tuple(found)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _texts(node: Any, key: str = "") -> list[tuple[str, str]]:
    """Every string of a config with its key; names of keys too, under ""."""
    if isinstance(node, Mapping):
        inner = [pair for name, value in node.items() for pair in _texts(value, str(name))]
        return [("", str(name)) for name in node] + inner
    if isinstance(node, list | tuple):
        return [pair for value in node for pair in _texts(value, key)]
    return [(key, node)] if isinstance(node, str) else []


def _last_of_each_step(lines: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """A run that was resumed by force may have written a step twice."""
    found = {(int(line["step"]), line.get("evaluator")): line for line in lines if line["kind"] == kind}
    return sorted(found.values(), key=lambda line: int(line["step"]))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
