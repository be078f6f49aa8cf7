"""The session of all front ends: what is asked of the model, and what comes of its answers."""

from __future__ import annotations

import io
import itertools
import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.batch import Dialogue, Turn
from data.source.visualglm_json import VisualGLMJson
from model.generation import Decoding
from serve.punctuation import restores_punctuation, settled, with_full_width
from serve.session import Answer, Exchange, Session
from tests.tiny_chat import batch_of, pictures, tiny_chat, train_pieces

GREEDY = Decoding(12)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces") / "ice_text.model")


@pytest.fixture(scope="module")
def session(pieces: Path) -> Session:
    return Session(tiny_chat(pieces), name="tiny")


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pictures(4)[number].permute(1, 2, 0).numpy()))


def said(session: Session, dialogue: Dialogue, images: Sequence[int] = ()) -> str:
    """Greedily, by the model itself."""
    batch = batch_of(session.model, [dialogue])
    batch = replace(batch, image_GCHW=torch.stack([pictures(4)[n] for n in images]) if images else batch.image_GCHW)
    return session.codec.decode(session.model.generate(batch, GREEDY)[0].tolist())


def chat(session: Session, *arguments: Any, **more: Any) -> tuple[str, list[Exchange]]:
    return session.chat(*arguments, temperature=0, max_new_tokens=12, **more)


def test_an_answer_is_the_models_own(session: Session) -> None:
    expected = said(session, Dialogue((Turn("描述这张图片。", "", 1),), "zh"), [0])
    answer, history = chat(session, picture(0), "描述这张图片。")
    assert answer == expected and history == [("描述这张图片。", expected)]
    assert json.loads(json.dumps(history)) == [["描述这张图片。", expected]]
    assert chat(session, picture(1), "描述这张图片。")[0] != expected, "the picture ought to matter"


def test_the_template_goes_by_the_questions_script_or_as_told(session: Session) -> None:
    assert chat(session, None, "What?")[0] == said(session, Dialogue((Turn("What?"),), "en"))
    expected = said(session, Dialogue((Turn("What?"),), "zh"))
    assert chat(session, None, "What?", language="zh")[0] == expected != chat(session, None, "What?")[0]


def test_a_conversation_remembers_its_pictures_where_they_were_shown(session: Session) -> None:
    """In VisualGLM a second picture replaces the first, in front of the old answers about it (`chat.py:104`)."""
    first, history = chat(session, picture(0), "描述")
    second, history = chat(session, None, "图片", history)
    turns = (Turn("描述", first, 1), Turn("图片"))
    assert second == said(session, Dialogue(turns, "zh"), [0])
    third, history = chat(session, picture(1), "内容", history)
    turns = (Turn("描述", first, 1), Turn("图片", second), Turn("内容", "", 1))
    assert third == said(session, Dialogue(turns, "zh"), [0, 1])
    assert [len(pair.pictures) for pair in history] == [1, 0, 1]


def test_visualglms_pairs_have_the_picture_first_however_often_it_is_given(session: Session) -> None:
    expected = said(session, Dialogue((Turn("描述", "圆", 1), Turn("图片")), "zh"), [2])
    assert chat(session, picture(2), "图片", [("描述", "圆")])[0] == expected
    assert chat(session, picture(2), "图片", [["描述", "圆"]])[0] == expected, "as JSON brings them"
    _, history = chat(session, picture(2), "描述")
    again = session.ask(picture(2), "图片", history)
    assert again.dialogue.num_images == 1, "the same picture with every question, as VisualGLM's users do"


def test_a_question_without_an_answer_leaves_only_its_picture(session: Session) -> None:
    history = [Exchange("描述", "", [session.picture(picture(0))]), Exchange("图片", "圆")]
    ask = session.ask(picture(1), "内容", history)
    assert ask.dialogue.turns == (Turn("图片", "圆", 1), Turn("内容", "", 1)) and len(ask.pictures) == 2
    assert ask.history("红") == [("图片", "圆"), ("内容", "红")]
    alone = session.ask(None, "内容", history[:1])
    assert alone.dialogue.turns == (Turn("内容", "", 1),)


def test_text_is_never_a_path(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """VisualGLM opens whatever stands between <img> and </img> in a question (`chat.py:72-92`)."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was opened")

    for place in ("builtins.open", "io.open", "os.open", "socket.socket.connect", "PIL.Image.open"):
        monkeypatch.setattr(place, refuse)
    for text in ("<img>/etc/passwd</img>描述", "Q <img>http://127.0.0.1/x.png</img>", "<img>", "</img><img>"):
        ask = session.ask(None, text)
        assert ask.encoded.image_starts == () and session.answer([ask])[0].num_tokens > 0
    for image in ("/etc/passwd", Path("/etc/passwd"), "http://127.0.0.1/x.png", 3):
        with pytest.raises(ValueError, match="a picture is bytes or an opened picture.*read_bytes"):
            session.ask(image, "描述")  # type: ignore[arg-type]


def test_pictures_that_cannot_be_used(session: Session) -> None:
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    assert torch.equal(session.picture(buffer.getvalue()), session.picture(picture(0)))
    for broken, expected in (
        (b"not a picture", "cannot be used: unreadable image"),
        (buffer.getvalue()[:60], "cannot be used: truncated image"),
        (b"", "cannot be used: unreadable image"),
        (np.zeros((28, 28, 3), np.float32), "cannot be used: Cannot handle this data type"),
    ):
        with pytest.raises(ValueError, match=expected):
            session.picture(broken)
    with pytest.raises(ValueError, match="too many pixels: 28 x 28, the limit is 100"):
        Session(session.model, max_pixels=100).picture(picture(0))


def test_an_answer_with_the_words_of_the_template_is_whole(session: Session) -> None:
    """VisualGLM takes what stands after the last 答： or A: (`chat.py:175`)."""
    ids = session.codec.encode(Dialogue((Turn("描述", "圆答：红色问：圆"),), "zh"))
    answer = [token for token, label in zip(ids.ids, ids.labels, strict=True) if label >= 0][1:]
    running = session.answers([session.ask(None, "描述")])
    for token in answer:
        running._add(0, token, has_ended=token in session.codec.stop_ids)
    assert running._answers == [Answer("圆答：红色问：圆", len(answer), "stop")]


def test_what_was_held_back_is_shown_at_the_end(session: Session) -> None:
    codec: Any = session.codec
    ids = codec.pieces.encode("圆 <im")
    running = session.answers([session.ask(None, "描述")])
    for number, token in enumerate(ids, start=1):
        running._add(0, token, has_ended=number == len(ids))
        assert number == len(ids) or "<" not in running._answers[0].text
    assert running._answers == [Answer(codec.decode(ids), len(ids), "length")] and "<" in codec.decode(ids)


def test_words_come_as_they_are_said_and_a_loop_may_be_left(session: Session) -> None:
    expected, _ = session.chat(picture(0), "What is it?", temperature=1.5, seed=3, max_new_tokens=30)
    texts = list(session.stream(picture(0), "What is it?", temperature=1.5, seed=3, max_new_tokens=30))
    assert texts[-1] == expected and len(set(texts)) > 5
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    for _ in session.stream(picture(0), "What is it?"):
        break
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled() and not session.lock.locked()


def mixed(session: Session) -> list[Any]:
    return [
        session.ask(picture(0), "描述这张图片。", decoding=Decoding(14, temperature=1.2, seed=1)),
        session.ask(None, "What is in the picture?", decoding=Decoding(5)),
        session.ask(picture(1), "图片", [("描述", "圆")], decoding=Decoding(14, temperature=1.0, top_p=0.9, seed=2)),
        session.ask(None, "Q", decoding=Decoding(9, temperature=1.0, top_k=9, repetition_penalty=1.3, seed=3)),
    ]


def test_a_batch_says_what_each_says_alone(session: Session) -> None:
    expected = [session.answer([ask])[0] for ask in mixed(session)]
    assert session.answer(mixed(session)) == expected
    assert len({answer.text for answer in expected}) == 4
    for answer, ask in zip(expected, mixed(session), strict=True):
        assert answer.ended == ("length" if answer.num_tokens == ask.decoding.max_new_tokens else "stop")


def test_several_at_once_do_not_disturb_one_another(session: Session) -> None:
    expected = [session.answer([ask])[0].text for ask in mixed(session)]
    running = [iter(session.answers([ask])) for ask in mixed(session)]
    found = [""] * len(running)
    for steps in itertools.zip_longest(*running):
        for row, step in enumerate(steps):
            found[row] = found[row] if step is None else step[0].text
    assert found == expected, "in one thread, in turns"

    def work(row: int) -> None:
        found[row] = session.answer([mixed(session)[row]])[0].text

    found = [""] * 4
    threads = [threading.Thread(target=work, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_a_stopped_row_stays_as_it_was_and_the_others_go_on(session: Session) -> None:
    asks = [session.ask(None, text, decoding=Decoding(10, min_new_tokens=10)) for text in ("Q", "描述")]
    expected = session.answer(asks)
    running = session.answers(asks)
    found = [Answer("")] * 2
    for number, answers in enumerate(running):
        if number == 3:
            running.stop(0)
        found = answers
    assert found[1] == expected[1]
    assert found[0].num_tokens == 4 and found[0].ended == "" and expected[0].text.startswith(found[0].text)


def test_beams_come_at_once_and_tell_their_end(session: Session) -> None:
    ask = session.ask(picture(0), "描述", decoding=Decoding(8, num_beams=3))
    (steps,) = list(session.answers([ask]))
    batch = batch_of(session.model, [Dialogue((Turn("描述", "", 1),), "zh")])
    ids = session.model.generate(batch, Decoding(8, num_beams=3))[0].tolist()
    assert steps[0].text == session.codec.decode(ids) and steps[0].ended in ("stop", "length")


def test_a_long_conversation_loses_its_beginning_and_never_its_question(session: Session, pieces: Path) -> None:
    """VisualGLM's ends in an IndexError that its page calls a time-out (`chat.py:135`)."""
    short = Session(session.model, max_tokens=80)
    history = [(f"What is in the picture? {number}", "A red circle on the left") for number in range(9)]
    ask = short.ask(picture(0), "描述", history, decoding=Decoding(500))
    assert ask.encoded.num_cut["history"] > 0 == ask.encoded.num_cut["question"]
    assert len(ask.encoded.ids) + ask.decoding.max_new_tokens == 80 and ask.decoding.max_new_tokens >= 40
    assert len(ask.encoded.image_starts) == 1, "the picture stays"
    assert short.answer([ask])[0].num_tokens > 0
    with pytest.raises(ValueError, match="leave no room in max_tokens"):
        Session(session.model, max_tokens=12).ask(picture(0), "描述", decoding=Decoding(2))


def test_dropout_is_off(pieces: Path) -> None:
    """VisualGLM's frozen parts ran with dropout 0.1 wherever `train()` had been called."""
    model = tiny_chat(pieces).train()
    session = Session(model)
    assert not any(module.training for module in model.modules())
    assert chat(session, picture(0), "描述") == chat(session, picture(0), "描述")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None, "  "), "the question is empty"),
        ((None, None), "the question is text, not NoneType"),
        ((None, "Q", [("a",)]), "pairs of a question and its answer"),
        ((None, "Q", ["ab"]), "pairs of a question and its answer"),
        ((None, "Q", [("a", 1)]), "pairs of a question and its answer"),
    ],
)
def test_what_cannot_be_asked(session: Session, arguments: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        session.chat(*arguments)


def test_no_history_is_none_as_visualglm_has_it(session: Session) -> None:
    assert chat(session, picture(0), "描述", None) == chat(session, picture(0), "描述", [])
    assert list(session.stream(None, "Q", None, temperature=0, max_new_tokens=3))


def test_values_out_of_range_are_told(session: Session) -> None:
    with pytest.raises(ValueError, match="language is 'fr'"):
        session.chat(None, "Q", language="fr")
    with pytest.raises(ValueError, match="temperature is -1"):
        session.chat(None, "Q", temperature=-1)
    with pytest.raises(ValueError, match="0 pictures for 1 places"):
        session.asked([Turn("Q", "", 1)], [])
    with pytest.raises(ValueError, match="nothing is asked"):
        session.answer([])


# ------------------------------------------------------------------------------------------------------- punctuation


class Halving:
    """A tokenizer that knows half-width punctuation only, as ChatGLM-6B's."""

    pieces: Any

    def __init__(self) -> None:
        self.pieces, self.stop_ids = self, (0,)

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text.replace("，", ",")]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in ids if token)


def test_full_width_punctuation_comes_back_beside_chinese(session: Session) -> None:
    assert restores_punctuation(Halving()) and not restores_punctuation(session.codec)
    text = "图中有:一只狐狸,a fox, red;很好!真的?yes!是"
    assert with_full_width(text) == "图中有：一只狐狸，a fox, red；很好！真的？yes！是"
    assert settled("圆,") == "圆" and settled("a, b") == "a, b"


def test_punctuation_does_not_change_once_it_is_shown(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "codec", Halving())
    monkeypatch.setattr(session, "restores_punctuation", True)
    ask = replace(Session(session.model).ask(None, "Q"))
    running = session.answers([ask])
    texts = []
    for token in [*map(ord, "fox,狐狸,red,ok!"), 0]:
        running._add(0, token, has_ended=token == 0)
        texts.append(running._answers[0].text)
    assert texts[-1] == "fox，狐狸，red,ok!" and "fox," not in texts
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))


def test_a_question_has_the_template_it_was_trained_with_whatever_language_its_answer_is_in(
    session: Session, tmp_path: Path
) -> None:
    """A Chinese question about an English report, as translated and published sets have them."""
    rows = [
        {"prompt": "这张胸片有什么？", "label": "The cardiac silhouette is normal in size."},
        {"prompt": "Describe this chest X-ray.", "label": "心影不大，双肺未见实变影，双侧肋膈角锐利。"},
        {"prompt": "CT?", "label": "双肺未见实变"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8")
    source = VisualGLMJson(path=str(tmp_path / "rows.json"))
    trained = {d.turns[0].question: d for lang in source.languages for i in range(source.num_samples(lang))
               for d in source.dialogues(lang, i)}  # fmt: skip
    assert {question: dialogue.language for question, dialogue in trained.items()} == {
        row["prompt"]: language for row, language in zip(rows, ("zh", "en", "en"), strict=True)
    }
    for question, dialogue in trained.items():
        asked = session.ask(None, question).encoded.ids
        assert session.codec.encode(dialogue).ids[: len(asked)] == asked
