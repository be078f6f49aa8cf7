"""Steps of micro-batches for this rank, from any first one, whatever their rows hold.

Workers and ranks only divide the work.  What a row holds follows from (seed, step, row); a bad sample's replacement
from (seed, epoch, step, row, attempt).  What a kind of batch adds is a `Recipe`: the order of a step's rows, how a row
is read and prepared, how rows become a batch.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Annotated, Any, Protocol, Self, TypeVar

import numpy as np
import torch
from annotated_types import Ge
from torch.utils.data import DataLoader, Dataset

from data.batch import Skip, StepBatches
from data.keyed import keyed_rng
from data.mixture import Mixture, Plan, Rows
from data.skips import SkipMonitor
from data.source import BadSample

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 50  # of one row; at a rate of bad samples that a run may have, 1%, it never comes near

ExampleT = TypeVar("ExampleT")


class Named(Protocol):
    """What an error says of a sample that was read."""

    @property
    def shard(self) -> str: ...

    @property
    def key(self) -> str: ...


class AnySource(Protocol):
    """What a source of either kind has in common: see `data.source`."""

    name: str
    languages: tuple[str, ...]

    def num_samples(self, language: str) -> int: ...

    def read(self, language: str, index: int) -> Named: ...

    def fingerprint(self) -> Mapping[str, Any]: ...


class Recipe(Protocol[ExampleT]):
    """What stage one and stage two do differently."""

    def rows(self, plan: Plan, step: int, micro_step: int) -> Rows:
        """This rank's rows of one micro-batch, with their places in the plan."""
        ...

    def prepare(self, sample: Any, language: str, rng: np.random.Generator, row: int) -> ExampleT:
        """One row, ready but for padding.  Raises BadSample."""
        ...

    def collate(self, examples: Sequence[ExampleT], plan: Plan, step: int, micro_step: int) -> tuple[Any, Counter[str]]:
        """The micro-batch, and what it counted."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """What a worker makes: one micro-batch and what it met on the way."""

    batch: Any  # a data.batch.Batch
    skips: tuple[Skip, ...]
    num_read: int
    counts: Counter[str]

    def pin_memory(self) -> Self:
        return replace(self, batch=self.batch.pin_memory())


class MicroBatches(Dataset[MicroBatch]):
    """Item n = micro-batch n % accumulate of step n // accumulate: a unit of work small enough to spread."""

    def __init__(self, sources: Mapping[str, AnySource], plan: Plan, recipe: Recipe[Any], accumulate: int):
        self.sources, self.plan, self.recipe, self.accumulate = sources, plan, recipe, accumulate

    def __getitem__(self, number: int) -> MicroBatch:
        step, micro_step = divmod(number, self.accumulate)
        rows = self.recipe.rows(self.plan, step, micro_step)
        skips: list[Skip] = []
        examples = [self._example(rows, i, skips) for i in range(len(rows.row))]
        batch, counts = self.recipe.collate(examples, self.plan, step, micro_step)
        return MicroBatch(batch, tuple(skips), len(examples) + len(skips), counts)

    def _example(self, rows: Rows, i: int, skips: list[Skip]) -> Any:
        """Row i, or the first usable replacement."""
        step, row, number, epoch = int(rows.step[i]), int(rows.row[i]), int(rows.stream[i]), int(rows.epoch[i])
        stream, index = self.plan.streams[number], int(rows.index[i])
        for attempt in range(1, MAX_ATTEMPTS + 1):
            where = ("", "")
            try:
                sample = self.sources[stream.source].read(stream.language, index)
                where = (sample.shard, sample.key)
                rng = keyed_rng("transform", self.plan.seed, step, row, attempt)
                return self.recipe.prepare(sample, stream.language, rng, row)
            except BadSample as bad:
                skips.append(Skip(stream.source, bad.shard or where[0], bad.key or where[1], bad.reason))
            index = self.plan.replacement(number, epoch=epoch, step=step, row=row, attempt=attempt)
        latest = "\n".join(f"  {skip.shard} {skip.key} ({skip.reason})" for skip in skips[-5:])
        raise ValueError(
            f"source {stream.source!r}: {MAX_ATTEMPTS} samples of {stream.language!r} in a row could not be used "
            f"(step {step}, row {row}). The latest:\n{latest}"
        )


@dataclass(eq=False, repr=False)
class StepLoader:
    """Endless steps of training batches; the loader of a stage adds what it reads by, and sets its `recipe`.

    Args:
        sources: name -> source.
        mixture: weights of languages and sources.
        global_batch_size: samples of one optimizer step over all ranks and micro-steps.
        accumulate: micro-steps of one optimizer step.
        seed: decides order, crops and which candidate is drawn.
        rank, num_ranks: which share of every batch is made here.
        num_workers: processes that decode; 0 decodes in the training process, None takes one for each core this rank
            has.  The batches are the same.
        max_skip_rate, skip_window: see `SkipMonitor`; `skip_monitor` is for the trainer to feed.
        prefetch: micro-batches that each worker prepares ahead.
        pin_memory: page-locked batches, for faster copies to a GPU; None where CUDA is available.

    Raises:
        ValueError: a batch that ranks and micro-steps do not divide, a language nobody has.
    """

    sources: Mapping[str, Any]  # AnySource, of one kind
    mixture: Mixture
    _: KW_ONLY
    global_batch_size: int
    accumulate: int = 1
    seed: int = 0
    rank: int = 0
    num_ranks: int = 1
    num_workers: Annotated[int, Ge(0)] | None = 0
    max_skip_rate: float = 0.01
    skip_window: int = 20_000
    prefetch: Annotated[int, Ge(1)] = 2
    pin_memory: bool | None = None

    recipe: Recipe[Any] = field(init=False)

    def __post_init__(self) -> None:
        unit = self.accumulate * self.num_ranks
        if self.global_batch_size < 1 or self.global_batch_size % unit:
            raise ValueError(
                f"train.global_batch_size={self.global_batch_size} cannot be divided by train.accumulate="
                f"{self.accumulate} times {self.num_ranks} ranks; the nearest that can: "
                f"{_nearest(self.global_batch_size, unit)}"
            )
        if not self.sources:
            raise ValueError("data.source is empty: expected at least one source, e.g. data.source.mine with its paths")
        self.workers = _cores_of_a_rank() if self.num_workers is None else self.num_workers
        self.plan = self.mixture.plan(self.sources, seed=self.seed)
        self.languages = self.plan.languages
        self.skip_monitor = SkipMonitor(self.max_skip_rate, self.skip_window)

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
        if self.workers:
            # fork: workers share the index arrays instead of getting a copy each
            parallel = {"multiprocessing_context": "fork", "worker_init_fn": _one_thread}
            parallel["prefetch_factor"] = self.prefetch
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
        return DataLoader(
            MicroBatches(self.sources, self.plan, self.recipe, self.accumulate),
            batch_size=None,
            sampler=_Numbers(first_step * self.accumulate),
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
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
                f"in memory. data.loader.num_workers={self.workers} and prefetch={self.prefetch} say how much is "
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
