"""Files of conversations, a codec of letters and a loader for the tests of dialogues."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.batch import IGNORED, Dialogue, EncodedDialogue, Turn
from data.loader import DialogueLoader
from data.mixture import Mixture
from data.source import BadSample, RawDialogue
from data.transform import EvalTransform
from model.llm.dialogue import fit
from tests.data.shard_files import jpeg, picture


class LetterDialogueCodec:
    """A token for every character; pictures before their question, ASK between question and answer, END after it."""

    pad_id, stop_ids, num_image_tokens, trains_every_turn = 0, (3,), 4, False
    ASK, END, IMAGE = 2, 3, 4

    def encode(
        self, dialogue: Dialogue, *, max_tokens: int | None = None, max_answer_tokens: int | None = None
    ) -> EncodedDialogue:
        return fit(dialogue, self._lay_out, max_tokens=max_tokens, max_answer_tokens=max_answer_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids if i > 9)

    def _lay_out(self, turns: tuple[Turn, ...]) -> EncodedDialogue:
        ids: list[int] = []
        starts: list[int] = []
        labels: list[int] = []
        for number, turn in enumerate(turns, start=1):
            for _ in range(turn.num_images):
                starts.append(len(ids))
                ids += [self.IMAGE] * self.num_image_tokens
            ids += [*map(ord, turn.question), self.ASK]
            answer = [*map(ord, turn.answer), self.END] if turn.answer else []
            labels += [IGNORED] * (len(ids) - len(labels))
            labels += answer if number == len(turns) else [IGNORED] * len(answer)
            ids += answer
        return EncodedDialogue(tuple(ids), tuple(labels), tuple(starts))


class EveryTurn(LetterDialogueCodec):
    trains_every_turn = True


class MemoryDialogues:
    """An answer of its own length for every index, two questions to draw from, a picture with every third.

    `bad` ones miss theirs.
    """

    scans = True

    def __init__(self, sizes: Mapping[str, int], *, name: str = "memory", bad: Sequence[int] = (), longest: int = 40):
        self.name, self.sizes, self.bad, self.longest = name, dict(sizes), frozenset(bad), longest
        self.languages = tuple(sizes)

    def num_samples(self, language: str) -> int:
        return self.sizes.get(language, 0)

    def dialogues(self, language: str, index: int) -> tuple[Dialogue, ...]:
        answer = f"{self.name} {language} {index} " + "x" * (index * 7919 % self.longest)
        return tuple(Dialogue((Turn(q, answer, int(index % 3 == 0)),), language) for q in ("what?", "whom?"))

    def where(self, language: str, index: int) -> str:
        return f"{self.name}.json, row {index}"

    def read(self, language: str, index: int) -> RawDialogue:
        if index in self.bad:
            raise BadSample("no image", shard=f"{self.name}.json", key=str(index))
        images = (picture(index, (16, 12)),) if index % 3 == 0 else ()
        return RawDialogue(self.dialogues(language, index), images, str(index), f"{self.name}.json")

    def fingerprint(self) -> dict[str, Any]:
        return {"samples": self.sizes}


def dialogue_loader(
    sources: Mapping[str, Any],
    *,
    languages: Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
    codec: Any = None,
    **options: Any,
) -> DialogueLoader:
    settings: dict[str, Any] = {"global_batch_size": 16, "seed": 3, **options}
    mixture = Mixture(languages, weights)
    return DialogueLoader(sources, mixture, EvalTransform(image_size=8), codec or LetterDialogueCodec(), **settings)


def write_json(file: Path, value: object) -> Path:
    """A list or object as JSON; a list as JSON lines where the name says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(item, ensure_ascii=False) for item in value] if file.suffix == ".jsonl" else None  # type: ignore
    text = json.dumps(value, ensure_ascii=False) if lines is None else "\n".join(lines) + "\n"
    file.write_text(text, encoding="utf-8")
    return file


def write_pictures(folder: Path, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(number))


def everything(source: Any) -> list[tuple[str, Dialogue]]:
    """(where, first candidate) of all samples, by language."""
    return [
        (source.where(language, i).rpartition("/")[2], source.dialogues(language, i)[0])
        for language in source.languages
        for i in range(source.num_samples(language))
    ]
