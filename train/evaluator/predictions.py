"""What was predicted, one JSON object a line, kept as it is made: an evaluation that was interrupted goes on there.

{"evaluator": "caption", "part": "zh", "index": 7, ...}; what else stands in a line is the evaluator's own.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from train.distributed import Ranks
from train.json_lines import HALVES, json_lines, lines_of

PREDICTIONS, METRICS = "predictions.jsonl", "metrics.json"  # of one evaluation, in a folder of its own
MATCHES = "matches.jsonl"  # beside them until the evaluation is done
FIRST, NEWEST = "training_first", "training_newest"  # those folders for what training evaluates, in <run>/eval

Row = Mapping[str, Any]  # "index" and what was predicted
Place = tuple[str, str, int]  # evaluator, part, index


class Predictions:
    """Every rank makes its share and knows everybody's; the first one writes.

    Args:
        path: the file; None keeps them in memory, as training does.
        lockstep: ranks share their weights (ZeRO-3), so that all must make the same calls to the model: none may stop
            early.
        shown: a progress bar, or now and then a line where there is no terminal.
    """

    def __init__(
        self, ranks: Ranks, path: Path | None = None, *, lockstep: bool | None = None, shown: bool = False
    ) -> None:
        self.ranks, self.shown = ranks, shown and ranks.is_first
        self.lockstep = ranks.count > 1 if lockstep is None else lockstep
        self._known: dict[Place, Row] = {}
        self._path = path
        self._file: TextIO | None = None
        if path is not None:
            self._known = ranks.broadcast_object(_read(path) if ranks.is_first else {})
            if ranks.is_first:
                _write(path, self._known)  # without a line that was cut off
                self._file = path.open("a", encoding="utf-8", errors=HALVES)

    def known(self, evaluator: str, part: str) -> dict[int, Row]:
        """index -> what was predicted, the same on every rank"""
        return {index: row for (name, of, index), row in self._known.items() if (name, of) == (evaluator, part)}

    def add(self, evaluator: str, part: str, rows: Sequence[Row]) -> int:
        """Every rank calls it, each with its own rows.  -> how many all ranks added; they are on disk now."""
        gathered = [row for own in self.ranks.gather_objects(list(rows)) for row in own]
        for row in gathered:
            place = (evaluator, part, int(row["index"]))
            self._known[place] = row
            if self._file is not None:
                self._file.write(_line(place, row))
        if self._file is not None:
            self._file.flush()
        return len(gathered)

    def matches(self, evaluator: str, part: str, *sizes: int) -> Matches:
        """What ITM said already; every rank must ask.  `sizes` of the pool, by which its pairs are numbered."""
        return Matches(self.ranks, self._path and self._path.with_name(MATCHES), [evaluator, part, *sizes])

    def progress(self, what: str, total: int, done: int = 0) -> Progress:
        return Progress(what, total, done, shown=self.shown)

    def keep(self, run_dir: Path, step: int, metrics: Mapping[str, float]) -> None:
        """What training predicted after `step`, where the report looks for it: the run's first time and its newest.

        On the first rank alone.  A run that begins anew in its folder replaces both.
        """
        if not self._known:
            return
        first, newest = run_dir / "eval" / FIRST, run_dir / "eval" / NEWEST
        folder = newest if _step_of(first) < step else first
        if folder == first and newest.exists():
            shutil.rmtree(newest)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / METRICS).unlink(missing_ok=True)  # written last: it names the step that the rest belongs to
        _write(folder / PREDICTIONS, dict(sorted(self._known.items())))
        about = {"checkpoint": f"step_{step}", "step": step, "metrics": dict(metrics)}
        (folder / METRICS).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Sorts the file, so that it does not tell how many ranks wrote it."""
        if self._file is not None and self._path is not None:
            self._file.close()
            self._file = None
            _write(self._path, dict(sorted(self._known.items())))
            self._path.with_name(MATCHES).unlink(missing_ok=True)


class Matches:
    """Logits of image-text pairs, kept block by block: a ranking needs them all, and they may take hours.

    Args:
        path: a JSON object a line, of any pools; None, as in training: nothing is kept.
        of: the pool whose pairs they are.
    """

    def __init__(self, ranks: Ranks, path: Path | None, of: Sequence[str | int]) -> None:
        self.ranks, self._path, self._of = ranks, path, list(of)
        self.logits: Mapping[int, float] = {}  # of each pair that was matched before, the same on every rank
        if path is not None:
            self.logits = ranks.broadcast_object(self._read(path) if ranks.is_first else {})

    def add(self, pairs: Sequence[int], logits: Sequence[float]) -> None:
        """Every rank calls it, each with its own."""
        if self._path is None:
            return
        gathered = self.ranks.gather_objects((list(pairs), list(logits)))
        if self.ranks.is_first:
            with self._path.open("a", encoding="utf-8") as file:
                for own, found in gathered:
                    # the line before may have been cut off
                    file.write("\n" + json.dumps({"of": self._of, "pairs": own, "logits": found}))

    def _read(self, path: Path) -> dict[int, float]:
        lines = json_lines(path)[0] if path.exists() else []
        return {
            pair: logit
            for line in lines
            if line.get("of") == self._of
            for pair, logit in zip(line["pairs"], line["logits"], strict=True)
        }


class Progress:
    """A bar with the time left; where stderr is no terminal, a line every half minute."""

    EVERY = 30.0

    def __init__(self, what: str, total: int, done: int = 0, *, shown: bool) -> None:
        self.what, self.total, self.done, self.shown = what, total, done, shown
        self._start, self._first, self._said = time.monotonic(), done, time.monotonic()
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=what, total=total, initial=done, dynamic_ncols=True, leave=False)

    def advance(self, number: int) -> None:
        self.done += number
        if self._bar is not None:
            self._bar.update(number)
        elif self.shown and time.monotonic() - self._said >= self.EVERY and self.done > self._first:
            self._said = time.monotonic()
            seconds = int((self._said - self._start) / (self.done - self._first) * (self.total - self.done))
            left = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
            print(f"{self.what}: {self.done} of {self.total}, {left} left", flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Every line of a finished file, as it stands."""
    return [json.loads(line) for line in lines_of(path)]


def _step_of(folder: Path) -> float:
    """Infinite where nothing whole is kept there."""
    try:
        return float(json.loads((folder / METRICS).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf


def _line(place: Place, row: Row) -> str:
    evaluator, part, index = place
    return json.dumps({"evaluator": evaluator, "part": part, **row, "index": index}, ensure_ascii=False) + "\n"


def _read(path: Path) -> dict[Place, Row]:
    found: dict[Place, Row] = {}
    if path.exists():
        for line in lines_of(path):
            try:
                row = json.loads(line)
                place = (str(row.pop("evaluator")), str(row.pop("part")), int(row["index"]))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            found[place] = row
    return found


def _write(path: Path, known: Mapping[Place, Row]) -> None:
    new = path.with_suffix(".new")
    with new.open("w", encoding="utf-8", errors=HALVES) as file:
        for place, row in known.items():
            file.write(_line(place, row))
    os.replace(new, path)
