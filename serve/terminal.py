"""A conversation in a terminal, in Chinese or English: a picture by its path, then questions."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from torch import Tensor

from model.generation import Decoding
from serve.session import Exchange, Session

MOST_BYTES = 2**30  # of a file; a film by mistake would fill the memory
TEXTS = {
    "zh": {
        "welcome": "模型 {name} 已就绪。输入 clear 重新开始，stop 结束；回答时按 Ctrl-C 停止回答。",
        "picture": "图片路径（直接回车则不用图片）：",
        "question": "用户：",
        "answer": "{name}：",
        "describe": "描述这张图片。",
        "absent": "没有这个文件：{path}",
        "unreadable": "这个文件读不了：{path}（{error}）",
        "stopped": "（已停止）",
        "failed": "（回答失败：{error}）",
        "cut": "（对话太长，最早的部分已略去）",
        "idle": "（输入 stop 结束程序）",
        "bye": "再见。",
    },
    "en": {
        "welcome": "{name} is ready. clear begins anew, stop ends; Ctrl-C stops an answer.",
        "picture": "Path of a picture (none: just press Enter): ",
        "question": "You: ",
        "answer": "{name}: ",
        "describe": "Describe the image.",
        "absent": "There is no file {path}",
        "unreadable": "{path} cannot be read ({error})",
        "stopped": "(stopped)",
        "failed": "(the answer failed: {error})",
        "cut": "(the conversation is long: its beginning was left out)",
        "idle": "(type stop to end the program)",
        "bye": "Goodbye.",
    },
}


class Terminal:
    """One person at a terminal.

    Args:
        language: of what the program says: "zh" or "en"; answers are in the language of the questions.
        question: asked first of every picture; None: "Describe the image."
    """

    def __init__(
        self,
        session: Session,
        decoding: Decoding,
        *,
        language: str,
        question: str | None = None,
        out: TextIO = sys.stdout,
    ) -> None:
        self.session, self.decoding, self.out = session, decoding, out
        self.texts = TEXTS[language]
        self.first_question = question or self.texts["describe"]

    def run(self, picture: Path | None = None) -> None:
        """Until `stop`, or the end of what is typed.

        Args:
            picture: of the first conversation, instead of asking for its path.
        """
        self.tell("welcome", name=self.session.name)
        try:
            while self.conversation(picture):
                picture = None
        except EOFError:
            self.write("\n")
        self.tell("bye")

    def conversation(self, path: Path | None) -> bool:
        """From a picture on.  -> whether another one follows"""
        history: list[Exchange] = []
        picture = None
        while picture is None:
            typed = self.read("picture") if path is None else str(path)
            if typed in ("stop", "clear"):
                return typed == "clear"
            if not typed:
                break
            picture, path = self.open(typed), None
        if picture is None:
            question = self.read("question")
        else:
            question = self.first_question
            self.write(f"{self.texts['question']}{question}\n")  # nobody typed it: who reads the answer has to see it
        while question != "stop":
            if question == "clear":
                return True
            if question:
                history = self.answer(picture, question, history)
                picture = None  # the history remembers it
            question = self.read("question")
        return False

    def answer(self, picture: Tensor | None, question: str, history: list[Exchange]) -> list[Exchange]:
        """Shows an answer as it comes.  -> the history with it, or with as much as was said"""
        shown = ""
        with interrupted() as is_interrupted:
            try:
                ask = self.session.ask(picture, question, history, decoding=self.decoding)
            except ValueError as error:
                self.write(f"{error}\n")
                return history
            if ask.encoded.num_cut.get("history") or ask.encoded.num_cut.get("question"):
                self.tell("cut")
            self.write(self.texts["answer"].format(name=self.session.name))
            try:
                for (answer,) in self.session.answers([ask]):
                    self.write(answer.text[len(shown) :])
                    shown = answer.text
                    if is_interrupted():
                        self.write(f" {self.texts['stopped']}")
                        break
            except Exception as error:  # out of memory, say: the conversation is still there
                self.tell("failed", error=f"{type(error).__name__}: {error}")
                return history
        self.write("\n")
        return ask.history(shown)

    def open(self, typed: str) -> Tensor | None:
        """The picture at a path that was typed here; None, with a sentence, where it cannot be used."""
        shown = readable(typed.strip("'\""))
        try:
            for path in spelt(typed):
                if path.is_file():
                    if path.stat().st_size > MOST_BYTES:
                        raise ValueError(f"it has more than {MOST_BYTES} bytes")
                    return self.session.picture(path.read_bytes())
            self.tell("absent", path=shown)
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: the home directory of nobody
            self.tell("unreadable", path=shown, error=readable(str(error)))
        except KeyboardInterrupt:  # a large picture takes its time
            self.write("\n")
            self.tell("idle")
        return None

    def read(self, prompt: str) -> str:
        """What is typed; Ctrl-C there ends the line, not the program.  Raises EOFError at the end of the input."""
        while True:
            try:
                typed = input(self.texts[prompt])
            except KeyboardInterrupt:
                self.write("\n")
                self.tell("idle")
                continue
            return typed.strip() if prompt == "picture" else readable(typed).strip()

    def tell(self, sentence: str, **values: object) -> None:
        self.write(self.texts[sentence].format(**values) + "\n")

    def write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def readable(typed: str) -> str:
    """Bytes that are no UTF-8 come as halves of characters, which no tokenizer takes and no terminal shows."""
    return typed.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def spelt(typed: str) -> Iterator[Path]:
    """What a path may mean: itself, in quotes, or as shells spell it, which is how terminals write a file that is
    dragged into them.  Raises RuntimeError: the home directory of nobody."""
    yield Path(typed).expanduser()
    yield Path(typed.strip("'\"")).expanduser()
    try:
        words = shlex.split(typed)
    except ValueError:  # a quotation that does not end
        return
    if len(words) == 1:
        yield Path(words[0]).expanduser()


@contextmanager
def interrupted() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C only sets a flag, which is asked after every token: nothing is torn in the middle of a step."""
    pressed: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if pressed:  # a second time: whoever waits for a very long prompt means it
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, before)
