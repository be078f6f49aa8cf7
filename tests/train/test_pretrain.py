"""The entry point as users type it: runs, resumes to the same bits, on other ranks too, and on every ZeRO stage.

Each run is a process of its own (DeepSpeed and its process group live once per process), so runs are shared.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.train.wandb_files import offline_runs

TIMEOUT = 150
STEPS, SAVED = 4, 2
TIMINGS = {"samples_per_second", "data_wait", "tflops", "peak_share"}
SMALL = [
    "experiment=smoke",
    "train.global_batch_size=8",
    "train.accumulate=2",
    "model.vision.num_layers=1",
    "data.source.scenes.num_scenes=100",
    f"train.steps={STEPS}",
    f"train.save_every={SAVED}",
]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **changes}


def pretrain(run_dir: Path, *overrides: str, ranks: int = 0, expect: int = 0, **env: str) -> str:
    """Output of one run; `ranks` > 0 goes through the launcher."""
    what = ["-m", "train.pretrain", *SMALL, f"run.dir={run_dir}", *overrides]
    command = ["bash", "scripts/launch.sh", str(ranks), *what] if ranks else [sys.executable, *what]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(QUEQIAO_VENV=str(Path(sys.executable).parents[1]), **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == expect, done.stdout[-6000:]
    return done.stdout


def metrics(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in found if line["kind"] == kind]


def assert_close(run_dir: Path, expected_dir: Path, tolerance: float) -> None:
    lines, expected_lines = metrics(run_dir), metrics(expected_dir)
    assert [line["step"] for line in lines] == [line["step"] for line in expected_lines][: len(lines)]
    for line, expected in zip(lines, expected_lines, strict=False):
        numbers = {name: value for name, value in expected.items() if name != "kind"}
        assert {n: v for n, v in line.items() if n != "kind"} == pytest.approx(numbers, abs=tolerance, rel=tolerance)


def cut_back(run_dir: Path, to: Path) -> Path:
    """The run as a kill between its two checkpoints leaves it: lines beyond the checkpoint, a half-written one."""
    shutil.copytree(run_dir, to, symlinks=True)
    (to / f"checkpoints/step_{STEPS}/complete").unlink()
    with (to / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "lo')
    return to


def typed(zero_stage: int) -> list[str]:
    """The command of each shared run; one of them has wandb's own package along, offline."""
    return [f"train/engine=zero{zero_stage}", *(["run.wandb.mode=offline"] if zero_stage == 1 else [])]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """One uninterrupted run for each ZeRO stage, two at a time."""
    folder = tmp_path_factory.mktemp("straight")
    runs = {zero_stage: folder / f"zero{zero_stage}" for zero_stage in range(4)}
    with ThreadPoolExecutor(2) as pool:
        said = pool.map(lambda zero_stage: pretrain(runs[zero_stage], *typed(zero_stage)), runs)
        for run, text in zip(runs.values(), said, strict=True):
            run.with_suffix(".txt").write_text(text)
    return runs


@pytest.mark.parametrize("zero_stage", range(4))
def test_same_command_resumes_to_the_same_bits(straight: dict[int, Path], tmp_path: Path, zero_stage: int) -> None:
    run = cut_back(straight[zero_stage], tmp_path / "run")
    said = pretrain(run, *typed(zero_stage))
    assert f"resuming after step {SAVED}" in said
    assert "step_4 is ignored: it was not written to the end" in said
    expected = metrics(straight[zero_stage])
    assert [line["step"] for line in expected] == [1, 2, 3, 4]
    assert metrics(run) == expected
    for file in ("weights.safetensors", "optimizer.safetensors", "random.safetensors"):
        path = f"checkpoints/step_{STEPS}/{file}"
        assert (run / path).read_bytes() == (straight[zero_stage] / path).read_bytes(), file
    if zero_stage == 1:
        assert_wandb_goes_on(run)


def assert_wandb_goes_on(run: Path) -> None:
    """The resumed run is the same run of wandb, and counts the same steps with the same values."""
    (first_id, first), (second_id, second) = offline_runs(run)
    assert first_id == second_id == (run / "wandb/run_id.txt").read_text()
    assert [row["_step"] for row in first] == [1, 2, 3, 4] and [row["_step"] for row in second] == [3, 4]
    expected = {line["step"]: line["loss"] for line in metrics(run)}
    assert {row["_step"]: row["train/loss"] for row in [*first, *second]} == expected
    assert all(again["train/loss"] == row["train/loss"] for again, row in zip(second, first[2:], strict=True))


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_stages_agree(straight: dict[int, Path], zero_stage: int) -> None:
    assert_close(straight[zero_stage], straight[0], 1e-5)


@pytest.mark.parametrize(("written", "zero_stage"), [(3, 1), (0, 3)])
def test_resume_on_two_ranks_and_another_stage(
    straight: dict[int, Path], tmp_path: Path, written: int, zero_stage: int
) -> None:
    run = cut_back(straight[written], tmp_path / "run")
    persistence = "train.engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    extra = [persistence] if zero_stage == 3 else []
    pretrain(run, f"train/engine=zero{zero_stage}", *extra, ranks=2)
    assert len(metrics(run)) == STEPS
    assert_close(run, straight[written], 1e-6)


def test_what_a_run_prints_and_leaves(straight: dict[int, Path]) -> None:
    said = straight[0].with_suffix(".txt").read_text()
    assert "contrastive batch 4" in said
    assert "everything, no decay" in said and "qformer" in said and "frozen" in said
    assert "unknown" in said and "truncated" in said, "no statistics of the captions"
    assert {p.name for p in straight[0].iterdir()} == {"config.yaml", "metrics.jsonl", "checkpoints", "tokenizer"}
    assert (straight[0] / "checkpoints/latest").resolve().name == f"step_{STEPS}"
    first = metrics(straight[0])[0]
    assert {"loss", "itc", "itm", "itg", "itc/zh", "itc/en", "temperature", "lr", "grad_norm", "skips"} <= first.keys()
    assert "deepspeed" not in said.lower().replace("train.engine.deepspeed", ""), "DeepSpeed is to be quiet"


def test_never_starts_afresh_beside_the_old_run_and_wandb_may_be_dead(
    straight: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight[0], run, symlinks=True)
    said = pretrain(
        run,
        "run.resume=never",
        "train.steps=1",
        "train/engine=zero0",
        "run.wandb.mode=online",
        "run.wandb.timeout=2",
        WANDB_MODE="online",
        WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_API_KEY="0" * 40,
    )
    assert "wandb: " in said and "metrics.jsonl has everything" in said
    beside = tmp_path / "run-2"
    assert metrics(beside)[0]["loss"] == metrics(straight[0])[0]["loss"]
    assert metrics(run) == metrics(straight[0])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_run_whose_checkpoints_are_all_damaged_is_left_as_it_is(straight: dict[int, Path], tmp_path: Path) -> None:
    run = cut_back(straight[0], tmp_path / "run")
    weights = run / f"checkpoints/step_{SAVED}/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = contents(run)
    said = pretrain(run, "train.log_every=2", expect=1)
    assert f"step_{STEPS}: it was not written to the end" in said and f"step_{SAVED}: weights.safetensors has" in said
    assert "run.resume=never" in said and "Traceback" not in said
    assert contents(run) == before, "metrics, config and what is left of the checkpoints"


def test_changed_data_is_an_error_that_names_the_key(straight: dict[int, Path], tmp_path: Path) -> None:
    run = cut_back(straight[0], tmp_path / "run")
    said = pretrain(run, "data.source.scenes.num_scenes=90", expect=1)
    assert "cannot resume: the data changed" in said and "scenes" in said and "run.force_resume=true" in said
    said = pretrain(run, "data.source.scenes.num_scenes=90", "run.force_resume=true", "train.steps=3")
    assert "resuming by force" in said


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "train.pretrain",
            *SMALL,
            f"run.dir={run}",
            "train.steps=100000",
            "train.save_every=99999",
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 2/"):
                process.send_signal(signal.SIGTERM)
                break
        rest, _ = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 0, rest
    assert "the same command goes on from there" in rest
    last = metrics(run)[-1]["step"]
    assert (run / "checkpoints/latest").resolve().name == f"step_{last}"


def test_two_ranks_make_one_run_directory_and_the_same_losses(straight: dict[int, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight[0], run, symlinks=True)
    said = pretrain(run, "run.resume=never", "train/engine=zero2", ranks=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run-2"]
    assert said.count(f"step 1/{STEPS}") == 1, "only one rank speaks"
    assert len(metrics(tmp_path / "run-2")) == STEPS
    assert_close(tmp_path / "run-2", straight[0], 1e-5)


def test_batch_that_ranks_do_not_divide(tmp_path: Path) -> None:
    said = pretrain(tmp_path / "run", "train.global_batch_size=7", expect=1)
    assert "train.global_batch_size=7 cannot be divided by train.accumulate=2 times 1 ranks" in said
    assert not (tmp_path / "run").exists()
