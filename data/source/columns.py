"""Rows whose fields a column map names: JSON lists and lines, and what `hf_datasets.py` reads."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.batch import Turn
from data.records import text_of, texts_of
from data.source.conversations import Conversation, ConversationSource
from data.source.llava_json import spoken_turns

MEANINGS = ("image", "question", "answer", "turns", "language")


@dataclass(kw_only=True)
class ColumnSource(ConversationSource):
    """
    Args:
        columns: what -> the column that holds it; what is one of
            image: the picture's path, or a list of paths, or null for text alone;
            question, answer: text; without a question one of `prompts` asks;
            turns: instead of both, a list of what was said, as LLaVA or OpenAI write it;
            language: zh, en, ...
        prompts: language -> questions for rows without one; one is drawn for each row, by (seed, step, row).
    """

    columns: Mapping[str, str | None]
    prompts: Mapping[str, Sequence[str]] | None = None
    name: str = "columns"

    def __post_init__(self) -> None:
        self.map = checked_columns(self.columns, self.prompts, self.name)
        super().__post_init__()

    def images(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return texts_of(row, self.map["image"]) if "image" in self.map else ()

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        images = self.images(row)
        language = row.get(self.map["language"]) if "language" in self.map else None
        if "turns" in self.map:
            return Conversation(spoken_turns(row, self.map["turns"], len(images)), images, language)
        answer = text_of(row, self.map["answer"])
        if "question" not in self.map:
            return Conversation((Turn("", answer, len(images)),), images, language, prompts=self.prompts)
        question = text_of(row, self.map["question"], empty=bool(images))
        return Conversation((Turn(question, answer, len(images)),), images, language)


def checked_columns(
    columns: Mapping[str, str | None], prompts: Mapping[str, Sequence[str]] | None, name: str
) -> dict[str, str]:
    """The columns that are named.  Raises ValueError for a word that means nothing, or too few of them."""
    for what in columns:
        if what not in MEANINGS:
            near = difflib.get_close_matches(str(what), MEANINGS, n=1)
            raise ValueError(
                f"{name}: columns.{what} means nothing; expected {', '.join(MEANINGS)}"
                + (f" (perhaps {near[0]})" if near else "")
            )
    named = {what: column for what, column in columns.items() if column is not None}
    if "turns" in named and {"question", "answer"} & set(named):
        raise ValueError(f"{name}: columns.turns stands instead of question and answer, but {sorted(named)} are named")
    if "turns" not in named and "answer" not in named:
        raise ValueError(f"{name}: columns names {sorted(named)}; expected answer (with question or prompts), or turns")
    if "answer" in named and ("question" in named) == bool(prompts):
        raise ValueError(f"{name}: who asks?  Name columns.question, or give prompts by language, and not both")
    return named
