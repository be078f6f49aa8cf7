"""Writing a folder of safetensors as transformers lays it out, one shard in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.weights.checkpoint import Checkpoint, end_of, examining, is_finite

MAX_SHARD_BYTES = 1024**3


def write_folder(
    checkpoint: Checkpoint, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES, metadata: Mapping[str, str]
) -> torch.dtype:
    """`model.safetensors`, or `model-00001-of-<n>.safetensors` with an index, which is written last.

    Args:
        metadata: kept in every file, with where the tensors came from.
    Returns:
        The dtype of the first tensor.
    Raises:
        ValueError: the folder is not empty, or a tensor has NaN or infinity in it; nothing is left there then.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: nothing was written")
    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _write(checkpoint, folder, max_shard_bytes, metadata)
    except ValueError:
        for file in folder.iterdir():
            file.unlink()
        if not was_there:
            folder.rmdir()
        raise


def _write(checkpoint: Checkpoint, folder: Path, max_shard_bytes: int, metadata: Mapping[str, str]) -> torch.dtype:
    from safetensors.torch import save_file

    dtype, total, place = None, 0, {}
    parts: list[Path] = []
    for shard in _shards(checkpoint, max_shard_bytes):
        parts.append(folder / f"part-{len(parts) + 1:05d}.safetensors")  # how many there will be is not known yet
        save_file(shard, parts[-1], metadata={"format": "pt", **metadata})
        dtype = dtype or next(iter(shard.values())).dtype
        total += sum(tensor.nbytes for tensor in shard.values())
        place.update(dict.fromkeys(shard, len(parts)))
        shard.clear()  # else it stays in memory while the next one is gathered
    assert dtype is not None, "a checkpoint without a tensor"
    if len(parts) == 1:
        parts[0].rename(folder / "model.safetensors")
        return dtype
    names = {number: f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)}
    for number, part in enumerate(parts, start=1):
        part.rename(folder / names[number])
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[number] for name, number in place.items()}}
    write_json(folder / "model.safetensors.index.json", index)
    return dtype


def read_finite(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor that is to be written.

    Looked at as it will be stored, in one pass, since a precision may end too early; only one that is not finite is
    read again, to find the file at fault.

    Raises:
        ValueError: there is NaN or infinity in it.
    """
    tensor = checkpoint.read(name)
    if not is_finite(tensor):
        with examining():
            checkpoint.read(name)
        raise ValueError(
            f"{name} of {checkpoint.path} has numbers that do not fit into {end_of(tensor.dtype)}: take bfloat16 or "
            f"float32"
        )
    return tensor


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def copy_files(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Those that are there."""
    for pattern in patterns:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


def _shards(checkpoint: Checkpoint, max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name in checkpoint.shapes:
        tensor = read_finite(checkpoint, name).clone(memory_format=torch.contiguous_format)  # a slice shares its memory
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard
