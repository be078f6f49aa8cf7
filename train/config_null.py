"""What null takes out of a config, and what referred to it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from train.config_check import Path_, Places

MAY_BE_EMPTY = ("data/source", "train/evaluator")


def without_leftovers(config: DictConfig, overrides: Sequence[str]) -> None:
    """Where the command line says that nothing of a group is chosen, what files add to its members goes too."""
    for group in MAY_BE_EMPTY:
        dotted = group.replace("/", ".")
        if not {f"{group}=null", f"~{group}", f"{dotted}=null"} & set(overrides):
            continue
        nodes = OmegaConf.select(config, dotted) or {}
        for name in [name for name, node in nodes.items() if isinstance(node, DictConfig) and "_target_" not in node]:
            if not any(override.lstrip("+~").startswith(f"{dotted}.{name}") for override in overrides):
                del nodes[name]


def broken_reference(config: Any, places: Places) -> str | None:
    """A sentence about the first ${key} that leads into what is null or not there.

    Args:
        config: as plain dicts and lists, with references unresolved.
    """
    for path, text in _leaves(config, ()):
        for key in re.findall(r"\$\{([\w./-]+)\}", text) if isinstance(text, str) else ():
            end = _dead_end(config, key.split("."))
            if end is None:
                continue
            at, is_null = end
            fault = f"{'.'.join(at)} is null ({places.of(at)})" if is_null else f"there is no {'.'.join(at)}"
            member = ".".join(path[:3])
            both = any(member.startswith(group.replace("/", ".")) for group in MAY_BE_EMPTY)
            return f"{'.'.join(path)} ({places.of(path)}) is ${{{key}}}, but {fault}" + (
                f": to do without both, set {member}=null too" if both else ""
            )
    return None


def _dead_end(config: Any, steps: Sequence[str]) -> tuple[Path_, bool] | None:
    """Where the way to a key ends before its last step, and whether at a null; None where it arrives or refers on."""
    node = config
    for number, step in enumerate(steps):
        if isinstance(node, str):
            return None
        if node is None:
            return tuple(steps[:number]), True
        if not isinstance(node, Mapping) or step not in node:
            return tuple(steps[: number + 1]), False
        node = node[step]
    return None


def _leaves(node: Any, path: Path_) -> Iterator[tuple[Path_, Any]]:
    if not isinstance(node, Mapping | list):
        yield path, node
        return
    for key, inner in node.items() if isinstance(node, Mapping) else enumerate(node):
        yield from _leaves(inner, (*path, str(key)))
