"""scripts/merge_adapter.py on folders of ChatGLM2, ChatGLM3 and GLM-4 as published, and on converted ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GlmForCausalLM

from model.adapter import Lora
from model.llm.glm import Glm
from model.weights import adapter_folder, glm, merging
from model.weights.checkpoint import open_folder
from tests.model.glm_common import small_glm, visual_chat
from tests.model.test_weights_glm import CONFIG, original_weights, write_original
from tests.scripts.test_merge_adapter import CPU, merge

IDS = torch.tensor([[3, 50, 7, 599, 12]])


def trained(base: Path, folder: Path, **arguments: Any) -> Tensor:
    """An adapter as a run on `base` saves it -> the logits with it, in double precision."""
    model = visual_chat(small_glm("chatglm3", frozen=True, **arguments))
    glm.load(model, base, prefix="llm.network.")
    Lora(rank=4).attach(model, device=CPU)
    torch.manual_seed(1)
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in found.values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    adapter_folder.save(model, {name: p.detach() for name, p in found.items()}, folder)
    about = json.loads((folder / "queqiao.json").read_text())
    (folder / "queqiao.json").write_text(json.dumps({**about, "template": "ChatGLM3Codec"}))  # of its tokenizer
    return logits(model.llm)


@torch.no_grad()
def logits(llm: Glm) -> Tensor:
    mask = torch.ones_like(IDS, dtype=torch.bool)
    return llm.double().logits(llm.hidden(llm.embed(IDS), IDS, mask))


@pytest.mark.parametrize("ratio", [1, 50])
def test_an_original_folder_becomes_transformers_glm(tmp_path: Path, ratio: int) -> None:
    base = write_original(tmp_path / "base", {**CONFIG, "rope_ratio": ratio}, original_weights(CONFIG))
    if ratio == 1:
        expected = trained(base, tmp_path / "adapter")
    else:  # which loading cannot read without being told the family
        plain = write_original(tmp_path / "plain", CONFIG, original_weights(CONFIG))
        trained(plain, tmp_path / "adapter")
        long = small_glm("chatglm3", rope_ratio=float(ratio), frozen=True)
        there = glm.convert(base, tmp_path / "converted", family="chatglm3")
        model = visual_chat(long)
        glm.load(model, there, prefix="llm.network.")
        adapter_folder.load(model, tmp_path / "adapter")
        expected = logits(model.llm)
    said = merge(tmp_path / "adapter", base, tmp_path / "merged", "--dtype", "float32", "--max-shard-gb", 1e-5)
    assert "trained.safetensors" in said
    merged = GlmForCausalLM.from_pretrained(tmp_path / "merged").double().eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-3, rtol=1e-4)
    assert not (tmp_path / "merged/modeling_chatglm.py").exists() and (tmp_path / "merged/tokenizer.model").is_file()
    again = small_glm("chatglm3", seed=9, rope_ratio=float(ratio))
    glm.load(again.network, tmp_path / "merged")
    torch.testing.assert_close(logits(again), expected, atol=1e-3, rtol=1e-4)


def test_the_original_and_the_converted_folder_give_the_same(tmp_path: Path) -> None:
    base = write_original(tmp_path / "base", CONFIG, original_weights(CONFIG))
    trained(base, tmp_path / "adapter")
    there = glm.convert(base, tmp_path / "converted", family="chatglm3")
    merged = [merging.merged(folder, tmp_path / "adapter", qkv_order=None, dtype=None) for folder in (base, there)]
    assert merged[0].shapes == merged[1].shapes == open_folder(there).shapes
    assert all(torch.equal(merged[0].read(name), merged[1].read(name)) for name in merged[0].shapes)
    changed = {
        name for name in merged[1].shapes if not torch.equal(merged[1].read(name), open_folder(there).read(name))
    }
    assert len(changed) == 3 * 6, changed


def test_a_family_that_nothing_tells_is_refused_with_the_command(tmp_path: Path) -> None:
    base = write_original(tmp_path / "base", CONFIG, original_weights(CONFIG))
    trained(base, tmp_path / "adapter")
    (tmp_path / "adapter/queqiao.json").unlink()  # what peft wrote says nothing of templates
    merging.merged(base, tmp_path / "adapter", qkv_order=None)
    (base / "config.json").write_text(json.dumps({**CONFIG, "rope_ratio": 4}))
    said = merge(tmp_path / "adapter", base, tmp_path / "merged", expect=1)
    command = f"convert it first: python scripts/convert_weights.py glm {base} TARGET --family chatglm2|chatglm3|glm4"
    assert said.startswith("error: ") and f"{command} --to transformers" in said and said.count("\n") == 1
    assert not (tmp_path / "merged").exists()


def test_pefts_own_on_the_published_code_keeps_the_published_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = original_weights(CONFIG)
    base = write_original(tmp_path / "base", CONFIG, tensors)
    published = nn.Module()
    joint = "transformer.encoder.layers.0.self_attention.query_key_value"
    module = published
    for word in joint.split(".")[:-1]:
        module.add_module(word, nn.Module())
        module = module.get_submodule(word)
    rows, width = tensors[f"{joint}.weight"].shape
    module.add_module("query_key_value", nn.Linear(width, rows))
    adapted = get_peft_model(published, LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    caplog.set_level(logging.ERROR)
    merged = merging.merged(base, tmp_path / "adapter", qkv_order=None, dtype=None)  # these have one order of rows
    assert merged.shapes == open_folder(base).shapes
    update = merging.read_updates(tmp_path / "adapter")[joint]
    expected = tensors[f"{joint}.weight"] + update.scale * (update.up_OR @ update.down_RI)
    torch.testing.assert_close(merged.read(f"{joint}.weight"), expected)
    assert torch.equal(merged.read(f"{joint}.bias"), tensors[f"{joint}.bias"])
