"""Evaluators: (model) -> numbers, pictures and lines.  Used in training and by `evaluate.py`.

An evaluator owns its samples (source, transform, tokenizer), so it measures the same thing wherever it is called from.
Every rank calls it and gets the same metrics back; the work is divided.  It runs in the precision of its caller: inside
`torch.autocast` where the training is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn

from train.distributed import Ranks


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

    def __call__(self, model: Any, *, device: torch.device, ranks: Ranks) -> Evaluation:
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
