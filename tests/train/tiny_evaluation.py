"""A stage one that says something different of every picture, and sets of pictures with every way of belonging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data.source import BadSample, RawSample
from data.source.synthetic import SceneSource
from model.image_text import ImageTextModel
from model.qformer import QFormer
from model.tokenizer import CaptionTokenizer, train_wordpiece
from model.vision import eva_vit

CPU = torch.device("cpu")
NUM_SCENES = 11


def train_tokenizer(folder: Path) -> Path:
    source = SceneSource(300)
    texts = [text for i in range(300) for language in ("zh", "en") for text in source.scene(i).captions(language)]
    return train_wordpiece(texts, 400, folder)


def codec(folder: Path) -> CaptionTokenizer:
    return CaptionTokenizer(str(folder), bos="per_language")


def scenes() -> SceneSource:
    return SceneSource(NUM_SCENES, split="held_out", image_size=32)


def small_model(vocab_size: int, seed: int = 0) -> ImageTextModel:
    vision = eva_vit(image_size=32, patch_size=8, width=24, num_layers=1, num_heads=2, mlp_width=48, frozen=False)
    qformer = QFormer(
        vocab_size=vocab_size,
        image_width=24,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=64,
        num_query_tokens=3,
        max_positions=48,
    )
    model = ImageTextModel(vision, qformer, embed_dim=16)
    torch.manual_seed(seed)
    for parameter in model.parameters():  # random but far from indifferent: no ties, no equal captions
        torch.nn.init.normal_(parameter, std=0.7)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
    for attention in qformer.looking():  # ITM depends on the picture as much as on the text
        attention.image.value.weight.data *= 6.0
    return model


class Album:
    """Samples as they are written down: (picture, captions), or None for one that cannot be read.

    Pictures with one number are equal; a caption may be (text, id).
    """

    name, languages = "album", ("en",)

    def __init__(self, samples: Sequence[tuple[int, Sequence[Any]] | None]) -> None:
        self.samples = list(samples)

    def num_samples(self, language: str) -> int:
        return len(self.samples)

    def read(self, language: str, index: int) -> RawSample:
        sample = self.samples[index]
        if sample is None:
            raise BadSample("truncated image")
        picture, captions = sample
        pairs = [(caption, "") if isinstance(caption, str) else caption for caption in captions]
        image = SceneSource(NUM_SCENES, split="held_out", image_size=32).picture(picture) if picture >= 0 else None
        return RawSample(
            image or Image.new("RGB", (32, 32), (-40 * picture, 0, 0)),
            tuple(text for text, _ in pairs),
            key=f"sample {index}",
            caption_ids=tuple(told for _, told in pairs),
        )

    def fingerprint(self) -> Mapping[str, Any]:
        return {}
