"""A run's directory: made, claimed for this run alone, and told what the run was asked for."""

from __future__ import annotations

import errno
import fcntl
from io import TextIOWrapper
from pathlib import Path

_claims: list[TextIOWrapper] = []  # open as long as the process lives


def open_run_dir(run_dir: Path, config_yaml: str) -> None:
    """Makes the directory and writes `config.yaml`, whose lock tells that a run is at work here; for the first rank.

    Two runs in one directory would write into each other's metrics and remove each other's checkpoints.

    Raises:
        ValueError: it cannot be made or written, or another run is at work in it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        config = (run_dir / "config.yaml").open("a", encoding="utf-8")
        _claims.append(config)
        if not _lock(config):
            raise ValueError(
                f"another run is at work in run.dir={run_dir}: wait for its end, name another directory, or say "
                f"run.resume=never for a new one beside it"
            )
        config.truncate(0)
        config.write(config_yaml)
        config.flush()
    except OSError as error:
        raise ValueError(
            f"run.dir={run_dir} cannot be written ({error.strerror or error}): name another directory, or make room"
        ) from error


def _lock(file: TextIOWrapper) -> bool:
    """False where another process holds it.

    POSIX's: it ends with the process however that ends, and data workers, which are forked, do not inherit it.  It also
    ends when this process closes the file elsewhere, so nothing in a run may open it again.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # a file system without locks is no reason to stop
    return True
