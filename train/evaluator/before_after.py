"""The table at the end of a fine-tuning: each number of each evaluator before the first step and after the last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.json_lines import lines_of
from train.optim import format_table

_NO_METRIC = ("kind", "step", "evaluator", "time")


def before_and_after(metrics_file: Path) -> str:
    """From `metrics.jsonl`, so that a run that was interrupted has it too; "" where nothing was measured twice."""
    rows = [("measured", "step", "before", "step", "after")]
    for evaluator, (first, last) in first_and_last(metrics_file).items():
        if _step(first) == _step(last):
            continue
        for name, value in last.items():
            if name in _NO_METRIC or name not in first or "num_" in name or not isinstance(value, int | float):
                continue
            rows.append(
                (f"{evaluator}/{name}", str(first["step"]), f"{first[name]:.4g}", str(last["step"]), f"{value:.4g}")
            )
    return format_table(rows) if len(rows) > 1 else ""


def first_and_last(metrics_file: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Each evaluator's lines of the earliest step and of the latest, which may be the same."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for text in lines_of(metrics_file):
        line = json.loads(text)
        if line["kind"] == "eval":
            lines.setdefault(line["evaluator"], []).append(line)
    return {name: (min(measured, key=_step), max(measured, key=_step)) for name, measured in lines.items()}


def _step(line: dict[str, Any]) -> int:
    return int(line["step"])
