"""A stage two small enough for any test: a tiny ViT and Q-Former before a tiny ChatGLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import Dialogue, DialogueBatch, Turn
from model.qformer import QFormer
from model.vision.encoder import ImageEncoder, eva_vit
from model.visual_chat import VisualChatModel
from tests.model.llm_common import small_chatglm, train_pieces

__all__ = ["LANGUAGES", "SAMPLES", "batch_of", "pictures", "rows_of", "tiny_chat", "tiny_sight", "train_pieces"]

LANGUAGES = ("zh", "en")
SAMPLES = [  # pictures: one, none, two, several turns, none; answers of unequal lengths
    Dialogue((Turn("描述这张图片。", "两个绿色的三角形，还有一个红色的圆。", 1),), "zh"),
    Dialogue((Turn("What is in the picture?", "A red circle"),), "en"),
    Dialogue((Turn("What?", "blue", 2),), "en"),
    Dialogue((Turn("图片", "红色", 1), Turn("内容", "蒙蒙细雨", 1)), "zh"),
    Dialogue((Turn("描述", "圆"),), "zh"),
    Dialogue((Turn("Describe the image.", "Two green triangles and one more.", 1),), "en"),
    Dialogue((Turn("Q", "a"), Turn("What is on the left?", "A blue square.")), "en"),
    Dialogue((Turn("这张图片", "三角形", 1),), "zh"),
]


def tiny_sight(*, vision_layers: int = 2, qformer_layers: int = 3) -> tuple[ImageEncoder, QFormer]:
    vision = eva_vit(
        image_size=28, patch_size=14, width=24, num_layers=vision_layers, num_heads=2, mlp_width=48, initial_std=0.3
    )
    qformer = QFormer(
        vocab_size=10,
        image_width=vision.width,
        hidden_size=32,
        num_layers=qformer_layers,
        num_heads=4,
        intermediate_size=48,
        max_positions=4,
        num_query_tokens=5,
        dropout=0.0,
        initial_std=0.2,
    )
    return vision, qformer


def tiny_chat(tokenizer: Path, *, seed: int = 0, llm: dict[str, Any] | None = None, **parts: bool) -> VisualChatModel:
    torch.manual_seed(seed)
    vision, qformer = tiny_sight()
    return VisualChatModel(vision, qformer, small_chatglm(tokenizer, **{"frozen": True, **(llm or {})}), **parts).eval()


def pictures(count: int, *, seed: int = 0) -> list[Tensor]:
    """A colour for each patch."""
    generator = torch.Generator().manual_seed(seed)
    colours = 255 * torch.randint(0, 2, (count, 3, 2, 2), dtype=torch.uint8, generator=generator)
    return list(colours.repeat_interleave(14, 2).repeat_interleave(14, 3))


def batch_of(model: VisualChatModel, samples: Sequence[Dialogue] = SAMPLES, *, seed: int = 0) -> DialogueBatch:
    codec = model.llm.codec
    assert codec is not None
    stack = pictures(sum(sample.num_images for sample in samples), seed=seed)
    images = [[stack.pop(0) for _ in range(sample.num_images)] for sample in samples]
    batch = DialogueBatch.collate(
        [codec.encode(sample) for sample in samples],
        images,
        pad_id=codec.pad_id,
        image_size=28,
        language_of=[sample.language for sample in samples],
        languages=LANGUAGES,
    )
    return batch.agreed(step_target_tokens=batch.num_target_tokens, text_length=batch.text_length)


def rows_of(batch: DialogueBatch, rows: Sequence[int], num_micro_steps: int = 1, micro_step: int = 0) -> DialogueBatch:
    """These rows alone, cut to their own length, told the tokens of the whole step."""
    index_B = torch.tensor(rows)
    length = int(batch.mask_BL[index_B].sum(dim=1).max())
    has_G = torch.isin(batch.image_row_G, index_B)
    new_row = torch.full((len(batch),), -1).scatter(0, index_B, torch.arange(len(rows)))
    share = replace(
        batch,
        image_GCHW=batch.image_GCHW[has_G],
        image_row_G=new_row[batch.image_row_G[has_G]],
        image_start_G=batch.image_start_G[has_G],
        **{name: getattr(batch, name)[index_B, :length] for name in ("ids_BL", "labels_BL", "mask_BL")},
        row_B=batch.row_B[index_B],
        language_B=batch.language_B[index_B],
        micro_step=micro_step,
        num_micro_steps=num_micro_steps,
        own_target_tokens=None,
    )
    return share.agreed(step_target_tokens=batch.step_target_tokens, text_length=length)
