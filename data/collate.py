"""Prepared rows -> one micro-batch: stage one's pairs are truncated and padded here, dialogues come cut by their codec.

Shape letters   B = pairs in this rank's micro-batch   L = caption length in tokens   C, H, W = image
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.batch import DialogueBatch, EncodedDialogue, ImageTextBatch, TextCodec
from data.keyed import stable_hash
from data.source import RawSample


@dataclass(frozen=True)
class Example:
    """One row, ready but for padding."""

    image_CHW: Tensor  # uint8
    caption: str  # cleaned
    language: str
    image_key: int
    row: int  # in the contrastive batch of all ranks


def image_key(sample: RawSample) -> int:
    """63 bits, equal for equal images: by the id the data brought along, else by the image's bytes."""
    if sample.image_id:
        return stable_hash(sample.image_id)
    if isinstance(sample.image, bytes):
        return stable_hash(sample.image)
    return stable_hash(np.ascontiguousarray(np.asarray(sample.image)).tobytes())


def truncate(ids: list[int], max_tokens: int) -> list[int]:
    """At most `max_tokens`, keeping the last one ([SEP])."""
    return ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]]


def collate(
    examples: Sequence[Example],
    codec: TextCodec,
    *,
    languages: tuple[str, ...],
    max_text_tokens: int,
    step: int,
    micro_step: int,
    num_micro_steps: int,
) -> tuple[ImageTextBatch, Counter[str]]:
    """Captions are padded to the batch's longest.  Also counts pairs, tokens and truncated captions per language."""
    counts: Counter[str] = Counter()
    texts = []
    for example in examples:
        ids = codec.encode(example.caption)
        texts.append(truncate(ids, max_text_tokens))
        counts[f"pairs/{example.language}"] += 1
        counts[f"tokens/{example.language}"] += len(texts[-1])
        counts[f"truncated/{example.language}"] += len(ids) > max_text_tokens
    length_B = torch.tensor([len(ids) for ids in texts])
    text_mask_BL = torch.arange(int(length_B.max())) < length_B[:, None]
    text_ids_BL = torch.full(text_mask_BL.shape, codec.pad_id, dtype=torch.int64)
    text_ids_BL[text_mask_BL] = torch.tensor([token for ids in texts for token in ids])
    batch = ImageTextBatch(
        image_BCHW=torch.stack([example.image_CHW for example in examples]),
        text_ids_BL=text_ids_BL,
        text_mask_BL=text_mask_BL,
        bos_id_B=torch.tensor([codec.bos_id(example.language) for example in examples]),
        image_key_B=torch.tensor([example.image_key for example in examples]),
        text_key_B=torch.tensor([stable_hash(example.caption) for example in examples]),
        row_B=torch.tensor([example.row for example in examples]),
        language_B=torch.tensor([languages.index(example.language) for example in examples]),
        languages=languages,
        pad_id=codec.pad_id,
        step=step,
        micro_step=micro_step,
        num_micro_steps=num_micro_steps,
    )
    return batch, counts


# ------------------------------------------------------------------------------------------ stage two: dialogues


@dataclass(frozen=True)
class DialogueExample:
    """One row, ready but for padding."""

    encoded: EncodedDialogue
    images: tuple[Tensor, ...]  # uint8 CHW each
    language: str


def collate_dialogues(
    examples: Sequence[DialogueExample],
    *,
    pad_id: int,
    image_size: int,
    languages: tuple[str, ...],
    rows: Sequence[int],
    step: int,
    micro_step: int,
    num_micro_steps: int,
    pad_to_multiple_of: int = 1,
) -> tuple[DialogueBatch, Counter[str]]:
    """Also counts dialogues, tokens, and what was cut per language, and the padding."""
    counts: Counter[str] = Counter()
    for example in examples:
        counts[f"dialogues/{example.language}"] += 1
        counts[f"tokens/{example.language}"] += len(example.encoded.ids)
        counts[f"cut/{example.language}"] += any(example.encoded.num_cut.values())
        for part, tokens in example.encoded.num_cut.items():
            counts[f"cut_{part}_tokens/{example.language}"] += tokens
    batch = DialogueBatch.collate(
        [example.encoded for example in examples],
        [example.images for example in examples],
        pad_id=pad_id,
        image_size=image_size,
        language_of=[example.language for example in examples],
        languages=languages,
        rows=rows,
        step=step,
        micro_step=micro_step,
        num_micro_steps=num_micro_steps,
        pad_to_multiple_of=pad_to_multiple_of,
    )
    counts["padding"] = batch.ids_BL.numel() - int(batch.mask_BL.sum())
    return batch, counts
