"""Rows travel to whom asked for them, and their gradient finds the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ranks import run_ranks
from train.distributed import Ranks

ROWS = 3


def all_rows(count: int) -> Tensor:
    return torch.arange(count * ROWS * 4, dtype=torch.float64).view(count * ROWS, 2, 2).sin()


def wanted(rank: int, count: int) -> Tensor:
    return torch.tensor([[5, 0, 5, 3], [1, 1, 1, 2], [8, 4, 0, 8]][rank]) % (count * ROWS)


def weights(rank: int) -> Tensor:
    return torch.linspace(-1, 2, 4, dtype=torch.float64)[:, None, None] + rank


def fetch_and_send_back() -> tuple[Tensor, Tensor, Tensor]:
    ranks = Ranks.connect(torch.device("cpu"))
    own = all_rows(ranks.count)[ranks.own_rows(ROWS, torch.device("cpu"))].requires_grad_()
    fetched = ranks.fetch_rows(own, wanted(ranks.rank, ranks.count))
    (fetched * weights(ranks.rank)).sum().backward()
    gathered_own = all_rows(ranks.count)[ranks.own_rows(ROWS, torch.device("cpu"))].requires_grad_()
    # transposed: the gradient that comes in is not contiguous, the case that torch's own all_gather gets wrong
    (ranks.gather(gathered_own).transpose(1, 2) * (ranks.rank + 1)).cos().sum().backward()
    return fetched.detach(), own.grad, gathered_own.grad


def test_rows_travel_and_their_gradient_returns() -> None:
    count = 3
    everything = all_rows(count).requires_grad_()
    for rank in range(count):
        (everything[wanted(rank, count)] * weights(rank)).sum().backward()
    gathered = all_rows(count).requires_grad_()
    for rank in range(count):
        (gathered * (rank + 1)).cos().sum().backward()
    for rank, (fetched, gradient, gathered_gradient) in enumerate(run_ranks(count, fetch_and_send_back)):
        rows = slice(rank * ROWS, (rank + 1) * ROWS)
        torch.testing.assert_close(fetched, all_rows(count)[wanted(rank, count)])
        torch.testing.assert_close(gradient, everything.grad[rows])
        torch.testing.assert_close(gathered_gradient, gathered.grad[rows])


def agree() -> tuple[list[int], list[int], str, list[int], bool]:
    ranks = Ranks.connect(torch.device("cpu"))
    ranks.barrier()
    return (
        ranks.sum_ints([1, ranks.rank]),
        ranks.max_ints([7, ranks.rank]),
        ranks.broadcast_object(f"from {ranks.rank}"),
        ranks.gather_objects(ranks.rank),
        ranks.is_first,
    )


def test_ranks_agree_on_small_things() -> None:
    common = ([2, 1], [7, 1], "from 0", [0, 1])
    assert run_ranks(2, agree) == [(*common, True), (*common, False)]
    assert agree() == ([1, 0], [7, 0], "from 0", [0], True)
