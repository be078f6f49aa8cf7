"""`scripts/convert_weights.py` on the reference's VisualGLM: there and back, and never a guess."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from model.weights import sat, visualglm, visualglm_convert
from model.weights.checkpoint import open_folder
from model.weights.rows import head_by_head


@pytest.fixture
def source(shared_dir: Path) -> Path:
    return shared_dir / "parity" / "visualglm_sat"


def run(repo_root: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/convert_weights.py", *map(str, words)]
    return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=120)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return sat.read_newest(folder)


def test_from_sat_to_hugging_face_and_back_changes_no_byte(source: Path, repo_root: Path, tmp_path: Path) -> None:
    asked = run(repo_root, "visualglm", source, tmp_path / "hf", "--to", "huggingface")
    assert asked.returncode != 0 and "--qkv-order" in asked.stderr and not (tmp_path / "hf").exists()
    done = run(repo_root, "visualglm", source, tmp_path / "hf", "--to", "huggingface", "--qkv-order", "blocks")
    assert done.returncode == 0, done.stderr
    assert "rows of query_key_value: per_head" in done.stdout
    there = open_folder(tmp_path / "hf")
    weight = tensors_of(source)[visualglm.FIRST_QKV]
    assert torch.equal(there.read(visualglm.FIRST_QKV), head_by_head(weight, 4))
    assert "image_encoder.glm_proj.weight" in there.shapes and "lm_head.weight" in there.shapes
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert file.metadata()["qkv_order"] == "per_head"

    back = run(repo_root, "visualglm", tmp_path / "hf", tmp_path / "sat", "--to", "sat")  # the order was recorded
    assert back.returncode == 0, back.stderr
    expected, found = tensors_of(source), tensors_of(tmp_path / "sat")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    expected_config = sat.read_config(source)
    assert expected_config.pop("use_final_layernorm")  # SAT's default, which Hugging Face's config has no word for
    assert sat.read_config(tmp_path / "sat") == expected_config
    refused = run(repo_root, "visualglm", source, tmp_path / "sat", "--to", "sat", "--qkv-order", "blocks")
    assert refused.returncode != 0 and "is not empty" in refused.stderr


def test_a_known_tensor_shows_the_order(source: Path, repo_root: Path, tmp_path: Path) -> None:
    visualglm_convert.convert(source, tmp_path / "known", to="huggingface", qkv_order="blocks")
    words = "visualglm", source, tmp_path / "hf", "--to", "huggingface", "--reference", tmp_path / "known"
    done = run(repo_root, *words)
    assert done.returncode == 0, done.stderr
    found, expected = open_folder(tmp_path / "hf"), open_folder(tmp_path / "known")
    assert all(torch.equal(found.read(name), expected.read(name)) for name in expected.shapes)
    with pytest.raises(ValueError, match=r"written in order 'per_head', as conversion.json says, not 'blocks'"):
        visualglm_convert.convert(tmp_path / "known", tmp_path / "no", to="sat", qkv_order="blocks")


def test_shards_hold_the_same(source: Path, tmp_path: Path) -> None:
    for name, size in (("one", 2**30), ("many", 100_000)):
        visualglm_convert.convert(source, tmp_path / name, to="huggingface", qkv_order="blocks", max_shard_bytes=size)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    one, many = open_folder(tmp_path / "one"), open_folder(tmp_path / "many")
    assert one.shapes == many.shapes and all(torch.equal(one.read(n), many.read(n)) for n in one.shapes)


def test_a_lora_becomes_an_adapter_and_its_base_stays(source: Path, repo_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    (folder / "1").mkdir(parents=True)
    for name in ("model_config.json", "latest"):
        (folder / name).write_bytes((source / name).read_bytes())
    module = tensors_of(source)
    for target, parts in (("query_key_value", 3), ("dense", 1)):
        place = f"transformer.layers.0.attention.{target}."
        for kind in ("weight", "bias"):
            module[f"{place}original.{kind}"] = module.pop(place + kind)
        for part in range(parts):
            module |= {f"{place}matrix_A.{part}": torch.ones(2, 64), f"{place}matrix_B.{part}": torch.ones(64, 2)}
    torch.save({"module": module}, folder / "1" / "mp_rank_00_model_states.pt")

    done = run(repo_root, "adapter", folder, tmp_path / "adapter", "--base", "base")
    assert done.returncode == 0 and "rank 2 on layers 0" in done.stdout, done.stderr
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["rank_pattern"] == {"query_key_value": 6}
    module["transformer.layers.0.attention.query_key_value.matrix_A.1"] = torch.ones(3, 64)
    torch.save({"module": module}, folder / "1" / "mp_rank_00_model_states.pt")
    refused = run(repo_root, "adapter", folder, tmp_path / "broken", "--base", "base")
    assert refused.returncode == 1 and not (tmp_path / "broken").exists()
    file = folder / "1" / "mp_rank_00_model_states.pt"
    name = "transformer.layers.0.attention.query_key_value.matrix_A.1"
    assert f"convert_weights: {file}: {name} is [3, 64]; [2, 64] was expected" in refused.stderr
    words = "visualglm", folder, tmp_path / "base", "--to", "sat", "--qkv-order", "blocks"
    assert "LoRA that is not merged" in run(repo_root, *words).stderr
    assert run(repo_root, *words, "--leave-lora").returncode == 0
    found, expected = tensors_of(tmp_path / "base"), tensors_of(source)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_folder_of_neither_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither SAT's"):
        visualglm_convert.layout_of(tmp_path)
