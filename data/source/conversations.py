"""What all files of conversations share: rows checked at the start, pictures opened when needed, splits by group.

A format is one file beside this one: `conversation(row)` says what a row means.  Texts are kept as bytes in one array,
not as Python objects, so that forked workers share them.

The only text that is ever opened as a path is the field the format declares as a picture, and only below `image_root`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from data.batch import Dialogue, Turn
from data.language import language_of_turns
from data.picture_files import NUM_LOOKED_AT, NUM_PROBED, check_reference, look_at, probe, read_below
from data.picture_sides import PictureSide, named
from data.records import Malformed, as_object, files_of, read_rows
from data.source import BadSample, RawDialogue
from data.split import PARTS, held_out_share, part_of

log = logging.getLogger(__name__)

NUM_NAMED = 5


@dataclass(frozen=True)
class Conversation:
    """A row, as its format reads it."""

    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()  # paths, or whatever the format's `open` understands
    language: str | None = None  # None: by the script of its words
    prompts: Mapping[str, Sequence[str]] | None = None  # by language; each is a question in place of the only turn's
    group: str | None = None  # where the format knows a better one than a field of the row
    answers: tuple[str, ...] = ()  # of the last question, beside its turn's, where several people answered it


@dataclass
class _Store:
    """JSON of each conversation in one array of bytes."""

    packed: np.ndarray
    end: np.ndarray
    file: np.ndarray
    row: np.ndarray

    def __getitem__(self, sample: int) -> dict[str, Any]:
        start = int(self.end[sample - 1]) if sample else 0
        return json.loads(self.packed[start : int(self.end[sample])].tobytes())


@dataclass(kw_only=True)
class ConversationSource:
    """Base of the formats.

    Args:
        path: the file, a glob, or a list of them.
        image_root: the folder that picture paths start from, and may not leave; default: the folder of the file.
        language: of every row; default: the field `language` where a row has it, else by the script of its words.
        split, part: "80/20" and "train" or "test": only that part, by a hash of
        group: ... this field ("patient_id"); default: a row's pictures, or its words where it has none.
        malformed: "error" stops at a row that is not as expected, or a line that is no JSON; "skip" leaves it out and
            counts it.
        name: how logs and errors call it.
    Pictures are read when a sample is.  At the start the first and last bytes of those in up to 10,000 rows, spread
    evenly, are looked at, each picture once in a process and only on the first rank (`data.picture_files.look_at`).

    Raises:
        ValueError: no file, no UTF-8, a malformed row (file, row, turn, field, what was expected), nothing left of a
            part, no picture that can be used, a picture in both parts (only a warning where `group` is set).
    """

    path: str | Sequence[str]
    image_root: str | None = None
    language: str | None = None
    split: str | None = None
    part: str | None = None
    group: str | None = None
    malformed: str = "error"
    name: str = "conversations"

    scans: bool = field(default=True, init=False, repr=False)
    pictures_have_names: bool = field(default=True, init=False, repr=False)  # that tell one from another, in all rows
    rows_under: ClassVar[str | None] = None  # the key that a format's list may stand under

    def __post_init__(self) -> None:
        self._share = _checked_split(self.name, self.split, self.part, self.group)
        if self.malformed not in ("error", "skip"):
            raise ValueError(f"{self.name}: malformed is {self.malformed!r}; expected error or skip")
        self.num_malformed = 0
        self.files = self.find_files()
        beside = [file if file.is_dir() else file.parent for file in self.files]
        self._roots = [Path(self.image_root).expanduser()] * len(beside) if self.image_root else beside
        self._prompts: dict[str, tuple[str, ...]] = {}
        self._sides = {part: PictureSide() for part in PARTS}
        self._store, self._samples = self._read_all()
        self.languages = tuple(sorted(self._samples))
        if not self.languages:
            part = f" in part {self.part!r} of split {self.split}" if self.split else ""
            left_out = f" ({self.num_malformed} malformed rows left out)" if self.num_malformed else ""
            files = ", ".join(map(str, self.files[:NUM_NAMED]))
            raise ValueError(f"{self.name}: no conversation{part} in {files}{left_out}")
        self._check_sides()
        self._probe_pictures()
        counts = {language: self.num_samples(language) for language in self.languages}
        log.info("%s: conversations per language %s", self.name, counts)

    # ------------------------------------------------------------------------------------------ what a format writes

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        """Raises Malformed."""
        raise NotImplementedError

    def find_files(self) -> list[Path]:
        return files_of(self.path)

    def rows(self, file: Path) -> Iterator[tuple[int, object]]:
        return read_rows(
            file, under=self.rows_under, bad_line=lambda row, what: self._leave_out(f"{file}, row {row}: {what}")
        )

    def check_image(self, reference: str) -> None:
        """Before anything is opened.  Raises Malformed."""
        check_reference(reference)

    def open(self, reference: str, file: int, row: int) -> Any:
        """The picture's bytes.  Raises BadSample."""
        return read_below(self._roots[file], reference)

    # ------------------------------------------------------------------------------------------------ DialogueSource

    def num_samples(self, language: str) -> int:
        return len(self._samples.get(language, ()))

    def dialogues(self, language: str, index: int) -> tuple[Dialogue, ...]:
        return self._dialogues(language, self._store[int(self._samples[language][index])])

    def where(self, language: str, index: int) -> str:
        sample = int(self._samples[language][index])
        return f"{self.files[int(self._store.file[sample])]}, row {int(self._store.row[sample])}"

    def read(self, language: str, index: int) -> RawDialogue:
        sample = int(self._samples[language][index])
        file, row = int(self._store.file[sample]), int(self._store.row[sample])
        packed = self._store[sample]
        key = ", ".join([f"row {row}", *(packed["images"] if self.pictures_have_names else ())])
        where = {"shard": str(self.files[file]), "key": key}
        try:
            images = tuple(self.open(reference, file, row) for reference in packed["images"])
        except BadSample as bad:
            raise BadSample(bad.reason, detail=bad.detail, **where) from bad
        return RawDialogue(self._dialogues(language, packed), images, **where)

    def group_of(self, language: str, index: int) -> str:
        """What the sample was split by."""
        return self._store[int(self._samples[language][index])]["group"]

    def images_of(self, language: str, index: int) -> tuple[str, ...]:
        return tuple(self._store[int(self._samples[language][index])]["images"])

    def fingerprint(self) -> Mapping[str, Any]:
        digest = blake2b(self._store.packed.tobytes(), digest_size=16)
        digest.update(json.dumps({k: list(v) for k, v in sorted(self._prompts.items())}).encode())
        return {
            "samples": {language: self.num_samples(language) for language in self.languages},
            "texts": digest.hexdigest(),
            "part": [self.split, self.part, self.group],
        }

    @property
    def pictures(self) -> PictureSide:
        """Those of its own part."""
        return self._sides[self.part or "train"]

    def names_of_pictures(self, shared: frozenset[int]) -> str:
        """Of those that `PictureSide.shared_with` found, the first few, with their rows."""
        return named(shared, self._places_of_pictures())

    # ------------------------------------------------------------------------------------------------------- reading

    def _dialogues(self, language: str, packed: Mapping[str, Any]) -> tuple[Dialogue, ...]:
        turns = tuple(Turn(*turn) for turn in packed["turns"])
        if not packed["prompted"]:
            last = turns[-1]
            answers = (last.answer, *packed.get("answers", ()))
            return tuple(Dialogue((*turns[:-1], replace(last, answer=answer)), language) for answer in answers)
        (turn,) = turns
        prompts = self._prompts[language]
        return tuple(Dialogue((Turn(prompt, turn.answer, turn.num_images),), language) for prompt in prompts)

    def _read_all(self) -> tuple[_Store, dict[str, np.ndarray]]:
        packed, end, place, samples = bytearray(), [], [], {}  # type: ignore[var-annotated]
        for number, file in enumerate(self.files):
            for row, value in tqdm(self.rows(file), desc=f"reading {file.name}", unit=" rows", delay=2, leave=False):
                try:
                    found = self._pack(as_object(value), number)
                except Malformed as error:
                    self._leave_out(f"{file}, row {row}: {error}")
                    continue
                if found is None:
                    continue  # the other part's
                language, text = found
                samples.setdefault(language, []).append(len(end))
                packed += text
                end.append(len(packed))
                place.append((number, row))
        if self.num_malformed:
            log.warning("%s: %d malformed rows left out", self.name, self.num_malformed)
        places = np.array(place, np.int64).reshape(-1, 2)
        store = _Store(np.frombuffer(bytes(packed), np.uint8), np.array(end, np.int64), places[:, 0], places[:, 1])
        return store, {language: np.array(numbers, np.int64) for language, numbers in samples.items()}

    def _leave_out(self, what: str) -> None:
        if self.malformed == "error":
            raise ValueError(f"{what}.  Repair it, or leave such rows out: data.source.<name>.malformed=skip")
        self.num_malformed += 1
        if self.num_malformed <= NUM_NAMED:
            log.warning("%s: left out: %s", self.name, what)

    def _pack(self, row: Mapping[str, Any], file: int) -> tuple[str, bytes] | None:
        """(language, bytes) of a row; None where it belongs to the other part."""
        found = self.conversation(row)
        _check_turns(found)
        for reference in found.images:
            self.check_image(reference)
        group = self._group(row, found)
        part = self.part if self._share is None else part_of(group, self._share)
        if self.pictures_have_names:
            self._sides[part or "train"].note(self._roots[file], found.images)
        if part != self.part:
            return None
        language = self._language(row, found)
        if found.prompts is not None:
            if not found.prompts.get(language):
                raise Malformed("prompts", f"a prompt in {language!r}", sorted(found.prompts))
            self._prompts[language] = tuple(found.prompts[language])
        value = {
            "turns": [[turn.question, turn.answer, turn.num_images] for turn in found.turns],
            "images": found.images,
            "prompted": found.prompts is not None,
            "group": group,
        }
        if found.answers:
            value["answers"] = found.answers
        return language, json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")

    def _group(self, row: Mapping[str, Any], found: Conversation) -> str:
        if self.group is not None:
            value = row.get(self.group)
            if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
                raise Malformed(self.group, "the group's name or number (group is set)", value)
            return str(value)
        if found.group is not None:
            return found.group
        return "\0".join(sorted(found.images)) or "\0".join(f"{turn.question}\0{turn.answer}" for turn in found.turns)

    def _language(self, row: Mapping[str, Any], found: Conversation) -> str:
        told = self.language or found.language or row.get("language")
        if told is None:
            return language_of_turns(found.turns)
        if not isinstance(told, str) or not told:
            raise Malformed("language", "a language like zh or en", told)
        return told

    def _places_of_pictures(self, every: int = 1) -> Iterator[tuple[Path, str, int]]:
        for sample in range(0, len(self._store.end), every):
            root, row = self._roots[int(self._store.file[sample])], int(self._store.row[sample])
            yield from ((root, reference, row) for reference in self._store[sample]["images"])

    def _check_sides(self) -> None:
        """That a picture is in one part: rows that show several are split by all of them together, and people may have
        a picture under two groups."""
        train, test = (self._sides[part] for part in PARTS)
        shared = train.shared_with(test)
        if not shared:
            return
        names = self.names_of_pictures(shared)
        told = f"{self.name}: {len(shared)} pictures are in both parts of split {self.split}: {names}"
        if self.group is None:
            raise ValueError(
                f"{told}.  A row is split by all of its pictures together; set group to a field that is equal in rows "
                f"which share a picture (patient_id)"
            )
        log.warning("%s, since rows with them differ in %s; numbers on held-out ones flatter", told, self.group)

    def _probe_pictures(self) -> None:
        if self.pictures_have_names:
            look_at(self.name, self._places_of_pictures(every=-(-len(self._store.end) // NUM_LOOKED_AT)))
            return
        having = []
        for sample in range(0, len(self._store.end), max(1, len(self._store.end) // NUM_PROBED)):
            if images := self._store[sample]["images"]:
                place = int(self._store.file[sample]), int(self._store.row[sample])
                having.append(partial(self.open, images[0], *place))
        probe(self.name, having, self.image_root or "the folder of the file")


def _check_turns(found: Conversation) -> None:
    if not found.turns:
        raise Malformed("(the row)", "a question and its answer", [])
    for number, turn in enumerate(found.turns, start=1):
        if not turn.answer:
            raise Malformed("answer", "text that is not empty", turn.answer).in_turn(number)
        if not turn.question and not turn.num_images and found.prompts is None:
            raise Malformed("question", "text, or a picture to talk about", turn.question).in_turn(number)
    if not all(found.answers):
        raise Malformed("answers", "texts that are not empty", list(found.answers))
    shown = sum(turn.num_images for turn in found.turns)
    if shown != len(found.images):
        raise Malformed("pictures", f"{shown}, as many as the turns show", list(found.images))


def _checked_split(name: str, split: str | None, part: str | None, group: str | None) -> float | None:
    if split is None:
        if part is not None or group is not None:
            raise ValueError(f"{name}: part={part} and group={group} say nothing without split, such as split: 80/20")
        return None
    if part not in PARTS:
        raise ValueError(f"{name}: split is {split!r} and part {part!r}; expected part train or test")
    return held_out_share(split)
