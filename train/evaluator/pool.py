"""The samples that an evaluator measures on: pictures, captions and who belongs to whom.

Every rank reads and decodes its share, and keeps those pictures alone; all know the captions.

Shape letters   I = images   T = texts   P = pairs that belong together   K = this rank's images   L = caption length
                C, H, W = image
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from data.batch import TextCodec
from data.collate import image_key, truncate
from data.source import BadSample, RawSample, Source
from data.transform import PairTransform
from train.distributed import Ranks
from train.evaluator import own_share

READERS = 8  # threads; most of a picture's way is outside Python
READ_AHEAD = 256  # samples whose files are held in memory


@dataclass(frozen=True)
class Pool:
    """The images and captions of one language, on the host."""

    language: str
    samples: tuple[RawSample, ...]  # I, without their pictures
    captions: tuple[str, ...]  # T, as they are encoded
    references: tuple[tuple[str, ...], ...]  # of each image all captions, as they were written
    pair_P2: Tensor  # image and text of every pair that belongs together, image by image
    text_ids_TL: Tensor
    text_mask_TL: Tensor
    own_K: Tensor  # images whose pictures are on this rank
    image_KCHW: Tensor  # uint8
    num_truncated: int = 0
    num_left_out: int = 0  # samples that could not be read

    @property
    def num_images(self) -> int:
        return len(self.samples)

    @property
    def num_texts(self) -> int:
        return len(self.captions)

    def texts_of(self) -> list[list[int]]:
        """Of each image."""
        found: list[list[int]] = [[] for _ in self.samples]
        for image, text in self.pair_P2.tolist():
            found[image].append(text)
        return found

    def pictures(self, images: Sequence[int], ranks: Ranks) -> dict[int, Tensor]:
        """image -> its CHW, whichever rank has it; every rank must ask."""
        place = {image: k for k, image in enumerate(self.own_K.tolist())}
        own = {image: self.image_KCHW[place[image]] for image in images if image in place}
        return {image: picture for found in ranks.gather_objects(own) for image, picture in found.items()}


@dataclass(frozen=True)
class _Read:
    """What all ranks know of a sample."""

    sample: RawSample
    key: int  # equal for equal images
    captions: tuple[str, ...]
    caption_ids: tuple[str, ...]


def check_pool(source: Source, language: str, num_samples: int | None) -> int:
    """How many samples the pool is read from."""
    available = source.num_samples(language)
    wanted = available if num_samples is None else num_samples
    if not 0 < wanted <= available:
        raise ValueError(
            f"the evaluator asks for {wanted} samples of {language!r}; source {source.name!r} has {available}"
        )
    return wanted


def read_pool(
    source: Source,
    language: str,
    transform: PairTransform,
    codec: TextCodec,
    ranks: Ranks,
    *,
    num_samples: int | None,
    captions_per_image: int | None,
    max_text_tokens: int,
) -> Pool:
    """The first `num_samples` of a language (None: all).  A sample that cannot be read is left out, and counted.

    Equal images (`data.collate.image_key`) are one image with all their captions.  `captions_per_image` of a sample's
    captions are taken (None: all), starting with another one for each image, so that the first phrasing is not the only
    one measured.  Captions with the same id are one text, right for several images; a sample without captions is an
    image that is right for none.
    """
    wanted = check_pool(source, language, num_samples)
    own = _read_share(source, language, transform, captions_per_image, own_share(wanted, ranks))
    shares = ranks.gather_objects([known for known, _ in own])
    images: dict[int, int] = {}
    first: list[_Read] = []
    texts, captions, pairs = dict[str, int](), list[str](), dict[tuple[int, int], None]()
    own_images: dict[int, Tensor] = {}
    references: list[dict[str, None]] = []
    for rank, share in enumerate(shares):
        for number, known in enumerate(share):
            image = images.setdefault(known.key, len(images))
            if image == len(first):
                first.append(known)
                references.append({})
                if rank == ranks.rank:
                    own_images[image] = own[number][1]
            references[image] |= dict.fromkeys(known.sample.captions)
            for caption, told in zip(known.captions, known.caption_ids, strict=True):
                # without an id it is the image's own, once
                text = texts.setdefault(told or f"{image} {caption}", len(texts))
                if text == len(captions):
                    captions.append(caption)
                pairs[image, text] = None
    if not captions:
        raise ValueError(f"none of the {wanted} samples of {language!r} in source {source.name!r} can be read")
    ids_TL, mask_TL, num_truncated = encoded(captions, codec, max_text_tokens)
    side = transform.image_size
    return Pool(
        language,
        tuple(known.sample for known in first),
        tuple(captions),
        tuple(map(tuple, references)),
        torch.tensor(sorted(pairs)),
        ids_TL,
        mask_TL,
        torch.tensor(list(own_images), dtype=torch.int64),
        torch.stack(list(own_images.values())) if own_images else torch.zeros(0, 3, side, side, dtype=torch.uint8),
        num_truncated,
        wanted - sum(map(len, shares)),
    )


class Pools:
    """The pool of each language, read when it is first asked for.

    Args:
        languages: None for all of the source's.
        others: see `read_pool`.
    Raises:
        ValueError: more samples than the source has, before any is read.
    """

    def __init__(
        self, source: Source, transform: PairTransform, codec: TextCodec, languages: Sequence[str] | None,
        *, num_samples: int | None, captions_per_image: int | None, max_text_tokens: int,
    ) -> None:  # fmt: skip
        self.languages = tuple(languages) if languages else source.languages
        for language in self.languages:
            check_pool(source, language, num_samples)
        self._read = partial(
            read_pool,
            source,
            transform=transform,
            codec=codec,
            num_samples=num_samples,
            captions_per_image=captions_per_image,
            max_text_tokens=max_text_tokens,
        )
        self._pools: dict[str, Pool] = {}

    def of(self, language: str, ranks: Ranks) -> Pool:
        """Every rank must ask."""
        if language not in self._pools:
            self._pools[language] = self._read(language, ranks=ranks)
        return self._pools[language]


def encoded(captions: Sequence[str], codec: TextCodec, max_tokens: int) -> tuple[Tensor, Tensor, int]:
    """-> ids_TL, mask_TL, and how many captions were cut"""
    ids = [codec.encode(caption) for caption in captions]
    length_T = torch.tensor([min(len(row), max_tokens) for row in ids])
    mask_TL = torch.arange(int(length_T.max())) < length_T[:, None]
    ids_TL = torch.full(mask_TL.shape, codec.pad_id, dtype=torch.int64)
    ids_TL[mask_TL] = torch.tensor([token for row in ids for token in truncate(row, max_tokens)])
    return ids_TL, mask_TL, sum(len(row) > max_tokens for row in ids)


def _read_share(
    source: Source, language: str, transform: PairTransform, captions_per_image: int | None, share: range
) -> list[tuple[_Read, Tensor]]:
    """The samples of a share that can be used, each with its picture."""
    found = []
    prepare = partial(_prepared, transform, language, captions_per_image)
    with ThreadPoolExecutor(READERS) as threads:
        for first in range(share.start, share.stop, READ_AHEAD):
            indices = range(first, min(first + READ_AHEAD, share.stop))
            samples = [_sample(source, language, index) for index in indices]  # sources know of no threads
            found += [it for it in threads.map(prepare, indices, samples) if it is not None]
    return found


def _sample(source: Source, language: str, index: int) -> RawSample | None:
    try:
        return source.read(language, index)
    except BadSample:
        return None


def _prepared(
    transform: PairTransform, language: str, captions_per_image: int | None, index: int, sample: RawSample | None
) -> tuple[_Read, Tensor] | None:
    """Cleaned captions and decoded picture; None where the sample cannot be used."""
    if sample is None:
        return None
    number = len(sample.captions)
    chosen = [(index + k) % number for k in range(min(number, captions_per_image or number))]
    cleaned = {place: _cleaned(transform, sample.captions[place], language) for place in chosen}
    captions = {place: caption for place, caption in cleaned.items() if caption}
    if number and not captions:
        return None
    rng = np.random.default_rng(0)  # evaluation draws nothing; a training transform here is at least repeatable
    try:
        picture = transform.picture(sample.image, rng)
    except BadSample:
        return None
    named = sample.caption_ids or ("",) * number
    known = _Read(
        replace(sample, image=b""),  # the judge wants its captions, nobody its file
        image_key(sample),
        tuple(captions.values()),
        tuple(named[place] for place in captions),
    )
    return known, picture


def _cleaned(transform: PairTransform, text: str, language: str) -> str:
    try:
        return transform.caption(text, language)
    except BadSample:
        return ""
