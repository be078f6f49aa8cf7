"""Writes a report of one run or several: a page that opens from disk, and the same pictures as PNG.

    python scripts/report.py outputs/demo                       # outputs/demo/report/report.html
    python scripts/report.py outputs/mine outputs/mine-2        # compared: outputs/mine-2/report/comparison.html
    python scripts/report.py outputs/demo --evaluate            # measures the newest checkpoint first (evaluate.py)

Retrieval, captions and answers come from the predictions that evaluate.py keeps: evaluate a run before and after, or
two runs on the same evaluator, and they stand side by side.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    options = parser().parse_args()
    from train.failure import user_errors
    from train.report.page import Options, write_report

    with user_errors():
        made = write_report(
            options.runs,
            options.out,
            evaluate=options.evaluate,
            wandb=options.wandb,
            options=Options(options.examples, options.looks, options.attention, options.device),
        )
    print(f"{made}  ({made.stat().st_size / 2**20:.1f} MiB)")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="the directory of a run")
    made.add_argument("--out", type=Path, metavar="FILE", help="the page; its PNGs go beside it")
    made.add_argument("--evaluate", action="store_true", help="first measure checkpoints that have no predictions yet")
    made.add_argument("--examples", type=int, default=6, help="successes and failures shown (%(default)s of each)")
    made.add_argument("--looks", type=int, default=3, help="pictures whose attention is drawn (%(default)s)")
    made.add_argument(
        "--attention",
        choices=("auto", "yes", "no"),
        default="auto",
        help="auto: not where a published language model would have to be loaded",
    )
    made.add_argument("--device", default="cpu", help="where the model is asked for its attention (%(default)s)")
    made.add_argument(
        "--wandb",
        choices=("auto", "disabled", "offline", "online"),
        default="auto",
        help="adds the pictures to the run's wandb run; auto: as the run did",
    )
    return made


if __name__ == "__main__":
    main()
