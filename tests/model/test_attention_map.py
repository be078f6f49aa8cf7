"""The weights that are drawn are those that the fused attention uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention_map import cross_attention_weights, on_patches
from model.qformer import QFormer


@pytest.fixture
def qformer() -> QFormer:
    torch.manual_seed(0)
    made = QFormer(
        vocab_size=8, image_width=10, hidden_size=24, num_layers=4, num_heads=3, intermediate_size=32,
        num_query_tokens=5, initial_std=0.4,
    )  # fmt: skip
    return made.eval()  # two of its four layers look


def test_weights_times_values_are_what_fused_attention_returns(qformer: QFormer) -> None:
    memory = qformer.look(torch.randn(2, 17, 10))
    contexts: list[Tensor] = []

    def take(_: Any, arguments: tuple[Tensor, ...]) -> None:
        contexts.append(arguments[0])

    hooks = [attention.output.register_forward_pre_hook(take) for attention in qformer.looking()]
    with torch.no_grad():
        qformer.see(memory)
    for hook in hooks:
        hook.remove()
    expected = list(contexts)
    weights = cross_attention_weights(qformer, memory)
    assert len(weights) == len(expected) == 2
    for weight_BAQM, (_, value_BAMD), expected_BQH in zip(weights, memory.layers(), expected, strict=True):
        assert weight_BAQM.shape == (2, 3, 5, 17)
        context_BQH = (weight_BAQM @ value_BAMD).transpose(1, 2).flatten(2)
        torch.testing.assert_close(context_BQH, expected_BQH, atol=1e-6, rtol=1e-5)


def test_asking_leaves_the_q_former_as_it_was(qformer: QFormer) -> None:
    memory = qformer.look(torch.randn(1, 4, 10))
    with torch.no_grad():
        expected, _ = qformer.see(memory)
        cross_attention_weights(qformer, memory)
        found, _ = qformer.see(memory)
    assert torch.equal(found, expected)
    assert not any(module._forward_pre_hooks for module in qformer.modules())


@pytest.mark.parametrize("num_others", [0, 1, 5])
def test_patches_lie_row_by_row_after_what_is_no_patch(num_others: int) -> None:
    """Patch 7 of 3 x 3... is row 2, column 1; heads are averaged."""
    weight_BAQM = torch.zeros(1, 2, 1, num_others + 9)
    weight_BAQM[0, 0, 0, num_others + 7] = 1.0
    weight_BAQM[0, 1, 0, num_others + 2] = 0.4
    if num_others:
        weight_BAQM[0, 1, 0, :num_others] = 0.6 / num_others
    map_BQRR, other_BQ = on_patches(weight_BAQM)
    expected = torch.zeros(1, 1, 3, 3)
    expected[0, 0, 2, 1], expected[0, 0, 0, 2] = 0.5, 0.2
    torch.testing.assert_close(map_BQRR, expected)
    torch.testing.assert_close(other_BQ, torch.tensor([[0.3 if num_others else 0.0]]))
