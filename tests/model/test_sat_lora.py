"""LoRA as VisualGLM and XrayGLM save it: what it adds, and that nothing broken is taken for one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.weights import sat, sat_lora, visualglm
from model.weights.rows import in_blocks
from tests.model.test_weights_sat import CONFIG, chat_model, equal


def lora_tensors(*, rank: int = 2, layers: tuple[int, ...] = (0, 2), width: int = 32) -> dict[str, Tensor]:
    torch.manual_seed(9)
    out = {}
    for layer in layers:
        for target, parts in (("query_key_value", 3), ("dense", 1)):
            for part in range(parts):
                place = f"transformer.layers.{layer}.attention.{target}."
                out[f"{place}matrix_A.{part}"] = torch.randn(rank, width)
                out[f"{place}matrix_B.{part}"] = torch.randn(width, rank)
    return out


def with_lora(folder: Path, lora: dict[str, Tensor]) -> None:
    """As SAT saves it: what is wrapped is called `original`."""
    file = folder / "1" / "mp_rank_00_model_states.pt"
    module = torch.load(file, weights_only=True)["module"]
    wrapped = {name.rpartition(".matrix_")[0] for name in lora}
    renamed = {}
    for name, tensor in module.items():
        owner, _, kind = name.rpartition(".")
        renamed[f"{owner}.original.{kind}" if owner in wrapped else name] = tensor
    torch.save({"module": {**renamed, **lora}}, file)


def added_by_sat(lora: dict[str, Tensor], layer: int, x: Tensor, *, head_first: bool, num_heads: int = 4) -> Tensor:
    """`LoraLinear.forward` of SAT 0.4.12 and of XrayGLM's `lora_mixin.py` at alpha 1: what query_key_value gains."""
    place = f"transformer.layers.{layer}.attention.query_key_value."
    rank = len(lora[f"{place}matrix_A.0"])
    parts = [x @ lora[f"{place}matrix_A.{i}"].T @ lora[f"{place}matrix_B.{i}"].T / rank for i in range(3)]
    if head_first:
        return torch.cat([part.unflatten(-1, (num_heads, -1)) for part in parts], -1).flatten(-2)
    return torch.cat(parts, -1)


@pytest.mark.parametrize("order", ["blocks", "per_head"])
def test_a_lora_of_sats_becomes_an_adapter_of_pefts(tmp_path: Path, order: visualglm.QkvOrder) -> None:
    from peft import PeftModel

    folder = sat.write(chat_model(1), tmp_path / "sat", CONFIG, qkv_order=order)
    lora = lora_tensors()
    with_lora(folder, lora)
    model = chat_model(2)
    with pytest.raises(ValueError, match="LoRA that is not merged"):
        sat.load(model, folder, qkv_order=order)
    sat.load(model, folder, qkv_order=order, leave_lora=True)
    assert equal(model, chat_model(1))

    tensors = sat.read_module(folder / "1" / "mp_rank_00_model_states.pt")
    sat_lora.write(sat_lora.read(tensors, CONFIG), tmp_path / "adapter", base="VisualGLM-6B")
    x = torch.randn(5, 32)
    before = {layer: model.llm.layers[layer].attention.query_key_value(x) for layer in (0, 1, 2)}  # type: ignore[operator]
    dense = model.llm.layers[2].attention.dense(x)  # type: ignore[operator]
    PeftModel.from_pretrained(model.llm.network, str(tmp_path / "adapter"))  # type: ignore[arg-type]
    for layer in (0, 1, 2):
        added = model.llm.layers[layer].attention.query_key_value(x) - before[layer]  # type: ignore[operator]
        if layer == 1:
            assert not added.any()
            continue
        # XrayGLM's mixin adds in the rows of its base, head by head; SAT's in blocks
        expected = added_by_sat(lora, layer, x, head_first=True)
        torch.testing.assert_close(added, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            in_blocks(added.T, 4).T, added_by_sat(lora, layer, x, head_first=False), atol=1e-4, rtol=1e-4
        )
    place = "transformer.layers.2.attention.dense."
    expected = x @ lora[f"{place}matrix_A.0"].T @ lora[f"{place}matrix_B.0"].T / 2
    torch.testing.assert_close(model.llm.layers[2].attention.dense(x) - dense, expected, atol=1e-4, rtol=1e-4)  # type: ignore[operator]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [0, 2] and config["base_model_name_or_path"] == "VisualGLM-6B"


QKV, DENSE = (f"transformer.layers.0.attention.{target}.matrix_" for target in ("query_key_value", "dense"))
NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict.fromkeys(lora_tensors()), "no LoRA of SAT's here"),
        ({f"{QKV}B.1": None}, "layer 0, query_key_value: matrix_B.1 missing"),
        (
            {f"{QKV}A.3": (2, 32), f"{QKV}B.3": (32, 2)},
            rf"{QKV}A.3 was not expected: query_key_value has pairs 0, 1, 2 \(query, key",
        ),
        ({f"{DENSE}A.1": (2, 32), f"{DENSE}B.1": (32, 2)}, rf"{DENSE}A.1 was not expected: dense has pair 0"),
        ({f"{QKV}A.1": (3, 32), f"{QKV}B.1": (32, 3)}, rf"{QKV}A.1 is \[3, 32\]; \[2, 32\] was expected"),
        ({f"{QKV}A.1": (3, 32)}, rf"{QKV}A.1 is \[3, 32\]; \[2, 32\] was expected"),
        ({f"{QKV}A.2": (1, 32), f"{QKV}B.2": (32, 1)}, rf"{QKV}A.2 is \[1, 32\]; \[2, 32\]"),
        ({f"{QKV}B.2": (31, 2)}, rf"{QKV}B.2 is \[31, 2\]; \[32, 2\] was expected"),
        ({f"{QKV}A.0": (2, 33)}, rf"{QKV}A.0 is \[2, 33\]; \[2, 32\] was expected"),
        ({f"{DENSE}A.0": (2,)}, rf"{DENSE}A.0 is \[2\]; \[2, 32\]"),
        ({f"{DENSE}A.0": ()}, rf"{DENSE}A.0 is \[\]; \[2, 32\]"),
        ({"transformer.layers.0.mlp.dense_h_to_4h.matrix_A.0": (2, 32)}, "dense_h_to_4h.matrix_A.0: .*something else"),
        ({f"transformer.layers.3.{QKV[21:]}A.0": (2, 32)}, r"layers.3.*A.0 was not expected: .*blocks 0 to 2"),
    ],
)
def test_a_lora_that_is_broken_is_named_with_its_file(
    changes: dict[str, tuple[int, ...] | None], expected: str
) -> None:
    tensors: dict[str, Tensor] = lora_tensors()
    for name, shape in changes.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.ones(shape)
    with pytest.raises(ValueError, match="tuned.pt.*" + expected):
        sat_lora.read(tensors, CONFIG, file="tuned.pt")


def test_numbers_that_are_none_and_kinds_that_are_no_weights_are_named() -> None:
    for tensor, expected in (
        (torch.tensor([[1.0, NAN], *[[0.0, 0.0]] * 31]), rf"tuned.pt: {DENSE}B.0 holds 1 of 64 numbers that are NaN"),
        (torch.ones(32, 2, dtype=torch.uint8), rf"tuned.pt: {DENSE}B.0 is of torch.uint8"),
    ):
        with pytest.raises(ValueError, match=expected):
            sat_lora.read({**lora_tensors(), f"{DENSE}B.0": tensor}, CONFIG, file="tuned.pt")
    for alpha in (0.0, -1.0, NAN, float("inf")):
        with pytest.raises(ValueError, match="alpha is"):
            sat_lora.read(lora_tensors(), CONFIG, alpha=alpha)


def test_several_ranks_are_refused_though_each_fits_itself() -> None:
    """One `r` goes for all of them; SAT's training has one."""
    with pytest.raises(ValueError, match=r"layers.2.*matrix_A.0 is \[3, 32\]; \[2, 32\] was expected, .*rank 2"):
        sat_lora.read({**lora_tensors(layers=(0, 1)), **lora_tensors(rank=3, layers=(2,))}, CONFIG)
    assert sat_lora.read(lora_tensors(rank=3), CONFIG).rank == 3
