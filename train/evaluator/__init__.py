"""Evaluators: (model) -> numbers, pictures and lines.  Used in training and by `evaluate.py`.

An evaluator owns its samples (source, transform, tokenizer), so it measures the same thing wherever it is called from.
Every rank calls it and gets the same metrics back; the work is divided.  It runs in the precision of its caller: inside
`torch.autocast` where the training is.  What it predicts goes through `Predictions` first, and its metrics come from
there, so an evaluation that was interrupted loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from data.source import DialogueSource, Source
from train.distributed import Ranks
from train.evaluator.predictions import Predictions


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator found.

    metrics   name -> value, e.g. "zh/itc/image_to_text/r@1", without the evaluator's name; sizes of the pools too
    pictures  name -> picture, on the first rank only
    lines     the same for people, to be printed as they are
    """

    metrics: Mapping[str, float]
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)
    lines: tuple[str, ...] = ()


class Evaluator(Protocol):
    name: str
    source: Source | DialogueSource

    def __call__(
        self, model: Any, *, device: torch.device, ranks: Ranks, predictions: Predictions | None = None
    ) -> Evaluation:
        """Leaves the model as it was.  Every rank must call it."""
        ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module is in the mode it was in (frozen parts in eval mode)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def own_share(number: int, ranks: Ranks) -> range:
    """The rows of 0 .. number-1 that this rank works on: as many as any other, or fewer at the end."""
    share = -(-number // ranks.count)
    return range(min(ranks.rank * share, number), min((ranks.rank + 1) * share, number))


def in_step(own: Sequence[int], size: int, ranks: Ranks) -> Iterator[tuple[list[int], int]]:
    """Batches of at most `size` of this rank's rows, and how many of each are meant.

    Ranks make as many calls to the model as the busiest one, since ZeRO-3 and collectives need that: whoever has none
    left (or has none at all) gets its first row, or row 0, once more, of which none is meant.
    """
    calls = ranks.max_ints([-(-len(own) // size)])[0]
    for call in range(calls):
        rows = list(own[call * size : (call + 1) * size])
        yield (rows, len(rows)) if rows else ([own[0] if len(own) else 0], 0)


def everyones(rows_K: Tensor, values_K: Tensor, number: int, ranks: Ranks) -> Tensor:
    """(number, ...): row r from the rank that has it; 0 where none has.  Ranks bring as many rows as they have."""
    most = ranks.max_ints([len(rows_K)])[0]
    padding = most - len(rows_K)
    rows_N = ranks.gather_constant(torch.cat([rows_K, rows_K.new_full((padding,), -1)]))
    values_N = ranks.gather_constant(torch.cat([values_K, values_K.new_zeros(padding, *values_K.shape[1:])]))
    found = values_K.new_zeros(number, *values_K.shape[1:])
    found[rows_N[rows_N >= 0]] = values_N[rows_N >= 0]
    return found
