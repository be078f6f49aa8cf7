"""Small models for the tests of model/weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from model.image_text import ImageTextModel
from model.qformer import QFormer
from model.vision.encoder import eva_vit

VISION = {"image_size": 28, "patch_size": 14, "width": 32, "num_layers": 2, "num_heads": 4, "mlp_width": 64}
QFORMER = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_layers": 3,
    "num_heads": 4,
    "intermediate_size": 48,
    "max_positions": 16,
    "num_query_tokens": 5,
    "image_width": 32,
}


def small_model(*, seed: int = 0, frozen: bool = True, **qformer: Any) -> ImageTextModel:
    torch.manual_seed(seed)
    vision = eva_vit(**VISION, frozen=frozen, dtype="float32")  # type: ignore[arg-type]
    return ImageTextModel(vision, QFormer(**{**QFORMER, **qformer}), embed_dim=12).eval()


def parity_folder(name: str) -> Path:
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("QUEQIAO_SHARED", root.parent / "shared")) / "parity" / name
    if not folder.is_dir():
        pytest.skip(f"the reference numbers are not here: {folder}")
    return folder


def parity_model(folder: Path, *, seed: int = 0) -> ImageTextModel:
    """Stage one's model at the sizes of a parity folder."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    theirs, q = config["vision"], config["qformer"]
    torch.manual_seed(seed)
    vision = eva_vit(
        image_size=theirs["img_size"],
        patch_size=theirs["patch_size"],
        width=theirs["embed_dim"],
        num_layers=theirs["depth"],
        num_heads=theirs["num_heads"],
        mlp_width=int(theirs["embed_dim"] * theirs["mlp_ratio"]),
        frozen=True,
        ln_eps=1e-6,  # the loader has to put LAVIS's
    )
    qformer = QFormer(
        vocab_size=q["vocab_size"],
        image_width=theirs["embed_dim"],
        hidden_size=q["hidden_size"],
        num_layers=q["num_hidden_layers"],
        num_heads=q["num_attention_heads"],
        intermediate_size=q["intermediate_size"],
        max_positions=q["max_position_embeddings"],
        num_query_tokens=q["num_query_tokens"],
        cross_attention_frequency=q["cross_attention_frequency"],
    )
    return ImageTextModel(vision, qformer, embed_dim=q["projection_dim"]).eval()


def captions(vocab_size: int, *, pad: int = 0, first: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Three captions of different lengths.  -> ids_BL, mask_BL"""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(first, vocab_size, (3, 7), generator=generator)
    mask = torch.arange(7)[None] < torch.tensor([7, 4, 2])[:, None]
    return ids.masked_fill(~mask, pad), mask
