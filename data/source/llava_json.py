"""LLaVA's and ShareGPT's conversations, with <image> where a picture stands; several pictures, several turns, or none.

{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "..."}]}
`images` with a list, `messages` with `role` and `content`, and a system turn first are understood as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.batch import Turn
from data.records import Malformed, texts_of
from data.source.conversations import Conversation, ConversationSource

IMAGE = "<image>"
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "bing": "gpt", "system": "system"}


@dataclass(kw_only=True)
class LlavaJson(ConversationSource):
    name: str = "llava_json"

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        images = texts_of(row, "image") or texts_of(row, "images")
        field = "messages" if "conversations" not in row and "messages" in row else "conversations"
        return Conversation(spoken_turns(row, field, len(images)), images)


def spoken_turns(row: Mapping[str, Any], field: str, num_images: int) -> tuple[Turn, ...]:
    """Pictures belong to the questions that have <image>; where none has, to the first.

    What a system turn says stands before the first question.  Raises Malformed.
    """
    said = row.get(field)
    if not isinstance(said, list) or not said:
        raise Malformed(field, "a list of what was said", said)
    lines: list[tuple[str, str]] = []
    for number, item in enumerate(said):
        try:
            lines.append(_line(item, f"{field}[{number}]"))
        except Malformed as error:
            raise error.in_turn((number - _begins_with_system(lines)) // 2 + 1) from None
    skipped = int(_begins_with_system(lines))
    system = lines.pop(0)[1] if skipped else ""
    if len(lines) % 2 or not lines:
        raise Malformed(field, "questions and answers by turns, an answer last", f"{len(lines)} lines")
    turns = []
    for number in range(0, len(lines), 2):
        (asks, question), (answers, answer) = lines[number], lines[number + 1]
        place, turn = number + skipped, number // 2 + 1
        if (asks, answers) != ("human", "gpt"):
            expected = "human, then gpt (or user, then assistant)"
            raise Malformed(f"{field}[{place}]", expected, [asks, answers]).in_turn(turn)
        if IMAGE in answer:
            raise Malformed(f"{field}[{place + 1}]", f"an answer without {IMAGE}", answer).in_turn(turn)
        turns.append(Turn(question.replace(IMAGE, "").strip(), answer.strip(), question.count(IMAGE)))
    first = turns[0]
    shown = sum(turn.num_images for turn in turns) or num_images
    if shown != num_images:
        raise Malformed(field, f"{IMAGE} {num_images} times, once for each picture", f"{shown} times")
    at_start = first.num_images if any(turn.num_images for turn in turns) else num_images
    question = f"{system.strip()}\n{first.question}".strip() if system.strip() else first.question
    return (Turn(question, first.answer, at_start), *turns[1:])


def _begins_with_system(lines: Sequence[tuple[str, str]]) -> bool:
    return bool(lines) and lines[0][0] == "system"


def _line(item: object, field: str) -> tuple[str, str]:
    """(role, words)"""
    if not isinstance(item, Mapping):
        raise Malformed(field, "an object with from and value", item)
    role, words = item.get("from", item.get("role")), item.get("value", item.get("content"))
    if not isinstance(role, str) or role not in ROLES:
        raise Malformed(f"{field}.from", f"one of {', '.join(ROLES)}", role)
    if not isinstance(words, str):
        raise Malformed(f"{field}.value", "text", words)
    return ROLES[role], words
