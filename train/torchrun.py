"""torchrun, but what a run has said about its failure stays the last word: `scripts/launch.sh` starts this.

torchrun itself ends in a page of its own frames.  Here the processes' own sentence ends the output, or, where a process
died without one, torchrun's table of who died how.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from train.failure import SAID


def main() -> int:
    # It would announce each dead process; so does the table, and our sentence needs no comment.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as failed:
        told = [failure for failure in failed.failures.values() if failure.error_file_data.get(SAID)]
        if not told:
            print(failed, file=sys.stderr)
        _, first = failed.get_first_failure()
        return _exit_code((told or [first])[0].exitcode)
    except SignalException as received:  # the processes had it too, and have said what they did
        return _exit_code(-received.sigval)
    return 0


def _exit_code(code: int) -> int:
    """A shell's: 128 + the signal that ended a process."""
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
