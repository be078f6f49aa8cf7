"""Predictions -> the samples a report shows, each with its picture, found again in the evaluator's own source.

Which ones: as many successes as failures where there are enough, evenly spread over the set, so that nobody has chosen
them by hand; how many there are of each kind stands beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from PIL import Image

from data.decode import open_image, upright
from data.source import BadSample, RawSample
from model.build import build
from train.evaluator.answers import is_right
from train.evaluator.picture import spread
from train.report.records import PredictionSet

THUMBNAIL = 224  # pixels of the longer side
NEAREST_KEPT = 4  # candidates shown of each query

Row = Mapping[str, Any]
Picture = Image.Image | None


@dataclass(frozen=True)
class Candidate:
    """A caption or a picture that was found; right is None where nobody can tell."""

    text: str
    picture: Picture
    right: bool | None


@dataclass(frozen=True)
class Query:
    """One query of retrieval and what was found for it, best first.  `rank` is the place of the first right one."""

    text: str
    picture: Picture
    rank: int
    candidates: tuple[Candidate, ...]
    own: str = ""  # a right caption, the first one found, where none is among the candidates


@dataclass(frozen=True)
class Found:
    """One direction of retrieval in one language."""

    evaluator: str
    language: str
    direction: str
    how: str  # itc or itm
    number: int  # of queries
    number_right: int
    right: tuple[Query, ...]
    wrong: tuple[Query, ...]


@dataclass(frozen=True)
class Said:
    """What was said about one picture, by each of the sets compared; right is None where nobody can tell."""

    picture: Picture
    asked: str
    references: tuple[str, ...]
    answers: tuple[tuple[str, bool | None], ...]


@dataclass(frozen=True)
class Compared:
    """Captions or answers of one evaluator in one language, by several sets side by side."""

    evaluator: str
    language: str
    sets: tuple[str, ...]
    kinds: Mapping[str, int]  # "right both times" and so on -> how many
    number: int
    rows: tuple[Said, ...]


@dataclass
class Samples:
    """The source behind an evaluator; pictures are None, and `problem` says why, where it cannot be read here."""

    node: Mapping[str, Any]
    problem: str = ""
    _source: Any = field(default=None, repr=False)
    _transform: Any = field(default=None, repr=False)
    _judge: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        try:
            self._source = build(self.node["source"])
            self._transform = build(self.node["transform"])
            self._judge = build(self.node["judge"]) if self.node.get("judge") else None
        except KeyError as error:
            self.problem = f"the evaluation's config has no {error.args[0]}"
        except (ValueError, OSError, ImportError, TypeError) as error:
            self.problem = str(error).splitlines()[0] if str(error) else type(error).__name__

    def pair(self, language: str, index: int, key: str) -> RawSample | None:
        """A sample of a pool, in which equal pictures are one and unreadable ones lack: it lies at `index` or later."""
        if self._source is None:
            return None
        size = self._source.num_samples(language)
        for place in range(index, size):
            try:
                sample: RawSample = self._source.read(language, place)
            except (BadSample, OSError):
                continue
            if not key or sample.key == key or key == str(index):
                return sample
        return None

    def pictures(self, language: str, index: int) -> list[Image.Image]:
        """Those of a dialogue."""
        if self._source is None:
            return []
        try:
            images = self._source.read(language, index).images
        except (BadSample, OSError):
            return []
        return [shown for image in images if (shown := thumbnail(image)) is not None]

    def captions(self, sample: RawSample | None, language: str) -> tuple[str, ...]:
        """Its captions as they are compared."""
        found = []
        for text in sample.captions if sample is not None else ():
            try:
                found.append(self._transform.caption(text, language))
            except BadSample:
                continue
        return tuple(found)

    def judged(self, caption: str, references: Sequence[str], sample: RawSample | None, language: str) -> bool | None:
        """By the evaluator's judge; without one, what reads like a reference is right, and nobody knows of the rest."""
        if self._judge is not None and sample is not None:
            return bool(self._judge(caption, sample, language))
        return True if is_right(caption, references) else None

    def pixels(self, language: str, index: int) -> tuple[Image.Image, Any] | None:
        """A picture as it was stored, and uint8 CHW as the model gets it."""
        if self._source is None:
            return None
        try:
            sample = self._source.read(language, index)
            image = sample.images[0] if hasattr(sample, "images") else sample.image
            image_CHW = self._transform.picture(image, None)
        except (BadSample, OSError, IndexError):
            return None
        except (AttributeError, TypeError):  # a transform that draws, used for an evaluation
            return None
        shown = thumbnail(image)
        return None if shown is None else (shown, image_CHW)

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self._source.languages) if self._source is not None else ()

    def num_samples(self, language: str) -> int:
        return int(self._source.num_samples(language)) if self._source is not None else 0


def in_order(place: tuple[str, str]) -> tuple[str, bool, str]:
    """Of evaluator and part: Chinese first."""
    evaluator, part = place
    return evaluator, not part.startswith("zh"), part


def thumbnail(image: Any, side: int = THUMBNAIL) -> Picture:
    """Upright, RGB, at most `side` pixels long; None where it cannot be read."""
    try:
        shown = upright(open_image(image))
    except (BadSample, OSError, SyntaxError, ValueError):
        return None
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    return shown


# ----------------------------------------------------------------------------------------------------------- retrieval


def retrieved(made: PredictionSet, samples: Callable[[str], Samples], number: int) -> Iterator[Found]:
    """Successes and failures, `number` of each, for every direction and language."""
    for (evaluator, part), rows in sorted(made.parts.items(), key=lambda item: in_order(item[0])):
        language, _, direction = part.partition("/")
        ranked = [row for _, row in sorted(rows.items()) if isinstance(row.get("rank"), dict) and row["rank"]]
        if direction not in ("image_to_text", "text_to_image") or not ranked:
            continue
        how = "itm" if "itm" in ranked[0]["rank"] else "itc"
        hits = [row for row in ranked if row["rank"][how] == 1]
        misses = [row for row in ranked if row["rank"][how] != 1]
        from_source = samples(evaluator)
        show = _image_query if direction == "image_to_text" else _text_query
        yield Found(
            evaluator,
            language,
            direction,
            how,
            len(ranked),
            len(hits),
            *(
                tuple(show(from_source, chosen[place], language, how) for place in spread(len(chosen), number))
                for chosen in (hits, misses)
            ),
        )


def _image_query(samples: Samples, row: Row, language: str, how: str) -> Query:
    sample = samples.pair(language, int(row["index"]), str(row["query"]))
    captions = samples.captions(sample, language)
    found = [
        Candidate(str(text), None, _right(row, place, how, text in captions)) for place, text in enumerate(row["best"])
    ]
    shown = tuple(found[: NEAREST_KEPT - 1])
    known = chain((candidate.text for candidate in found if candidate.right), captions)
    own = "" if any(candidate.right for candidate in shown) else next(known, "")
    return Query(str(row["query"]), _picture(sample), int(row["rank"][how]), shown, own)


def _text_query(samples: Samples, row: Row, language: str, how: str) -> Query:
    text, candidates = str(row["query"]), []
    shown = list(zip(row["best_index"], row["best"], strict=False))[:NEAREST_KEPT]
    for place, (index, key) in enumerate(shown):
        sample = samples.pair(language, int(index), str(key))
        right = _right(row, place, how, text in samples.captions(sample, language))
        candidates.append(Candidate(str(key), _picture(sample), right))
    return Query(text, None, int(row["rank"][how]), tuple(candidates))


def _right(row: Row, place: int, how: str, own: bool) -> bool | None:
    """Whether the candidate in `place`, from 0, was counted as right.

    Rows of earlier versions do not tell.  There a caption and a picture that stand in one sample of the source (`own`)
    belong together, and nobody knows of the rest: other samples may have that picture too.
    """
    if "best_right" in row:
        return bool(row["best_right"][place])
    return True if own or (place == 0 and row["rank"][how] == 1) else None


def _picture(sample: RawSample | None) -> Picture:
    return None if sample is None else thumbnail(sample.image)


# ------------------------------------------------------------------------------------------------- captions and answers


def side_by_side(
    made: Sequence[tuple[str, PredictionSet]], samples: Callable[[str], Samples], number: int
) -> Iterator[Compared]:
    """What several sets (name, predictions) said to the same questions; one alone is shown as well.

    A set takes part where it has the evaluator, and a question where all of them were asked the same.
    """
    parts = dict.fromkeys(part for _, one in made for part in sorted(one.parts, key=in_order))
    for evaluator, language in parts:
        having = [(name, one.parts[evaluator, language]) for name, one in made if (evaluator, language) in one.parts]
        common = [index for index in sorted(having[0][1]) if _same([rows.get(index) for _, rows in having])]
        if common:
            tables = [rows for _, rows in having]
            yield _compared(evaluator, language, [name for name, _ in having], tables, common, samples, number)


def _same(rows: Sequence[Row | None]) -> bool:
    """Whether all of them answer the same question about the same sample."""
    if any(row is None or _words(row) is None for row in rows):
        return False
    asked = {(row.get("question"), row.get("key"), tuple(_references(row))) for row in rows if row is not None}
    return len(asked) == 1


def _words(row: Row) -> str | None:
    said = row.get("answer", row.get("caption"))
    return None if said is None else str(said)


def _references(row: Row) -> tuple[str, ...]:
    return tuple(str(text) for text in row.get("right", row.get("references", ())))


def _compared(
    evaluator: str,
    language: str,
    names: Sequence[str],
    tables: Sequence[Mapping[int, Row]],
    common: Sequence[int],
    samples: Callable[[str], Samples],
    number: int,
) -> Compared:
    from_source = samples(evaluator)
    kinds: dict[str, list[int]] = {}
    for index in common:
        rows = [table[index] for table in tables]
        first, last = _verdict(from_source, rows[0], language), _verdict(from_source, rows[-1], language)
        kinds.setdefault(_kind(first, last, alone=len(tables) == 1), []).append(index)
    order = [kind for kind in KINDS if kind in kinds]
    each = max(1, number // max(1, len(order)))
    chosen = [kinds[kind][place] for kind in order for place in spread(len(kinds[kind]), each)]
    shown = []
    for index in chosen:
        rows = [table[index] for table in tables]
        answers = tuple((_words(row) or "", _verdict(from_source, row, language)) for row in rows)
        asked = str(rows[0].get("question", ""))
        shown.append(Said(_shown(from_source, rows[0], language), asked, _references(rows[0]), answers))
    counts = {kind: len(kinds[kind]) for kind in order}
    return Compared(evaluator, language, tuple(names), counts, len(common), tuple(shown))


KINDS = ("became right", "became wrong", "wrong both times", "right both times", "wrong", "right", "not judged")


def _kind(first: bool | None, last: bool | None, *, alone: bool) -> str:
    if first is None or last is None:
        return "not judged"
    if alone:
        return "right" if last else "wrong"
    if first != last:
        return "became right" if last else "became wrong"
    return "right both times" if last else "wrong both times"


def _verdict(samples: Samples, row: Row, language: str) -> bool | None:
    said, references = _words(row) or "", _references(row)
    if "answer" in row:
        return is_right(said, references)
    needs_sample = samples.node.get("judge") is not None
    sample = samples.pair(language, int(row["index"]), str(row.get("key", ""))) if needs_sample else None
    return samples.judged(said, references, sample, language)


def _shown(samples: Samples, row: Row, language: str) -> Picture:
    if "answer" in row:
        found = samples.pictures(language, int(row["index"]))
        return found[0] if found else None
    return _picture(samples.pair(language, int(row["index"]), str(row.get("key", ""))))
