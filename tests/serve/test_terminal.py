"""The terminal: as a person at a real one finds it (a pty), and its conversation line by line."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import torch
from PIL import Image

from model.generation import Decoding
from serve.session import Session
from serve.terminal import TEXTS, Terminal
from tests.conftest import ROOT
from tests.model.glm_common import train_sentencepieces
from tests.tiny_chat import pictures, tiny_chat, train_pieces
from tests.tiny_run import chatglm_nodes, glm_nodes, write_run

# the first process of a session may take a terminal as its own: then Ctrl-C there is a signal, as for a person
OWN_TERMINAL = (
    "import fcntl, os, signal, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); "  # a shell starts what is in the background with it ignored
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
WAIT = 150.0  # seconds, on a machine that does much else


class Typist:
    """Types into a program and reads what it shows."""

    def __init__(self, *command: object) -> None:
        self.shown, self.num_reads = "", 0
        self.end, inside = pty.openpty()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "LANG": "C.UTF-8"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, *map(str, command)],
            cwd=ROOT,
            env=env,
            stdin=inside,
            stdout=inside,
            stderr=inside,
        )
        os.close(inside)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.end)

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def wait_for(self, pattern: str) -> str:
        """-> what was shown up to the end of the pattern; it is not looked at again"""
        until = time.monotonic() + WAIT
        while not (found := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self.end], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"waited for {pattern!r}; on the screen: {self.shown[-500:]!r}"
            try:
                self.shown += os.read(self.end, 65536).decode(errors="replace").replace("\r\n", "\n")
            except OSError:  # the program has ended
                assert re.search(pattern, self.shown), f"waited for {pattern!r}; at the end: {self.shown[-500:]!r}"
            self.num_reads += 1
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its answers never end by themselves."""
    place = tmp_path_factory.mktemp("run")
    nodes = glm_nodes(train_sentencepieces(place / "tokenizer.model"), place / "chatglm3", endless=True)
    write_run(place / "run", nodes)
    return place / "run"


@pytest.fixture(scope="module")
def fox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a fox.png"
    Image.fromarray(pictures(1)[0].permute(1, 2, 0).numpy().copy()).save(path)
    return path


def plain(text: str) -> str:
    return "".join(text.split())


def test_a_conversation_at_a_terminal(run: Path, fox: Path) -> None:
    session = Session.load(run, max_tokens=10**5)
    expected, history = session.chat(fox.read_bytes(), "Describe the image.", temperature=0, max_new_tokens=60)
    alone, _ = session.chat(None, "图片", temperature=0, max_new_tokens=60)
    options = ("--temperature", 0, "--max-new-tokens", 5000, "--max-tokens", 10**5, "--lang", "en")
    with Typist("scripts/chat.py", "--model", run, *options) as person:
        person.wait_for(r"run is ready.*\nPath of a picture.*: $")
        person.type("fox.png\n")
        person.wait_for(r"There is no file fox.png\nPath of a picture.*: $")
        person.type(f"'{fox}'\n")
        person.wait_for(r"You: Describe the image.\nrun: ")
        before = person.num_reads
        said = person.wait_for(r"[^\n]{80}")
        assert person.num_reads - before > 5, "words ought to appear as they come"
        person.type("\x03")
        said += person.wait_for(r"\(stopped\)\nYou: $")
        assert plain(said).startswith(plain(expected)[:50]) and len(said) < 5000
        time.sleep(1.0)  # Python's input() shows its prompt a moment before it can be interrupted
        person.type("\x03")
        person.wait_for(r"type stop to end the program\)\nYou: $")
        person.type("clear\n")
        person.wait_for(r"Path of a picture.*: $")
        person.type("\n")
        person.wait_for(r"You: $")
        person.type("图片\n")
        person.wait_for("run: ")
        said = person.wait_for(r"[^\n]{40}")
        person.type("\x03")
        said += person.wait_for(r"\(stopped\)\nYou: $")
        assert plain(said).startswith(plain(alone)[:20]) and not plain(alone).startswith(plain(expected)[:20])
        person.type("stop\n")
        person.wait_for("Goodbye.")
        assert person.process.wait(WAIT) == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--model", "nowhere"), "chat: there is no folder nowhere"),
        (("--model", ".", "--top-p", "7"), "chat: top_p is 7.0; expected a probability"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    options: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.chat import main

    monkeypatch.setattr(sys, "argv", ["chat.py", *options])
    with pytest.raises(SystemExit, match=expected):
        main()


def test_a_package_that_a_model_alone_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.chat import main

    write_run(tmp_path / "run", chatglm_nodes(train_pieces(tmp_path / "ice_text.model"), tmp_path / "base"))
    for name in [name for name in sys.modules if name.split(".")[0] == "sat" or name == "model.llm.sat_network"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without("sat"), *sys.meta_path])
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match=r"^chat: .*run needs the package 'sat', which is not installed here"):
        main()


class Without:
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.package)


# ------------------------------------------------------------------------------------------------------ line by line


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(tiny_chat(train_pieces(tmp_path_factory.mktemp("pieces") / "ice_text.model")), name="tiny")


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    waiting: Iterator[str] = iter(lines)

    def read(prompt: str) -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)


class Screen(io.StringIO):
    """Refuses a write while the one before it is not shown yet."""

    waiting = False

    def write(self, text: str) -> int:
        assert not self.waiting, "words ought to appear as they come"
        self.waiting = True
        return super().write(text)

    def flush(self) -> None:
        self.waiting = False


def shown(session: Session, language: str, first: Path | None = None, **more: int) -> list[str]:
    out = Screen()
    decoding = Decoding(more.get("max_new_tokens", 12))
    Terminal(session, decoding, language=language, out=out).run(first)
    return out.getvalue().splitlines()


def test_chinese_picture_then_questions(session: Session, fox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = {"temperature": 0, "max_new_tokens": 12}
    first, history = session.chat(fox.read_bytes(), "描述这张图片。", **greedy)
    second, history = session.chat(None, "内容", history, **greedy)
    alone, _ = session.chat(None, "内容", **greedy)
    typed(monkeypatch, "内容", "", "clear", "", "内容")
    welcome, *rest = shown(session, "zh", fox)
    assert "tiny" in welcome and "clear" in welcome and "stop" in welcome
    answers = [f"tiny：{answer}" for answer in (first, second, alone)]
    expected = ["用户：描述这张图片。", *answers]  # the question that nobody typed
    assert rest == [*expected, "", "再见。"], "the input ended without a stop"


def test_files_that_cannot_be_used_are_asked_for_again(
    session: Session, fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"GIF89a")
    pasted = "What is in the picture? " * 20  # where a path was asked for
    typed(monkeypatch, str(tmp_path), str(broken), "~nobody9/x.png", pasted, "stop")
    lines = shown(session, "en")
    assert lines.pop(3).startswith("~nobody9/x.png cannot be read (Could not determine home directory")
    assert "cannot be read ([Errno 36] File name too long" in lines.pop(3)
    assert lines[1:] == [
        f"There is no file {tmp_path}",
        f"{broken} cannot be read (the picture cannot be used: unreadable image: none of JPEG, PNG, WEBP, GIF, BMP, "
        f"TIFF, AVIF)",
        "Goodbye.",
    ]


def test_paths_as_terminals_write_dragged_files(
    session: Session, fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, seen = fox.read_bytes(), []
    monkeypatch.setattr(session, "picture", lambda image: seen.append(image))
    names = ["my fox.png", "it's.png", "'quoted'.png", "a\\b.png", os.fsdecode(b"\xff.png")]
    for name in names:
        (tmp_path / name).write_bytes(raw + os.fsencode(name))
    spellings = ["my\\ fox.png", "it\\'s.png", "'quoted'.png", "a\\b.png", os.fsdecode(b"\xff.png")]
    typed(monkeypatch, *(f"{tmp_path}/{name}" for name in spellings), "stop")
    shown(session, "en")
    typed(monkeypatch, f"'{tmp_path}/it'\\''s.png'", f' "{tmp_path}/my fox.png" ', "stop")
    shown(session, "en")
    assert seen == [raw + os.fsencode(name) for name in [*names, names[1], names[0]]]
    monkeypatch.setattr("serve.terminal.MOST_BYTES", 10)
    typed(monkeypatch, str(fox), os.fsdecode(b"/none/\xff.png"), "stop")
    assert shown(session, "en")[1:3] == [
        f"{fox} cannot be read (it has more than 10 bytes)",
        "There is no file /none/\ufffd.png",
    ]


@pytest.mark.parametrize("slow", ["picture", "ask"])
def test_ctrl_c_while_a_picture_or_a_question_is_read(
    session: Session, fox: Path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    """A large picture takes seconds to decode."""

    def pressed(*given: Any, **more: Any) -> Any:
        monkeypatch.setattr(session, slow, real)  # once
        signal.raise_signal(signal.SIGINT)
        return real(*given, **more)

    real = getattr(session, slow)
    monkeypatch.setattr(session, slow, pressed)
    typed(monkeypatch, str(fox), str(fox), "stop")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        lines = shown(session, "en")
    finally:
        signal.signal(signal.SIGINT, before)
    assert lines[-1] == "Goodbye." and (TEXTS["en"]["idle"] in lines) == (slow == "picture")
    assert any(line.endswith(TEXTS["en"]["stopped"]) for line in lines) == (slow == "ask")


def test_an_answer_that_fails_leaves_the_conversation(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = {"temperature": 0, "max_new_tokens": 12}
    first, history = session.chat(None, "Q", **greedy)
    second, _ = session.chat(None, "Q", history, **greedy)
    real = session.answers

    def answers(asks: Any) -> Any:
        if asks[0].dialogue.turns[-1].question == "much":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(asks)

    monkeypatch.setattr(session, "answers", answers)
    typed(monkeypatch, "", "Q", "much", "Q", "stop")
    lines = shown(session, "en")
    assert lines[1:] == [
        f"tiny: {first}",
        "tiny: (the answer failed: OutOfMemoryError: CUDA out of memory)",
        f"tiny: {second}",
        "Goodbye.",
    ]


def test_a_long_conversation_says_that_it_was_cut(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "", *["What is in the picture? A red circle on the left of a blue square."] * 6, "stop")
    short = Session(session.model, max_tokens=100)
    lines = shown(short, "en")
    assert TEXTS["en"]["cut"] in lines
    typed(monkeypatch, "", "Q" * 5, "\udcff描述", "stop")  # a byte that is no UTF-8
    assert len(shown(short, "en")) == 4


def test_both_languages_say_everything() -> None:
    assert TEXTS["zh"].keys() == TEXTS["en"].keys()
    for name, text in TEXTS["zh"].items():
        assert re.findall(r"{\w+}", text) == re.findall(r"{\w+}", TEXTS["en"][name])
