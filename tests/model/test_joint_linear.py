"""Maps of one input as one product: the numbers of each map alone, its adapter's too, and one cast for all."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from model.joint_linear import joint_linear
from tests.operations import Operations


@pytest.fixture
def maps() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"key": nn.Linear(6, 8), "value": nn.Linear(6, 4)})


def test_a_joint_product_is_each_map_and_its_gradients(maps: nn.ModuleDict) -> None:
    x = torch.randn(2, 5, 6, requires_grad=True)
    weight = torch.randn(2, 5, 12)
    results = []
    for found in (joint_linear(x, [maps["key"], maps["value"]]), torch.cat([maps["key"](x), maps["value"](x)], -1)):
        leaves = [x, *maps.parameters()]
        results.append([found, *torch.autograd.grad((found * weight).sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_an_adapter_on_one_of_the_maps_is_not_passed_over(maps: nn.ModuleDict) -> None:
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["value"], init_lora_weights=False), maps)
    x = torch.randn(3, 6)
    expected = torch.cat([maps["key"](x), maps["value"](x)], dim=-1)
    torch.testing.assert_close(joint_linear(x, [maps["key"], maps["value"]]), expected)
    assert not torch.allclose(expected[:, 8:], maps["value"].base_layer(x), atol=1e-3), "the adapter does nothing"


def test_the_input_is_cast_once_under_autocast(maps: nn.ModuleDict) -> None:
    x = torch.randn(2, 5, 6)
    with Operations() as asked, torch.autocast("cpu", dtype=torch.bfloat16):
        found = joint_linear(x, [maps["key"], maps["value"]])
    assert found.dtype == torch.bfloat16
    assert asked.counts["_to_copy", (2, 5, 6)] == 1
    assert asked.number_of("addmm") == 1
