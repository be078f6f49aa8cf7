"""Started by a launcher: processes that fail as a run can.  Without torch, so that it costs little."""

from __future__ import annotations

import os
import signal
import sys
import time

import train.failure
from train.failure import user_errors


def main(how: str) -> None:
    rank = int(os.environ["RANK"])
    if how == "all":
        with user_errors():
            raise ValueError("no shard at a.tar")
    if how == "the second alone":
        train.failure.PATIENCE_S = 0.5
        with user_errors():
            if rank == 1:
                raise ValueError("no shard at a.tar")
            time.sleep(60)  # as in a collective that the other will never join
    if how == "a lost peer":
        with user_errors():
            if rank == 0:
                raise ValueError("no shard at a.tar")
            raise RuntimeError("Connection closed by peer")
    if how == "a bug":
        with user_errors():
            raise ZeroDivisionError("a mistake of ours")
    if how == "a long run":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"rank {rank} saved"))
        os.write(sys.stdout.fileno(), b"running\n")  # at once: what `print` writes, another rank's may come between
        time.sleep(60)
    if how == "a crash" and rank == 0:
        os.abort()


if __name__ == "__main__":
    main(sys.argv[1])
