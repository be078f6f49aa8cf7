"""The loop: what it logs, when it saves and evaluates, and how it stops."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data.batch import Skip, StepBatches
from tests.train.tiny_training import BATCH, TinyLoader, TinyModel, tiny_objectives
from train.checkpoint import Checkpoints, read_state
from train.distributed import Ranks
from train.stage import Stage
from train.tracking import Tracker
from train.trainer import StopOnSignal, Trainer


class PlainEngine:
    """The engine's methods on torch alone, so that the loop is tested without DeepSpeed."""

    device = torch.device("cpu")
    zero_stage = 0

    def __init__(self) -> None:
        self.module = Stage(TinyModel(), tiny_objectives, Ranks.alone())
        self.trained = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD([p for _, p in self.trained], lr=0.0)
        self.factors: list[float] = []
        self.backwards = 0

    def __call__(self, batch: Any) -> Any:
        return self.module(batch)

    def backward(self, loss: torch.Tensor) -> None:
        self.backwards += 1
        (loss / 2).backward()

    def step(self, lr_factor: float) -> None:
        self.factors.append(lr_factor)
        self.grad_norm = float(nn.utils.clip_grad_norm_([p for _, p in self.trained], 1e9))
        self.optimizer.param_groups[0]["lr"] = 0.1 * lr_factor
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def learning_rates(self) -> dict[str, float]:
        return {"everything": self.optimizer.param_groups[0]["lr"]}

    def full_weights(self) -> Any:
        return iter(self.trained)

    def full_optimizer_state(self) -> Any:
        return iter(())

    def loss_scale_state(self) -> dict[str, Any]:
        return {}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield


@dataclass
class CountingEvaluator:
    name: str = "counting"
    calls: list[int] = field(default_factory=list)

    def __call__(self, model: nn.Module, *, device: torch.device, ranks: Ranks, predictions: Any) -> Any:
        torch.rand(7)  # an evaluator may use the global random state
        self.calls.append(1)
        model.eval()
        from train.evaluator import Evaluation

        return Evaluation({"value": 1.0})


def trainer(run_dir: Path, loader: Any = None, **changes: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "tracker": Tracker(run_dir, first_step=0, steps=6, is_first=True),
        "checkpoints": Checkpoints(run_dir, Ranks.alone(), keep=2),
        "evaluators": [],
        "lr_factor": lambda step: 1 / (step + 1),
        "checkpoint_state": {},
        "config_yaml": "",
        "steps": 6,
        "global_batch_size": BATCH,
        "log_every": 1,
        "save_every": 2,
        "eval_every": 0,
    }
    engine: Any = PlainEngine()
    return Trainer(engine, loader or TinyLoader(Ranks.alone()), Ranks.alone(), **{**arguments, **changes})


def lines(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    found = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def test_logs_the_loss_of_the_global_batch_and_every_part(tmp_path: Path) -> None:
    it = trainer(tmp_path, log_every=2)
    with torch.no_grad():
        expected = [float(sum(l_.mean() for l_ in losses)) for losses in _first_losses()]
    it.fit(0)
    train = lines(tmp_path, "train")
    assert [line["step"] for line in train] == [2, 4, 6]
    assert it.engine.backwards == 12  # type: ignore[attr-defined]
    fresh = trainer(tmp_path / "again", steps=1)
    fresh.fit(0)
    (line,) = lines(tmp_path / "again", "train")
    assert line["fit"] + line["size"] == pytest.approx(line["loss"])
    assert line["loss"] == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert {"squared", "lr", "grad_norm", "samples_per_second", "data_wait", "skips"} <= line.keys()
    assert line["lr"] == pytest.approx(0.1)
    assert line["num_rows"] == BATCH, "a total adds up over micro-batches"
    assert "squared/xx" not in line, "a mean of no rows is not a zero"
    assert line["data/truncated/xx"] == 3, "the loader's counters reach the log"
    assert "tflops" not in line


def _first_losses() -> Iterator[list[torch.Tensor]]:
    model = TinyModel()
    model.frozen.eval()
    for batch in next(TinyLoader(Ranks.alone()).steps(0)).micro_batches:
        losses, report = tiny_objectives(model, batch, Ranks.alone())  # type: ignore[arg-type]
        yield list(losses.values())


def test_learning_rate_follows_the_step_also_after_a_resume(tmp_path: Path) -> None:
    it = trainer(tmp_path)
    it.fit(4)
    assert it.engine.factors == [1 / 5, 1 / 6]  # type: ignore[attr-defined]


def test_saves_at_its_steps_and_at_the_end_and_keeps_the_newest(tmp_path: Path) -> None:
    trainer(tmp_path, steps=5, save_every=2).fit(0)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_4", "step_5"]
    assert (tmp_path / "checkpoints/latest").resolve().name == "step_5"
    assert [e["checkpoint"] for e in lines(tmp_path, "event")] == ["step_2", "step_4", "step_5"]


def test_evaluates_at_its_steps_and_at_the_end_and_changes_no_training(tmp_path: Path) -> None:
    evaluator = CountingEvaluator()
    torch.manual_seed(1)
    trainer(tmp_path / "with", steps=5, eval_every=2, evaluators=[evaluator]).fit(0)
    after = torch.rand(1)
    assert [line["step"] for line in lines(tmp_path / "with", "eval")] == [2, 4, 5]
    torch.manual_seed(1)
    it = trainer(tmp_path / "without", steps=5)
    it.fit(0)
    assert torch.equal(torch.rand(1), after)
    assert it.engine.module.training
    expected = [line["loss"] for line in lines(tmp_path / "without", "train")]
    assert [line["loss"] for line in lines(tmp_path / "with", "train")] == expected


@pytest.mark.parametrize("log_every", [1, 100])
def test_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path: Path, log_every: int) -> None:
    loader = TinyLoader(Ranks.alone(), bad_step=3)
    with pytest.raises(ValueError, match=r"not finite at step 4.*fit nan"):
        trainer(tmp_path, loader, log_every=log_every).fit(0)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*")) == ["step_2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_after_the_running_step(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting(TinyLoader):
        def steps(self, first_step: int) -> Iterator[StepBatches]:
            for step in super().steps(first_step):
                if step.step == 2:
                    os.kill(os.getpid(), number)
                yield step

    before = signal.getsignal(number)
    done = trainer(tmp_path, Interrupting(Ranks.alone()), save_every=100).fit(0)
    assert done == 3
    assert (tmp_path / "checkpoints/latest").resolve().name == "step_3"
    assert lines(tmp_path, "event")[-1] == {"kind": "event", "step": 3, "event": "stopped", "signal": number.name}
    assert "the same command goes on" in capsys.readouterr().out
    assert signal.getsignal(number) is before


def test_second_ctrl_c_ends_at_once_but_not_the_launchers_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr("train.trainer.time.monotonic", lambda: clock)
    with pytest.raises(KeyboardInterrupt), StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        clock += 1
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        clock += 5
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)


def test_skips_are_counted_and_told(tmp_path: Path) -> None:
    class Skipping(TinyLoader):
        def steps(self, first_step: int) -> Iterator[StepBatches]:
            for step in super().steps(first_step):
                skips = [Skip("photos", "a.tar", "k", "truncated image")] if step.step == 1 else []
                yield StepBatches(step.step, step.micro_batches, skips, step.num_read + len(skips))

    trainer(tmp_path, Skipping(Ranks.alone()), steps=3).fit(0)
    assert [line["skips"] for line in lines(tmp_path, "train")] == [0, 1, 1]
    (event,) = [e for e in lines(tmp_path, "event") if e["event"] == "skip"]
    expected = {"source": "photos", "shard": "a.tar", "key": "k", "reason": "truncated image"}
    assert event == {"kind": "event", "step": 2, "event": "skip", **expected}
    state = read_state(tmp_path / "checkpoints/step_3")
    resumed = trainer(tmp_path, Skipping(Ranks.alone()), steps=4, skips_before=state["data"]["skips"])
    resumed.fit(3)
    assert lines(tmp_path, "train")[-1]["skips"] == 1, "of the whole run"
