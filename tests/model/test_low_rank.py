"""LoRA in few steps beside peft's own forward: the same numbers and gradients, and peft's own where it has to be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.adapter import inject
from model.quantise import quantise_linears

CPU = torch.device("cpu")


def layer(*, quantised: bool = False, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """One map of 64 to 24 with an adapter that says something."""
    from peft import LoraConfig

    torch.manual_seed(0)
    root = nn.ModuleDict({"map": nn.Linear(64, 24, dtype=dtype)}).requires_grad_(False)
    if quantised:
        quantise_linears(root, ["map"], device=CPU)
    inject(root, LoraConfig(r=3, target_modules=["map"], **{"lora_alpha": 5, **config}))
    nn.init.normal_(root["map"].lora_B["default"].weight)  # type: ignore[union-attr, index]
    return root["map"]


def passed(forward: Callable[[Tensor], Tensor], module: Any, *, autocast: bool = False) -> list[Tensor]:
    """-> output and all gradients"""
    x = torch.linspace(-1, 1, 2 * 5 * 64).reshape(2, 5, 64).sin().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = forward(x)
    module.zero_grad()
    out.float().square().sum().backward()
    gradients = [p.grad.clone() for p in module.parameters() if p.requires_grad]
    assert len(gradients) == 2 and all(gradient.any() for gradient in gradients)
    return [out.detach(), x.grad, *gradients]  # type: ignore[list-item]


@pytest.mark.parametrize("quantised", [False, True])
def test_numbers_and_gradients_are_those_of_peft(quantised: bool) -> None:
    ours = layer(quantised=quantised)
    expected = passed(lambda x: type(ours).forward(ours, x), ours)
    for found, value in zip(passed(ours, ours), expected, strict=True):
        torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32])
def test_autocast_gives_what_fp32_gives_but_for_rounding(weight: torch.dtype) -> None:
    ours, whole = layer(dtype=weight), layer()
    whole.base_layer.weight.data = ours.base_layer.weight.data.float()
    whole.base_layer.bias.data = ours.base_layer.bias.data.float()
    found = passed(ours, ours, autocast=True)
    assert found[0].dtype == torch.bfloat16
    for value, expected in zip(found, passed(whole, whole), strict=True):
        assert torch.linalg.norm(value.float() - expected) < 2e-2 * torch.linalg.norm(expected)


def test_a_map_without_bias_and_an_input_that_needs_no_gradient() -> None:
    ours = layer()
    ours.base_layer.bias = None
    x = torch.randn(4, 64)
    torch.testing.assert_close(ours(x), type(ours).forward(ours, x))
    ours(x).sum().backward()
    assert ours.lora_A["default"].weight.grad.any()


@pytest.mark.parametrize("kind", ["disabled", "merged", "dropout", "dora", "two adapters"])
def test_everything_else_is_left_to_peft(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = layer(lora_dropout=0.5 if kind == "dropout" else 0.0, use_dora=kind == "dora")
    x, calls = torch.randn(4, 64), []
    own = type(ours).forward
    monkeypatch.setattr(type(ours), "forward", lambda *a, **k: calls.append(1) or own(*a, **k))
    if kind == "disabled":
        ours.enable_adapters(False)
        torch.testing.assert_close(ours(x), ours.base_layer(x))
    elif kind == "merged":
        expected = ours(x)
        ours.merge()
        torch.testing.assert_close(ours(x), expected)
    elif kind == "two adapters":
        ours.update_layer("more", 2, 4, config=ours_config())
        ours.set_adapter(["default", "more"])
        ours(x)
    elif kind == "dropout":
        ours.train()
        assert not torch.equal(ours(x), ours(x))
        calls.clear()
        assert torch.equal(ours.eval()(x), ours(x)) and not calls
        return
    else:
        ours(x)
    assert calls


def ours_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=4)


def test_a_copy_has_weights_of_its_own() -> None:
    ours = layer()
    other = copy.deepcopy(ours)
    x = torch.randn(4, 64)
    expected = ours(x)
    other.lora_B["default"].weight.data.zero_()
    torch.testing.assert_close(other(x), other.base_layer(x))
    assert torch.equal(ours(x), expected) and not torch.equal(other(x), expected)
