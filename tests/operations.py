"""Counts what torch is asked to do, which is what a step costs where the host launches it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """By name and the shape of the first tensor; below autograd, so that a backward pass counts too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shape = tuple(args[0].shape) if args and isinstance(args[0], torch.Tensor) else ()
        self.counts[func._schema.name.removeprefix("aten::"), shape] += 1
        return func(*args, **(kwargs or {}))

    def number_of(self, name: str) -> int:
        return sum(count for (found, _), count in self.counts.items() if found == name)
