"""VQA v2's files, and OK-VQA's, which are the same: questions, and what ten people answered.

v2_OpenEnded_mscoco_val2014_questions.json
    {"questions": [{"question_id": 262148000, "image_id": 262148, "question": "Where is he looking?"}, ...]}
v2_mscoco_val2014_annotations.json
    {"annotations": [{"question_id": 262148000, "answers": [{"answer": "down", "answer_id": 1, ...}, ...], ...}, ...]}
Every annotator's answer is a candidate, so training draws one of the ten, and evaluation counts them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data.batch import Turn
from data.records import Malformed, as_object, read_rows, text_of
from data.source.conversations import Conversation, ConversationSource


@dataclass(kw_only=True)
class VqaV2(ConversationSource):
    """
    Args:
        path: the file of questions.
        annotations: the file of answers.
        image_file: the picture's path below `image_root`, with its number: COCO_val2014_{:012d}.jpg.
        suffix: behind every question, e.g. " Answer in one word."
    """

    annotations: str
    image_file: str = "COCO_val2014_{:012d}.jpg"
    suffix: str = ""
    language: str | None = "en"
    name: str = "vqa_v2"

    rows_under: ClassVar[str | None] = "questions"

    def rows(self, file: Path) -> Iterator[tuple[int, object]]:
        """Questions, each with its answers."""
        answers: dict[str, Any] = {}
        place = Path(self.annotations).expanduser()
        if not place.is_file():
            raise ValueError(f"{self.name}: no file at {place}")
        for number, value in read_rows(place, under="annotations"):
            try:
                row = as_object(value)
                answers[text_of(row, "question_id")] = row.get("answers")
            except Malformed as error:
                raise ValueError(f"{place}, row {number}: {error}") from error
        for number, value in read_rows(file, under=self.rows_under):
            told = as_object(value)
            yield number, {**told, "answers": answers.get(str(told.get("question_id")))}

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        said = row.get("answers")
        if not isinstance(said, list) or not said:
            raise Malformed("answers", f"what people answered, in {self.annotations}", said)
        answers = [text_of(as_object(answer), "answer", empty=True) for answer in said]
        first, *others = [answer for answer in answers if answer] or [""]
        image_id = row.get("image_id")
        if not isinstance(image_id, int):
            raise Malformed("image_id", "a whole number", image_id)
        question = text_of(row, "question") + self.suffix
        return Conversation((Turn(question, first, 1),), (self.image_file.format(image_id),), answers=tuple(others))
