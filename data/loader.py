"""The loaders: sources + mixture + transform + codec -> StepBatches for every step from any first one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.batch import ImageTextBatch, TextCodec
from data.collate import Example, collate, image_key
from data.mixture import Mixture, Plan, Rows
from data.source import RawSample, Source
from data.steps import StepLoader
from data.transform import Transform


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


class Loader(StepLoader):
    """Stage one: pairs of picture and caption.

    Args:
        sources: name -> source.
        mixture: weights of languages and sources.
        transform: raw sample -> picture and caption.
        codec: caption -> token ids.
        global_batch_size: pairs of one optimizer step over all ranks and micro-steps.
        accumulate: micro-steps of one optimizer step; the contrastive batch is the global one divided by it.
        seed: decides order, crops and caption choice.
        rank, num_ranks: which contiguous share of every contrastive batch is made here.
        num_workers: processes that decode; 0 decodes in the training process, None takes one for each core this rank
            has.  The batches are the same.
        max_text_tokens: captions are cut to this many tokens, [CLS] and [SEP] included.
        max_skip_rate, skip_window: see `SkipMonitor`; `skip_monitor` is for the trainer to feed.
        prefetch: micro-batches that each worker prepares ahead.
        pin_memory: page-locked batches, for faster copies to a GPU; None where CUDA is available.

    Raises:
        ValueError: a batch that ranks and micro-steps do not divide, a language nobody has.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        mixture: Mixture,
        transform: Transform,
        codec: TextCodec,
        *,
        global_batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        num_workers: int | None = 0,
        max_text_tokens: int = 32,
        max_skip_rate: float = 0.01,
        skip_window: int = 20_000,
        prefetch: int = 2,
        pin_memory: bool | None = None,
    ):
        if max_text_tokens < 3:
            raise ValueError(f"data.loader.max_text_tokens is {max_text_tokens}; [CLS], one token and [SEP] need 3")
        super().__init__(
            sources,
            mixture,
            global_batch_size=global_batch_size,
            accumulate=accumulate,
            seed=seed,
            num_ranks=num_ranks,
            num_workers=num_workers,
            max_skip_rate=max_skip_rate,
            skip_window=skip_window,
            prefetch=prefetch,
            pin_memory=pin_memory,
        )
        self.recipe = ImageTextRecipe(transform, codec, global_batch_size, accumulate, rank, num_ranks, max_text_tokens)
