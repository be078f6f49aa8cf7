"""What narrow networks from scratch begin with."""

from __future__ import annotations

import pytest
import torch

from model.qformer import QFormer
from model.vision.encoder import eva_vit, sincos_positions


def small_vit(**options: object):
    torch.manual_seed(0)
    return eva_vit(
        image_size=32, patch_size=8, width=64, num_layers=1, num_heads=2, mlp_width=64, frozen=False, **options
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("expected", [0.02, 0.1])
def test_initial_std_is_that_of_the_weights(expected: float) -> None:
    torch.manual_seed(0)
    qformer = QFormer(vocab_size=50, image_width=64, hidden_size=64, num_layers=2, num_heads=2, initial_std=expected)
    for network in (qformer, small_vit(initial_std=expected)):
        matrices = [parameter for parameter in network.parameters() if parameter.ndim == 2]
        assert matrices
        for matrix in matrices:
            assert matrix.std().item() == pytest.approx(expected, rel=0.15)


def test_sincos_positions_follow_the_distance() -> None:
    grid, width = 5, 32
    positions = sincos_positions(grid, width).view(grid, grid, width)
    row, column = 2, 1
    rate = 100.0 ** -torch.linspace(0, 1, width // 4)
    expected = torch.cat([(row * rate).sin(), (row * rate).cos(), (column * rate).sin(), (column * rate).cos()])
    torch.testing.assert_close(positions[row, column], expected)
    alike = positions.flatten(0, 1) @ positions[0, 0]
    near, far = alike.view(grid, grid)[0, 1], alike.view(grid, grid)[4, 4]
    assert alike.argmax() == 0 and near > far
    assert len({tuple(row.tolist()) for row in positions.flatten(0, 1)}) == grid * grid


def test_a_vit_begins_with_them_and_goes_on_learning_them() -> None:
    vit = small_vit(initial_positions="sincos")
    positions = vit.network.embeddings.position_embedding
    torch.testing.assert_close(positions[0, 1:], sincos_positions(4, 64))
    assert positions.requires_grad
    with pytest.raises(ValueError, match="width that 4 divides, not 30"):
        sincos_positions(4, 30)
