"""How a process of a run ends when something is wrong: one rank says it, the exit code is not 0, and nothing follows.

Most faults meet every rank at the same step, and a rank whose peer is gone fails as well, with a page about sockets.
So the first rank speaks at once, and the others keep still for a while: their launcher ends them as soon as it sees
the first one gone.  A rank that is alone with its fault speaks when nobody has ended it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

PATIENCE_S = 10.0
SAID = "queqiao"  # marks our entry in torchrun's error file, for train/torchrun.py


@contextmanager
def user_errors() -> Iterator[None]:
    """A ValueError is a sentence for the user, not a page of frames; QUEQIAO_TRACEBACK=1 shows those too."""
    try:
        yield
    except ValueError as error:
        if os.environ.get("QUEQIAO_TRACEBACK"):
            _wait_for_the_first_rank()
            raise
        stop(f"error: {error}\n(QUEQIAO_TRACEBACK=1 shows where it was raised)", 1)
    except Exception:
        _wait_for_the_first_rank()
        raise


def stop(text: str, code: int) -> NoReturn:
    """Says `text` on stderr, once for all ranks, and ends the process with `code`."""
    _wait_for_the_first_rank()
    _write_error_file(text)
    print(text, file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Unwinding while gloo's threads live aborts now and then, and the exit code would be the abort's.
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)


def _wait_for_the_first_rank() -> None:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(PATIENCE_S)


def _write_error_file(text: str) -> None:
    """What torchrun shows under "Root Cause", in the form of torch.distributed.elastic; without it, no word of ours."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        with open(file, "w", encoding="utf-8") as out:
            json.dump({"message": message, SAID: True}, out)
