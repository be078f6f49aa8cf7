"""A run stops above the allowed share of bad samples, not before, and names them."""

from __future__ import annotations

import logging

import pytest

from data.batch import Skip
from data.skips import SkipMonitor


def skips(number: int) -> list[Skip]:
    return [Skip("web", f"/shards/{n:05d}.tar", f"key{n}", "truncated image") for n in range(number)]


def test_it_stops_when_the_share_is_exceeded_and_not_before() -> None:
    monitor = SkipMonitor(max_skip_rate=0.01)
    monitor.update(64, 10, skips(10))  # exactly 1% of the thousand that a first few count as
    with pytest.raises(ValueError, match=r"(?s)11 of the latest 128.*web: /shards/00000.tar key0 \(truncated image\)"):
        monitor.update(64, 1, skips(1))


def test_old_tries_leave_the_window() -> None:
    monitor = SkipMonitor(max_skip_rate=0.01, window=1000)
    for _ in range(50):  # 10 of 1100 tries a turn, the share of any 1000 consecutive ones never above 1%
        monitor.update(100, 10, skips(10))
        for _ in range(10):
            monitor.update(100, 0)
    assert monitor.total["web", "truncated image"] == 500


@pytest.mark.parametrize("step_size", [16, 300, 2000])
def test_a_rate_above_the_limit_stops_and_one_below_goes_on(step_size: int) -> None:
    below, above = SkipMonitor(0.05, window=500), SkipMonitor(0.05, window=500)

    def bad(rate: float, step: int) -> int:
        return int(rate * step_size * (step + 1)) - int(rate * step_size * step)

    for step in range(200):
        below.update(step_size, bad(0.04, step))
    with pytest.raises(ValueError, match="allows 5.0%"):
        for step in range(200):
            above.update(step_size, bad(0.07, step))


def test_every_rank_comes_to_the_same_verdict() -> None:
    """They are fed the same sums, and their own skips only to name them."""
    monitors = [SkipMonitor(0.01, window=100) for _ in range(2)]
    for monitor, own in zip(monitors, ([*skips(2)], []), strict=True):
        with pytest.raises(ValueError, match="2 of the latest 50"):
            monitor.update(50, 2, own)


def test_a_sample_that_came_again_is_named_once() -> None:
    again = [Skip("s", "/reports.jsonl", f"row {n % 2}, {n % 2}.dcm", "DICOM file") for n in range(9)]
    with pytest.raises(ValueError) as caught:
        SkipMonitor(0.001, least=10).update(100, 9, again)
    named = [line for line in str(caught.value).splitlines() if "/reports.jsonl" in line]
    assert named == [f"  s: /reports.jsonl row {n}, {n}.dcm (DICOM file)" for n in (0, 1)]


def test_limits_at_the_ends() -> None:
    with pytest.raises(ValueError):
        SkipMonitor(0.0).update(1000, 1, skips(1))
    SkipMonitor(1.0).update(1000, 1000, skips(5))


def test_the_log_is_limited(caplog, monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("data.skips.time.monotonic", lambda: clock[0])
    monitor = SkipMonitor(1.0)
    with caplog.at_level(logging.WARNING, logger="data.skips"):
        for second in range(61):
            clock[0] = float(second)
            monitor.update(10, 1, skips(1))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3 and "truncated image 30" in lines[1] and "/shards/00000.tar key0" in lines[1]
