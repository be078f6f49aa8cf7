"""What every data format ends in and every stage starts from: the contract between `data/`, `model/` and `train/`.

Shape letters   B = pairs, or dialogues, in this rank's micro-batch   L = length in tokens   C, H, W = image
                G = pictures of a micro-batch of dialogues
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def whole_characters(text: str) -> str:
    """Without the halves that JSON can hold of a character outside the basic plane: no tokenizer takes one."""
    return _HALF_CHARACTER.sub("", text)


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
        return _map_tensors(self, lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Self:
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))


# ------------------------------------------------------------------------------------------ stage two: dialogues

IGNORED = -100  # the label of a position that carries no loss, as in torch's cross_entropy


@dataclass(frozen=True)
class Turn:
    """One question with its answer, both without halves of characters.

    Pictures are counted, never named in the text: no text can ask for a file.
    """

    question: str
    answer: str = ""  # empty while it is still to be given, which only the last turn's may be
    num_images: int = 0  # shown with this question, before its words

    def __post_init__(self) -> None:
        for name in ("question", "answer"):
            object.__setattr__(self, name, whole_characters(getattr(self, name)))


@dataclass(frozen=True)
class Dialogue:
    """What a conversation format ends in.  Its pictures travel beside it, in the order of the turns."""

    turns: tuple[Turn, ...]
    language: str

    @property
    def num_images(self) -> int:
        return sum(turn.num_images for turn in self.turns)


@dataclass(frozen=True)
class EncodedDialogue:
    """A dialogue in one language model's layout, training and chat alike."""

    ids: tuple[int, ...]  # a placeholder at every image token
    labels: tuple[int, ...]  # as long: the id itself where position t is to be predicted (from t - 1), else IGNORED
    image_starts: tuple[int, ...]  # position of each picture's first image token
    num_cut: Mapping[str, int] = field(default_factory=dict)  # tokens left out of "history", "question", "answer"

    @property
    def num_target_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels[1:])


class DialogueCodec(Protocol):
    """Dialogue <-> ids: prompt template, special ids and label masking of one family of language models, once."""

    pad_id: int
    stop_ids: tuple[int, ...]  # an answer ends at any of them
    num_image_tokens: int  # positions that one picture takes
    trains_every_turn: bool  # False: only the last answer carries labels (a prefix mask lets the rest be seen whole)

    def encode(
        self, dialogue: Dialogue, *, max_tokens: int | None = None, max_answer_tokens: int | None = None
    ) -> EncodedDialogue:
        """The training layout; where the last answer is empty, the chat layout, which is the same up to the answer.

        A dialogue longer than `max_tokens` loses its oldest turns first (their pictures move to the first turn that is
        kept), then the beginning of the last question, then the end of the answer; never the words between question and
        answer, never image tokens.  `max_answer_tokens` bounds the last answer alone.

        Raises:
            ValueError: an empty dialogue, an unanswered turn before the last, or a `max_tokens` that not even pictures
                and template fit in.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The answer that `ids` spell, up to the first stop id."""
        ...


@dataclass(frozen=True)
class DialogueBatch:
    """One rank's share of a batch of dialogues, with any number of pictures a row, none included.

    Picture g replaces the embeddings of `num_image_tokens` positions of row `image_row_G[g]`, from `image_start_G[g]`
    on.  Rows are padded on the right, to the longest of this rank's own: nothing is exchanged between ranks.
    """

    image_GCHW: Tensor  # uint8, or floating point when normalised already; (0, C, H, W) where no row has a picture
    image_row_G: Tensor  # int64
    image_start_G: Tensor  # int64
    ids_BL: Tensor  # int64
    labels_BL: Tensor  # int64: what stands at this position, IGNORED where it is not to be predicted
    mask_BL: Tensor  # bool, True on real tokens, image tokens included
    row_B: Tensor  # int64: row in the global batch
    language_B: Tensor  # int64: index into `languages`
    languages: tuple[str, ...]
    step: int = 0
    micro_step: int = 0
    num_micro_steps: int = 1
    step_target_tokens: int = 0  # tokens to predict in the whole step, over all ranks and micro-batches
    own_target_tokens: int | None = None  # of this micro-batch; counted before it leaves the host, to spare a sync

    def __len__(self) -> int:
        return len(self.ids_BL)

    @property
    def num_target_tokens(self) -> int:
        if self.own_target_tokens is not None:
            return self.own_target_tokens
        return int((self.labels_BL[:, 1:] != IGNORED).sum())

    @property
    def text_length(self) -> int:
        return self.ids_BL.shape[1]

    def agreed(self, *, step_target_tokens: int, text_length: int) -> Self:
        """Told the token count of the whole step.  The common length is not needed: each rank pads for itself."""
        return replace(self, step_target_tokens=step_target_tokens, own_target_tokens=self.num_target_tokens)

    def pin_memory(self) -> Self:
        return _map_tensors(self, lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Self:
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    @classmethod
    def collate(
        cls,
        dialogues: Sequence[EncodedDialogue],
        images: Sequence[Sequence[Tensor]],
        *,
        pad_id: int,
        image_size: int,
        language_of: Sequence[str],
        languages: tuple[str, ...],
        rows: Sequence[int] | None = None,
        step: int = 0,
        micro_step: int = 0,
        num_micro_steps: int = 1,
        pad_to_multiple_of: int = 1,
    ) -> Self:
        """`images[b]` holds the pictures of dialogue b, (C, H, W) each; `image_size` is asked for where there are none.

        Raises:
            ValueError: a row whose pictures are not as many as its encoding has places for.
        """
        for row, (dialogue, own) in enumerate(zip(dialogues, images, strict=True)):
            if len(dialogue.image_starts) != len(own):
                raise ValueError(f"row {row} has {len(own)} pictures, its text {len(dialogue.image_starts)} places")
        pictures = [picture for own in images for picture in own]
        length_B = torch.tensor([len(dialogue.ids) for dialogue in dialogues])
        length = -(-int(length_B.max()) // pad_to_multiple_of) * pad_to_multiple_of
        mask_BL = torch.arange(length) < length_B[:, None]

        def padded(values: Sequence[tuple[int, ...]], fill: int) -> Tensor:
            out_BL = torch.full(mask_BL.shape, fill, dtype=torch.int64)
            out_BL[mask_BL] = torch.tensor([value for row in values for value in row])
            return out_BL

        starts = [(row, start) for row, dialogue in enumerate(dialogues) for start in dialogue.image_starts]
        row_start_G2 = torch.tensor(starts, dtype=torch.int64).view(-1, 2)
        no_image = torch.zeros(0, 3, image_size, image_size, dtype=torch.uint8)
        return cls(
            image_GCHW=torch.stack(pictures) if pictures else no_image,
            image_row_G=row_start_G2[:, 0],
            image_start_G=row_start_G2[:, 1],
            ids_BL=padded([d.ids for d in dialogues], pad_id),
            labels_BL=padded([d.labels for d in dialogues], IGNORED),
            mask_BL=mask_BL,
            row_B=torch.tensor(range(len(dialogues)) if rows is None else rows),
            language_B=torch.tensor([languages.index(language) for language in language_of]),
            languages=languages,
            step=step,
            micro_step=micro_step,
            num_micro_steps=num_micro_steps,
        )


def _map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)}
    return replace(batch, **{name: change(tensor) for name, tensor in tensors.items()})


# --------------------------------------------------------------------------------------------------- both stages


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
