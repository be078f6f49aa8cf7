"""What the codecs of all families share: which parts of a dialogue give way where it is too long.

A family brings `lay_out(turns) -> EncodedDialogue`; with an empty last answer that is the chat layout, and it has to be
how the training layout begins.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from data.batch import Dialogue, EncodedDialogue, Turn

Layout = Callable[[tuple[Turn, ...]], EncodedDialogue]


def fit(
    dialogue: Dialogue, lay_out: Layout, *, max_tokens: int | None = None, max_answer_tokens: int | None = None
) -> EncodedDialogue:
    """See `data.batch.DialogueCodec.encode`.  An answer cut short loses its end mark too: nothing really ended there.

    History and question give way only until the answer fits or they are down to half of `max_tokens`; then the answer's
    end goes.
    """
    turns = checked(dialogue)
    whole, prompt = lay_out(turns), lay_out(asked(turns))
    num_answer = len(whole.ids) - len(prompt.ids)
    num_kept = num_answer if max_answer_tokens is None else min(num_answer, max_answer_tokens)
    cut = {"history": 0, "question": 0, "answer": 0}
    if max_tokens is not None and len(prompt.ids) + num_kept > max_tokens:
        room = max(max_tokens - num_kept, max_tokens // 2)
        turns, cut["history"] = _without_history(turns, lay_out, room)
        turns, cut["question"] = _shorter_question(turns, lay_out, room)
        whole, prompt = lay_out(turns), lay_out(asked(turns))
        if len(prompt.ids) + min(num_answer, 1) > max_tokens:
            raise ValueError(
                f"{len(prompt.ids)} tokens of pictures and template leave no room in max_tokens={max_tokens}: raise "
                f"it, or show fewer pictures ({dialogue.num_images}) in a dialogue"
            )
        num_kept = min(num_kept, max_tokens - len(prompt.ids))
    cut["answer"] = num_answer - num_kept
    end = len(prompt.ids) + num_kept
    return replace(whole, ids=whole.ids[:end], labels=whole.labels[:end], num_cut=cut)


def said(ids: Iterable[int], *, stop_ids: Collection[int], special: Collection[int]) -> list[int]:
    """What a codec decodes of an answer: up to its first stop id, without special tokens."""
    answer: list[int] = []
    for token in map(int, ids):
        if token in stop_ids:
            break
        if token not in special:
            answer.append(token)
    return answer


def checked(dialogue: Dialogue) -> tuple[Turn, ...]:
    if not dialogue.turns:
        raise ValueError("a dialogue without a turn")
    for number, turn in enumerate(dialogue.turns[:-1], start=1):
        if not turn.answer:
            raise ValueError(f"turn {number} of {len(dialogue.turns)} has no answer; only the last may be without")
    return dialogue.turns


def asked(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The same turns, the last not answered yet."""
    return (*turns[:-1], replace(turns[-1], answer=""))


def _without_history(turns: tuple[Turn, ...], lay_out: Layout, room: int) -> tuple[tuple[Turn, ...], int]:
    before = after = len(lay_out(asked(turns)).ids)
    while after > room and len(turns) > 1:
        first, second, *rest = turns
        # its pictures stay: the answers that follow may speak of them
        turns = (replace(second, num_images=first.num_images + second.num_images), *rest)
        after = len(lay_out(asked(turns)).ids)
    return turns, before - after


def _shorter_question(turns: tuple[Turn, ...], lay_out: Layout, room: int) -> tuple[tuple[Turn, ...], int]:
    """Characters go until the tokens fit, since tokens do not add up over pieces of text."""

    def from_character(start: int) -> tuple[Turn, ...]:
        return (*turns[:-1], replace(turns[-1], question=turns[-1].question[start:]))

    def num_tokens(start: int) -> int:
        return len(lay_out(asked(from_character(start))).ids)

    before = num_tokens(0)
    low, high = 0, len(turns[-1].question)  # `high` fits, or nothing does
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if num_tokens(middle) <= room else (middle + 1, high)
    return from_character(high), before - num_tokens(high)
