"""Ranks, and nothing else.  Only this file and `engine.py` may import torch.distributed.

Nothing in `model/` or `train/loss/` asks where it runs: a `Ranks` is handed in.

Shape letters   B = rows on this rank   N = rows on all ranks
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """The processes of a run.

    `device_group` carries tensors (NCCL or gloo), `host_group` carries small integers over gloo, so that agreeing on a
    number never waits for the GPU.
    """

    def __init__(self, rank: int = 0, count: int = 1, device_group: Any = None, host_group: Any = None) -> None:
        self.rank, self.count = rank, count
        self._device_group, self._host_group = device_group, host_group

    @classmethod
    def alone(cls) -> Ranks:
        return cls()

    @classmethod
    def connect(cls, device: torch.device, *, timeout_minutes: float = 30.0) -> Ranks:
        """Joins the processes that torchrun or deepspeed started; alone when nobody did.

        A process group that exists already is used as it is.
        """
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return cls.alone()
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
        if dist.get_world_size() == 1:
            return cls.alone()
        host_group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
        return cls(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, host_group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    # ------------------------------------------------------------------------------------------------------- tensors

    def gather(self, x_B: Tensor) -> Tensor:
        """(B, ...) on each rank -> (N, ...) on every rank.  The gradient of every rank's use comes back, summed."""
        if self.count == 1:
            return x_B
        if not (torch.is_grad_enabled() and x_B.requires_grad):
            return self.gather_constant(x_B)
        return self._all_gather(x_B)

    def gather_constant(self, x_B: Tensor) -> Tensor:
        """As `gather`, without gradient, own rows included (LAVIS's `concat_all_gather`)."""
        if self.count == 1:
            return x_B.detach()
        return self._all_gather(x_B.detach())

    def _all_gather(self, x_B: Tensor) -> Tensor:
        return _Gather.apply(x_B.contiguous(), self.rank, self.count, self._device_group)

    def own_rows(self, num_rows: int, device: torch.device) -> Tensor:
        """Rows of the gathered batch that this rank's came from: rank * B + (0 .. B-1)."""
        return torch.arange(num_rows, device=device) + self.rank * num_rows

    def fetch_rows(self, x_B: Tensor, index_K: Tensor) -> Tensor:
        """Rows `index_K` (global numbers, the same K on every rank) of the batch of all ranks.  -> (K, ...)

        Only the rows asked for travel.  Where `x_B` requires a gradient it travels back the same way.
        """
        if self.count == 1:
            return x_B[index_K]
        rows_here = len(x_B)
        asked_RK = self.gather_constant(index_K).view(self.count, -1)
        owner_RK = asked_RK // rows_here
        # What I send: for each rank in turn, my rows that it asks for.  What I get: sorted by the rank that owns it.
        wanted_RK = owner_RK == self.rank
        send_index = (asked_RK - self.rank * rows_here)[wanted_RK]
        arrival_K = owner_RK[self.rank].argsort(stable=True)
        counts = torch.stack([wanted_RK.sum(1), owner_RK[self.rank].bincount(minlength=self.count)]).tolist()
        received = _ExchangeRows.apply(x_B[send_index], counts[0], counts[1], self._device_group)
        return received[arrival_K.argsort()]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, without gradient."""
        if self.count == 1:
            return x.detach()
        x = x.detach().clone()
        dist.all_reduce(x, group=self._device_group)
        return x

    # ------------------------------------------------------------------------------------------------ small integers

    def sum_ints(self, values: list[int]) -> list[int]:
        return self._reduce_ints(values, dist.ReduceOp.SUM)

    def max_ints(self, values: list[int]) -> list[int]:
        return self._reduce_ints(values, dist.ReduceOp.MAX)

    def _reduce_ints(self, values: list[int], operation: Any) -> list[int]:
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=operation, group=self._host_group)
        return tensor.tolist()

    def broadcast_object(self, value: T) -> T:
        """What rank 0 holds, on every rank."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._host_group)
        return box[0]

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's object, in rank order, on every rank."""
        if self.count == 1:
            return [value]
        box: list[Any] = [None] * self.count
        dist.all_gather_object(box, value, group=self._host_group)
        return box

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier(group=self._host_group)


class _Gather(torch.autograd.Function):
    """Everybody's rows; backward, the gradients that all ranks have for mine.

    Blocking collectives: with the functional ones, ranks on gloo died natively in two of about twenty runs of the
    invariance test (SIGABRT in malloc, SIGSEGV; torch 2.13).  The cause was not found, so this is a precaution.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, rank: int, count: int, group: Any) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.own, ctx.group = slice(rank * len(rows), (rank + 1) * len(rows)), group
        parts = [torch.empty_like(rows) for _ in range(count)]
        dist.all_gather(parts, rows, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        everyones = gradient.clone(memory_format=torch.contiguous_format)  # reduced in place, and it is not ours
        dist.all_reduce(everyones, group=ctx.group)
        return everyones[ctx.own], None, None, None


class _ExchangeRows(torch.autograd.Function):
    """Rows to each rank in turn, and back again with the gradient."""

    @staticmethod
    def forward(ctx, rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.send, ctx.receive, ctx.group = send, receive, group
        received = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
        return received

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        returned = gradient.new_empty((sum(ctx.send), *gradient.shape[1:]))
        dist.all_to_all_single(returned, gradient.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return returned, None, None, None
