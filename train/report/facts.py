"""What a report says of its runs in words: how far they are, what they are made of, what was skipped, what differs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from train.report.records import RunRecord, is_number

MOST_DIFFERENCES, MOST_EVENTS, MOST_REASONS = 400, 200, 12
SIZES = {
    "width": "{} wide",
    "hidden_size": "{} wide",
    "num_layers": "{} layers",
    "image_size": "{} px",
    "num_query_tokens": "{} query tokens",
    "rank": "rank {}",
}
NAMES = {"QFormer": "", "NoAdapter": "none", "warm_up": "ChatGLM, warmed up first"}  # others say what they are
PLACES = ("run.dir", "run.name")  # differ between any two runs


def facts(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Rows of a table, a column for each run; rows that no run fills are left out."""
    made = [_facts(run) for run in runs]
    labels = dict.fromkeys(label for one in made for label in one)
    rows = [(label, [one.get(label, "–") for one in made]) for label in labels]
    return {"names": [run.name for run in runs], "rows": rows}


def _facts(run: RunRecord) -> dict[str, str]:
    last = run.train[-1] if run.train else {}
    batch = run.setting("train.global_batch_size")
    found = {
        "folder": str(run.folder),
        "state": _state(run),
        "batch": f"{batch} samples" if is_number(batch) else "",
        "image encoder": _named(run.setting("model.vision"), "width", "num_layers", "image_size"),
        "Q-Former": _named(run.setting("model.qformer"), "hidden_size", "num_layers", "num_query_tokens"),
        "language model": _named(run.setting("model.llm"), "hidden_size", "num_layers"),
        "adapter": _named(run.setting("model.adapter"), "rank"),
        "learning rate": _text(run.setting("train.optim.lr")),
        "precision": _text(run.setting("train.precision")),
        "last loss": f"{last['loss']:.4g} at step {last['step']}" if is_number(last.get("loss")) else "",
        "throughput": _median(run, "samples_per_second", "{:.4g} samples / s (median)"),
        "waiting for data": _median(run, "data_wait", "{:.1%} of the time (median)"),
        "left out of the log": f"{run.broken} line{'s' * (run.broken > 1)} that could not be read"
        if run.broken
        else "",
    }
    return {label: text for label, text in found.items() if text}


def _state(run: RunRecord) -> str:
    """A file does not tell whether somebody still writes it; how old it is says enough."""
    of = f" of {run.wanted_steps}" if run.wanted_steps is not None else ""
    if run.wanted_steps is not None and run.last_step >= run.wanted_steps:
        return f"finished, {run.last_step} steps"
    minutes = (time.time() - run.metrics_file.stat().st_mtime) / 60
    told = "a moment" if minutes < 2 else f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"
    return f"step {run.last_step}{of}; last written {told} ago"


def _named(node: Any, *sizes: str) -> str:
    """ "eva_vit: 128 wide, ..." of a `_target_` node."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        return ""
    name = str(node["_target_"]).rpartition(".")[2]
    said = ", ".join(SIZES[size].format(node[size]) for size in sizes if is_number(node.get(size)))
    return ": ".join(filter(None, (NAMES.get(name, name), said)))


def _text(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _median(run: RunRecord, key: str, form: str) -> str:
    _, values = run.series(key)
    return form.format(statistics.median(values)) if values else ""


def skipped(run: RunRecord) -> dict[str, Any]:
    """The count in the last line, and the reasons of the events."""
    _, totals = run.series("skips")
    reasons: dict[str, list[Mapping[str, Any]]] = {}
    for event in run.events:
        if event.get("event") == "skip":
            reasons.setdefault(str(event.get("reason", "?")), []).append(event)
    rows = [
        (reason, len(events), " ".join(str(events[0].get(key, "")) for key in ("shard", "key", "detail")).strip())
        for reason, events in sorted(reasons.items(), key=lambda pair: -len(pair[1]))
    ]
    total = max(int(totals[-1]) if totals else 0, sum(number for _, number, _ in rows))
    return {"name": run.name, "total": total, "rows": rows[:MOST_REASONS]}


def told_events(run: RunRecord) -> dict[str, Any]:
    """Everything but skips, the newest of very many."""
    lines = [(int(event["step"]), _told(event)) for event in run.events if event.get("event") != "skip"]
    return {"name": run.name, "lines": lines[-MOST_EVENTS:]}


def _told(event: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in event.items() if key not in ("kind", "step", "event", "time") and value}
    return " ".join([str(event.get("event", "?")), ", ".join(f"{key} {value}" for key, value in rest.items())]).strip()


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Settings whose values are not the same in all runs."""
    flat = [dict(_leaves(run.config)) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    found = []
    for key in sorted(keys):
        values = [str(one.get(key, "–")) for one in flat]
        if len(set(values)) > 1 and key not in PLACES:
            found.append((key, [value if len(value) <= 120 else value[:119] + "…" for value in values]))
    return found[:MOST_DIFFERENCES]


def _leaves(node: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, Mapping) or not node:
        return [(path, node)]
    return [leaf for name, value in node.items() for leaf in _leaves(value, f"{path}.{name}".lstrip("."))]
