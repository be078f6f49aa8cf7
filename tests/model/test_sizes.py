"""The shipped sizes, built from their YAML: the full one has the parameters that LAVIS prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import instantiate

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"


def node(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text("utf-8"))
    return loaded


def test_full_size_trains_as_many_parameters_as_lavis() -> None:
    with torch.device("meta"):
        vision = instantiate(node("vision/eva_vit_g"))
        qformer = instantiate(node("qformer/bert_base"), vocab_size=30523, pad_id=0, image_width=vision.width)
        model = instantiate(node("image_text/blip2"), vision=vision, qformer=qformer)
    expected = 186_705_470  # blip2.md 0.2: computed from LAVIS's code, and printed in a public log of it
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 985_952_256 - 2 * 1408


@pytest.mark.parametrize(("vision", "qformer"), [("vit_tiny", "tiny"), ("vit_small_128", "small")])
def test_small_sizes_fit_together_and_train_along(vision: str, qformer: str) -> None:
    with torch.device("meta"):
        encoder = instantiate(node(f"vision/{vision}"))
        queries = instantiate(node(f"qformer/{qformer}"), vocab_size=100, pad_id=0, image_width=encoder.width)
        model = instantiate(node("image_text/blip2"), vision=encoder, qformer=queries)
    assert not encoder.frozen and all(p.requires_grad for p in model.parameters())
    image = torch.empty(2, 3, encoder.image_size, encoder.image_size, device="meta")
    assert model.encode_image(image).query_BQE.shape == (2, queries.num_query_tokens, 256)
