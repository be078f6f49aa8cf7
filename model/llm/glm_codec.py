"""What the dialogue codecs of ChatGLM2, ChatGLM3 and GLM-4 share: [gMASK] <sop> first, and places for pictures.

None of the three was trained on pictures: a picture is a run of placeholders, between marks, where its embeddings go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from data.batch import IGNORED, Dialogue, EncodedDialogue, Turn
from model.llm.dialogue import fit, said


class TextPieces(Protocol):
    """`model.llm.pieces.Pieces`, or whatever turns plain text into ids and never into special ones."""

    vocab_size: int

    def id_of(self, piece: str) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Layout:
    """Ids, labels and places of pictures, as they are written down."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.starts: list[int] = []

    def add(self, ids: Iterable[int], *, learn: bool = False) -> None:
        for token in ids:
            self.ids.append(token)
            self.labels.append(token if learn else IGNORED)

    def done(self) -> EncodedDialogue:
        return EncodedDialogue(tuple(self.ids), tuple(self.labels), tuple(self.starts))


class GlmCodec:
    """Base of the families' codecs, which write `_lay_out`; see `data.batch.DialogueCodec`.

    Args:
        special: ids by role, "gmask" and "sop" among them.
        pad_id: stands for padding and for image tokens.
        image_marks: ids before and after the tokens of a picture; None: those of the words <img> and </img>.
    """

    trains_every_turn = True

    def __init__(
        self,
        pieces: TextPieces,
        special: dict[str, int],
        *,
        pad_id: int,
        stop_ids: tuple[int, ...],
        num_image_tokens: int,
        image_marks: tuple[list[int], list[int]] | None = None,
    ) -> None:
        self.pieces, self.special = pieces, special
        self.image_marks = image_marks or (pieces.encode("<img>"), pieces.encode("</img>"))
        self.pad_id, self.stop_ids, self.num_image_tokens = pad_id, stop_ids, num_image_tokens

    @property
    def num_ids(self) -> int:
        return max(self.pieces.vocab_size, *(i + 1 for i in self.special.values()))

    def encode(
        self, dialogue: Dialogue, *, max_tokens: int | None = None, max_answer_tokens: int | None = None
    ) -> EncodedDialogue:
        """See `data.batch.DialogueCodec`."""
        return fit(dialogue, self._lay_out, max_tokens=max_tokens, max_answer_tokens=max_answer_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        special = {*self.special.values(), self.pad_id}
        return self.pieces.decode(said(ids, stop_ids=self.stop_ids, special=special)).strip()

    def _lay_out(self, turns: tuple[Turn, ...]) -> EncodedDialogue:
        raise NotImplementedError

    def _begin(self) -> Layout:
        layout = Layout()
        layout.add([self.special["gmask"], self.special["sop"]])
        return layout

    def _show(self, layout: Layout, num_images: int) -> None:
        before, after = self.image_marks
        for _ in range(num_images):
            layout.add(before)
            layout.starts.append(len(layout.ids))
            layout.add([self.pad_id] * self.num_image_tokens)
            layout.add(after)


class RoleCodec(GlmCodec):
    r"""[gMASK] <sop> <|user|> \n `pictures` question <|assistant|> \n answer <|user|> ... <|assistant|> \n answer `end`

    The layout of ChatGLM3 and GLM-4.  The prompt ends at <|assistant|>: the line break, before which a tool's name may
    stand, is the model's to say.  Every answer is trained, with what ends it: the next <|user|>, or `end`.
    """

    end_id: int

    def _lay_out(self, turns: tuple[Turn, ...]) -> EncodedDialogue:
        layout, line_break = self._begin(), self.pieces.encode("\n")
        for number, turn in enumerate(turns):
            layout.add([self.special["user"]], learn=number > 0)
            layout.add(line_break)
            self._show(layout, turn.num_images)
            layout.add(self.pieces.encode(turn.question))
            layout.add([self.special["assistant"]])
            if turn.answer:
                layout.add([*line_break, *self.pieces.encode(turn.answer)], learn=True)
        if turns[-1].answer:
            layout.add([self.end_id], learn=True)
        return layout.done()
