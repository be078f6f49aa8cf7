"""What every data format ends in and every stage starts from: the contract between `data/`, `model/` and `train/`.

Shape letters   B = pairs in this rank's micro-batch   L = caption length in tokens   C, H, W = image
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor


class TextCodec(Protocol):
    """Text -> token ids.  `data/` may not import `model/`, so a tokenizer is handed in as this protocol."""

    vocab_size: int
    pad_id: int
    unk_id: int

    def encode(self, text: str) -> list[int]:
        """All ids of `text` between [CLS] and [SEP], both included, never truncated."""
        ...

    def bos_id(self, language: str) -> int:
        """The id that stands at position 0 when a caption in `language` is generated ([DEC] in LAVIS)."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Readable text; special tokens are left out."""
        ...


class Batch(Protocol):
    """What the trainer may know of a batch, whatever the stage."""

    @property
    def step(self) -> int: ...

    @property
    def micro_step(self) -> int: ...

    def __len__(self) -> int: ...

    @property
    def num_target_tokens(self) -> int:
        """Tokens of this micro-batch that carry a token loss."""
        ...

    @property
    def text_length(self) -> int: ...

    def agreed(self, *, step_target_tokens: int, text_length: int) -> Self:
        """The same batch, told what all ranks agreed on: the token count of the whole step, the common padding."""
        ...

    def pin_memory(self) -> Self: ...

    def to(self, device: torch.device) -> Self: ...


@dataclass(frozen=True)
class ImageTextBatch:
    """One rank's share of one contrastive batch.

    Row r of the contrastive batch on N ranks is row r - rank * B here.  `image_BCHW` is uint8 as decoded, and the
    image encoder normalises it on its own device (a quarter of the bytes to move); floating point is taken as
    normalised already.
    """

    image_BCHW: Tensor  # uint8, or floating point when normalised already
    text_ids_BL: Tensor  # int64: [CLS] w1 .. wn [SEP] [PAD]..
    text_mask_BL: Tensor  # bool, True on real tokens
    bos_id_B: Tensor  # int64: what replaces position 0 when the caption is generated
    image_key_B: Tensor  # int64: equal for equal images
    text_key_B: Tensor  # int64: equal for equal captions
    row_B: Tensor  # int64: row in the contrastive batch of all ranks; keys the draw of negatives
    language_B: Tensor  # int64: index into `languages`
    languages: tuple[str, ...]
    pad_id: int
    step: int  # optimizer step, from 0; with micro_step and row_B it keys every random draw of the losses
    micro_step: int = 0
    num_micro_steps: int = 1
    step_target_tokens: int = 0  # caption tokens to predict in the whole step, over all ranks and micro-batches
    own_target_tokens: int | None = None  # of this micro-batch; counted before it leaves the host, to spare a sync

    def __len__(self) -> int:
        return len(self.text_ids_BL)

    @property
    def num_target_tokens(self) -> int:
        if self.own_target_tokens is not None:
            return self.own_target_tokens
        return int(self.text_mask_BL[:, 1:].sum())

    @property
    def text_length(self) -> int:
        return self.text_ids_BL.shape[1]

    def agreed(self, *, step_target_tokens: int, text_length: int) -> Self:
        """Ranks exchange caption rows, so all must pad to one length; token losses divide by the whole step's count."""
        missing = text_length - self.text_length
        if missing < 0:
            raise ValueError(f"captions of {self.text_length} tokens cannot be padded to {text_length}")
        return replace(
            self,
            text_ids_BL=F.pad(self.text_ids_BL, (0, missing), value=self.pad_id),
            text_mask_BL=F.pad(self.text_mask_BL, (0, missing), value=False),
            step_target_tokens=step_target_tokens,
            own_target_tokens=self.num_target_tokens,
        )

    def pin_memory(self) -> Self:
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Self:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Any) -> Self:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class Skip:
    """A sample that could not be used, and where it was."""

    source: str
    shard: str
    key: str
    reason: str  # one of a few words: "truncated image", "empty text", ...


@dataclass(frozen=True)
class StepBatches:
    """All micro-batches of one optimizer step on this rank, and what was left out on the way."""

    step: int
    micro_batches: Sequence[Batch]
    skips: Sequence[Skip] = ()
    num_read: int = 0  # samples tried, bad ones included
    counts: Mapping[str, int] = field(default_factory=dict)  # more counters for the log, e.g. truncated captions


# The statistics a stage reports beside its losses: name -> (sum, count), both 0-dim tensors.  Sums and counts add up
# over micro-batches and ranks; their quotient is what the log shows ("itc/zh": ITC of the Chinese rows).  A name that
# begins with `num_` is a total (its count is 0): the log shows the sum.
Report = Mapping[str, tuple[Tensor, Tensor]]
