"""`--help`: every key, from the same schema and files that are checked."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

from train.config_check import resolved_type

WIDTH = 120


def help_text(name: str, overrides: Sequence[str], schema: type, config_dir: Path) -> str:
    """Keys of the schema with defaults, then the files of every group with their comments."""
    first_lines = (config_dir / f"{name}.yaml").read_text(encoding="utf-8").split("\ndefaults:")[0]
    options = (
        "Options: --help; --cfg job prints the config; --config-dir DIR adds your own DIR/experiment/*.yaml and groups."
    )
    parts = [first_lines.strip(), "", options, "", "Keys (key = default):", *_keys(schema, ())]
    parts += ["", "Groups: choose one with group=name, set its keys as group.key=value (dots for slashes)."]
    for folder in sorted({file.parent for file in config_dir.rglob("*.yaml")} - {config_dir}):
        group = folder.relative_to(config_dir)
        files = sorted(folder.glob("*.yaml"))
        parts += ["", f"{group} = {' | '.join(file.stem for file in files)}"]
        if group.parts[0] != "experiment":
            for file in files:
                text = file.read_text(encoding="utf-8").rstrip()
                parts += [f"  {group}={file.stem}", textwrap.indent(text, "    | ")]
    return "\n".join(parts)


def _keys(schema: type, path: tuple[str, ...]) -> Iterator[str]:
    for item in fields(schema):
        here = (*path, item.name)
        help_ = item.metadata["help"]
        choices = item.metadata.get("choices")
        if choices:
            help_ += f" ({' | '.join(map(str, choices))})"
        kind = resolved_type(schema, item)
        if is_dataclass(kind):
            yield from ["", f"{'.'.join(here)}: {help_}"]
            yield from _keys(kind, here)  # type: ignore[arg-type]
            continue
        default = "" if item.default is MISSING or item.default is None else f" = {item.default}"
        yield textwrap.fill(
            help_, WIDTH, initial_indent=f"  {'.'.join(here)}{default}".ljust(46) + "  ", subsequent_indent=" " * 48
        )
