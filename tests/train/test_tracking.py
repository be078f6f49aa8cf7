"""metrics.jsonl survives a kill; wandb never holds up a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.train.wandb_files import offline_runs
from train.tracking import MetricsFile, Tracker, WandbWriter, peak_tflops


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_resumed_file_has_no_step_twice_and_no_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (1, 2, 3):
        first.write("train", step, {"loss": 1 / step})
        first.write("event", step, {"event": "skip", "key": "图"})
        first.write("event", step, {"event": "skip", "key": "b"})
    first.write("eval", 2, {"evaluator": "retrieval", "r@1": 0.5})
    first.write("eval", 2, {"evaluator": "caption", "r@1": 0.25})
    first.close()
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 2, "loss": 0.75}\n{"kind": "train", "step": 4, "lo')
    resumed = MetricsFile(path, 2)
    resumed.write("train", 3, {"loss": 0.1})
    resumed.close()
    found = entries(path)
    assert [e["step"] for e in found if e["kind"] == "train"] == [1, 2, 3]
    assert [e["loss"] for e in found if e["kind"] == "train"] == [1.0, 0.75, 0.1]
    assert [(e["step"], e["key"]) for e in found if e["kind"] == "event"] == [(1, "图"), (1, "b"), (2, "图"), (2, "b")]
    assert {e["evaluator"]: e["r@1"] for e in found if e["kind"] == "eval"} == {"retrieval": 0.5, "caption": 0.25}


def test_floats_keep_every_bit(tmp_path: Path) -> None:
    expected = [0.1 + 0.2, 1e-45, 3.4028234663852886e38, 1 / 3]
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write("train", 1, {"values": expected})
    file.close()
    assert entries(tmp_path / "metrics.jsonl")[0]["values"] == expected


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, first_step=0, steps=2, is_first=False)
    tracker.train(1, {"loss": 1.0})
    tracker.eval(1, "retrieval", {"r@1": 1.0}, {})
    tracker.event(1, "saved")
    tracker.close()
    assert not list(tmp_path.iterdir())


def test_line_for_people_tells_loss_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(tmp_path, first_step=0, steps=9, is_first=True)
    tracker.train(3, {"loss": 2.5, "itc": 1.5, "samples_per_second": 12.0})
    tracker.eval(3, "retrieval", {"r@1": 0.5}, {"examples": Image.new("RGB", (4, 4))}, ["R@1 50%"])
    tracker.close()
    said = capsys.readouterr().out
    assert "step 3/9  loss 2.5  itc 1.5" in said and "left" in said and "R@1 50%" in said
    assert Image.open(tmp_path / "report/retrieval_examples.png").size == (4, 4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 311.8),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA H20", 148.0),
        ("Some other card", None),
    ],
)
def test_peaks(name: str, expected: float | None) -> None:
    assert peak_tflops(name) == expected


def writer(run_dir: Path, **changes: Any) -> WandbWriter:
    arguments = {"name": "t", "project": "queqiao", "mode": "offline", "timeout": 150.0, "config": {"a": 1}}
    return WandbWriter(run_dir, **{**arguments, **changes})


def test_wandb_offline_keeps_one_id_for_a_run_directory(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    for step in (1, 2):
        wandb_writer = writer(tmp_path)
        wandb_writer.log(step, {"train/loss": 1.0}, {"examples": Image.new("RGB", (4, 4))})
        wandb_writer.close()
        assert wandb_writer.problem is None
        wandb.teardown()  # as the end of a process does: its service may write a moment longer than `finish` waits
    expected = (tmp_path / "wandb/run_id.txt").read_text()
    found = [(run_id, [row["_step"] for row in rows]) for run_id, rows in offline_runs(tmp_path)]
    assert found == [(expected, [1]), (expected, [2])]
    assert list((tmp_path / "wandb").rglob("*.png")), "the picture was not logged"


def test_dead_network_does_not_hold_up_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb_writer = writer(tmp_path, mode="online", timeout=3.0)
    for step in range(100):
        wandb_writer.log(step, {"train/loss": 1.0}, {})
    wandb_writer.close()
    assert wandb_writer.problem
    assert "metrics.jsonl has everything" in capsys.readouterr().err
