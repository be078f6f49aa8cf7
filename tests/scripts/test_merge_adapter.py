"""scripts/merge_adapter.py: the merged model says what the adapter said, after QLoRA too, in either row order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.adapter import Lora, QLora
from model.llm.warm_up import chatglm_config
from model.visual_chat import VisualChatModel
from model.weights import adapter_folder, chatglm_folder, merging, writing
from model.weights.checkpoint import from_tensors, open_folder
from model.weights.rows import in_blocks
from tests.conftest import ROOT
from tests.model.llm_common import codec_of
from tests.tiny_chat import batch_of, tiny_chat, train_pieces

CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "inner_size": 128, "vocab_size": 256}
KINDS = {
    "lora": Lora(rank=4),
    "rslora": Lora(rank=4, rslora=True, layer_range=(1, 3)),
    "dora": Lora(rank=4, dora=True),
    "qlora": QLora(rank=4),
}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces") / "ice_text.model")


def chat(pieces: Path) -> VisualChatModel:
    return tiny_chat(pieces, llm={**SIZES, "initial_std": 0.15})


def base_folder(pieces: Path, folder: Path, order: str = "per_head") -> Path:
    """ChatGLM's folder, in several shards."""
    model = chat(pieces)
    tensors = {name: p.detach() for name, p in model.llm.network.named_parameters()}
    if order == "blocks":
        tensors = {n: in_blocks(t, 4) if "query_key_value" in n else t for n, t in tensors.items()}
    writing.write_folder(from_tensors(tensors), folder, max_shard_bytes=100_000, metadata={})
    (folder / "config.json").write_text(json.dumps(chatglm_config(SIZES, codec_of(model.llm), 0.0)))  # type: ignore[arg-type]
    return folder


def logits(model: VisualChatModel) -> Tensor:
    with torch.no_grad():
        return model.eval().predict(batch_of(model)).logits_TV


def trained(pieces: Path, kind: str, folder: Path, **save: Any) -> VisualChatModel:
    model = chat(pieces)
    KINDS[kind].attach(model, device=CPU)
    torch.manual_seed(1)
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in found.values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    adapter_folder.save(model, {name: p.detach() for name, p in found.items()}, folder, **save)
    return model


def with_weights(pieces: Path, merged: Path, order: str = "per_head") -> VisualChatModel:
    model = chat(pieces)
    chatglm_folder.load(model, merged, qkv_order=order)  # type: ignore[arg-type]
    beside = load_file(merged / "trained.safetensors")
    for name, tensor in beside.items():
        model.get_parameter(name).data.copy_(tensor)
    return model


def merge(*arguments: object, expect: int = 0) -> str:
    command = [sys.executable, "scripts/merge_adapter.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_says_what_the_adapter_said(pieces: Path, tmp_path: Path, kind: str) -> None:
    base = base_folder(pieces, tmp_path / "base")
    model = trained(pieces, kind, tmp_path / "adapter")
    if kind == "qlora":  # the adapter is what counts, on the weights as they were before 4 bits
        whole = chat(pieces)
        adapter_folder.load(whole, tmp_path / "adapter")
        expected = logits(whole)
        assert (logits(model) - expected).abs().max() > 0.05
    else:
        expected = logits(model)
    checkpoint = merging.merged(base, tmp_path / "adapter", qkv_order="per_head", dtype=torch.float32)
    writing.write_folder(checkpoint, tmp_path / "merged", metadata={})
    (tmp_path / "merged/config.json").write_bytes((base / "config.json").read_bytes())
    (tmp_path / "merged/trained.safetensors").write_bytes((tmp_path / "adapter/trained.safetensors").read_bytes())
    found = logits(with_weights(pieces, tmp_path / "merged"))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert (found - logits(chat(pieces))).abs().max() > 0.1, "merging changed nothing"


def test_the_command_in_bfloat16_and_rows_in_blocks(pieces: Path, tmp_path: Path) -> None:
    base = base_folder(pieces, tmp_path / "base", "blocks")
    model = trained(pieces, "lora", tmp_path / "adapter")
    expected = logits(model)
    said = merge(tmp_path / "adapter", base, tmp_path / "merged", expect=1)
    assert "Give --qkv-order" in said and not (tmp_path / "merged").exists()
    options = ("--qkv-order", "blocks", "--max-shard-gb", 1e-4)
    assert "trained.safetensors" in merge(tmp_path / "adapter", base, tmp_path / "merged", *options)
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2
    merged = open_folder(tmp_path / "merged")
    assert {merged.read(name).dtype for name in merged.shapes} == {torch.bfloat16}
    assert merged.shapes == open_folder(base).shapes
    assert json.loads((tmp_path / "merged/conversion.json").read_text())["qkv_order"] == "blocks"
    found = logits(with_weights(pieces, tmp_path / "merged", "blocks"))
    for name, parameter in model.llm.network.named_parameters():  # the same rounding of everything that was not merged
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16().float()
    rounding = (logits(model) - expected).abs().max()
    assert 0 < rounding and (found - expected).abs().max() < 4 * rounding
    with pytest.raises(ValueError, match="was written in order 'blocks'"):
        with_weights(pieces, tmp_path / "merged", "per_head")
    (tmp_path / "merged/conversion.json").unlink()
    other = logits(with_weights(pieces, tmp_path / "merged", "per_head"))
    assert (other - expected).abs().max() > 4 * rounding, "the order of the rows matters"


def test_a_whole_visualglm_takes_projection_and_qformer_too(
    pieces: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = chat(pieces)
    config = chatglm_config(SIZES, codec_of(whole.llm), 0.0)  # type: ignore[arg-type]
    base = chatglm_folder.write(whole, tmp_path / "base", config, qkv_order="blocks")
    expected = logits(trained(pieces, "lora", tmp_path / "adapter", base_model="elsewhere"))
    caplog.clear()
    checkpoint = merging.merged(base, tmp_path / "adapter", qkv_order="blocks", dtype=None)
    assert [r.getMessage().partition(": ")[0] for r in caplog.records] == [
        f"{tmp_path / 'adapter'} was trained on elsewhere and is put on {base}"
    ]
    assert not merging.left_over(base, tmp_path / "adapter")
    merged = {name: checkpoint.read(name) for name in checkpoint.shapes}
    changed = {n for n, t in merged.items() if not torch.equal(t, open_folder(base).read(n))}
    assert {n.split(".")[1] for n in changed if n.startswith("image_encoder")} == {"vit", "qformer", "glm_proj"}
    writing.write_folder(checkpoint, tmp_path / "merged", metadata={})
    (tmp_path / "merged/config.json").write_bytes((base / "config.json").read_bytes())
    model = tiny_chat(pieces, seed=5, llm={**SIZES, "initial_std": 0.15})
    chatglm_folder.load(model, tmp_path / "merged", qkv_order="blocks")
    torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=1e-4)


def test_what_does_not_belong_together_is_named(pieces: Path, tmp_path: Path) -> None:
    base = base_folder(pieces, tmp_path / "base")
    trained(pieces, "lora", tmp_path / "adapter")
    for change, expected in (
        (lambda t: {n.replace("layers.2", "layers.7"): v for n, v in t.items()}, "base has no transformer.layers.7"),
        (lambda t: {n: v[:, :32] if "lora_A" in n else v for n, v in t.items()}, "it belongs to another model"),
        (lambda t: {n: v for n, v in t.items() if "layers.0.attention.dense.lora_A" not in n}, "are not 2 for each"),
        (lambda t: {n: v for n, v in t.items() if "layers.0.attention.dense.lora_B" not in n}, "are not 2 for each"),
    ):
        file = tmp_path / "adapter/adapter_model.safetensors"
        before = file.read_bytes()
        save_file({n: v.contiguous() for n, v in change(load_file(file)).items()}, file)
        with pytest.raises(ValueError, match=expected):
            merging.merged(base, tmp_path / "adapter", qkv_order="per_head")
        file.write_bytes(before)
    trained(pieces, "dora", tmp_path / "dora")
    file = tmp_path / "dora/adapter_model.safetensors"
    name = "base_model.model.transformer.layers.2.attention.dense.lora_magnitude_vector"
    save_file({**load_file(file), name: torch.ones(7)}, file)
    with pytest.raises(ValueError, match=r"2.attention.dense.lora_magnitude_vector is \[7\]; \[64\] was expected"):
        merging.merged(base, tmp_path / "dora", qkv_order="per_head")
    (base / "model_config.json").write_text("{}")
    with pytest.raises(ValueError, match="SAT's folder: python scripts/convert_weights.py"):
        merging.merged(base, tmp_path / "adapter", qkv_order="per_head")


PLACE = "transformer.layers.1.attention.dense.lora_"


@pytest.mark.parametrize(
    ("shapes", "pattern", "expected"),
    [
        ({"A": (6, 64), "B": (64, 6)}, {}, rf"{PLACE}A.weight is \[6, 64\]; 4 rows were expected, rank 4"),
        ({"A": (6, 64)}, {}, rf"{PLACE}A.weight is \[6, 64\]; 4 rows were expected"),
        ({"B": (64, 3)}, {}, rf"{PLACE}B.weight is \[64, 3\]; 4 columns were expected"),
        ({"A": (4,)}, {}, rf"{PLACE}A.weight is \[4\]; 4 rows"),
        ({"B": ()}, {}, rf"{PLACE}B.weight is \[\]; 4 columns"),
        ({}, {"attention.dense": 6}, rf"{PLACE.replace('1', '0')}A.weight is \[4, 64\]; 6 rows were expected, rank 6"),
    ],
)
def test_ranks_that_its_config_does_not_tell_are_not_merged_with_the_scale_of_another(
    pieces: Path, tmp_path: Path, shapes: dict[str, tuple[int, ...]], pattern: dict[str, int], expected: str
) -> None:
    base = base_folder(pieces, tmp_path / "base")
    trained(pieces, "lora", tmp_path / "adapter")
    file, settings = (tmp_path / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "rank_pattern": pattern}))
    broken = {f"base_model.model.{PLACE}{kind}.weight": torch.ones(shape) for kind, shape in shapes.items()}
    save_file({**load_file(file), **broken}, file)
    for read in (
        lambda: merging.merged(base, tmp_path / "adapter", qkv_order="per_head"),
        lambda: adapter_folder.load(chat(pieces), tmp_path / "adapter"),
    ):
        with pytest.raises(ValueError, match=f"{file}: {expected}"):
            read()
