"""Which checkpoint is the best so far, by one number of the evaluators."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any


class BestMetric:
    """
    Args:
        name: as metrics.json of evaluate.py and the log have it: EVALUATOR/NAME.
        mode: "max" or "min".
        evaluators: names of those that run.
        before: what `state` said in the checkpoint that a run goes on from.
    Raises:
        ValueError: a name that begins with no evaluator's.
    """

    def __init__(
        self, name: str, mode: str, evaluators: Sequence[str], before: Mapping[str, Any] | None = None
    ) -> None:
        if not any(name.startswith(f"{evaluator}/") for evaluator in evaluators):
            raise ValueError(
                f"train.best_metric.name={name} is no number of {', '.join(evaluators) or 'any evaluator'}: it begins "
                f"with an evaluator's name, as in retrieval/zh/itm/mean"
            )
        self.name, self.mode = name, mode
        same = before is not None and (before["name"], before["mode"]) == (name, mode)
        self.state: dict[str, Any] | None = dict(before) if before is not None and same else None

    def sees(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the weights after `step` are the best so far; the first of several equals is."""
        value = metrics[self.name]
        best = -math.inf if self.state is None else self.state["value"] * self._sign
        if not value * self._sign > best:
            return False
        self.state = {"name": self.name, "mode": self.mode, "value": value, "step": step}
        return True

    def why_missing(self, metrics: Mapping[str, float]) -> str | None:
        """A sentence where no evaluator gave the number."""
        if self.name in metrics:
            return None
        near = difflib.get_close_matches(self.name, metrics, n=3, cutoff=0.4)
        return f"train.best_metric.name={self.name} was not measured; nearest: {', '.join(near) or ', '.join(metrics)}"

    @property
    def _sign(self) -> int:
        return 1 if self.mode == "max" else -1
