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
        for number, value in enumerate(turns):
            turn = as_object(value)
            shown = texts_of(turn, "images") or texts_of(turn, "image")
            images += shown
            for name in ("question", "answer"):
                if name not in turn:
                    raise Malformed(f"turns[{number}].{name}", "text", f"no such field among {sorted(turn)}")
            found.append(Turn(text_of(turn, "question", empty=bool(shown)), text_of(turn, "answer"), len(shown)))
        return Conversation(tuple(found), tuple(images))
