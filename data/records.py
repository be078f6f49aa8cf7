"""Rows of JSON and JSONL files, each with its number, and what is said where one is not as expected."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

TOO_DEEP = "lists or objects within one another, more than can be read"


class Malformed(ValueError):
    """A row that is not what its format says; who reads the file adds where it stands."""

    def __init__(self, field: str, expected: str, found: object):
        super().__init__(f"field {field!r}: expected {expected}, found {_shown(found)}")

    def in_turn(self, number: int) -> Malformed:
        """The same, said of one turn of a conversation, counted from 1."""
        self.args = (f"turn {number}, {self.args[0]}",)
        return self


def files_of(path: str | Sequence[str]) -> list[Path]:
    """A file, a glob, or a list of them.  Raises ValueError where one finds nothing."""
    found: list[Path] = []
    for entry in [path] if isinstance(path, str) else list(path):
        name = os.path.expanduser(str(entry))
        matches = [Path(name)] if os.path.isfile(name) else [Path(match) for match in sorted(glob(name))]
        matches = [match for match in matches if match.is_file()]
        if not matches:
            raise ValueError(f"no file at {entry!r} (working directory {os.getcwd()})")
        found += matches
    return found


def read_rows(
    file: Path, *, under: str | None = None, bad_line: Callable[[int, str], None] | None = None
) -> Iterator[tuple[int, object]]:
    """(row number from 1, value) of a JSON list, or (line number, value) of JSON lines.

    Args:
        under: the list may also stand under this key of one JSON object.
        bad_line: called with the number of a line that is no JSON, and what was expected of it; None raises it.
    Raises:
        ValueError: no UTF-8, no JSON, or JSON that is no list.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: not UTF-8 at byte {error.start}; if it is GBK: iconv -f GBK -t UTF-8 {file.name} > new.json"
        ) from error
    whole = _whole(file, text, under)
    if whole is not None:
        yield from enumerate(whole, start=1)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = _parsed(line)
            except ValueError as error:
                what = f"expected a JSON value on a line, found {error}"
                if bad_line is None:
                    raise ValueError(f"{file}, row {number}: {what}") from error
                bad_line(number, what)
            else:
                yield number, value


def _whole(file: Path, text: str, under: str | None) -> list[Any] | None:
    """The list that the file is; None where it has a value on each line."""
    start = text.lstrip()[:1]
    try:
        value = _parsed(text)
    except ValueError as error:
        if start == "[" and file.suffix.lower() != ".jsonl":
            raise ValueError(f"{file}: expected a JSON list, found {error}") from error
        return None
    if isinstance(value, dict) and under is not None and under in value:
        value = value[under]
    elif isinstance(value, dict):
        return None  # a single line
    if not isinstance(value, list):
        place = f" under {under!r}" if under else ""
        raise ValueError(f"{file}: expected a JSON list{place} or JSON lines, found {_shown(value)}")
    return value


def _parsed(text: str) -> Any:
    """Raises ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def as_object(value: object, name: str = "(the row)") -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise Malformed(name, "an object with named fields", value)
    return value


def text_of(record: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    """The text of a field, without the white space around it; numbers are written out."""
    if name not in record:
        raise Malformed(name, "text", f"no such field among {sorted(map(str, record))}")
    value = record[name]
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str):
        raise Malformed(name, "text", value)
    if not value.strip() and not empty:
        raise Malformed(name, "text that is not empty", value)
    return value.strip()


def texts_of(record: Mapping[str, Any], name: str, what: str = "path") -> tuple[str, ...]:
    """A text or a list of texts; nothing where the field is missing or null.

    Args:
        what: they are, for the error.
    """
    value = record.get(name)
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    for item in values:
        if not isinstance(item, str) or not item.strip():
            raise Malformed(name, f"a {what}, or a list of {what}s", item)
    return tuple(values)


def _shown(value: object) -> str:
    if isinstance(value, str) and value.startswith("no such field"):
        return value
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except RecursionError:
        return TOO_DEEP
    return text if len(text) <= 80 else text[:77] + "..."
