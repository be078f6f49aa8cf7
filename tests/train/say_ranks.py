"""Started by a launcher: each process joins the others and leaves a file that names it and holds its arguments."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from train.distributed import Ranks
from train.engine import close_process_group


def main() -> None:
    assert not any(argument.startswith("--local_rank") for argument in sys.argv)
    ranks = Ranks.connect(torch.device("cpu"))
    assert ranks.sum_ints([1]) == [ranks.count]
    Path(sys.argv[1], f"rank{ranks.rank}of{ranks.count}").write_text(json.dumps(sys.argv[2:]))
    close_process_group()


if __name__ == "__main__":
    main()
