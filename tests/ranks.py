"""Runs a function on several CPU processes, as `torchrun` would start them, and brings back what each returned."""

from __future__ import annotations

import faulthandler
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.multiprocessing as mp


def run_ranks(count: int, work: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """`[work(*args) on rank 0, on rank 1, ...]`, each in its own process with RANK, WORLD_SIZE, MASTER_PORT set.

    `work` is a function at the top level of a module (it travels by name) and connects by itself, for instance with
    `train.distributed.Ranks.connect`.  What it returns is pickled.  A rank that raises, dies or is not done after
    `timeout` seconds fails the test; the stacks of ranks that hang are printed.
    """
    context = mp.get_context("spawn")
    with TemporaryDirectory(prefix="queqiao-ranks-") as folder:
        port = free_port()
        processes = [
            context.Process(target=_rank_main, args=(rank, count, port, folder, timeout, work, args), daemon=False)
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [pickle.loads(Path(folder, f"result-{rank}").read_bytes()) for rank in range(count)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _rank_main(
    rank: int, count: int, port: int, folder: str, timeout: float, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(timeout - 2, 1), file=sys.stderr)
    try:
        import torch

        torch.set_num_threads(1)
        import torch.distributed as dist

        result = pickle.dumps(work(*args))
        if dist.is_initialized():  # an interpreter that ends while gloo's threads run may abort
            dist.destroy_process_group()
        Path(folder, f"result-{rank}").write_bytes(result)
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None
    finally:
        faulthandler.cancel_dump_traceback_later()


def _wait(processes: list[Any], folder: Path, timeout: float) -> None:
    """Returns when all are done; raises as soon as one failed, since the others then wait for it in a collective."""
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        if any(process.exitcode not in (None, 0) for process in processes):
            break
        if time.monotonic() > deadline:
            hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
            raise TimeoutError(f"ranks {hanging} of {len(processes)} were not done after {timeout} s")
        wait([process.sentinel for process in processes if process.is_alive()], timeout=0.5)
    failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
    if failed:
        # A rank that lost its peer fails too, a moment later; the first to have written its error is the cause.
        errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        story = "\n".join(f"--- rank {path.name.removeprefix('error-')}\n{path.read_text()}" for path in errors)
        codes = {rank: processes[rank].exitcode for rank in failed}
        raise RuntimeError(f"exit codes by rank {codes}\n{story or 'no Python error: killed from outside?'}")
