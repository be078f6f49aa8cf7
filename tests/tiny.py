"""A stage one small enough for any test, with the shapes of the real one."""

from __future__ import annotations

import torch
from torch import Tensor

from data.batch import ImageTextBatch
from model.image_text import ImageTextModel
from model.qformer import QFormer
from model.vision.encoder import eva_vit
from train.distributed import Ranks
from train.loss.stage_one import ImageGroundedTextGeneration, ImageTextContrastive, ImageTextMatching, StageOneLoss
from train.stage import Stage

VOCAB_SIZE, PAD, CLS, SEP, BOS = 60, 0, 1, 2, 59


def tiny_model(*, frozen: bool = True, num_layers: int = 4, seed: int = 0) -> ImageTextModel:
    torch.manual_seed(seed)
    vision = eva_vit(
        image_size=28, patch_size=14, width=24, num_layers=2, num_heads=2, mlp_width=48, frozen=frozen, dtype="float32"
    )
    qformer = QFormer(
        vocab_size=VOCAB_SIZE,
        image_width=vision.width,
        hidden_size=32,
        num_layers=num_layers,
        num_heads=4,
        intermediate_size=48,
        max_positions=16,
        num_query_tokens=5,
        dropout=0.0,
    )
    model = ImageTextModel(vision, qformer, embed_dim=16)
    with torch.no_grad():  # BERT's initial weights make everything look alike; the tests want differences
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model


def tiny_stage(
    ranks: Ranks | None = None, *, frozen: bool = True, num_layers: int = 4, losses: StageOneLoss | None = None
) -> Stage:
    losses = losses or StageOneLoss(ImageTextContrastive(), ImageTextMatching(seed=7), ImageGroundedTextGeneration())
    return Stage(tiny_model(frozen=frozen, num_layers=num_layers), losses, ranks or Ranks.alone())


def random_batch(
    size: int, *, shortest: int = 3, length: int = 9, seed: int = 0, image_key_B: Tensor | None = None
) -> ImageTextBatch:
    """Captions of `shortest` to `length` tokens; every pair different unless keys are given."""
    generator = torch.Generator().manual_seed(seed)
    size_B = torch.randint(shortest, length + 1, (size,), generator=generator)
    size_B[0] = length
    ids_BL = torch.randint(3, BOS, (size, length), generator=generator)
    position_L = torch.arange(length)
    ids_BL[:, 0] = CLS
    ids_BL = ids_BL.where(position_L != size_B[:, None] - 1, SEP)
    mask_BL = position_L < size_B[:, None]
    row_B = torch.arange(size)
    # a colour for each patch: noise would look alike to every image token
    colours_B = 255 * torch.randint(0, 2, (size, 3, 2, 2), dtype=torch.uint8, generator=generator)
    batch = ImageTextBatch(
        image_BCHW=colours_B.repeat_interleave(14, 2).repeat_interleave(14, 3),
        text_ids_BL=ids_BL.masked_fill(~mask_BL, PAD),
        text_mask_BL=mask_BL,
        bos_id_B=torch.full((size,), BOS),
        image_key_B=row_B if image_key_B is None else image_key_B,
        text_key_B=row_B + 1000,
        row_B=row_B,
        language_B=row_B % 2,
        languages=("zh", "en"),
        pad_id=PAD,
        step=3,
    )
    return batch.agreed(step_target_tokens=batch.num_target_tokens, text_length=length)


def share_of(batch: ImageTextBatch, rank: int, count: int) -> ImageTextBatch:
    """The contiguous rows that one of `count` ranks holds."""
    from dataclasses import fields, replace

    size = len(batch) // count
    rows = slice(rank * size, (rank + 1) * size)
    tensors = {
        f.name: getattr(batch, f.name)[rows] for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)
    }
    share = replace(batch, **tensors, own_target_tokens=None)
    return share.agreed(step_target_tokens=batch.step_target_tokens, text_length=batch.text_length)
