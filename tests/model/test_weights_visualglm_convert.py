"""A conversion of VisualGLM writes the model of its config, or names what is in the way and writes nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.weights import chatglm_folder, sat, visualglm, visualglm_convert
from model.weights.checkpoint import open_folder
from tests.model.test_sat_lora import lora_tensors, with_lora
from tests.model.test_weights_sat import CONFIG, change, chat_model

DENSE = "transformer.layers.0.attention.dense.weight"
INV_FREQ = "transformer.layers.0.attention.rotary_emb.inv_freq"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sat.write(chat_model(1), tmp_path / "sat", CONFIG)


def converted(source: Path, *, to: visualglm_convert.Layout = "huggingface", **given: Any) -> Path:
    given = {"qkv_order": "blocks" if to == "huggingface" else "per_head", **given}
    return visualglm_convert.convert(source, source.with_name("converted"), to=to, **given)


def refused(source: Path, **given: Any) -> str:
    with pytest.raises(ValueError) as caught:
        converted(source, **given)
    assert not source.with_name("converted").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({DENSE: torch.zeros(5, 7)}, [f"1 of another shape ({DENSE} is [5, 7], not [32, 32])"]),
        ({visualglm.FIRST_QKV: torch.zeros(5, 7)}, ["query_key_value.weight is [5, 7], not [96, 32]"]),
        ({"mixins.ptuning.prefix.weight": torch.zeros(5)}, ["1 unexpected (mixins.ptuning.prefix.weight)"]),
        ({"transformer.layers.3.mlp.dense_4h_to_h.bias": torch.zeros(32)}, ["1 unexpected (transformer.layers.3.mlp"]),
        (
            {DENSE: None, f"{DENSE}_scale": torch.zeros(32), "mixins.eva.model.glm_proj.bias": torch.zeros(2)},
            [f"1 missing ({DENSE})", f"1 unexpected ({DENSE}_scale)", "glm_proj.bias is [2], not [32]"],
        ),
        ({sat.INV_FREQ: torch.zeros(4)}, [f"{sat.INV_FREQ} is [4], not [2]"]),  # another number of heads
    ],
)
def test_what_is_no_part_of_the_model_is_named(folder: Path, changes: dict[str, Any], expected: list[str]) -> None:
    change(folder, **changes)
    found = refused(folder)
    assert str(folder) in found and all(words in found for words in expected), found


@pytest.mark.parametrize(
    ("part", "first"),
    [
        ("mixins.eva.model.vit.transformer.layers.1.", "layers.1.input_layernorm.weight"),
        ("mixins.eva.model.qformer.transformer.layers.2.", "layers.2.input_layernorm.weight"),
        ("transformer.layers.2.", "transformer.layers.2.input_layernorm.weight"),
    ],
)
def test_a_last_layer_that_the_config_has_is_missed(folder: Path, part: str, first: str) -> None:
    lacking = [name for name in sat.read_newest(folder) if name.startswith(part)]
    change(folder, **dict.fromkeys(lacking))
    found = refused(folder)
    assert f"{len(lacking)} missing" in found and first in found and len(lacking) > 11


def test_layers_that_the_config_lacks_are_named(folder: Path) -> None:
    (folder / "model_config.json").write_text(json.dumps({**CONFIG, "num_layers": 2}))
    assert "12 unexpected (transformer.layers.2.input_layernorm.weight" in refused(folder)


def test_the_base_of_a_qlora_is_packed_and_no_model(folder: Path) -> None:
    change(folder, **{DENSE: torch.zeros(512, 1, dtype=torch.uint8)})
    with_lora(folder, lora_tensors())
    found = refused(folder, leave_lora=True)
    assert f"{DENSE} is [512, 1], not [32, 32]" in found and "quantised" in found


@pytest.mark.parametrize(("num_heads", "expected"), [(5, "num_attention_heads"), (8, "inv_freq is [2], not [1]")])
def test_a_number_of_heads_that_cannot_be(folder: Path, num_heads: int, expected: str) -> None:
    (folder / "model_config.json").write_text(json.dumps({**CONFIG, "num_attention_heads": num_heads}))
    assert expected in refused(folder)


def test_hugging_faces_folders_are_held_to_their_config_too(folder: Path) -> None:
    there = converted(folder).rename(folder.with_name("hf"))
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps({**config, "inner_hidden_size": 40}))
    assert "dense_h_to_4h.weight is [48, 32], not [40, 32]" in refused(there, to="sat")


@pytest.mark.parametrize("to", ["sat", "huggingface"])
def test_tables_that_are_computed_stay_behind(folder: Path, to: visualglm_convert.Layout) -> None:
    """Positions that nobody used are in old checkpoints of SAT's, frequencies in every layer of Hugging Face's."""
    extra = {"transformer.position_embeddings.weight": torch.zeros(9, 32), INV_FREQ: torch.zeros(2)}
    change(folder, **extra)
    out = converted(folder, to=to, qkv_order="blocks")
    found = sat.open_folder(out) if to == "sat" else open_folder(out)
    assert not extra.keys() & found.shapes.keys() and len(found.shapes) > 100


# What Hugging Face's checkpoints of ChatGLM-6B and of ViTs and BERTs keep beside the weights
BUFFERS = {
    "transformer.rotary_emb.inv_freq": torch.zeros(2),
    **{f"transformer.layers.{index}.attention.rotary_emb.inv_freq": torch.zeros(2) for index in range(3)},
    "image_encoder.vit.embeddings.position_ids": torch.arange(5)[None],
    "image_encoder.qformer.transformer.layers.0.position_ids": torch.arange(5)[None],
}


def hugging_faces(folder: Path, **more: Tensor) -> Path:
    there = converted(folder).rename(folder.with_name("hf"))
    (there / "conversion.json").unlink()  # as nobody of ours has written it
    tensors = load_file(there / "model.safetensors")
    save_file({**tensors, **more}, there / "model.safetensors")
    return there


def test_a_published_folder_is_read_past_its_buffers_which_are_named(folder: Path, repo_root: Path) -> None:
    there = hugging_faces(folder, **BUFFERS)
    words = ["visualglm", there, there.with_name("out"), "--to", "sat", "--qkv-order", "per_head"]
    command = [sys.executable, "scripts/convert_weights.py", *map(str, words)]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = {
        "image_encoder.qformer.transformer.layers.*.position_ids": 1,
        "image_encoder.vit.embeddings.position_ids": 1,
        "transformer.layers.*.attention.rotary_emb.inv_freq": 3,
        "transformer.rotary_emb.inv_freq": 1,
    }
    assert json.loads((there.with_name("out") / "conversion.json").read_text())["left_out"] == told
    for name, count in told.items():
        assert f"{name} ({count})" in done.stdout.partition("left out, since nothing in them is learned: ")[2]
    expected, found = sat.read_newest(folder), sat.read_newest(there.with_name("out"))
    assert all(torch.equal(found[name], expected[name]) for name in expected.keys() - {sat.INV_FREQ})

    model = chat_model(2)
    report = chatglm_folder.load(model, there, qkv_order="per_head")
    assert set(report.ignored) == set(BUFFERS) and not report.new
    assert "not part of this model" not in str(report) and "vit.embeddings.position_ids" in str(report)


def test_beside_buffers_a_tensor_that_nobody_knows_is_still_an_error(folder: Path) -> None:
    unknown = {
        "transformer.prefix_encoder.embedding.weight": torch.zeros(4, 8),
        "image_encoder.vit.ids": torch.zeros(2),
    }
    found = refused(hugging_faces(folder, **BUFFERS, **unknown), to="sat")
    assert "2 unexpected (image_encoder.vit.ids, transformer.prefix_encoder.embedding.weight)" in found
    assert not any(name in found for name in BUFFERS)


def test_only_what_is_written_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison of shapes brings no weight into memory, and each is read once, when its turn comes."""
    stored, asked = sat.open_folder(folder), list[str]()

    def read(name: str) -> Tensor:
        asked.append(name)
        return stored.read(name)

    watched = type(stored)(stored.path, stored.shapes, read)
    monkeypatch.setattr(sat, "open_folder", lambda *_, **__: watched)
    converted(folder)
    assert sorted(asked) == sorted(stored.shapes.keys() - {sat.INV_FREQ})


# ---------------------------------------------------------------------------------------------------- rows by reference


@pytest.mark.parametrize("order", ["per_head", "blocks"])
def test_a_reference_of_either_order_shows_the_same(
    folder: Path, repo_root: Path, tmp_path: Path, order: visualglm.QkvOrder
) -> None:
    expected = open_folder(converted(folder))
    known = visualglm_convert.convert(
        folder, tmp_path / "known", to="huggingface", qkv_order="blocks", target_order=order
    )
    words = ["visualglm", folder, tmp_path / "out", "--to", "huggingface", "--reference", known]
    command = [sys.executable, "scripts/convert_weights.py", *map(str, words)]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "rows of query_key_value: per_head" in done.stdout, done.stderr
    found = open_folder(tmp_path / "out")
    assert all(torch.equal(found.read(name), expected.read(name)) for name in expected.shapes)
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["source_qkv_order"] == "blocks"


def test_a_record_that_the_reference_contradicts(folder: Path) -> None:
    known = chatglm_folder.known_rows(converted(folder))
    (folder / "conversion.json").write_text('{"qkv_order": "per_head"}')
    shutil.rmtree(folder.with_name("converted"))
    found = refused(folder, qkv_order=None, reference=known)
    assert "in order 'blocks', as the reference shows, not 'per_head', as conversion.json says" in found


def test_a_reference_that_is_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Hugging Face folder of ChatGLM-6B"):
        chatglm_folder.known_rows(save_small(tmp_path / "other"))
    found = refused(folder, qkv_order=None, reference=torch.zeros(10, 32))  # of another size
    assert "is the reference's in neither order" in found


def save_small(folder: Path) -> Path:
    folder.mkdir()
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    return folder
