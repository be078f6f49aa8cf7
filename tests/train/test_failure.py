"""A failure is told once, in a sentence, at the end of what several processes print."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train.failure
from tests.conftest import ROOT
from tests.data.shard_files import bilingual_members, replaced, write_tar
from train.failure import stop, user_errors

SENTENCE = "error: no shard at a.tar"
BIN = Path(sys.executable).parent


def launch(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "scripts/launch.sh", "2", *arguments],
        cwd=ROOT,
        env={**os.environ, "QUEQIAO_VENV": str(BIN.parent), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
    )


def test_a_users_mistake_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("QUEQIAO_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended, user_errors():
        raise ValueError("no shard at a.tar")
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines() == [SENTENCE, "(QUEQIAO_TRACEBACK=1 shows where it was raised)"]
    monkeypatch.setenv("QUEQIAO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no shard"), user_errors():
        raise ValueError("no shard at a.tar")
    with pytest.raises(TypeError), user_errors():
        raise TypeError("a mistake of ours keeps its frames")


@pytest.mark.parametrize(("rank", "expected"), [("0", []), ("1", [10.0]), ("7", [10.0])])
def test_only_the_first_rank_speaks_at_once(monkeypatch: pytest.MonkeyPatch, rank: str, expected: list[float]) -> None:
    slept: list[float] = []
    monkeypatch.setattr(train.failure.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit):
        stop("error: x", 2)
    with pytest.raises(RuntimeError), user_errors():
        raise RuntimeError("Connection closed by peer")
    assert slept == expected * 2


@pytest.mark.parametrize("how", ["all", "the second alone", "a lost peer"])
def test_the_sentence_stands_once_and_last(how: str) -> None:
    done = launch("-m", "tests.train.fail_ranks", how)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [SENTENCE, "(QUEQIAO_TRACEBACK=1 shows where it was raised)"], done.stdout


def test_under_torchrun_itself_the_root_cause_is_the_sentence() -> None:
    command = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "tests.train.fail_ranks", "all"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 1
    assert SENTENCE in done.stderr.partition("Root Cause")[2], done.stderr


def test_bugs_and_crashes_keep_what_tells_of_them() -> None:
    done = launch("-m", "tests.train.fail_ranks", "a bug")
    assert done.returncode == 1
    assert done.stdout.count("ZeroDivisionError: a mistake of ours") == 1, "by one rank"
    done = launch("-m", "tests.train.fail_ranks", "a crash")
    assert done.returncode == 128 + signal.SIGABRT
    assert "SIGABRT" in done.stdout.partition("Root Cause")[2]
    assert "torch/distributed/launcher" not in done.stdout, "none of torchrun's own frames"


def test_a_launcher_that_is_told_to_stop_says_nothing_itself() -> None:
    process = subprocess.Popen(
        ["bash", "scripts/launch.sh", "2", "-m", "tests.train.fail_ranks", "a long run"],
        cwd=ROOT,
        env={**os.environ, "QUEQIAO_VENV": str(BIN.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["running\n"] * 2
        process.terminate()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "rank 0 saved" in said and "rank 1 saved" in said and "Traceback" not in said, said


def test_config_errors_are_told_once() -> None:
    done = launch("-m", "train.pretrain", "experiment=smoke", "train.stepz=3")
    assert done.returncode == 2
    assert done.stdout.splitlines() == [
        "config error: unknown key train.stepz (on the command line: train.stepz=3): did you mean train.steps?"
    ]


def test_too_many_bad_samples_end_a_run_of_two_ranks_with_our_words(tmp_path: Path) -> None:
    members = bilingual_members(range(64))
    for number in range(40):
        members = replaced(members, f"{number:05d}.jpg", b"no picture")
    write_tar(tmp_path / "shards" / "00000.tar", members)
    smoke = ["experiment=smoke", "data/source=shards", "~data.source.scenes", "train.global_batch_size=8"]
    done = launch(
        "-m",
        "train.pretrain",
        *smoke,
        "model.vision.num_layers=1",
        f"data.source.shards.paths={tmp_path}/shards",
        "data.loader.skip_window=16",
        f"run.dir={tmp_path}/run",
    )
    assert done.returncode == 1
    before, _, last = done.stdout.partition("error: ")
    assert "data.max_skip_rate allows 1.0%" in last and f"{tmp_path}/shards/00000.tar 000" in last, done.stdout
    assert last.splitlines()[-2:] == [
        "Repair them, leave them out of the data, or raise data.max_skip_rate.",
        "(QUEQIAO_TRACEBACK=1 shows where it was raised)",
    ]
    assert "error: " not in last and "Traceback" not in done.stdout, done.stdout
    assert before.count("bad samples replaced") == 1, "the other rank warns of the same"
