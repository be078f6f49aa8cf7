"""How many samples may be bad before a run stops, and what it says about them."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence

from data.batch import Skip

log = logging.getLogger(__name__)

NUM_NAMED = 10  # keys in an error
LOG_EVERY_S = 30.0


class SkipMonitor:
    """Watches the share of bad samples over the latest `window` tries.

    Arithmetic on numbers that all ranks have summed, so every rank comes to the same verdict at the same step.

    Args:
        max_skip_rate: the run stops above this share; 1 never stops it.
        window: how many tries the share is taken over: enough that chance does not lift it above the limit.
        least: fewer tries than this count as this many, so that one bad sample of the first sixty-four ends no run.
    """

    def __init__(self, max_skip_rate: float = 0.01, window: int = 20_000, least: int = 1000):
        if not 0 <= max_skip_rate <= 1:
            raise ValueError(f"data.max_skip_rate is {max_skip_rate}; expected a share from 0 to 1")
        if window < 1:
            raise ValueError(f"data.loader.skip_window is {window}; expected a number of samples, 1 or more")
        self.max_skip_rate, self.window, self.least = max_skip_rate, window, min(least, window)
        self.total: Counter[tuple[str, str]] = Counter()  # (source, reason) -> skips it was told of
        self._steps: deque[tuple[int, int]] = deque()  # (tries, skips) of all ranks
        self._tries = self._bad = 0
        self._latest: deque[Skip] = deque(maxlen=NUM_NAMED)
        self._unsaid: Counter[tuple[str, str]] = Counter()
        self._said_at = float("-inf")

    def update(self, num_read: int, num_skipped: int, skips: Sequence[Skip] = ()) -> None:
        """After each step: tries and skips summed over ranks, and the skips to name: the trainer gathers all ranks'.

        Raises ValueError when the share of the latest tries is above `max_skip_rate`.
        """
        self._remember(skips)
        self._steps.append((num_read, num_skipped))
        self._tries += num_read
        self._bad += num_skipped
        while len(self._steps) > 1 and self._tries - self._steps[0][0] >= self.window:
            tries, bad = self._steps.popleft()
            self._tries -= tries
            self._bad -= bad
        if self._bad > self.max_skip_rate * max(self._tries, self.least):
            raise ValueError(self._verdict())

    def _remember(self, skips: Sequence[Skip]) -> None:
        for skip in skips:
            self._latest.append(skip)
            self.total[skip.source, skip.reason] += 1
            self._unsaid[skip.source, skip.reason] += 1
        if self._unsaid and time.monotonic() - self._said_at >= LOG_EVERY_S:
            last = self._latest[-1]
            log.warning("bad samples replaced: %s; the latest: %s %s", _table(self._unsaid), last.shard, last.key)
            self._unsaid.clear()
            self._said_at = time.monotonic()

    def _verdict(self) -> str:
        latest = dict.fromkeys(f"  {s.source}: {s.shard} {s.key} ({s.reason})" for s in self._latest)
        named = "\n".join(latest)  # a small set meets the same ones again
        return (
            f"{self._bad} of the latest {self._tries} samples could not be used "
            f"({self._bad / self._tries:.1%}); data.max_skip_rate allows {self.max_skip_rate:.1%}. "
            + (f"By reason: {_table(self.total)}. The latest:\n{named}\n" if named else "Other ranks name them. ")
            + "Repair them, leave them out of the data, or raise data.max_skip_rate."
        )


def _table(counts: Counter[tuple[str, str]]) -> str:
    return ", ".join(f"{source} {reason} {number}" for (source, reason), number in counts.most_common())
