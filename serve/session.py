"""One way to talk to every model that the project trains or reads, for all front ends.

    session = Session.load("outputs/my_run")                       # a run, VisualGLM-6B, or a merged folder
    answer, history = session.chat(Path("fox.jpg").read_bytes(), "这是什么动物？")
    answer, history = session.chat(None, "它在做什么？", history)   # the history remembers the picture

Pictures are bytes or opened pictures, in fields of their own; no text is ever searched for paths or addresses.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.batch import Dialogue, DialogueBatch, DialogueCodec, EncodedDialogue, Turn
from data.decode import MAX_PIXELS
from data.language import language_of_turns
from data.source import BadSample
from data.transform import EvalTransform
from model.generation import Decoding, GrowingText
from model.load import load
from model.visual_chat import VisualChatModel
from serve.punctuation import restores_punctuation, settled, with_full_width

Picture = bytes | Image.Image | np.ndarray | Tensor  # a tensor: what `Session.picture` made
LANGUAGES = ("zh", "en")
# VisualGLM's own (`cli_demo.py:18-26`), but for its repetition penalty of 1.2, which makes a model avoid the words of
# the question
CHAT = Decoding(max_new_tokens=512, temperature=0.8, top_k=100, top_p=0.4)


class Exchange(tuple[str, str]):
    """A question and its answer, a pair as in VisualGLM's history, which knows the pictures shown with the question."""

    pictures: tuple[Tensor, ...]

    def __new__(cls, question: str, answer: str, pictures: Sequence[Tensor] = ()) -> Exchange:
        made = super().__new__(cls, (question, answer))
        made.pictures = tuple(pictures)
        return made


@dataclass(frozen=True)
class Ask:
    """A dialogue whose last turn is to be answered; `Session.ask` and `Session.asked` make them."""

    dialogue: Dialogue  # its last answer empty
    pictures: tuple[Tensor, ...]  # as many as the turns show, in their order
    decoding: Decoding
    encoded: EncodedDialogue  # cut where it was too long: `encoded.num_cut` says what

    def history(self, answer: str) -> list[Exchange]:
        """The conversation with this answer."""
        left, found = list(self.pictures), []
        for turn in self.dialogue.turns:
            shown = [left.pop(0) for _ in range(turn.num_images)]
            found.append(Exchange(turn.question, turn.answer or answer, shown))
        return found


@dataclass(frozen=True)
class Answer:
    """What has been said so far."""

    text: str
    num_tokens: int = 0  # its end included
    ended: Literal["", "stop", "length"] = ""  # by itself or at the limit; "" while it is on its way, and if stopped


class Session:
    """A model that answers.  Threads may share it: its steps run one at a time, its batches side by side.

    Args:
        model: on its device, or spread over several.
        name: what it is called towards users.
        max_tokens: of prompt and answer together; a longer conversation loses its oldest turns, then its question's
            beginning.
        max_pixels: a larger picture is refused by its header.
    """

    def __init__(
        self, model: VisualChatModel, *, name: str = "queqiao", max_tokens: int = 2048, max_pixels: int = MAX_PIXELS
    ) -> None:
        if model.llm.codec is None:
            raise ValueError("this language model has no tokenizer: nobody can talk to it")
        vision: Any = model.vision
        self.model, self.name, self.max_tokens = model.eval(), name, max_tokens
        self.codec: DialogueCodec = model.llm.codec
        self.transform = EvalTransform(image_size=vision.image_size, max_pixels=max_pixels)
        self.device = next(vision.parameters()).device
        self.lock = threading.Lock()
        self.restores_punctuation = restores_punctuation(self.codec)

    @classmethod
    def load(
        cls,
        model: str | Path,
        adapter: str | Path | None = None,
        *,
        max_tokens: int = 2048,
        max_pixels: int = MAX_PIXELS,
        **how: Any,
    ) -> Session:
        """
        Args:
            model, adapter, how: see `model.load.load`.
        Raises:
            ValueError: as `model.load.load`.
        """
        made = load(model, adapter, **how)
        return cls(made, name=Path(model).resolve().name, max_tokens=max_tokens, max_pixels=max_pixels)

    # ------------------------------------------------------------------------------------------------- for one person

    def chat(
        self,
        image: Picture | None,
        question: str,
        history: Sequence[Sequence[str]] | None = None,
        *,
        language: str | None = None,
        **decoding: Any,
    ) -> tuple[str, list[Exchange]]:
        """An answer, and the history with it.

        Args:
            image: shown with this question, unless it is the picture that was shown last; where the history is of plain
                pairs, as VisualGLM's is, before the first question.
            history: what an earlier call gave, or pairs of a question and its answer; None, as VisualGLM has it, or an
                empty one to begin.
            language: of the template, "zh" or "en"; None goes by the script of the question.
            decoding: fields of `model.generation.Decoding`, where they shall not be `CHAT`'s.
        Raises:
            ValueError: an empty question, a picture that cannot be used, a value out of its range, or pictures that
                leave no room for an answer.
        """
        ask = self.ask(image, question, history, language=language, decoding=replace(CHAT, **decoding))
        (answer,) = self.answer([ask])
        return answer.text, ask.history(answer.text)

    def stream(
        self,
        image: Picture | None,
        question: str,
        history: Sequence[Sequence[str]] | None = None,
        *,
        language: str | None = None,
        **decoding: Any,
    ) -> Iterator[str]:
        """`chat`, but yields the answer as it grows, whole at last.  Leaving the loop ends it."""
        ask = self.ask(image, question, history, language=language, decoding=replace(CHAT, **decoding))
        for (answer,) in self.answers([ask]):
            yield answer.text

    # ------------------------------------------------------------------------------------------------ for front ends

    def picture(self, image: Picture) -> Tensor:
        """-> uint8 (3, H, W), as the image encoder takes it

        Raises:
            ValueError: something else than bytes or an opened picture; a broken, unknown or too large one.
        """
        size = self.transform.image_size
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.shape == (3, size, size):
            return image
        if not isinstance(image, bytes | Image.Image | np.ndarray):
            raise ValueError(
                f"a picture is bytes or an opened picture, not {type(image).__name__}: read a file with "
                f"pathlib.Path(...).read_bytes()"
            )
        try:
            return self.transform.image(image)
        except (BadSample, TypeError) as bad:  # TypeError: an array that Pillow makes no picture of
            raise ValueError(f"the picture cannot be used: {bad}") from bad

    def ask(
        self,
        image: Picture | None,
        question: str,
        history: Sequence[Sequence[str]] | None = None,
        *,
        language: str | None = None,
        decoding: Decoding = CHAT,
    ) -> Ask:
        """See `chat`."""
        history = history or ()
        if not isinstance(question, str):
            raise ValueError(f"the question is text, not {type(question).__name__}")
        for pair in history:
            if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise ValueError(f"the history holds pairs of a question and its answer, not {pair!r}")
        shown = [list(getattr(pair, "pictures", ())) for pair in history] + [[]]
        if image is not None:
            new = self.picture(image)
            before = [picture for pictures in shown for picture in pictures]
            knows_pictures = any(isinstance(pair, Exchange) for pair in history)
            if not before or not torch.equal(before[-1], new):
                shown[-1 if knows_pictures else 0].append(new)
        turns: list[Turn] = []
        waiting = 0  # pictures of questions that got no answer, and are not asked again
        for (asked, said), own in zip(history, shown, strict=False):
            waiting += len(own)
            if said:
                turns.append(Turn(asked, said, waiting))
                waiting = 0
        turns.append(Turn(question, "", waiting + len(shown[-1])))
        pictures = [picture for own in shown for picture in own]
        return self.asked(turns, pictures, language=language, decoding=decoding)

    def asked(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[Tensor],
        *,
        language: str | None = None,
        decoding: Decoding = CHAT,
    ) -> Ask:
        """From turns with any pictures anywhere, prepared by `picture`; the last has no answer yet.  Raises
        ValueError."""
        question = turns[-1].question
        if not question.strip():
            raise ValueError("the question is empty")
        if language not in (None, *LANGUAGES):
            raise ValueError(f"language is {language!r}; it can be {' or '.join(LANGUAGES)}")
        dialogue = Dialogue(tuple(turns), language or language_of_turns(turns))
        if dialogue.num_images != len(pictures):
            raise ValueError(f"{len(pictures)} pictures for {dialogue.num_images} places in the conversation")
        kept_for_answer = min(decoding.max_new_tokens, self.max_tokens // 2)
        encoded = self.codec.encode(dialogue, max_tokens=self.max_tokens - kept_for_answer)
        room = min(decoding.max_new_tokens, self.max_tokens - len(encoded.ids))
        return Ask(dialogue, tuple(pictures), replace(decoding, max_new_tokens=room), encoded)

    def answer(self, asks: Sequence[Ask]) -> list[Answer]:
        """Whole answers, in one batch; `decoding.num_beams` has to be the same in all."""
        *_, last = self.answers(asks)
        return last

    def answers(self, asks: Sequence[Ask]) -> Answers:
        """The same as they grow: iterate over it."""
        return Answers(self, asks)


class Answers:
    """A batch of answers on its way: yields all of them so far, after every token.  With beams, once."""

    def __init__(self, session: Session, asks: Sequence[Ask]) -> None:
        if not asks:
            raise ValueError("nothing is asked")
        self.session, self.asks = session, list(asks)
        self._answers = [Answer("") for _ in asks]
        self._texts = [GrowingText(session.codec) for _ in asks]
        self._stopped: set[int] = set()

    def stop(self, row: int) -> None:
        """Nobody waits for this row's answer any more; any thread may say so."""
        self._stopped.add(row)

    def __iter__(self) -> Iterator[list[Answer]]:
        if self.asks[0].decoding.num_beams > 1:
            yield self._all_at_once()
            return
        with self.session.lock:
            generation = self.session.model.begin(self._batch(), [ask.decoding for ask in self.asks])
        while True:
            for row in list(self._stopped):
                generation.stop(row)
            if not any(generation.running):
                return
            with self.session.lock:
                step = generation.step()
            for row, token in enumerate(step):
                if token is not None:
                    self._add(row, token, has_ended=not generation.running[row])
            yield list(self._answers)

    def _all_at_once(self) -> list[Answer]:
        with self.session.lock:
            said_BN = self.session.model.generate(self._batch(), [ask.decoding for ask in self.asks])
        for row, ids in enumerate(said_BN.tolist()):
            for number, token in enumerate(ids, start=1):
                has_ended = token in self.session.codec.stop_ids or number == self.asks[row].decoding.max_new_tokens
                self._add(row, token, has_ended=has_ended)
                if has_ended:
                    break
        return self._answers

    def _add(self, row: int, token: int, *, has_ended: bool) -> None:
        sure, stop_ids = self._texts[row].push(token), self.session.codec.stop_ids
        text = self._texts[row].finish() if has_ended else sure
        if self.session.restores_punctuation:
            text = with_full_width(text if has_ended else settled(text))
        ended = ("stop" if token in stop_ids else "length") if has_ended else ""
        self._answers[row] = Answer(text, self._answers[row].num_tokens + 1, ended)  # type: ignore[arg-type]

    def _batch(self) -> DialogueBatch:
        pictures = [list(ask.pictures) for ask in self.asks]
        return DialogueBatch.collate(
            [ask.encoded for ask in self.asks],
            pictures,
            pad_id=self.session.codec.pad_id,
            image_size=self.session.transform.image_size,
            language_of=[ask.dialogue.language for ask in self.asks],
            languages=tuple(sorted({ask.dialogue.language for ask in self.asks})),
        ).to(self.session.device)
