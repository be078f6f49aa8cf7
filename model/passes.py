"""What a model says of itself so that others can run it faster without knowing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pass:
    """A method, tensors in and one tensor out, that launches the same kernels for inputs of the same shapes."""

    owner: Any  # the module whose method it is
    method: str
    modules: tuple[Any, ...]  # whose parameters it reads, and perhaps trains
    unless: Callable[..., bool] | None = None  # the same inputs -> whether the host has to take part after all
