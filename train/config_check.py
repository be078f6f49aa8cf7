"""Finds the keys of a config that nobody will read: a mistyped key is an error that names the nearest right one."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import operator
import types
import typing
from collections import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from model.build import PACKAGES, ConfigError

HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_"}
Path_ = tuple[str, ...]
SECTION = "names with values, {name: value, ...}"


class Places:
    """Where a key of the composed config was written."""

    def __init__(self, folders: Sequence[Path], name: str, overrides: Sequence[str], choices: Mapping[str, Any]):
        self.folders, self.overrides = list(folders), list(overrides)
        chosen = [f"{name}.yaml"]
        for group, choice in choices.items():
            if isinstance(choice, str) and not group.startswith("hydra/"):
                chosen.append(f"{group.partition('@')[0]}/{choice}.yaml")
        self.chosen = [folder / file for file in chosen for folder in self.folders]

    def of(self, path: Path_) -> str:
        """ "on the command line: ..." or "configs/train/optim/adamw.yaml, line 3"."""
        dotted = ".".join(path)
        for override in reversed(self.overrides):  # of two with the same key the last holds
            written = override.lstrip("+~").partition("=")[0]
            inside = dotted.startswith(written + ".") and path[-1] in override  # a.b={c: 1}
            if inside or written == dotted or written.startswith(dotted + "."):
                return f"on the command line: {override}"
        every = [file for folder in self.folders for file in sorted(folder.rglob("*.yaml"))]
        for file in [*reversed(self.chosen), *(file for file in every if file not in self.chosen)]:
            line = self._line(file, path)
            if line is not None:
                own = len(self.folders) > 1 and file.is_relative_to(self.folders[0])
                return f"{file if own else file.relative_to(self.folders[-1].parent)}, line {line}"
        return "in the composed config"

    def _line(self, file: Path, path: Path_) -> int | None:
        if not file.is_file():
            return None
        text = file.read_text(encoding="utf-8")
        folder = next(folder for folder in self.folders if file.is_relative_to(folder))
        package = file.relative_to(folder).parent.parts
        header = text[:200].partition("@package")[2].split()
        if header:
            package = () if header[0] == "_global_" else tuple(header[0].split("."))
        for at in range(len(package), len(path)):
            # A group's file may have been put deeper (`data/source@data.source.photos`), never higher.
            if path[: len(package)] == package:
                line = _line_of(_composed(text), path[at:])
                if line is not None:
                    return line
        return None


@cache
def _composed(text: str) -> Any:
    return yaml.compose(text)


def _line_of(node: Any, path: Path_) -> int | None:
    for name in path[:-1]:
        node = next((v for k, v in node.value if k.value == name), None) if isinstance(node, yaml.MappingNode) else None
    if isinstance(node, yaml.MappingNode):
        return next((k.start_mark.line + 1 for k, _ in node.value if k.value == path[-1]), None)
    return None


def unknown_keys(config: Any, schema: type, places: Places) -> list[str]:
    """One sentence for each key that is no key.  What needs no import is looked at first."""
    checker = _Checker(schema, places)
    problems = list(checker.dataclass_keys(config, schema, ()))
    if not problems:
        checker.imports = True
        problems = list(checker.dataclass_keys(config, schema, ()))
    return problems


class _Checker:
    def __init__(self, schema: type, places: Places):
        self.places = places
        self.imports = False  # whether signatures and DeepSpeed may be asked
        self.elsewhere = {path[-1]: ".".join(path) for path in _schema_paths(schema)}

    def dataclass_keys(self, config: Mapping[str, Any], schema: type, path: Path_) -> Iterator[str]:
        known = {item.name: item for item in fields(schema)}
        for name, value in config.items():
            here = (*path, str(name))
            if name not in known:
                yield self.unknown(here, known)
                continue
            kind = resolved_type(schema, known[name])
            if is_dataclass(kind):
                if isinstance(value, Mapping):
                    yield from self.dataclass_keys(value, kind, here)  # type: ignore[arg-type]
                else:
                    yield f"{'.'.join(here)} is a section, not a value ({self.places.of(here)})"
            elif value is not None:
                yield from self.free(value, known[name].metadata.get("free", "any"), here)

    def free(self, value: Any, rule: str, path: Path_) -> Iterator[str]:
        """Sections whose keys are not in the schema."""
        if not isinstance(value, Mapping):
            if rule != "any" and value is not None and not _is_open(value):
                yield f"{'.'.join(path)}={value} is a section, not a value ({self.places.of(path)})"
            return
        if rule == "deepspeed":
            yield from self.deepspeed(value, path)
        elif rule == "groups":
            own = [folder / path[-1] for folder in self.places.folders]
            groups = [group.name for folder in own if folder.is_dir() for group in folder.iterdir() if group.is_dir()]
            for name, node in value.items():
                if name not in groups:
                    yield self.unknown((*path, name), groups)
                elif node is None:
                    yield f"{'.'.join((*path, name))} is null ({self.places.of((*path, name))}): a run needs one"
                else:
                    yield from self.free(node, "target", (*path, name))
        elif rule in ("target", "targets") and "_target_" in value:
            yield from self.target(value, path)
        elif rule == "target":
            for name in value:
                yield f"{'.'.join((*path, name))}: nothing is chosen for {'.'.join(path)} that could read it " + (
                    f"({self.places.of((*path, name))})"
                )
        elif rule == "targets":
            named = [name for name, node in value.items() if isinstance(node, Mapping) and "_target_" in node]
            for name, node in value.items():
                if name in named:
                    yield from self.target(node, (*path, name))
                elif node is not None:
                    yield self.unknown((*path, name), named)

    def target(self, node: Mapping[str, Any], path: Path_) -> Iterator[str]:
        """A node's keys against the signature of what it builds."""
        name = node["_target_"]
        if not isinstance(name, str) or name.partition(".")[0] not in PACKAGES:
            where = self.places.of((*path, "_target_"))
            yield f"{'.'.join(path)}._target_={name}: may only point into {', '.join(PACKAGES)} ({where})"
            return
        if not self.imports:
            return
        try:
            found = find(name)
            parameters = inspect.signature(found).parameters
        except (ImportError, AttributeError) as error:
            yield f"{'.'.join(path)}._target_={name}: {error} ({self.places.of((*path, '_target_'))})"
            return
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            for key in node:
                if key not in parameters and key not in HYDRA_KEYS:
                    yield self.unknown((*path, str(key)), [p for p in parameters if p != "self"])
        hints = _hints_of(found)
        for key, value in node.items():
            for inner, found_there, wanted in _misfits(value, hints[key], (str(key),)) if key in hints else ():
                here = (*path, *inner)
                yield f"{'.'.join(here)}={found_there} ({self.places.of(here)}): expected {wanted}" + (
                    _how_to_quote(here, value) if SECTION in wanted else ""
                )
        for key, value in node.items():
            yield from self.nested(value, (*path, str(key)))

    def nested(self, value: Any, path: Path_) -> Iterator[str]:
        if isinstance(value, Mapping):
            if "_target_" in value:
                yield from self.target(value, path)
            else:
                for key, inner in value.items():
                    yield from self.nested(inner, (*path, str(key)))

    def deepspeed(self, section: Mapping[str, Any], path: Path_) -> Iterator[str]:
        if not section:
            return
        from train.config_deepspeed import unknown_keys

        for inner, found in unknown_keys(section, imports=self.imports):
            here = (*path, *inner)
            if isinstance(found, str):
                yield f"{'.'.join(here)}: set {found} instead ({self.places.of(here)})"
            else:
                yield self.unknown(here, found)

    def unknown(self, path: Path_, known: Iterable[str]) -> str:
        name, parent, known = path[-1], ".".join(path[:-1]), sorted(known)
        if not parent:
            known.append("experiment")  # a choice of the command line, in no config
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        if close:
            advice = f"did you mean {'.'.join((*path[:-1], close[0]))}?"
        elif name in self.elsewhere:
            advice = f"did you mean {self.elsewhere[name]}?"
        else:
            advice = f"{parent or 'the config'} has {', '.join(known) or 'no keys'}"
        return f"unknown key {'.'.join(path)} ({self.places.of(path)}): {advice}"


def _hints_of(target: Any) -> dict[str, Any]:
    """Parameter -> annotation; nothing for what cannot be resolved."""
    by_field = not inspect.isclass(target) or is_dataclass(target)  # inherited ones are written in other modules' words
    try:
        return typing.get_type_hints(target if by_field else target.__init__, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


def _is_open(value: Any) -> bool:
    """Resolved, or asked for, later."""
    return isinstance(value, str) and ("${" in value or value == "???")


def _misfits(value: Any, annotation: Any, path: Path_) -> Iterator[tuple[Path_, Any, str]]:
    """(where, what was found there, what it should have been): the value, or single ones of a `Mapping[str, ...]`."""
    wanted = _misfit(value, annotation)
    if wanted:
        yield path, value, wanted
    elif isinstance(value, Mapping):
        sections = [each for each in _alternatives(annotation) if typing.get_origin(each) is abc.Mapping]
        for key, inner in value.items() if len(sections) == 1 else ():
            of_one = typing.get_args(sections[0])[1]
            if not (inner is None and of_one is str):  # fields that a file has for a language: null is no such field
                yield from _misfits(inner, of_one, (*path, str(key)))


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _how_to_quote(path: Path_, value: object) -> str:
    """A shell makes two words, a=b:1 and a=c:2, out of a={b:1,c:2}."""
    name = str(value).partition(":")[0].strip() or "a"
    return f".  On a command line in quotes, for the braces are the shell's too: '{'.'.join(path)}={{{name}: 1, ...}}'"


def _misfit(value: Any, annotation: Any) -> str | None:
    """What a plain value should have been, or None where it fits or the annotation is not a plain one."""
    if _is_open(value):
        return None
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is abc.Mapping:
        return None if isinstance(value, Mapping) else SECTION
    if origin is abc.Sequence:
        return None if isinstance(value, list) else "a list, [a, b]"
    if origin is typing.Annotated:
        return _misfit(value, arguments[0]) or _out_of_bounds(value, arguments[1:])
    if origin is typing.Literal:
        return None if value in arguments else f"one of {', '.join(map(str, arguments))}"
    if origin in (typing.Union, types.UnionType):
        misfits = [_misfit(value, argument) for argument in arguments]
        return None if None in misfits else " or ".join(str(misfit) for misfit in misfits)
    plain = {bool: (bool,), int: (int,), float: (int, float), str: (str,), type(None): (type(None),)}
    if annotation not in plain:
        return None
    fits = isinstance(value, plain[annotation]) and (annotation is bool or not isinstance(value, bool))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return None if fits else names[annotation]


def _out_of_bounds(value: Any, bounds: Iterable[Any]) -> str | None:
    """Of `Annotated[float, Ge(0)]`, where a signature says more than a type."""
    if not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        return "a finite number"
    wanted = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    fits = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
    for bound in bounds:
        for name, words in wanted.items():
            limit = getattr(bound, name, None)
            if limit is not None and not fits[name](value, limit):
                return f"{words} {limit}"
    return None


def find(target: str) -> Any:
    """The thing a dotted name means; imports as little as finding it takes."""
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:length])
        try:
            found = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
                continue
            raise
        for name in parts[length:]:
            if not hasattr(found, name):
                close = difflib.get_close_matches(name, dir(found), n=1)
                raise AttributeError(f"{module_name} has no {name}" + (f"; did you mean {close[0]}?" if close else ""))
            found = getattr(found, name)
        return found
    raise ImportError(f"no module named {parts[0]}")


def as_forced(override: str, folders: Sequence[Path]) -> str:
    """`a.b=1` -> `++a.b=1`, so that an unknown key reaches our check; choices of a group stay as they are, but null,
    which Hydra says in another way."""
    name = override.lstrip("+~").partition("=")[0].partition("@")[0]
    if override == "train.evaluator=null":
        return "~train.evaluator"
    if "=" not in override and not override.startswith("~"):
        raise ConfigError(f"{override!r} is no key=value")
    if override.startswith(("~", "++")) or name.partition(".")[0] == "hydra":
        return override
    if any((folder / name).is_dir() for folder in folders):
        if override.partition("=")[2] == "null":
            return f"~{name}"
        return override.lstrip("+") if name == "experiment" else override
    if "/" in name:
        groups = [str(p.relative_to(folder)) for folder in folders for p in folder.rglob("*") if p.is_dir()]
        close = difflib.get_close_matches(name, groups, n=1)
        raise ConfigError(
            f"no config group {name} (on the command line: {override})"
            + (f": did you mean {close[0]}?" if close else f"; groups: {', '.join(sorted(groups))}")
        )
    return "++" + override.lstrip("+")


def choices_and_bounds(config: DictConfig, schema: type, places: Places, path: Path_ = ()) -> list[str]:
    """The schema's rules on values."""
    problems: list[str] = []
    for item in fields(schema):
        value, here = config[item.name], (*path, item.name)
        kind = resolved_type(schema, item)
        if is_dataclass(kind):
            problems += choices_and_bounds(value, kind, places, here)  # type: ignore[arg-type]
            continue
        choices, least, below = (item.metadata.get(rule) for rule in ("choices", "least", "below"))
        if item.metadata.get("free") == "target" and value is None:
            problems.append(f"{'.'.join(here)} is null ({places.of(here)}): a run needs one")
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{'.'.join(here)}={value} ({places.of(here)}): a finite number")
        if choices is not None and value not in choices:
            problems.append(f"{'.'.join(here)}={value} ({places.of(here)}): one of {', '.join(map(str, choices))}")
        if least is not None and value < least:
            problems.append(f"{'.'.join(here)}={value} ({places.of(here)}): at least {least}")
        if below is not None and value >= below:
            problems.append(f"{'.'.join(here)}={value} ({places.of(here)}): below {below}")
        if item.metadata.get("free") == "deepspeed" and value:
            problems += _deepspeed_values(value, here, places, zero_stage=config.zero_stage)
    return problems


def _deepspeed_values(section: DictConfig, path: Path_, places: Places, *, zero_stage: int) -> list[str]:
    from train.config_deepspeed import impossible_values

    plain: Any = OmegaConf.to_container(section)
    found = impossible_values(plain, zero_stage=zero_stage)
    return [f"{'.'.join((*path, *at))}={value} ({places.of((*path, *at))}): {wrong}" for at, value, wrong in found]


@cache
def _type_hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def resolved_type(schema: type, item: Field[Any]) -> Any:
    return _type_hints(schema)[item.name]


def _schema_paths(schema: type, path: Path_ = ()) -> Iterator[Path_]:
    for item in fields(schema):
        kind = resolved_type(schema, item)
        yield (*path, item.name)
        if is_dataclass(kind):
            yield from _schema_paths(kind, (*path, item.name))  # type: ignore[arg-type]
