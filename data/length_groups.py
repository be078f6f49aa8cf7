"""Which rows of a run make which step where batches are grouped by length: arithmetic on (seed, step) and the lengths.

The rows of `group_steps` consecutive steps of the plan are sorted by length and cut into as many steps, which come in
an order drawn by the seed.  Within a step the sorted rows are cut into micro-batches, and each of these is dealt to the
ranks like cards, back and forth, so that all ranks have rows of about the same lengths and none waits for another.

Which rows a step holds depends on neither ranks, workers nor accumulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from data.keyed import hash_64, permute, stable_hash
from data.mixture import Plan, Rows

_ORDER = stable_hash("order of length groups")


class LengthGroups:
    def __init__(self, tokens: Sequence[np.ndarray], *, global_batch_size: int, group_steps: int):
        self.tokens, self.global_batch_size, self.group_steps = tokens, global_batch_size, group_steps
        self._latest: tuple[int, Rows] | None = None  # one group is asked for again and again

    def step(self, plan: Plan, step: int) -> Rows:
        """The rows of a step, shortest first, with their places in the plan."""
        group, number = divmod(step, self.group_steps)
        if self._latest is None or self._latest[0] != group:
            self._latest = group, self._sorted(plan, group)
        key = hash_64(plan.seed, _ORDER, group)
        place = int(permute(np.array([number]), self.group_steps, key)[0])
        size = self.global_batch_size
        return self._latest[1][place * size : (place + 1) * size]

    def _sorted(self, plan: Plan, group: int) -> Rows:
        first = group * self.group_steps
        parts = [plan.rows(step, self.global_batch_size) for step in range(first, first + self.group_steps)]
        rows = Rows(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Rows)))
        length = np.empty(len(rows.row), np.int64)
        for stream in np.unique(rows.stream):
            mine = rows.stream == stream
            length[mine] = self.tokens[int(stream)][rows.index[mine]]
        return rows[np.argsort(length, kind="stable")]


def dealt(size: int, *, micro_step: int, num_micro_steps: int, rank: int, num_ranks: int) -> np.ndarray:
    """Places, among a step's `size` sorted rows, of this rank's rows of one micro-batch."""
    share = size // num_micro_steps
    hands = np.arange(micro_step * share, (micro_step + 1) * share).reshape(-1, num_ranks)
    hands[1::2] = hands[1::2, ::-1]
    return hands[:, rank]
