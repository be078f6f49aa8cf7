"""The best checkpoint: chosen by a number of the evaluators, kept, and known to a run that goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_trainer import lines, trainer
from train.best import BestMetric
from train.checkpoint import Checkpoints, read_state
from train.distributed import Ranks
from train.evaluator import Evaluation


@dataclass
class Scripted:
    """Gives the next of its values each time."""

    values: list[float]
    name: str = "scripted"
    calls: list[int] = field(default_factory=list)

    def __call__(self, model: Any, **_: Any) -> Evaluation:
        return Evaluation({"zh/value": self.values.pop(0), "zh/other": 0.0})


def run(
    run_dir: Path, values: list[float], *, mode: str = "max", first: int = 0, keep: int = 1, **changes: Any
) -> None:
    checkpoints = Checkpoints(run_dir, Ranks.alone(), keep=keep)
    newest, _ = checkpoints.newest()
    before = None if newest is None else checkpoints.best_of(read_state(newest))
    best = BestMetric("scripted/zh/value", mode, ["scripted"], before)
    options = {"eval_every": 1, "save_every": 100, "steps": first + len(values), **changes}
    trainer(run_dir, checkpoints=checkpoints, evaluators=[Scripted(values)], best=best, **options).fit(first)


def saved(run_dir: Path) -> list[str]:
    return sorted(folder.name for folder in (run_dir / "checkpoints").glob("step_*"))


def best_of(run_dir: Path) -> str:
    return (run_dir / "checkpoints/best").resolve().name


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("max", [0.1, 0.5, 0.3, 0.5], "step_2"),  # the first of two equals
        ("min", [0.4, 0.5, 0.3, 0.6], "step_3"),
        ("max", [float("nan"), -2.0, -3.0], "step_2"),
        ("max", [1.0, 2.0, 3.0], "step_3"),
    ],
)
def test_the_best_is_saved_and_kept(tmp_path: Path, mode: str, values: list[float], expected: str) -> None:
    last = f"step_{len(values)}"
    run(tmp_path, list(values), mode=mode)
    assert best_of(tmp_path) == expected and (tmp_path / "checkpoints/latest").resolve().name == last
    assert saved(tmp_path) == sorted({expected, last}), "one is kept beside the best"
    best = read_state(tmp_path / "checkpoints/best")["best"]
    number = int(expected.removeprefix("step_"))
    assert best == {"name": "scripted/zh/value", "mode": mode, "value": values[number - 1], "step": number}
    assert [event["step"] for event in lines(tmp_path, "event") if event["event"] == "best"][-1] == number


def test_a_run_that_goes_on_knows_the_best(tmp_path: Path) -> None:
    run(tmp_path, [0.1, 0.9, 0.2])
    run(tmp_path, [0.5, 0.8], first=3)
    assert best_of(tmp_path) == "step_2" and saved(tmp_path) == ["step_2", "step_5"]
    run(tmp_path, [0.95], first=5)
    assert best_of(tmp_path) == "step_6" and saved(tmp_path) == ["step_6"]


def test_another_number_or_a_lost_checkpoint_begins_anew(tmp_path: Path) -> None:
    run(tmp_path, [0.9, 0.2])
    run(tmp_path, [0.5, 0.6], first=2, mode="min")
    assert best_of(tmp_path) == "step_3"
    (tmp_path / "checkpoints/step_3/weights.safetensors").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path, Ranks.alone(), keep=1)
    assert checkpoints.best_of(read_state(tmp_path / "checkpoints/latest")) is None


def test_a_link_that_a_kill_prevented_is_made_up_for(tmp_path: Path) -> None:
    run(tmp_path, [0.1, 0.9, 0.2], keep=0)
    (tmp_path / "checkpoints/best").unlink()
    run(tmp_path, [0.3], first=3, keep=0)
    assert best_of(tmp_path) == "step_2"


def test_a_number_that_nobody_measures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.best_metric\.name=retrieval/r@1 is no number of scripted"):
        BestMetric("retrieval/r@1", "max", ["scripted"])
    best = BestMetric("scripted/zh/valeu", "max", ["scripted"])
    it = trainer(tmp_path, evaluators=[Scripted([0.1, 0.2])], best=best, eval_every=1, save_every=100)
    with pytest.raises(ValueError, match=r"was not measured; nearest: scripted/zh/value.*is saved"):
        it.fit(0)
    assert saved(tmp_path) == ["step_1"], "the step that was trained is not lost"
