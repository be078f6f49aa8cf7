"""Files with a JSON object on each line (metrics.jsonl, predictions.jsonl), as a killed writer may leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Half a character, of an emoji cut in two, is written as JSON escapes it: "\ud83d".
HALVES = "backslashreplace"


def lines_of(file: Path) -> list[str]:
    """The lines that are not empty.  Not `str.splitlines`, which also splits at U+2028 and U+0085: JSON leaves those in
    texts as they are."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return [line for line in text.split("\n") if line.strip()]


def json_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects, and how many lines are none."""
    found, broken = [], 0
    for text in lines_of(file):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            found.append(line)
        else:
            broken += 1
    return found, broken
