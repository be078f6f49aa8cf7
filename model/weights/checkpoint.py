"""Other people's checkpoint files behind one face: names, shapes, and tensors one at a time.

Nothing here runs code that a file brings: safetensors, or `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

_INDEXED = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


class Config(dict[str, Any]):
    """What a JSON file holds: a key that is asked for and not there is a fault of the file, whose name it carries."""

    def __init__(self, content: Mapping[str, Any], place: str) -> None:
        super().__init__(content)
        for key, value in content.items():
            if isinstance(value, dict) and not isinstance(value, Config):  # one that came along keeps its name
                self[key] = Config(value, f"{place}, {key}")
        self.place = place

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.place} has no {key}")


@dataclass(frozen=True)
class Checkpoint:
    """`shapes` says what is there; `read(name)` fetches one tensor, from disk only then."""

    path: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    def first_of(self, names: tuple[str, ...]) -> str | None:
        """The first of several names for the same thing that the checkpoint has."""
        return next((name for name in names if name in self.shapes), None)

    def without_prefix(self, *prefixes: str) -> Checkpoint:
        """The same tensors with the first of `prefixes` that begins a name taken off it."""
        original = {}
        for name in self.shapes:
            prefix = next((p for p in prefixes if name.startswith(p)), "")
            original[name[len(prefix) :]] = name
        shapes = {short: self.shapes[name] for short, name in original.items()}
        return Checkpoint(self.path, shapes, lambda short: self.read(original[short]))

    def with_prefix(self, prefix: str) -> Checkpoint:
        shapes = {prefix + name: shape for name, shape in self.shapes.items()}
        return Checkpoint(self.path, shapes, lambda name: self.read(name.removeprefix(prefix)))

    def only(self, wanted: Callable[[str], bool]) -> Checkpoint:
        return Checkpoint(self.path, {name: shape for name, shape in self.shapes.items() if wanted(name)}, self.read)


def from_tensors(
    tensors: Mapping[str, Tensor], path: str = "tensors in memory", *, file: Path | None = None
) -> Checkpoint:
    """`file`: where they are, if `path` is a folder."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Checkpoint(path, shapes, lambda name: _examined(tensors[name], name, file or path))


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity, in one pass without memory where the tensor lies.

    On one core of a Xeon 3 to 5 GB/s, where `torch.isfinite` makes several passes and comes to 0.2.
    """
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    least_and_largest = torch.stack(_countable(tensor).aminmax())  # both are NaN where one number is
    return bool(least_and_largest.isfinite().all())


def require_finite(tensor: Tensor, name: str, file: str | Path) -> None:
    """Raises ValueError: there is NaN or infinity in it."""
    if not is_finite(tensor):
        count = tensor.numel() - int(_countable(tensor).isfinite().sum())
        raise ValueError(
            f"{file}: {name} holds {count} of {tensor.numel()} numbers that are NaN or infinite: the file is damaged, "
            f"or the training that wrote it had gone wrong.  Fetch or copy it again, or take an earlier checkpoint"
        )


def in_precision(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Raises ValueError: numbers that end as infinity there."""
    converted = tensor.to(dtype)
    if converted.dtype != tensor.dtype and not is_finite(converted):
        raise too_large(tensor, dtype, name)
    return converted


def too_large(tensor: Tensor, dtype: torch.dtype, name: str, kept: str = "it") -> ValueError:
    """The file is sound: another precision is the way out."""
    largest = max(map(float, _countable(tensor).aminmax()), key=abs)
    return ValueError(f"{name} has {largest:g}, {kept} is kept in {end_of(dtype)}: take bfloat16 or float32")


def end_of(dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}, which ends at {torch.finfo(dtype).max:g}"


def _countable(tensor: Tensor) -> Tensor:
    """torch finds no minimum in 8 bits."""
    return tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()


@contextmanager
def examining() -> Iterator[None]:
    """While it lasts, every tensor read from a checkpoint has to be finite.

    This is known where a file is open, as a format may hand its tensors on under other names, in other shapes.
    """
    before = _EXAMINING.set(True)
    try:
        yield
    finally:
        _EXAMINING.reset(before)


_EXAMINING = ContextVar("examining", default=False)


def _examined(tensor: Tensor, name: str, file: str | Path) -> Tensor:
    if _EXAMINING.get():
        require_finite(tensor, name, file)
    return tensor


def open_file(path: Path) -> Checkpoint:
    """A `.safetensors` file, or a `.pth`, `.pt`, `.bin` file of torch.

    Raises:
        ValueError: there is no such file, or it holds something else than tensors.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}")
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)


def open_folder(path: Path) -> Checkpoint:
    """A folder as transformers writes it: one file or shards with an index; safetensors before torch's.

    Raises:
        ValueError: there are no weights in it, a shard is missing, or the index does not fit the shards.
    """
    for single, index in _INDEXED:
        if (path / single).is_file():
            return open_file(path / single)
        if (path / index).is_file():
            return _open_shards(path, index)
    expected = ", ".join(name for pair in _INDEXED for name in pair)
    raise ValueError(f"{path} holds no weights (looked for {expected})")


def _open_shards(path: Path, index: str) -> Checkpoint:
    weight_map = read_json(path / index)["weight_map"]
    if not weight_map or not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{path / index}: weight_map names no tensors with their files")
    outside = sorted({file for file in weight_map.values() if PureWindowsPath(file).name != file})  # knows / and \
    if outside:
        raise ValueError(f"{path / index} names {outside[0]!r}: shards are files in the folder itself")
    absent = sorted({file for file in weight_map.values() if not (path / file).is_file()})
    if absent:
        raise ValueError(
            f"{path} is incomplete: {', '.join(absent)} of {index} is missing; "
            f"run `python scripts/fetch_weights.py` again, it resumes"
        )
    there = {file: open_file(path / file).shapes for file in set(weight_map.values())}
    astray = [f"{name} is not in {file}" for name, file in weight_map.items() if name not in there[file]]
    if astray:
        raise ValueError(
            f"{path / index} does not fit its shards: {len(astray)} tensors are not where it says (first: {astray[0]})"
        )
    shapes = {name: there[file][name] for name, file in weight_map.items()}

    @lru_cache(maxsize=1)  # the pages of a file that stays open count as this process' memory
    def shard(file: str) -> Checkpoint:
        return open_file(path / file)

    return Checkpoint(str(path), shapes, lambda name: shard(weight_map[name]).read(name))


def read_config(path: Path) -> Config:
    """`config.json` of a transformers folder."""
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} is no checkpoint folder of transformers: it has no config.json")
    return read_json(file)


def read_json(file: Path) -> Config:
    """Raises ValueError where it is no JSON, or not names with values."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:  # a UnicodeDecodeError is one too
        raise ValueError(f"{file} is no readable JSON, perhaps cut short ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected names with values ({{...}})")
    return Config(content, str(file))


def _open_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file, perhaps cut short ({error})") from error
    return Checkpoint(str(path), shapes, lambda name: _examined(file.get_tensor(name), name, path))


def load_torch(path: Path, *, allowed: Sequence[Any] = (), expected: str = "tensors") -> Any:
    """What a file of torch's holds; tensors are mapped and paged in one by one, but those older than torch 1.6.

    Args:
        allowed: what may be in it beside tensors and plain data (`torch.serialization.safe_globals`).
        expected: the same in words.
    Raises:
        ValueError: anything else is in it, or it is damaged.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} holds more than {expected}, which could be a program, or is damaged; it is not read ({first_line})"
        ) from error
    except Exception as error:  # of a damaged file any: OSError, KeyError, struct.error, AssertionError have been seen
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no readable torch file, perhaps cut short ({reason})") from error


def _open_torch(path: Path) -> Checkpoint:
    loaded = load_torch(path)
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    tensors = {name: t for name, t in loaded.items() if isinstance(t, Tensor)} if isinstance(loaded, dict) else {}
    if not tensors:
        raise ValueError(f"{path} holds no named tensors")
    return from_tensors(tensors, str(path))
