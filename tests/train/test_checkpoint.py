"""A checkpoint is whole or not there."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.weights import manifest, ours
from model.weights.checkpoint import open_file
from model.weights.manifest import fingerprint_of_file
from train.checkpoint import (
    Checkpoints,
    check_same,
    frozen_fingerprint,
    load_training_state,
    load_weights,
    random_state,
    read_state,
    set_random_state,
)
from train.distributed import Ranks


class FakeEngine:
    def __init__(self, weight: float = 0.0, moment: float = 0.0):
        self.weight, self.moment = weight, moment

    def full_weights(self) -> Any:
        yield "a.weight", torch.full((2, 3), self.weight)

    def full_optimizer_state(self) -> Any:
        yield "a.weight.exp_avg", torch.full((2, 3), self.moment)

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.moment = float(tensors["a.weight.exp_avg"][0, 0])

    def loss_scale_state(self) -> dict[str, Any]:
        return {}

    def load_loss_scale_state(self, state: Mapping[str, Any]) -> None:
        assert state == {}


def save(run_dir: Path, steps: list[int], keep: int = 0) -> Checkpoints:
    checkpoints = Checkpoints(run_dir, Ranks.alone(), keep=keep)
    for step in steps:
        engine: Any = FakeEngine(float(step))
        checkpoints.save(engine, step, {"data": {"next_step": step}}, "run: {}\n")
    return checkpoints


def flip_a_bit(file: Path) -> None:
    """Of a number, so that the file stays one that can be read: the last digit in JSON, the last number of a tensor."""
    data = bytearray(file.read_bytes())
    is_text = file.suffix != ".safetensors"
    data[max(i for i, byte in enumerate(data) if not is_text or chr(byte) in "0123456789{")] ^= 1
    file.write_bytes(data)


def damage(folder: Path, how: str) -> None:
    if how == "no marker":
        (folder / "complete").unlink()
    elif how == "cut file":
        data = (folder / "weights.safetensors").read_bytes()
        (folder / "weights.safetensors").write_bytes(data[:-1])
    elif how == "overwritten":
        data = (folder / "weights.safetensors").read_bytes()
        (folder / "weights.safetensors").write_bytes(b"\xff" * 16 + data[16:])
    elif how == "overwritten state":
        data = (folder / "state.json").read_bytes()
        (folder / "state.json").write_bytes(data[:5] + b"\xff" + data[6:])
    elif how.startswith("flipped "):
        flip_a_bit(folder / how.removeprefix("flipped "))
    elif how == "lost file":
        (folder / "state.json").unlink()
    elif how == "cut marker":
        (folder / "complete").write_text('{"state.js')


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no marker", "not written to the end"),
        ("cut file", "bytes instead of"),
        ("overwritten", "weights.safetensors is damaged"),
        ("overwritten state", "state.json is damaged"),
        ("lost file", "state.json is missing"),
        ("cut marker", "marker file is damaged"),
        ("flipped weights.safetensors", "weights.safetensors is damaged .*SHA-256"),
        ("flipped optimizer.safetensors", "optimizer.safetensors is damaged .*SHA-256"),
        ("flipped random.safetensors", "random.safetensors is damaged .*SHA-256"),
        ("flipped state.json", "state.json is damaged .*SHA-256"),
        ("flipped config.yaml", "config.yaml is damaged .*SHA-256"),
        ("flipped complete", "is damaged"),
    ],
)
def test_damaged_checkpoint_is_ignored_and_reported(tmp_path: Path, how: str, message: str) -> None:
    checkpoints = save(tmp_path, [9, 10, 100])
    damage(tmp_path / "checkpoints/step_100", how)
    newest, damaged = checkpoints.newest()
    assert newest == tmp_path / "checkpoints/step_10"
    assert len(damaged) == 1 and "step_100" in damaged[0] and re.search(message, damaged[0])


def test_a_checkpoint_of_before_has_sizes_alone(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, [9, 10])
    marker = tmp_path / "checkpoints/step_10/complete"
    told = json.loads(marker.read_text())
    marker.write_text(json.dumps({name: about["bytes"] for name, about in told.items()}))
    assert checkpoints.newest() == (tmp_path / "checkpoints/step_10", [])
    damage(tmp_path / "checkpoints/step_10", "cut file")
    assert checkpoints.newest()[0] == tmp_path / "checkpoints/step_9"


@pytest.mark.parametrize("marker", ["[]", "{}", '{"state.json": {"bytes": 3}}', '{"state.json": "3"}'])
def test_a_marker_that_says_nothing_of_its_files_is_damaged(tmp_path: Path, marker: str) -> None:
    checkpoints = save(tmp_path, [9, 10])
    (tmp_path / "checkpoints/step_10/complete").write_text(marker)
    newest, (told,) = checkpoints.newest()
    assert newest == tmp_path / "checkpoints/step_9" and "its marker file is damaged" in told


def test_contents_are_read_once_a_start_and_never_by_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = save(tmp_path, [9, 10])
    read: list[Path] = []
    monkeypatch.setattr(manifest, "fingerprint_of_file", lambda file: read.append(file) or fingerprint_of_file(file))
    checkpoints.newest()
    assert len(read) == 5
    Checkpoints(tmp_path, Ranks.alone(), keep=0).newest()
    assert len(read) == 5
    save(tmp_path, [11], keep=2)
    assert len(read) == 10 and {file.parent.name for file in read[5:]} == {".step_11.writing"}


def test_a_file_that_the_disk_does_not_give_is_damage_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = save(tmp_path, [9, 10])

    def fails(file: Path) -> str:
        if file.parent.name == "step_10" and file.name == "optimizer.safetensors":
            raise OSError(5, "Input/output error")
        return fingerprint_of_file(file)

    monkeypatch.setattr(manifest, "fingerprint_of_file", fails)
    newest, (told,) = checkpoints.newest()
    assert newest == tmp_path / "checkpoints/step_9"
    assert "step_10 is ignored: optimizer.safetensors cannot be read (Input/output error)" in told


def test_nothing_there(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, Ranks.alone(), keep=1).newest() == (None, [])


def test_none_whole_is_refused_and_names_them(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, [9, 10, 100])
    checkpoints.refuse_if_none_is_whole()
    for step, how in [(9, "lost file"), (10, "cut file")]:
        damage(tmp_path / f"checkpoints/step_{step}", how)
    checkpoints.refuse_if_none_is_whole()  # the newest still is
    damage(tmp_path / "checkpoints/step_100", "no marker")
    expected = "step_100: it was not written.*step_10: weights.safetensors has .*step_9: state.json is missing"
    with pytest.raises(ValueError, match=f"(?s){expected}.*run.resume=never"):
        checkpoints.refuse_if_none_is_whole()
    Checkpoints(tmp_path / "new", Ranks.alone(), keep=1).refuse_if_none_is_whole()


def test_interrupted_save_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, [1])

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("train.checkpoint._sync", full_disk)
    with pytest.raises(ValueError, match="step_2 could not be written: No space left on device.*make room"):
        save(tmp_path, [2])
    monkeypatch.undo()
    assert Checkpoints(tmp_path, Ranks.alone(), keep=1).newest()[0] == tmp_path / "checkpoints/step_1"
    assert (tmp_path / "checkpoints/latest").resolve().name == "step_1"
    save(tmp_path, [3])
    assert (tmp_path / "checkpoints/latest").resolve().name == "step_3"
    assert not list((tmp_path / "checkpoints").glob(".step_*")), "what a cut-off save left is removed by the next"


@pytest.mark.parametrize(("keep", "expected"), [(0, [1, 2, 3, 10]), (1, [10]), (2, [3, 10])])
def test_rotation_keeps_the_newest(tmp_path: Path, keep: int, expected: list[int]) -> None:
    save(tmp_path, [1, 2, 3, 10], keep)
    assert sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").glob("step_*")) == expected


@pytest.mark.parametrize("how", ["no marker", "flipped weights.safetensors"])
def test_rotation_does_not_count_damaged_ones(tmp_path: Path, how: str) -> None:
    checkpoints = save(tmp_path, [1, 2])
    damage(tmp_path / "checkpoints/step_2", how)
    assert checkpoints.newest()[0] == tmp_path / "checkpoints/step_1"
    save(tmp_path, [3], keep=2)
    assert {p.name for p in (tmp_path / "checkpoints").glob("step_*")} == {"step_1", "step_2", "step_3"}


def test_state_tells_step_position_and_versions(tmp_path: Path) -> None:
    save(tmp_path, [4])
    state = read_state(tmp_path / "checkpoints/latest")
    assert state["step"] == 4 and state["data"] == {"next_step": 4}
    assert state["versions"]["torch"] == torch.__version__.partition("+")[0] or state["versions"]["torch"]
    told = json.loads((tmp_path / "checkpoints/latest/complete").read_text())
    assert told.keys() == {
        "weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "config.yaml"
    }  # fmt: skip
    for name, about in told.items():
        content = (tmp_path / "checkpoints/latest" / name).read_bytes()
        assert about == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


class OneLayer(nn.Module):
    def __init__(self, *shape: int):
        super().__init__()
        self.a = nn.Linear(*shape, bias=False)


def test_load_weights(tmp_path: Path) -> None:
    save(tmp_path, [7])
    folder = tmp_path / "checkpoints/step_7"
    model = OneLayer(3, 2)
    load_weights(model, folder)
    assert torch.equal(model.a.weight, torch.full((2, 3), 7.0))
    with pytest.raises(ValueError, match=r"a\.weight has shape \(2, 3\), this model's has \(4, 3\)"):
        load_weights(OneLayer(3, 4), folder)
    with pytest.raises(ValueError, match=r"1 trainable parameters are not in it \(\['0\.a\.weight'\]\)"):
        load_weights(nn.Sequential(OneLayer(3, 2)), folder)


def test_what_a_diverged_run_left_is_not_gone_on_from(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Ranks.alone(), keep=0)
    saved = [FakeEngine(float("nan"), 1.0), FakeEngine(1.0, float("inf")), FakeEngine(1.0, 2.0)]
    first, second, whole = (checkpoints.save(engine, i, {}, "") for i, engine in enumerate(saved))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"step_0/weights\.safetensors: a\.weight holds 6 of 6 .*earlier checkpoint"):
        load_weights(OneLayer(3, 2), first)
    engine: Any = FakeEngine()
    with pytest.raises(ValueError, match=r"step_1/optimizer\.safetensors: a\.weight\.exp_avg holds 6 of 6"):
        load_training_state(engine, second, Ranks.alone())
    load_training_state(engine, whole, Ranks.alone())
    assert engine.moment == 2.0


@pytest.mark.parametrize("how", ["ours.load_trained", "ours.load"])
def test_who_only_reads_the_weights_sees_damage_too(tmp_path: Path, how: str) -> None:
    """Chat, evaluation, and a stage two that starts from stage one."""
    save(tmp_path, [7])
    folder = tmp_path / "checkpoints/step_7"
    model = OneLayer(3, 2)

    def read() -> None:
        if how == "ours.load":
            ours.load(model, tmp_path)
        else:
            ours.load_trained(model, open_file(ours.find(tmp_path)))

    (folder / "optimizer.safetensors").unlink()  # which they do without
    if how == "ours.load_trained":
        read()
        assert torch.equal(model.a.weight, torch.full((2, 3), 7.0))
    flip_a_bit(folder / "weights.safetensors")
    with pytest.raises(ValueError, match=r"step_7: weights\.safetensors is damaged .*name another checkpoint"):
        read()


def test_fingerprints_name_what_changed() -> None:
    before = {"seed": 1, "sources": {"photos": {"zh": 10}}}
    assert check_same(before, before, "the data", force=False) == []
    now = {"seed": 1, "sources": {"photos": {"zh": 12}, "more": {"zh": 1}}}
    with pytest.raises(ValueError, match=r"sources\.more\.zh: absent -> 1; sources\.photos\.zh: 10 -> 12.*run\.resume"):
        check_same(before, now, "the data", force=False)
    assert len(check_same(before, now, "the data", force=True)) == 2


def test_frozen_hash_sees_one_weight_and_none_that_trains() -> None:
    model = nn.ModuleDict({"frozen": OneLayer(3, 2).requires_grad_(False), "free": OneLayer(3, 2)})
    expected = frozen_fingerprint(model)
    assert expected["names"] == ["frozen.a.weight"]
    model["free"].a.weight.data += 1
    assert frozen_fingerprint(model) == expected
    as_stored = nn.ModuleDict({"frozen": model["frozen"].bfloat16(), "free": model["free"]})
    assert frozen_fingerprint(as_stored) == expected, "the precision of storage does not matter"
    model["frozen"].a.weight.data[1, 2] *= 1.01
    assert frozen_fingerprint(model)["sha256"] != expected["sha256"]


def test_random_states_come_back() -> None:
    import random

    tensors, plain = random_state()
    plain = json.loads(json.dumps(plain))
    expected = (torch.rand(3), np.random.rand(3), random.random())
    set_random_state(tensors, plain)
    again = (torch.rand(3), np.random.rand(3), random.random())
    assert torch.equal(again[0], expected[0])
    assert np.array_equal(again[1], expected[1])
    assert again[2] == expected[2]
