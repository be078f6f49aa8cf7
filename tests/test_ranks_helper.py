"""The helper that other tests trust to run ranks: results in order, errors and hangs told."""

from __future__ import annotations

import os
import time

import pytest

from tests.ranks import run_ranks


def _sum_over_ranks(value: int) -> tuple[int, float]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([float(value * (dist.get_rank() + 1))])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return int(os.environ["RANK"]), total.item()


def _raise_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank 1 has had enough")
    time.sleep(60)


def _hang() -> None:
    time.sleep(60)


def test_results_come_back_in_rank_order() -> None:
    expected = [(0, 9.0), (1, 9.0)]
    assert run_ranks(2, _sum_over_ranks, 3) == expected


def test_the_error_of_one_rank_ends_all_and_is_shown() -> None:
    with pytest.raises(RuntimeError, match="rank 1 has had enough"):
        run_ranks(2, _raise_on_rank_1, timeout=50)


def test_ranks_that_hang_are_named() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 1"):
        run_ranks(1, _hang, timeout=3)
