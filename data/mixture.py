"""Which sample fills which row of which global batch: arithmetic on (seed, step, row) and nothing else.

Three steps, each with random access: a row's place in the run picks its stream (a language of a source) by cumulative
quotas; the count of that stream so far is the position in it; position -> (epoch, sample) by a keyed permutation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from data.keyed import hash_64, permute, stable_hash
from data.source import DialogueSource, Source

# Weights become fractions with at most this denominator, so that quotas are exact in int64 for 2^38 rows.
MAX_DENOMINATOR = 1 << 24


@dataclass(frozen=True)
class Rows:
    """Rows of one global batch, or of some: parallel int64 arrays."""

    step: np.ndarray  # the global batch
    row: np.ndarray  # 0 .. global batch - 1
    stream: np.ndarray  # index into `Plan.streams`
    index: np.ndarray  # the sample's number in its stream
    epoch: np.ndarray  # how often the stream had been read from end to end before

    def __getitem__(self, part: slice | np.ndarray) -> Rows:
        return Rows(self.step[part], self.row[part], self.stream[part], self.index[part], self.epoch[part])


class Quotas:
    """Divides consecutive numbers among streams so that every prefix holds each one's share.

    Two streams are split by n -> floor(n p + 1/2): their counts never leave their shares by more than one half.  More
    are split two by two along a tree, which bounds the error by the sum over the levels, each smaller than one.
    """

    def __init__(self, weights: Sequence[float]):
        assert weights and all(w > 0 for w in weights), weights
        self.num_streams = len(weights)
        self._middle = (self.num_streams + 1) // 2
        if self.num_streams > 1:
            exact = [Fraction(w) for w in weights]
            share = (sum(exact[: self._middle], Fraction()) / sum(exact, Fraction())).limit_denominator(MAX_DENOMINATOR)
            self._a, self._b = share.numerator, share.denominator
            self._left, self._right = Quotas(weights[: self._middle]), Quotas(weights[self._middle :])

    def assign(self, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Place n (int64, from 0) -> (its stream, how many earlier places that stream has had)."""
        if self.num_streams == 1:
            return np.zeros_like(place), place
        before, after = self._count_left(place), self._count_left(place + 1)
        left = after > before
        stream, position = np.empty_like(place), np.empty_like(place)
        stream[left], position[left] = self._left.assign(before[left])
        right_stream, position[~left] = self._right.assign((place - before)[~left])
        stream[~left] = right_stream + self._middle
        return stream, position

    def shares(self) -> list[str]:
        """The fractions at the tree's nodes, for a fingerprint."""
        if self.num_streams == 1:
            return []
        return [f"{self._a}/{self._b}", *self._left.shares(), *self._right.shares()]

    def _count_left(self, n: np.ndarray) -> np.ndarray:
        return (2 * n * self._a + self._b) // (2 * self._b)


class Mixture:
    """Languages by weight first, then the sources of each language; or, without `languages`, sources first.

    Args:
        languages: language -> weight; their order is the batch's `languages`.  One to one is VisualGLM's
            (https://github.com/THUDM/VisualGLM-6B: 30M Chinese and 300M English pairs "with the same weight").
            None: all that the sources have, each source with its own languages as often as it has samples of them.
        sources: source -> weight among the sources of a language, or among all without `languages` (a replay of general
            data beside one's own: {mine: 3, general: 1}); 0 leaves one out.  Without weights each source weighs its
            samples, so that every sample is read equally often.
    """

    def __init__(self, languages: Mapping[str, float] | None, sources: Mapping[str, float] | None = None):
        self.by_source = languages is None
        self.languages = {name: float(weight) for name, weight in (languages or {}).items()}
        self.sources = {name: float(weight) for name, weight in (sources or {}).items()}
        for kind, weights in (("language", self.languages), ("source", self.sources)):
            for name, weight in weights.items():
                if not (weight >= 0 and np.isfinite(weight)):
                    raise ValueError(f"mixture: {kind} {name!r} has weight {weight}; expected a number, 0 or more")
        if not self.by_source and not any(self.languages.values()):
            raise ValueError("mixture.languages: expected at least one language with a weight above 0")

    def plan(self, sources: Mapping[str, Source | DialogueSource], *, seed: int) -> Plan:
        """Binds the weights to sources.  Raises ValueError for a language nobody has or a source nobody knows."""
        unknown = set(self.sources) - set(sources)
        if unknown:
            raise ValueError(f"mixture.sources names {sorted(unknown)}, but the sources are {sorted(sources)}")
        if self.by_source:
            return self._plan_by_source(sources, seed)
        streams, inner = [], []
        languages = {name: weight for name, weight in self.languages.items() if weight > 0}
        for language in languages:
            sizes = {name: src.num_samples(language) for name, src in sources.items() if language in src.languages}
            weights = self._source_weights(language, sizes)
            if not weights:
                unweighed = [name for name, size in sizes.items() if size]
                raise ValueError(
                    f"the mixture asks for {language!r}, but "
                    + (
                        f"data.mixture.sources gives weight 0 to {', '.join(unweighed)}, which alone have it"
                        if unweighed
                        else f"no source has a sample of it; there are: {_what_there_is(sources)}"
                    )
                    + f".  Check the source's language options or set data.mixture.languages.{language}=0"
                )
            streams += [Stream(name, language, sizes[name]) for name in weights]
            inner.append(Quotas(list(weights.values())))
        return Plan(streams, Quotas(list(languages.values())), inner, tuple(languages), seed)

    def _plan_by_source(self, sources: Mapping[str, Source | DialogueSource], seed: int) -> Plan:
        sizes = {name: sum(src.num_samples(n) for n in src.languages) for name, src in sources.items()}
        weights = self._source_weights("samples", sizes)
        if not weights:
            raise ValueError(
                f"no source with a weight has a sample; there are: {_what_there_is(sources)}; weights: "
                f"{self.sources or 'none given'}"
            )
        streams, inner = [], []
        for name in weights:
            own = {n: sources[name].num_samples(n) for n in sources[name].languages if sources[name].num_samples(n)}
            streams += [Stream(name, language, size) for language, size in own.items()]
            inner.append(Quotas(list(own.values())))
        languages = tuple(sorted({stream.language for stream in streams}))
        return Plan(streams, Quotas(list(weights.values())), inner, languages, seed)

    def _source_weights(self, language: str, sizes: Mapping[str, int]) -> dict[str, float]:
        used = [name for name, size in sizes.items() if size and self.sources.get(name, 1.0) > 0]
        named = [name for name in used if name in self.sources]
        if not named:
            return {name: float(sizes[name]) for name in used}
        unnamed = [name for name in used if name not in self.sources]
        if unnamed:  # a weight has no meaning beside a number of samples
            raise ValueError(
                f"mixture.sources gives a weight to {named} but none to {unnamed}, which have {language!r} too; "
                "give one to each, or to none of them"
            )
        return {name: self.sources[name] for name in used}


def _what_there_is(sources: Mapping[str, Source | DialogueSource]) -> str:
    """ "photos with zh 1200, en 900; scenes with no sample" """
    found = []
    for name, source in sources.items():
        sizes = {language: source.num_samples(language) for language in source.languages}
        told = ", ".join(f"{language} {size}" for language, size in sizes.items())
        found.append(f"{name} with {told or 'no language'}")
    return "; ".join(found)


@dataclass(frozen=True)
class Stream:
    """One language of one source."""

    source: str
    language: str
    size: int


class Plan:
    """The whole run's order, computed where it is needed."""

    def __init__(
        self, streams: list[Stream], outer: Quotas, inner: list[Quotas], languages: tuple[str, ...], seed: int
    ):
        self.streams, self.languages, self.seed = streams, languages, seed
        self._outer, self._inner = outer, inner
        self._first_stream = np.cumsum([0] + [quotas.num_streams for quotas in inner])
        self._key = np.array([stable_hash(f"{s.source}\0{s.language}") for s in streams], np.uint64)

    def rows(self, step: int, global_batch_size: int) -> Rows:
        """All rows of global batch `step`.

        Rows of a language, and of a source within it, are spread evenly, so every contiguous slice (a micro-batch, a
        rank's share) holds its share too.
        """
        row = np.arange(global_batch_size, dtype=np.int64)
        language, place = self._outer.assign(step * global_batch_size + row)
        stream, position = np.empty_like(row), np.empty_like(row)
        for i, quotas in enumerate(self._inner):
            mine = language == i
            inner_stream, position[mine] = quotas.assign(place[mine])
            stream[mine] = inner_stream + self._first_stream[i]
        index, epoch = np.empty_like(row), np.empty_like(row)
        for i in np.unique(stream):
            mine = stream == i
            index[mine], epoch[mine] = self._sample(int(i), position[mine])
        return Rows(np.full_like(row, step), row, stream, index, epoch)

    def _sample(self, stream: int, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Every epoch of a stream reads each of its samples once, in an order of its own."""
        size = self.streams[stream].size
        epoch, offset = np.divmod(position, size)
        return permute(offset, size, hash_64(self.seed, int(self._key[stream]), epoch)), epoch

    def replacement(self, stream: int, *, epoch: int, step: int, row: int, attempt: int) -> int:
        """The sample of the same stream that takes the place of a bad one; attempts count from 1."""
        drawn = hash_64(self.seed, int(self._key[stream]), epoch, step, row, attempt)
        return int(drawn[0] % np.uint64(self.streams[stream].size))

    def fingerprint(self) -> dict[str, Any]:
        """Streams with their sizes and the quotas' fractions, as JSON values."""
        return {
            "order": 1,  # counts up when the arithmetic of this file changes
            "seed": self.seed,
            "streams": [[s.source, s.language, s.size] for s in self.streams],
            "shares": self._outer.shares() + [share for quotas in self._inner for share in quotas.shares()],
        }
