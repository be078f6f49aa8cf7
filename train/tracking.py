"""What a run tells: metrics.jsonl always, a line or a bar for people, wandb where it can."""

from __future__ import annotations

import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from train.evaluator.predictions import Predictions
from train.json_lines import HALVES, lines_of

# Dense tensor-core peaks in TFLOP/s (bf16 or fp16), NVIDIA's data sheets, without sparsity.
PEAK_TFLOPS = {
    "H200": 989.4, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4, "H800": 989.4, "H20": 148.0, "B200": 2250.0,
    "A100": 311.8, "A800": 311.8, "A40": 149.7, "A30": 165.0, "A10": 125.0, "L40S": 362.1, "L40": 181.1, "L4": 121.0,
    "RTX 4090": 165.2, "RTX 3090": 71.0, "V100": 125.0, "T4": 65.1,
}  # fmt: skip


def peak_tflops(device_name: str) -> float | None:
    """Peak of a GPU by its name; the longest entry that fits wins, None for one that is not in the table."""
    fits = [name for name in PEAK_TFLOPS if name in device_name]
    return PEAK_TFLOPS[max(fits, key=len)] if fits else None


class MetricsFile:
    """metrics.jsonl: one JSON object a line, floats in full precision.

    A killed run may leave a cut last line, and lines beyond its last checkpoint; opening it for a run that goes on
    after `step` drops both, so that no step stands in it twice.
    """

    def __init__(self, path: Path, step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _lines_until(path, step) if path.exists() else []
        replacement = path.with_suffix(".new")
        replacement.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(replacement, path)
        self._file: TextIO = path.open("a", encoding="utf-8", errors=HALVES)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        line = json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines_until(path: Path, step: int) -> list[str]:
    kept: dict[Any, str] = {}
    for number, line in enumerate(lines_of(path)):
        try:
            entry = json.loads(line)
            kind, at = entry["kind"], int(entry["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if at <= step:
            # Events may share a step; of train and eval lines the last one written is the one that counts.
            kept[number if kind == "event" else (kind, at, entry.get("evaluator"))] = line
    return list(kept.values())


class Writer(Protocol):
    """Where else metrics go."""

    def log(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class WandbWriter:
    """wandb in a thread of its own: a dead network, a full disk or a missing account never hold up a step."""

    def __init__(self, run_dir: Path, *, name: str, project: str, mode: str, timeout: float, config: Mapping[str, Any]):
        self._queue: queue.Queue[tuple[int, dict[str, float], dict[str, Any]] | None] = queue.Queue(maxsize=10_000)
        self._timeout = timeout
        self.problem: str | None = None
        arguments = {"project": project, "name": name, "mode": mode, "config": dict(config)}
        self._thread = threading.Thread(target=self._work, args=(run_dir, arguments), name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Any]) -> None:
        if self.problem is None and not self._queue.full():
            self._queue.put_nowait((step, dict(values), dict(pictures)))

    def close(self) -> None:
        """Waits for what is left, but not longer than the time-out."""
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=self._timeout)
                self._thread.join(self._timeout)
            except queue.Full:
                pass
        if self._thread.is_alive() or self.problem is not None:
            self.problem = self.problem or f"it did not finish within {self._timeout:g} s"
            print(f"wandb: {self.problem}; metrics.jsonl has everything", file=sys.stderr)

    def _work(self, run_dir: Path, arguments: dict[str, Any]) -> None:
        try:
            import wandb

            run = wandb.init(
                **arguments,
                id=_wandb_id(run_dir),
                resume="allow",
                dir=str(run_dir),
                settings=wandb.Settings(init_timeout=self._timeout, silent=True, console="off", x_disable_stats=True),
            )
            while (item := self._queue.get()) is not None:
                step, values, pictures = item
                run.log({**values, **{name: wandb.Image(p) for name, p in pictures.items()}}, step=step)
            run.finish()
        except Exception as error:  # whatever goes wrong in there, training goes on
            self.problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _wandb_id(run_dir: Path) -> str:
    """One id per run directory, so that a resumed run goes on in the same wandb run."""
    file = run_dir / "wandb" / "run_id.txt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(os.urandom(4).hex(), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


class Tracker:
    """Rank 0 tells; on the other ranks every method does nothing."""

    def __init__(self, run_dir: Path, *, first_step: int, steps: int, is_first: bool, writer: Writer | None = None):
        self.is_first, self.steps, self.writer = is_first, steps, writer
        self._run_dir, self._report = run_dir, run_dir / "report"
        self._metrics = MetricsFile(run_dir / "metrics.jsonl", first_step) if is_first else None
        self._bar: Any = None
        if is_first and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._started, self._first_step = time.monotonic(), first_step

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def train(self, step: int, values: Mapping[str, float]) -> None:
        if self._metrics is None:
            return
        self._metrics.write("train", step, values)
        losses = "  ".join(
            f"{name} {values[name]:.4g}" for name in list(values)[:5] if math.isfinite(values[name]) or name == "loss"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(losses)
        else:
            speed = values.get("samples_per_second", 0.0)
            self.say(f"step {step}/{self.steps}  {losses}  {speed:.1f} samples/s  {self._time_left(step)} left")
        self._log(step, {f"train/{name}": value for name, value in values.items()}, {})

    def eval(
        self,
        step: int,
        name: str,
        values: Mapping[str, float],
        pictures: Mapping[str, Any],
        lines: Sequence[str] = (),
    ) -> None:
        """`pictures` (PIL) also lie in report/ as `<evaluator>_<name>.png`, the newest only."""
        if self._metrics is None:
            return
        self._metrics.write("eval", step, {"evaluator": name, **values})
        for line in lines or ["  ".join(f"{key} {value:.4g}" for key, value in values.items())]:
            self.say(f"step {step}  {line}")
        for picture_name, picture in pictures.items():
            self._report.mkdir(exist_ok=True)
            picture.save(self._report / f"{name}_{picture_name}.png".replace("/", "_"))
        self._log(step, {f"{name}/{key}": value for key, value in values.items()}, pictures)

    def predicted(self, step: int, predictions: Predictions, metrics: Mapping[str, float]) -> None:
        """What the evaluators predicted after `step`, for the report's before and after."""
        if self.is_first:
            predictions.keep(self._run_dir, step, metrics)

    def event(self, step: int, what: str, **details: Any) -> None:
        if self._metrics is not None:
            self._metrics.write("event", step, {"event": what, **details})

    def say(self, text: str) -> None:
        if not self.is_first:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self.writer is not None:
            self.writer.close()
        if self._metrics is not None:
            self._metrics.close()

    def _log(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Any]) -> None:
        if self.writer is not None:
            self.writer.log(step, values, pictures)

    def _time_left(self, step: int) -> str:
        per_step = (time.monotonic() - self._started) / max(1, step - self._first_step)
        seconds = int(per_step * (self.steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
