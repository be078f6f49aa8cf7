"""The samples that an evaluator measures on, read once: pictures, captions and who belongs to whom.

Shape letters   I = images   T = texts   L = caption length   C, H, W = image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.batch import TextCodec
from data.collate import truncate
from data.source import BadSample, RawSample, Source
from data.transform import Transform
from train.distributed import Ranks


@dataclass(frozen=True)
class Pool:
    """All images and captions of one language, on the host."""

    language: str
    samples: tuple[RawSample, ...]  # I
    image_ICHW: Tensor  # uint8
    captions: tuple[str, ...]  # T, as they are encoded
    image_of_T: Tensor  # the image each caption was written for
    text_ids_TL: Tensor
    text_mask_TL: Tensor
    num_truncated: int = 0

    @property
    def num_images(self) -> int:
        return len(self.samples)

    @property
    def num_texts(self) -> int:
        return len(self.captions)

    def is_right(self) -> Tensor:
        """right_IT: True where the caption is one of the image's, or reads like one of them."""
        number: dict[str, int] = {}
        text_T = torch.tensor([number.setdefault(caption, len(number)) for caption in self.captions])
        right = torch.zeros(self.num_images, len(number), dtype=torch.bool)
        right[self.image_of_T, text_T] = True
        return right[:, text_T]


def read_pool(
    source: Source,
    language: str,
    transform: Transform,
    codec: TextCodec,
    *,
    num_samples: int | None,
    captions_per_image: int | None,
    max_text_tokens: int,
) -> Pool:
    """The first `num_samples` of a language (None: all).  A sample that cannot be read is left out.

    `captions_per_image` of its captions are taken (None: all), starting with another one for each image, so that the
    first phrasing is not the only one measured.
    """
    available = source.num_samples(language)
    wanted = available if num_samples is None else num_samples
    if not 0 < wanted <= available:
        raise ValueError(
            f"the evaluator asks for {wanted} samples of {language!r}; source {source.name!r} has {available}"
        )
    samples: list[RawSample] = []
    images: list[Tensor] = []
    captions: list[str] = []
    image_of: list[int] = []
    for index in range(wanted):
        try:
            sample = source.read(language, index)
            found = _captions(sample, index, language, transform, captions_per_image)
        except BadSample:
            continue
        images.append(found[0])
        captions += found[1]
        image_of += [len(samples)] * len(found[1])
        samples.append(replace(sample, image=b""))  # the judge wants its captions, nobody its file
    if not samples:
        raise ValueError(f"none of the {wanted} samples of {language!r} in source {source.name!r} can be read")
    ids = [codec.encode(caption) for caption in captions]
    length_T = torch.tensor([min(len(row), max_text_tokens) for row in ids])
    mask_TL = torch.arange(int(length_T.max())) < length_T[:, None]
    ids_TL = torch.full(mask_TL.shape, codec.pad_id, dtype=torch.int64)
    ids_TL[mask_TL] = torch.tensor([token for row in ids for token in truncate(row, max_text_tokens)])
    return Pool(
        language,
        tuple(samples),
        torch.stack(images),
        tuple(captions),
        torch.tensor(image_of),
        ids_TL,
        mask_TL,
        sum(len(row) > max_text_tokens for row in ids),
    )


def _captions(
    sample: RawSample, index: int, language: str, transform: Transform, captions_per_image: int | None
) -> tuple[Tensor, list[str]]:
    """The picture, and its captions as the transform cleans them."""
    number = len(sample.captions)
    if not number:
        raise BadSample("empty text", shard=sample.shard, key=sample.key)
    chosen = [sample.captions[(index + k) % number] for k in range(min(number, captions_per_image or number))]
    rng = np.random.default_rng(0)  # evaluation draws nothing; a training transform used here is at least repeatable
    pairs = [
        transform(replace(sample, captions=(text,), keywords=(), max_keywords=0), language, rng) for text in chosen
    ]
    return pairs[0][0], list(dict.fromkeys(text for _, text in pairs))


def own_share(number: int, ranks: Ranks) -> tuple[Tensor, int]:
    """The rows of 0 .. number-1 that this rank works on, and how many of them are really its own.

    Every rank gets as many, so that all make the same calls (ZeRO-3 and collectives need that): the last ranks repeat
    the last row, and gathered results are cut back to `number`.
    """
    share = -(-number // ranks.count)
    first = ranks.rank * share
    return torch.arange(first, first + share).clamp(max=number - 1), min(max(number - first, 0), share)


def pools_of(
    source: Source, languages: Sequence[str] | None, transform: Transform, codec: TextCodec, **options: int | None
) -> dict[str, Pool]:
    """language -> pool"""
    chosen = tuple(languages) if languages else source.languages
    return {language: read_pool(source, language, transform, codec, **options) for language in chosen}  # type: ignore[arg-type]
