"""Our own format: one conversation a line, and pictures where they are shown.

{"turns": [{"question": "...", "images": ["a.png"], "answer": "..."}, ...], "language": "zh", "patient_id": "7"}
`images` and `language` may be missing; `image` with one path is understood as well; other fields may serve as a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.batch import Turn
from data.records import Malformed, as_object, text_of, texts_of
from data.source.conversations import Conversation, ConversationSource


@dataclass(kw_only=True)
class JsonlTurns(ConversationSource):
    name: str = "jsonl_turns"

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        turns, images = row.get("turns"), []  # type: ignore[var-annotated]
        if not isinstance(turns, list) or not turns:
            raise Malformed("turns", "a list of questions and answers", turns)
        found = []
        for number, value in enumerate(turns, start=1):
            try:
                turn, shown = _turn(as_object(value, "(the turn)"))
            except Malformed as error:
                raise error.in_turn(number) from None
            found.append(turn)
            images += shown
        return Conversation(tuple(found), tuple(images))


def _turn(value: Mapping[str, Any]) -> tuple[Turn, tuple[str, ...]]:
    shown = texts_of(value, "images") or texts_of(value, "image")
    return Turn(text_of(value, "question", empty=bool(shown)), text_of(value, "answer"), len(shown)), shown
