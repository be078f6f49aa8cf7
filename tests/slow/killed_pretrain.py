"""python -m tests.slow.killed_pretrain MOMENT ...: stage one's entry point, killed by SIGKILL in its second save."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import train.checkpoint
from train.checkpoint import MARKER, Checkpoints

saves = 0


def die() -> None:
    if saves == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def halve(file: Path) -> None:
    if saves == 2:
        os.truncate(file, file.stat().st_size // 2)


def replaced(owner: Any, name: str, before: Callable[..., None] | None = None, after: Any = None) -> None:
    original = getattr(owner, name)

    def stand_in(*arguments: Any, **named: Any) -> Any:
        if before is not None:
            before(*arguments)
        result = original(*arguments, **named)
        if after is not None:
            after(*arguments)
        return result

    setattr(owner, name, stand_in)


def count(*_: Any) -> None:
    global saves
    saves += 1


def in_the_file(name: str) -> Callable[..., None]:
    def cut(_: Any, file: Path) -> None:
        if file.name == name:
            halve(file)
            die()

    return cut


def in_the_marker(file: Path) -> None:
    if file.name == MARKER:
        halve(file)
        die()


def before_the_rename(file: Path) -> None:
    if file.name.endswith(".writing"):
        die()


def half_deleted(folder: Path, **_: Any) -> None:
    if Path(folder).name.endswith(".deleting") and saves == 2:
        (Path(folder) / "weights.safetensors").unlink()
        die()


MOMENTS: dict[str, Callable[[], None]] = {
    "weights half written": lambda: replaced(train.checkpoint, "save_file", after=in_the_file("weights.safetensors")),
    "optimizer half written": lambda: replaced(
        train.checkpoint, "save_file", after=in_the_file("optimizer.safetensors")
    ),
    "marker half written": lambda: replaced(train.checkpoint, "_sync", before=in_the_marker),
    "whole but not yet in its place": lambda: replaced(train.checkpoint, "_sync", after=before_the_rename),
    "in its place but not the latest": lambda: replaced(Checkpoints, "_point", before=lambda *_: die()),
    "an old one half deleted": lambda: replaced(shutil, "rmtree", before=half_deleted),
}


if __name__ == "__main__":
    moment = sys.argv.pop(1)
    replaced(Checkpoints, "save", before=count)
    MOMENTS[moment]()

    from train.pretrain import main

    main()
