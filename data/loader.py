"""Global batch k for this rank, for every k from any first one: sources + mixture + transform + codec -> StepBatches.

Workers and ranks only divide the work.  What a row holds follows from (seed, step, row); a bad sample's replacement
from (seed, epoch, step, row, attempt).
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch.utils.data import DataLoader, Dataset

from data.batch import ImageTextBatch, Skip, StepBatches, TextCodec
from data.collate import Example, collate, image_key
from data.keyed import keyed_rng
from data.mixture import Mixture, Plan, Rows
from data.skips import SkipMonitor
from data.source import BadSample, Source
from data.transform import Transform

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 50  # of one row; at a rate of bad samples that a run may have, 1%, it never comes near


@dataclass(frozen=True)
class MicroBatch:
    """What a worker makes: one micro-batch and what it met on the way."""

    batch: ImageTextBatch
    skips: tuple[Skip, ...]
    num_read: int
    counts: Counter[str]

    def pin_memory(self) -> Self:
        return replace(self, batch=self.batch.pin_memory())


class MicroBatches(Dataset[MicroBatch]):
    """Item n = micro-batch n % accumulate of step n // accumulate: a unit of work small enough to spread."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        plan: Plan,
        transform: Transform,
        codec: TextCodec,
        *,
        global_batch_size: int,
        accumulate: int,
        rank: int,
        num_ranks: int,
        max_text_tokens: int,
    ):
        self.sources, self.plan, self.transform, self.codec = sources, plan, transform, codec
        self.global_batch_size, self.accumulate, self.max_text_tokens = global_batch_size, accumulate, max_text_tokens
        self.contrastive_batch_size = global_batch_size // accumulate
        self.size = self.contrastive_batch_size // num_ranks
        self.first = rank * self.size  # this rank's first row of a contrastive batch

    def __getitem__(self, number: int) -> MicroBatch:
        step, micro_step = divmod(number, self.accumulate)
        start = micro_step * self.contrastive_batch_size + self.first
        rows = self.plan.rows(step, self.global_batch_size)[slice(start, start + self.size)]
        skips: list[Skip] = []
        examples = [self._example(rows, i, step, skips) for i in range(self.size)]
        batch, counts = collate(
            examples,
            self.codec,
            languages=self.plan.languages,
            max_text_tokens=self.max_text_tokens,
            step=step,
            micro_step=micro_step,
            num_micro_steps=self.accumulate,
        )
        return MicroBatch(batch, tuple(skips), len(examples) + len(skips), counts)

    def _example(self, rows: Rows, i: int, step: int, skips: list[Skip]) -> Example:
        """Row i, or the first usable replacement."""
        row, number, epoch = int(rows.row[i]), int(rows.stream[i]), int(rows.epoch[i])
        stream, index = self.plan.streams[number], int(rows.index[i])
        for attempt in range(1, MAX_ATTEMPTS + 1):
            where = ("", "")
            try:
                sample = self.sources[stream.source].read(stream.language, index)
                where = (sample.shard, sample.key)
                rng = keyed_rng("transform", self.plan.seed, step, row, attempt)
                image_CHW, caption = self.transform(sample, stream.language, rng)
                contrastive_row = row % self.contrastive_batch_size
                return Example(image_CHW, caption, stream.language, image_key(sample), contrastive_row)
            except BadSample as bad:
                skips.append(Skip(stream.source, bad.shard or where[0], bad.key or where[1], bad.reason))
            index = self.plan.replacement(number, epoch=epoch, step=step, row=row, attempt=attempt)
        latest = "\n".join(f"  {skip.shard} {skip.key} ({skip.reason})" for skip in skips[-5:])
        raise ValueError(
            f"source {stream.source!r}: {MAX_ATTEMPTS} samples of {stream.language!r} in a row could not be used "
            f"(step {step}, row {row}). The latest:\n{latest}"
        )


class Loader:
    """Endless steps of training batches.

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
        if global_batch_size < 1 or global_batch_size % (accumulate * num_ranks):
            raise ValueError(
                f"train.global_batch_size={global_batch_size} cannot be divided by train.accumulate={accumulate} times "
                f"{num_ranks} ranks; the nearest that can: {_nearest(global_batch_size, accumulate * num_ranks)}"
            )
        if max_text_tokens < 3:
            raise ValueError(f"data.loader.max_text_tokens is {max_text_tokens}; [CLS], one token and [SEP] need 3")
        if not sources:
            raise ValueError("data.source is empty: expected at least one source, e.g. data.source.mine with its paths")
        self.sources, self.transform = dict(sources), transform
        self.global_batch_size, self.accumulate = global_batch_size, accumulate
        self.num_workers = _cores_of_a_rank() if num_workers is None else num_workers
        self.prefetch = prefetch
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.plan = mixture.plan(self.sources, seed=seed)
        self.languages = self.plan.languages
        self.skip_monitor = SkipMonitor(max_skip_rate, skip_window)
        self._micro_batches = MicroBatches(
            self.sources,
            self.plan,
            transform,
            codec,
            global_batch_size=global_batch_size,
            accumulate=accumulate,
            rank=rank,
            num_ranks=num_ranks,
            max_text_tokens=max_text_tokens,
        )

    def steps(self, first_step: int = 0) -> Iterator[StepBatches]:
        """Step first_step, first_step + 1, ... without end; the same rows wherever it starts."""
        stream = iter(self._data_loader(first_step))
        for step in itertools.count(first_step):
            yield join(step, [self._next(stream) for _ in range(self.accumulate)])

    def fingerprint(self) -> dict[str, Any]:
        """What the order of samples depends on, as JSON values; ranks, workers and accumulation do not belong to it."""
        return {
            "global_batch_size": self.global_batch_size,
            **self.plan.fingerprint(),
            "sources": {name: dict(source.fingerprint()) for name, source in sorted(self.sources.items())},
        }

    def _data_loader(self, first_step: int) -> DataLoader[MicroBatch]:
        parallel: dict[str, Any] = {}
        if self.num_workers:
            # fork: workers share the index arrays instead of getting a copy each
            parallel = {"multiprocessing_context": "fork", "worker_init_fn": _one_thread}
            parallel["prefetch_factor"] = self.prefetch
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
        return DataLoader(
            self._micro_batches,
            batch_size=None,
            sampler=_Numbers(first_step * self.accumulate),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # its own, or starting workers would move the global random state
            **parallel,
        )

    def _next(self, stream: Iterator[MicroBatch]) -> MicroBatch:
        try:
            return next(stream)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(
                f"a data worker died ({error}). Usual causes: no room in /dev/shm (in a container: --shm-size=16g) or "
                f"in memory. data.loader.num_workers={self.num_workers} and prefetch={self.prefetch} say how much is "
                f"held; num_workers=0 decodes in the training process and shows the real error."
            ) from error


def join(step: int, parts: list[MicroBatch]) -> StepBatches:
    """All micro-batches of one step on this rank."""
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    return StepBatches(
        step=step,
        micro_batches=tuple(part.batch for part in parts),
        skips=tuple(skip for part in parts for skip in part.skips),
        num_read=sum(part.num_read for part in parts),
        counts=counts,
    )


class _Numbers:
    """first, first + 1, ...: a sampler without an end."""

    def __init__(self, first: int):
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first)


def _cores_of_a_rank() -> int:
    """Cores of this machine that may be used, divided by the ranks on it (torchrun and deepspeed tell); at most 16."""
    return min(16, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the training process' to answer; it ends its workers


def _nearest(size: int, unit: int) -> str:
    below = size // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
