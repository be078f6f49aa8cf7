"""The numbers of a report, in tables: a column for each run and evaluation, each with the file it comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.evaluation import METRICS
from train.report.chart import spoken
from train.report.records import NO_METRIC, PredictionSet, RunRecord, is_number


@dataclass(frozen=True)
class Column:
    """What was measured of one checkpoint: evaluator -> its metrics."""

    name: str
    source: str
    measured: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Table:
    """rows: what was measured, and a text for each column, "" where it was not."""

    evaluator: str
    sizes: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def columns(runs: Sequence[RunRecord]) -> list[Column]:
    """Of each run the first and the last evaluation while training, and every evaluation by evaluate.py."""
    found = []
    for run in runs:
        before = f"{run.name}, " if len(runs) > 1 else ""
        by_tool = [
            Column(f"{before}{title(made)}", str(made.folder / METRICS), by_evaluator(made.metrics))
            for made in run.predictions
            if made.metrics and not made.in_training
        ]
        for step, measured in _first_and_last(run):
            at_step = [made for made in run.predictions if made.step == step and not made.in_training]
            if any(set(measured) <= set(by_evaluator(made.metrics)) for made in at_step):
                continue  # measured again by evaluate.py
            by_tool.append(Column(f"{before}step {step}, in training", str(run.metrics_file), measured))
        found += sorted(by_tool, key=lambda column: _step(column.name))
    return found


def title(made: PredictionSet) -> str:
    """ "step 2100", and the name of the evaluation where it has one of its own."""
    if made.checkpoint == "as_loaded":
        words = "starting weights"
    else:
        words = re.sub(r"^step_(\d+)$", r"step \1", made.checkpoint)
    own = "in training" if made.in_training else made.folder.name.removeprefix(made.checkpoint).strip("-_,. ")
    return f"{words}, {own}" if own else words


def tables(made: Sequence[Column]) -> list[Table]:
    """One for each evaluator."""
    evaluators = dict.fromkeys(evaluator for column in made for evaluator in column.measured)
    return [table for evaluator in evaluators if (table := _table(evaluator, made)).rows]


def by_evaluator(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{"retrieval/zh/itc/mean": x, ...} -> {"retrieval": {"zh/itc/mean": x, ...}}"""
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        evaluator, _, key = name.partition("/")
        if is_number(value):
            found.setdefault(evaluator, {})[key] = float(value)
    return found


def _first_and_last(run: RunRecord) -> Iterator[tuple[int, dict[str, dict[str, float]]]]:
    steps: dict[int, dict[str, dict[str, float]]] = {}
    for evaluator, lines in run.measured().items():
        for line in dict.fromkeys([0, len(lines) - 1]):
            own = {key: float(value) for key, value in lines[line].items() if key not in NO_METRIC and is_number(value)}
            steps.setdefault(int(lines[line]["step"]), {})[evaluator] = own
    yield from sorted(steps.items())


def _step(name: str) -> int:
    found = re.search(r"step (\d+)", name)
    return int(found[1]) if found else -1


def _table(evaluator: str, made: Sequence[Column]) -> Table:
    having = [column for column in made if evaluator in column.measured]
    keys = sorted(dict.fromkeys(key for column in having for key in column.measured[evaluator]), key=_chinese_first)
    rows: dict[str, tuple[str, ...]] = {}
    for key in keys:
        label, together = _row(key, keys)
        if label and label not in rows:
            rows[label] = tuple(_cell(column.measured[evaluator], together) for column in having)
    names = tuple(column.name for column in having)
    return Table(evaluator, _sizes([column.measured[evaluator] for column in having]), names, tuple(rows.items()))


def _chinese_first(key: str) -> bool:
    return not key.startswith("zh/")


def _row(key: str, keys: Sequence[str]) -> tuple[str, list[str]]:
    """A label and the keys whose values stand in it: R@1, R@5, R@10 and their mean share a row."""
    before, _, last = key.rpartition("/")
    together = [other for other in keys if re.fullmatch(re.escape(f"{before}/") + r"r@\d+", other)]
    if last.startswith("num_"):
        return "", []
    if last.startswith("r@") or (last == "mean" and together):
        means = [f"{before}/mean"] if f"{before}/mean" in keys else []
        label = f"{spoken(before)}: R@" + " / ".join(other.rpartition("@")[2] for other in together)
        return label + (", mean" if means else ""), together + means
    return spoken(key), [key]


def _cell(measured: Mapping[str, float], keys: Sequence[str]) -> str:
    """Shares in per cent; BLEU, ROUGE-L and CIDEr as their scorers give them."""
    here = [key for key in keys if key in measured]
    if not here:
        return ""
    if re.search(r"bleu|rouge|cider", here[0]) or not all(0.0 <= measured[key] <= 1.0 for key in here):
        return " / ".join(f"{measured[key]:.3f}" for key in here)
    shares = {key: f"{100 * measured[key]:.1f}" for key in here}
    apart = [key for key in here if len(here) > 1 and key.endswith("/mean")]
    recalls = " / ".join(share for key, share in shares.items() if key not in apart)
    return ", ".join([recalls, *(shares[key] for key in apart)]) + " %"


def _sizes(measured: Sequence[Mapping[str, float]]) -> str:
    """Of the pools: "Chinese: 256 images, 256 texts; English: ..."."""
    found: dict[str, dict[str, None]] = {}
    for one in measured:
        for key in sorted(one, key=_chinese_first):
            before, _, last = key.rpartition("/")
            if last.startswith("num_"):
                words = f"{one[key]:g} {last.removeprefix('num_').replace('_', ' ')}"
                found.setdefault(spoken(before) if before else "all", {})[words] = None
    return "; ".join(f"{where}: {', '.join(sizes)}" for where, sizes in found.items())
