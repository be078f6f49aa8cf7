"""The loaders: sources + mixture + transform + codec -> StepBatches for every step from any first one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np

from data.batch import Dialogue, DialogueBatch, DialogueCodec, ImageTextBatch, TextCodec
from data.collate import DialogueExample, Example, collate, collate_dialogues, image_key
from data.length_groups import LengthGroups, dealt
from data.lengths import Limits, StreamLengths, codec_digest, read_lengths, table
from data.mixture import Plan, Rows
from data.source import BadSample, RawDialogue, RawSample
from data.steps import StepLoader
from data.transform import PictureTransform, Transform

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageTextRecipe:
    """Contrastive batches: micro-step m has rows m * size .. of the global batch, a rank the r-th slice of them."""

    transform: Transform
    codec: TextCodec
    global_batch_size: int
    accumulate: int
    rank: int
    num_ranks: int
    max_text_tokens: int

    @property
    def contrastive_batch_size(self) -> int:
        return self.global_batch_size // self.accumulate

    def rows(self, plan: Plan, step: int, micro_step: int) -> Rows:
        size = self.contrastive_batch_size // self.num_ranks
        start = micro_step * self.contrastive_batch_size + self.rank * size
        return plan.rows(step, self.global_batch_size)[start : start + size]

    def prepare(self, sample: RawSample, language: str, rng: np.random.Generator, row: int) -> Example:
        image_CHW, caption = self.transform(sample, language, rng)
        return Example(image_CHW, caption, language, image_key(sample), row % self.contrastive_batch_size)

    def collate(
        self, examples: Sequence[Example], plan: Plan, step: int, micro_step: int
    ) -> tuple[ImageTextBatch, Counter[str]]:
        return collate(
            examples,
            self.codec,
            languages=plan.languages,
            max_text_tokens=self.max_text_tokens,
            step=step,
            micro_step=micro_step,
            num_micro_steps=self.accumulate,
        )


@dataclass(eq=False, repr=False)
class Loader(StepLoader):
    """Stage one: pairs of picture and caption.  The contrastive batch is the global one divided by `accumulate`.

    Args:
        transform: raw sample -> picture and caption.
        codec: caption -> token ids.
        max_text_tokens: captions are cut to this many tokens, [CLS] and [SEP] included.
        others: see `StepLoader`.
    """

    transform: Transform
    codec: TextCodec
    _: KW_ONLY
    max_text_tokens: int = 32

    def __post_init__(self) -> None:
        if self.max_text_tokens < 3:
            raise ValueError(
                f"data.loader.max_text_tokens is {self.max_text_tokens}; [CLS], one token and [SEP] need 3"
            )
        super().__post_init__()
        self.recipe = ImageTextRecipe(
            self.transform,
            self.codec,
            self.global_batch_size,
            self.accumulate,
            self.rank,
            self.num_ranks,
            self.max_text_tokens,
        )


# ------------------------------------------------------------------------------------------ stage two: dialogues


@dataclass(frozen=True)
class DialogueRecipe:
    """Rows grouped by length (`data/length_groups.py`), each dialogue drawn, encoded and cut as the codec says."""

    groups: LengthGroups
    transform: PictureTransform
    codec: DialogueCodec
    limits: Limits
    accumulate: int
    rank: int
    num_ranks: int
    draw_answer: bool
    pad_to_multiple_of: int

    def places(self, micro_step: int) -> np.ndarray:
        """Of this rank's rows in the global batch."""
        return dealt(
            self.groups.global_batch_size,
            micro_step=micro_step,
            num_micro_steps=self.accumulate,
            rank=self.rank,
            num_ranks=self.num_ranks,
        )

    def rows(self, plan: Plan, step: int, micro_step: int) -> Rows:
        return self.groups.step(plan, step)[self.places(micro_step)]

    def prepare(self, sample: RawDialogue, language: str, rng: np.random.Generator, row: int) -> DialogueExample:
        dialogue = self._drawn(sample, rng)
        try:
            encoded = self.limits.encode(self.codec, dialogue)
        except ValueError as error:  # at the start of the run every scanned one was seen to fit
            raise BadSample("dialogue does not fit", detail=str(error)) from error
        if not encoded.num_target_tokens:
            raise BadSample("no token to learn")
        images = tuple(self.transform.picture(image, rng) for image in sample.images[: dialogue.num_images])
        return DialogueExample(encoded, images, language)

    def _drawn(self, sample: RawDialogue, rng: np.random.Generator) -> Dialogue:
        dialogue = sample.dialogues[int(rng.integers(len(sample.dialogues))) if len(sample.dialogues) > 1 else 0]
        if self.draw_answer and not self.codec.trains_every_turn and len(dialogue.turns) > 1:
            last = int(rng.integers(1, len(dialogue.turns) + 1))
            return replace(dialogue, turns=dialogue.turns[:last])
        return dialogue

    def collate(
        self, examples: Sequence[DialogueExample], plan: Plan, step: int, micro_step: int
    ) -> tuple[DialogueBatch, Counter[str]]:
        return collate_dialogues(
            examples,
            pad_id=self.codec.pad_id,
            image_size=self.transform.image_size,
            languages=plan.languages,
            rows=self.places(micro_step).tolist(),
            step=step,
            micro_step=micro_step,
            num_micro_steps=self.accumulate,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )


@dataclass(eq=False, repr=False)
class DialogueLoader(StepLoader):
    """Stage two and domain fine-tuning: dialogues with any number of pictures.

    Args:
        transform: for the pictures; words are left as they are.
        codec: the language model's.
        max_tokens: a longer dialogue loses its history first, then the beginning of its question, then the end of its
            answer; image tokens count.
        max_answer_tokens: bounds the last answer alone.
        draw_answer: where the codec trains one answer of a dialogue, which one is drawn each time, and what follows it
            is left out; False trains the last.
        group_steps: over how many steps rows are sorted by length, and the mixture holds; 1 keeps the plan's rows in
            each step.
        pad_to_multiple_of: a micro-batch is padded to its longest row, rounded up to this (None: 1): few lengths, so
            that CUDA graphs recorded for one (`train/cuda_graphs.py`) serve many.
        others: see `StepLoader`.

    Raises:
        ValueError: see `StepLoader`; and dialogues that nothing is learnt from, by file and row number.
    """

    transform: PictureTransform
    codec: DialogueCodec
    _: KW_ONLY
    max_tokens: int = 512
    max_answer_tokens: int | None = None
    draw_answer: bool = True
    group_steps: int = 8
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_tokens", self.max_tokens), ("max_answer_tokens", self.max_answer_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"data.loader.{name} is {value}; expected tokens, 1 or more")
        if self.group_steps < 1:
            raise ValueError(f"data.loader.group_steps is {self.group_steps}; expected steps, 1 or more")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(
                f"data.loader.pad_to_multiple_of is {self.pad_to_multiple_of}; expected tokens, 1 for no rounding"
            )
        super().__post_init__()
        self.limits = Limits(self.max_tokens, self.max_answer_tokens)
        self.lengths: list[StreamLengths] = read_lengths(
            self.sources, self.plan.streams, self.codec, self.limits, workers=self.workers
        )
        groups = LengthGroups(
            [own.tokens for own in self.lengths],
            global_batch_size=self.global_batch_size,
            group_steps=self.group_steps,
        )
        for line in self._left_out():
            log.warning(line)
        self.recipe = DialogueRecipe(
            groups,
            self.transform,
            self.codec,
            self.limits,
            self.accumulate,
            self.rank,
            self.num_ranks,
            self.draw_answer,
            self.pad_to_multiple_of or 1,
        )

    def table(self) -> str:
        """Dialogues, their lengths and what is cut or left out, by source and language: for the start of a run."""
        return "\n".join([table(self.plan.streams, self.lengths, self.limits), *self._left_out()])

    def _left_out(self) -> list[str]:
        """Rows that no step will hold: no run may lose some without a word."""
        used = {(stream.source, stream.language) for stream in self.plan.streams}
        lines = []
        for name, source in self.sources.items():
            for language in source.languages:
                if (name, language) not in used and source.num_samples(language):
                    number = source.num_samples(language)
                    lines.append(
                        f"left out: {number} dialogues in {language!r} of {name}, without weight in data.mixture"
                    )
            if malformed := getattr(source, "num_malformed", 0):
                lines.append(f"left out: {malformed} malformed rows of {name}")
        return lines

    def fingerprint(self) -> dict[str, Any]:
        return {
            **super().fingerprint(),
            "group_steps": self.group_steps,
            "limits": [self.limits.max_tokens, self.limits.max_answer_tokens],
            "lengths": [own.digest for own in self.lengths],
            "draw_answer": self.draw_answer,
            "codec": codec_digest(self.codec),
        }
