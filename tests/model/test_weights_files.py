"""Index and config files that are broken: a sentence with the file and the key, whatever reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.weights import chatglm_folder, sat, visualglm, visualglm_convert
from model.weights.checkpoint import open_file, open_folder, read_config
from tests.model.test_weights_sat import CONFIG, HF_CONFIG, chat_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for letter in "ab":
        save_file({letter: torch.zeros(2)}, tmp_path / f"{letter}.safetensors")
    return tmp_path


def refused(run: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        run()
    return str(caught.value)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ('{"weight_map": {"a": "a.safet', "is no readable JSON, perhaps cut short"),
        ("[]", "holds a list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "weight_map names no tensors"),
        ('{"weight_map": ["a"]}', "weight_map names no tensors"),
        ('{"weight_map": {"a": 1}}', "weight_map names no tensors"),
        ('{"weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}', "b is not in a.safetensors"),
        ('{"weight_map": {"a": "../OTHER/a.safetensors"}}', "names '../OTHER/a.safetensors': shards are files in the"),
        ('{"weight_map": {"a": "OTHER/a.safetensors"}}', "names 'OTHER/a.safetensors'"),
        (r'{"weight_map": {"a": "..\\a.safetensors"}}', r"names '..\\a.safetensors'"),
    ],
)
def test_a_broken_index_is_named(shards: Path, index: str, expected: str) -> None:
    (shards / INDEX).write_text(index.replace("OTHER", shards.name))
    expected = expected.replace("OTHER", shards.name)
    found = refused(lambda: open_folder(shards))
    assert str(shards / INDEX) in found and expected in found


@pytest.mark.parametrize("is_zip", [True, False])  # torch's format, and the one before 1.6
@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.pth", "mp_rank_00_model_states.pt"])
def test_a_torch_file_that_was_cut_short(tmp_path: Path, name: str, is_zip: bool) -> None:
    """At every 400th byte, and among the first 64: torch answers with errors of many kinds."""
    file = tmp_path / name
    read = sat.read_module if name.startswith("mp_rank") else open_file
    tensors = {f"layers.{number}.weight": torch.randn(20, 100) for number in range(8)}
    torch.save({"module": tensors} if read is sat.read_module else tensors, file, _use_new_zipfile_serialization=is_zip)
    whole = file.read_bytes()
    assert len(whole) > 64_000 and read(file)
    for size in [*range(64), *range(64, len(whole), 400)]:
        file.write_bytes(whole[:size])
        assert str(file) in refused(lambda: read(file)), size


@pytest.mark.parametrize("place", [0, 30, 300])
def test_a_torch_file_whose_beginning_is_other_bytes(tmp_path: Path, place: int) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.bin")
    whole = bytearray((tmp_path / "a.bin").read_bytes())
    for value in range(0, 256, 5):
        whole[place : place + 40] = bytes([value]) * 40
        (tmp_path / "a.bin").write_bytes(whole)
        assert str(tmp_path / "a.bin") in refused(lambda: open_file(tmp_path / "a.bin")), value


@pytest.mark.parametrize("name", ["../1", "/tmp", "1/..", "..\\1"])
def test_a_checkpoint_is_in_its_folder(tmp_path: Path, name: str) -> None:
    folder = sat.write(chat_model(1), tmp_path / "sat", CONFIG)
    (folder / "latest").write_text(name)
    assert f"{folder / 'latest'} names {name!r}" in refused(lambda: sat.open_folder(folder))


@pytest.mark.parametrize(
    ("text", "expected"), [('{"a": ', "cut short"), ("[]", "holds a list"), ("\udcff", "no readable")]
)
def test_a_broken_config_is_named(tmp_path: Path, text: str, expected: str) -> None:
    for name, read in (("config.json", read_config), ("model_config.json", sat.read_config)):
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        found = refused(lambda read=read: read(tmp_path))  # type: ignore[misc]
        assert str(tmp_path / name) in found and expected in found
    (tmp_path / visualglm.RECORD).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert visualglm.RECORD in refused(lambda: visualglm.recorded_order(tmp_path))


@pytest.mark.parametrize("key", ["num_attention_heads", "image_length", "vocab_size", "gmask_token_id", "num_layers"])
def test_a_key_that_a_conversion_needs_is_named(tmp_path: Path, key: str) -> None:
    folder = sat.write(chat_model(1), tmp_path / "sat", {name: value for name, value in CONFIG.items() if name != key})
    found = refused(lambda: visualglm_convert.convert(folder, tmp_path / "out", to="huggingface", qkv_order="blocks"))
    assert f"{folder / 'model_config.json'} has no {key}" in found and not (tmp_path / "out").exists()


def test_a_key_inside_a_part_is_named(tmp_path: Path) -> None:
    theirs = {**HF_CONFIG, "image_length": 5, "eva_config": CONFIG["eva_args"], "qformer_config": {"hidden_size": 24}}
    folder = chatglm_folder.write(chat_model(1), tmp_path / "hf", theirs)
    found = refused(lambda: visualglm_convert.convert(folder, tmp_path / "out", to="sat", qkv_order="per_head"))
    assert f"{folder / 'config.json'}, qformer_config has no is_decoder" in found
    for part in ("eva_args", "qformer_args"):
        (tmp_path / "model_config.json").write_text(json.dumps({**CONFIG, part: 5}))
        assert f"no ['{part}']" in refused(lambda: sat.read_config(tmp_path))
    for part in ("eva_config", "qformer_config"):
        (tmp_path / "config.json").write_text(json.dumps({**theirs, part: 5}))
        (tmp_path / "model_config.json").unlink(missing_ok=True)
        assert f"it has no {part}" in refused(lambda: visualglm_convert.read_config(tmp_path))


def test_a_record_of_no_known_order_is_refused(tmp_path: Path) -> None:
    (tmp_path / visualglm.RECORD).write_text('{"qkv_order": "rows"}')
    found = refused(lambda: visualglm.recorded_order(tmp_path))
    assert str(tmp_path / visualglm.RECORD) in found and "qkv_order" in found and "'rows'" in found
    (tmp_path / visualglm.RECORD).write_text("{}")
    assert visualglm.recorded_order(tmp_path) is None
