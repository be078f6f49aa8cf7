"""Started by a launcher: each process joins the others and leaves a file that names it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from train.distributed import Ranks
from train.engine import close_process_group


def main() -> None:
    assert not any(argument.startswith("--local_rank") for argument in sys.argv)
    ranks = Ranks.connect(torch.device("cpu"))
    assert ranks.sum_ints([1]) == [ranks.count]
    Path(sys.argv[1], f"rank{ranks.rank}of{ranks.count}").touch()
    close_process_group()


if __name__ == "__main__":
    main()
