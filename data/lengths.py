"""How many tokens each dialogue takes: read once at the start, so that batches can be grouped by length by arithmetic.

The same pass finds what would train on nothing, with its row number, before a model is loaded.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.batch import Dialogue, DialogueCodec, EncodedDialogue, Turn
from data.mixture import Stream
from data.shard_list import cache_home
from data.source import BadSample, DialogueSource

log = logging.getLogger(__name__)

CACHED_FROM_S = 20.0  # a shorter scan is done again
NUM_PROBED = 64  # samples of a stream whose ids go into the cache's name, or from which an unscanned one is judged
NUM_NAMED = 10
PART = 500  # samples that are scanned at a time
PARALLEL_FROM = 10_000  # samples; fewer are faster without starting processes
PARTS = ("history", "question", "answer")
_PROBES = (
    Dialogue((Turn("描述这张图片。", "两个绿色的三角形，还有一个红色的圆。", 1), Turn("还有呢？", "没有了。")), "zh"),
    Dialogue((Turn("What is in the picture?", "A red circle, 2 cm", 1), Turn("Else?", "No.")), "en"),
)


@dataclass(frozen=True)
class Limits:
    max_tokens: int
    max_answer_tokens: int | None = None

    def encode(self, codec: DialogueCodec, dialogue: Dialogue) -> EncodedDialogue:
        return codec.encode(dialogue, max_tokens=self.max_tokens, max_answer_tokens=self.max_answer_tokens)


@dataclass(frozen=True)
class StreamLengths:
    """Of one language of one source; `cut` counts tokens of "history", "question", "answer" that were left out."""

    tokens: np.ndarray  # int32 by sample, of the longest candidate, after cutting
    scanned: bool
    num_targets: int = 0  # of the first candidates
    num_cut: int = 0  # dialogues from which something was cut
    cut: Mapping[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return blake2b(np.ascontiguousarray(self.tokens, "<i4").tobytes(), digest_size=8).hexdigest()


def codec_digest(codec: DialogueCodec) -> str:
    """Changes with template, special ids and, as far as a few sentences show it, vocabulary."""
    found = [codec.encode(dialogue) for dialogue in _PROBES]
    known = [codec.pad_id, list(codec.stop_ids), codec.num_image_tokens, [[e.ids, e.labels] for e in found]]
    return blake2b(json.dumps(known).encode(), digest_size=8).hexdigest()


def read_lengths(
    sources: Mapping[str, DialogueSource],
    streams: Sequence[Stream],
    codec: DialogueCodec,
    limits: Limits,
    *,
    workers: int = 0,
) -> list[StreamLengths]:
    """One for each stream.

    Args:
        workers: processes that divide a large stream among themselves.
    Raises:
        ValueError: dialogues with no token to learn, or that do not fit; the first ones with file and row number.
    """
    problems: list[str] = []
    found = []
    for stream in streams:
        source = sources[stream.source]
        found.append(
            _scanned(source, stream, codec, limits, problems, workers)
            if source.scans
            else _estimated(source, stream, codec, limits)
        )
    if problems:
        more = f"\n  ... and {len(problems) - NUM_NAMED} more" if len(problems) > NUM_NAMED else ""
        raise ValueError(
            f"{len(problems)} dialogues cannot be trained on:\n  " + "\n  ".join(problems[:NUM_NAMED]) + more
        )
    return found


def table(streams: Sequence[Stream], lengths: Sequence[StreamLengths], limits: Limits) -> str:
    """What the scan found, for the start of a run."""
    lines = [f"{'source':<20}{'language':<10}{'dialogues':>10}{'mean':>8}{'longest':>9}{'cut':>8}  tokens cut from"]
    for stream, own in zip(streams, lengths, strict=True):
        name = f"{stream.source:<20}{stream.language:<10}{stream.size:>10}"
        if not own.scanned:
            lines.append(f"{name}{own.tokens.mean():>8.1f}{'':>9}{'':>8}  (shards: not scanned, judged by a few)")
            continue
        cut = ", ".join(f"{part} {own.cut[part]}" for part in PARTS if own.cut.get(part)) or "-"
        lines.append(f"{name}{own.tokens.mean():>8.1f}{own.tokens.max():>9}{own.num_cut:>8}  {cut}")
    answer = f", answers to {limits.max_answer_tokens}" if limits.max_answer_tokens else ""
    return "\n".join([*lines, f"(tokens, image tokens included, cut to {limits.max_tokens}{answer})"])


@dataclass(frozen=True)
class _Scan:
    """What is done with a range of a stream's samples; forked workers find it in `_scan`."""

    source: DialogueSource
    language: str
    codec: DialogueCodec
    limits: Limits

    def __call__(self, part: range) -> tuple[np.ndarray, Counter[str], list[str]]:
        """-> lengths, counts, what is wrong with whom"""
        tokens, counts, problems = np.zeros(len(part), np.int32), Counter[str](), []
        for place, index in enumerate(part):
            for number, candidate in enumerate(self.source.dialogues(self.language, index)):
                try:
                    encoded = self.limits.encode(self.codec, candidate)
                    if not encoded.num_target_tokens:
                        raise ValueError("no token of its answer is left to learn")
                except ValueError as error:
                    problems.append(f"{self.source.where(self.language, index)}: {error}")
                    break
                tokens[place] = max(tokens[place], len(encoded.ids))
                if number == 0:
                    counts["targets"] += encoded.num_target_tokens
                    counts["dialogues cut"] += any(encoded.num_cut.values())
                    counts.update(encoded.num_cut)
        return tokens, counts, problems


_scan: _Scan | None = None


def _scan_part(part: range) -> tuple[np.ndarray, Counter[str], list[str]]:
    assert _scan is not None
    return _scan(part)


def _scanned(
    source: DialogueSource, stream: Stream, codec: DialogueCodec, limits: Limits, problems: list[str], workers: int
) -> StreamLengths:
    global _scan
    cache = _cache_file(source, stream, codec, limits)
    if (kept := _load(cache, stream.size)) is not None:
        return kept
    started = time.monotonic()
    parts = [range(first, min(first + PART, stream.size)) for first in range(0, stream.size, PART)]
    _scan = _Scan(source, stream.language, codec, limits)
    tokens, counts, wrong = [], Counter[str](), []
    title = f"{stream.source} ({stream.language}): lengths"
    with ExitStack() as stack, tqdm(total=stream.size, desc=title, unit=" rows", delay=2, leave=False) as bar:
        scan: Any = map
        if workers > 1 and stream.size >= PARALLEL_FROM:
            fork = multiprocessing.get_context("fork")  # sources and codecs need not be picklable
            scan = stack.enter_context(ProcessPoolExecutor(workers, mp_context=fork)).map
        for part_tokens, part_counts, part_wrong in scan(_scan_part, parts):
            tokens.append(part_tokens)
            counts.update(part_counts)
            wrong += part_wrong
            bar.update(len(part_tokens))
    _scan = None
    cut = {part: counts[part] for part in PARTS}
    found = StreamLengths(np.concatenate(tokens), True, counts["targets"], counts["dialogues cut"], cut)
    problems += wrong
    if time.monotonic() - started > CACHED_FROM_S and not wrong:
        _keep(cache, found)
    return found


def _estimated(source: DialogueSource, stream: Stream, codec: DialogueCodec, limits: Limits) -> StreamLengths:
    """Where the texts cannot be read beforehand, every sample counts as long as a few of them are on average."""
    seen = []
    for index in _spread(stream.size):
        try:
            seen.append(len(limits.encode(codec, source.dialogues(stream.language, index)[0]).ids))
        except BadSample:
            continue
    return StreamLengths(np.full(stream.size, round(np.mean(seen)) if seen else 0, np.int32), False)


def _spread(size: int) -> Iterator[int]:
    yield from range(0, size, max(1, size // NUM_PROBED))


# -------------------------------------------------------------------------------------------------------- the cache


def _cache_file(source: DialogueSource, stream: Stream, codec: DialogueCodec, limits: Limits) -> Path:
    """Its name holds all that lengths depend on; of the tokenizer, what it makes of samples spread over the data."""
    digest = blake2b(digest_size=12)
    known: list[Any] = [1, stream.language, dict(source.fingerprint()), limits.max_tokens, limits.max_answer_tokens]
    digest.update(json.dumps([*known, codec_digest(codec)], sort_keys=True).encode())
    for index in _spread(stream.size):
        try:
            encoded = codec.encode(source.dialogues(stream.language, index)[0])
        except ValueError:
            continue  # the scan says what is wrong with it
        digest.update(np.array([*encoded.ids, *encoded.labels], np.int64).tobytes())
    return cache_home() / "lengths" / f"{digest.hexdigest()}.npz"


def _load(file: Path, size: int) -> StreamLengths | None:
    try:
        with np.load(file, allow_pickle=False) as kept:
            tokens, counts = kept["tokens"], kept["counts"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if len(tokens) != size:
        return None
    return StreamLengths(tokens, True, counts[0], counts[1], dict(zip(PARTS, counts[2:], strict=True)))


def _keep(file: Path, found: StreamLengths) -> None:
    """Whole or not at all: several ranks may write it at once.  A cache that cannot be written costs time, no run."""
    counts = np.array([found.num_targets, found.num_cut, *(found.cut[part] for part in PARTS)], np.int64)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".npz", delete=False) as out:
            np.savez(out, tokens=found.tokens, counts=counts)
        os.replace(out.name, file)
    except OSError as error:
        log.warning("lengths could not be kept in %s: %s", file, error)
