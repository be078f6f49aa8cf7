"""What wandb wrote offline: a LevelDB log of messages, for which its Python package has no reader any more (0.31)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, FILE_HEADER, RECORD_HEADER = 32768, 7, 7
FULL, FIRST, MIDDLE, LAST = range(1, 5)


def _messages(raw: bytes) -> Iterator[bytes]:
    assert raw.startswith(b":W&B"), "no offline file of wandb"
    at, parts = FILE_HEADER, []
    while at + RECORD_HEADER <= len(raw):
        if BLOCK - at % BLOCK < RECORD_HEADER:  # a record's header never crosses a block
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + RECORD_HEADER])
        at += RECORD_HEADER
        parts = [*(parts if kind in (MIDDLE, LAST) else []), raw[at : at + length]]
        at += length
        if kind in (FULL, LAST):
            yield b"".join(parts)


def offline_runs(run_dir: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """(run id, rows of history) of every `wandb/offline-run-*`, in the order of the times in their names."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        run_id, rows = "", []
        for message in _messages(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(message)
            run_id = record.run.run_id or run_id
            if record.HasField("history"):
                rows.append(
                    {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
        found.append((run_id, rows))
    return found
