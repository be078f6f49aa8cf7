"""Each format gives the dialogues it means, and names what is malformed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.batch import Dialogue, Turn
from data.language import language_of
from data.records import Malformed
from data.source.columns import ColumnSource
from data.source.dialogue_shards import DialogueShards
from data.source.jsonl_turns import JsonlTurns
from data.source.llava_json import LlavaJson
from data.source.shards import ShardSource
from data.source.visualglm_json import VisualGLMJson
from data.source.xrayglm_json import XrayGLMJson
from tests.data.dialogue_files import everything, write_json, write_pictures
from tests.data.shard_files import bilingual_members, jpeg, write_tar

VISUALGLM = [
    {"img": "a.jpg", "prompt": "背景里有什么内容？", "label": "蒙蒙细雨。"},
    {"img": "b.jpg", "prompt": "What is it?", "label": " a dog "},
    {"prompt": "Who are you?", "label": "I am a model."},
]
VISUALGLM_DIALOGUES = [
    Dialogue((Turn("What is it?", "a dog", 1),), "en"),
    Dialogue((Turn("Who are you?", "I am a model."),), "en"),
    Dialogue((Turn("背景里有什么内容？", "蒙蒙细雨。", 1),), "zh"),
]


def dialogues(source: Any) -> list[Dialogue]:
    return [dialogue for _, dialogue in everything(source)]


# ------- formats


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_visualglm(tmp_path: Path, name: str) -> None:
    write_pictures(tmp_path, ["a.jpg", "b.jpg"])
    source = VisualGLMJson(path=str(write_json(tmp_path / name, VISUALGLM)))
    assert source.languages == ("en", "zh") and dialogues(source) == VISUALGLM_DIALOGUES
    assert [where for where, _ in everything(source)] == [f"{name}, row {n}" for n in (2, 3, 1)]
    assert source.read("zh", 0).images == (jpeg(0),) and source.read("en", 0).images == (jpeg(1),)
    assert source.read("en", 1).images == ()
    assert source.read("zh", 0).key == "row 1, a.jpg"


def test_half_a_character_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('[{"prompt": "Who\\ud83d?", "label": "I \\ud83d\\ude00 am.\\udc00"}]')
    source = VisualGLMJson(path=str(tmp_path / "data.json"), language="en")
    assert dialogues(source) == [Dialogue((Turn("Who?", "I 😀 am."),), "en")]


def test_a_byte_order_mark_a_glob_and_a_root_elsewhere(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", ["a.jpg", "b.jpg"])
    for n in range(2):
        file = write_json(tmp_path / f"{n}.json", VISUALGLM[n : n + 1])
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    source = VisualGLMJson(path=str(tmp_path / "*.json"), image_root=str(tmp_path / "pictures"), language="zh")
    assert source.num_samples("zh") == 2 and source.languages == ("zh",)
    assert source.read("zh", 1).images == (jpeg(1),)


def test_xrayglm_asks_with_every_prompt(tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", ["2_1.png", "3.png"])
    annotations = [{"image_id": "2_1", "caption": "心影正常。"}, {"image_id": 3, "caption": "No effusion."}]
    file = write_json(tmp_path / "openi.json", {"annotations": annotations})
    prompts = {"zh": ["诊断？", "描述。"], "en": ["Findings?"]}
    source = XrayGLMJson(path=str(file), image_root=str(tmp_path / "images"), prompts=prompts)
    expected = tuple(Dialogue((Turn(prompt, "心影正常。", 1),), "zh") for prompt in prompts["zh"])
    assert source.read("zh", 0).dialogues == source.dialogues("zh", 0) == expected
    assert source.read("en", 0).images == (jpeg(1),)
    with pytest.raises(ValueError, match="openi.json, row 1: field 'prompts': expected a prompt in 'zh'"):
        XrayGLMJson(path=str(file), image_root=str(tmp_path / "images"), prompts={"en": ["Findings?"]})


def test_llava(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.jpg", "b.jpg"])
    rows = [
        {
            "image": "a.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A dog."},
                {"from": "human", "value": "Colour?"},
                {"from": "gpt", "value": "Brown."},
            ],
        },
        {
            "images": ["a.jpg", "b.jpg"],
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Look: <image>"},
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": "<image> And this?"},
                {"role": "assistant", "content": "A cat."},
            ],
        },
        {"image": "b.jpg", "conversations": [{"from": "human", "value": "它？"}, {"from": "gpt", "value": "狗。"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    ]
    source = LlavaJson(path=str(write_json(tmp_path / "llava.json", rows)))
    assert dialogues(source) == [
        Dialogue((Turn("What is it?", "A dog.", 1), Turn("Colour?", "Brown.")), "en"),
        Dialogue((Turn("Be brief.\nLook:", "Yes.", 1), Turn("And this?", "A cat.", 1)), "en"),
        Dialogue((Turn("Hi", "Hello."),), "en"),
        Dialogue((Turn("它？", "狗。", 1),), "zh"),
    ]
    assert source.read("en", 1).images == (jpeg(0), jpeg(1))


def test_jsonl_turns(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.jpg", "b.jpg"])
    rows = [
        {
            "turns": [
                {"question": "", "images": ["a.jpg", "b.jpg"], "answer": "two"},
                {"question": "More?", "answer": "no"},
                {"question": "This?", "image": "a.jpg", "answer": "one"},
            ]
        },
        {"turns": [{"question": "1 + 1?", "answer": "2"}], "language": "zh"},
    ]
    source = JsonlTurns(path=str(write_json(tmp_path / "turns.jsonl", rows)))
    assert dialogues(source) == [
        Dialogue((Turn("", "two", 2), Turn("More?", "no"), Turn("This?", "one", 1)), "en"),
        Dialogue((Turn("1 + 1?", "2"),), "zh"),
    ]
    assert source.read("en", 0).images == (jpeg(0), jpeg(1), jpeg(0))


def test_columns(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.jpg"])
    rows = [{"file": "a.jpg", "q": "How many?", "a": 2, "lang": "fr"}, {"file": None, "q": "Oui?", "a": "non"}]
    columns = {"image": "file", "question": "q", "answer": "a", "language": "lang"}
    source = ColumnSource(path=str(write_json(tmp_path / "rows.jsonl", rows)), columns=columns)
    assert dialogues(source) == [
        Dialogue((Turn("Oui?", "non"),), "en"),
        Dialogue((Turn("How many?", "2", 1),), "fr"),
    ]
    asked = ColumnSource(
        path=str(tmp_path / "rows.jsonl"), columns={"answer": "a"}, language="en", prompts={"en": ["A?", "B?"]}
    )
    assert [d.turns[0].question for d in asked.dialogues("en", 0)] == ["A?", "B?"]
    for wrong, message in [
        ({"images": "file", "answer": "a"}, "columns.images means nothing.*perhaps image"),
        ({"image": "file", "question": "q"}, "expected answer"),
        ({"answer": "a"}, "who asks"),
        ({"turns": "t", "answer": "a"}, "instead of question and answer"),
    ]:
        with pytest.raises(ValueError, match=message):
            ColumnSource(path=str(tmp_path / "rows.jsonl"), columns=wrong)


def test_shards_become_dialogues(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", bilingual_members(range(3)))
    shards = ShardSource(str(tmp_path), caption_fields={"zh": "zh", "en": "en"})
    source = DialogueShards(shards, {"zh": ["描述？"], "en": ["What?", "Describe."]})
    found = source.read("en", 1)
    assert found.dialogues == tuple(
        Dialogue((Turn(question, "picture number 1", 1),), "en") for question in ("What?", "Describe.")
    )
    assert found.images == (jpeg(1),) and (found.key, found.shard) == ("00001", str(tmp_path / "a.tar"))
    assert source.dialogues("en", 1) == found.dialogues and not source.scans
    with pytest.raises(ValueError, match=r"captions in \['zh'\], prompts has \['en'\]"):
        DialogueShards(shards, {"en": ["What?"]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is it?", "en"),
        ("这是什么？", "zh"),
        ("CT 显示肺部感染", "zh"),
        ("The word 龙 means dragon", "en"),
        ("1", "en"),
    ],
)
def test_language_by_script(text: str, expected: str) -> None:
    assert language_of(text) == expected


# ------- what is malformed


LINE = {"from": "human", "value": "Hi"}
ANSWER = {"from": "gpt", "value": "Hello"}
SYSTEM = {"from": "system", "value": "Be brief."}
TURN = {"question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (VisualGLMJson, {"img": "a.jpg", "prompt": "q"}, r"'label': expected text, found no such field among \['img"),
        (VisualGLMJson, {"prompt": "q", "label": "  "}, "'label': expected text that is not empty"),
        (VisualGLMJson, {"prompt": "q", "label": float("nan")}, "'label': expected text, found"),
        (VisualGLMJson, {"prompt": "q", "label": None}, "'label': expected text, found null"),
        (VisualGLMJson, {"img": 3, "prompt": "q", "label": "a"}, "'img': expected a path, or a list of paths, found 3"),
        (VisualGLMJson, ["q", "a"], "expected an object with named fields"),
        (VisualGLMJson, {"img": "../a.jpg", "prompt": "q", "label": "a"}, "below image_root, found \"../a.jpg\""),
        (VisualGLMJson, {"img": "x/../../a.jpg", "prompt": "q", "label": "a"}, "below image_root"),
        (VisualGLMJson, {"img": "/etc/passwd", "prompt": "q", "label": "a"}, "below image_root"),
        (VisualGLMJson, {"img": "http://x.org/a.jpg", "prompt": "q", "label": "a"}, "addresses are not fetched"),
        (VisualGLMJson, {"prompt": "q", "label": "a", "language": 3}, "'language': expected a language"),
        (LlavaJson, {"conversations": []}, "'conversations': expected a list of what was said"),
        (LlavaJson, {"conversations": [LINE]}, "an answer last, found \"1 lines\""),
        (LlavaJson, {"conversations": [LINE, LINE]}, r"turn 1, field 'conversations\[0\]': expected human, then"),
        (LlavaJson, {"conversations": [{"from": "dog", "value": "x"}, ANSWER]}, r"turn 1, .*\[0\].from': expected one"),
        (LlavaJson, {"conversations": [{"from": ["human"], "value": "x"}, ANSWER]}, r"\[0\].from': expected one of"),
        (LlavaJson, {"conversations": [LINE, {"from": "gpt"}]}, r"turn 1, .*'conversations\[1\].value': expected text"),
        (LlavaJson, {"conversations": [SYSTEM, LINE, ANSWER, LINE, 3]}, r"turn 2, .*conversations\[4\]': expected an"),
        (LlavaJson, {"conversations": [SYSTEM, LINE, ANSWER, LINE, LINE]}, r"turn 2, .*conversations\[3\]': expected"),
        (LlavaJson, {"conversations": [LINE, ANSWER, LINE, {**ANSWER, "value": " "}]}, "turn 2, field 'answer': exp"),
        (LlavaJson, {"conversations": [{**LINE, "value": "<image>"}, ANSWER]}, "<image> 0 times, .*1 times"),
        (LlavaJson, {"conversations": [LINE, {**ANSWER, "value": "<image>"}]}, "an answer without <image>"),
        (LlavaJson, {"conversations": [LINE, {**ANSWER, "value": ""}]}, "turn 1, field 'answer'"),
        (JsonlTurns, {"turns": {}}, "'turns': expected a list of questions and answers"),
        (JsonlTurns, {"turns": [{"question": "q"}]}, "turn 1, field 'answer': expected text, found no such field"),
        (JsonlTurns, {"turns": [TURN, {"question": " ", "answer": "a"}]}, "turn 2, field 'question': expected text th"),
        (JsonlTurns, {"turns": [TURN, TURN, {**TURN, "answer": ""}]}, "turn 3, field 'answer': expected text that is"),
        (JsonlTurns, {"turns": [TURN, {**TURN, "images": [3]}]}, r"turn 2, field 'images': expected a path, .* found"),
        (JsonlTurns, {"turns": [TURN, "q"]}, r"turn 2, field '\(the turn\)': expected an object"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_named(tmp_path: Path, kind: Any, row: object, message: str) -> None:
    good = {"prompt": "q", "label": "a", "conversations": [LINE, ANSWER], "turns": [{"question": "q", "answer": "a"}]}
    file = write_json(tmp_path / "rows.jsonl", [good, good, row])
    with pytest.raises(ValueError, match=f"rows.jsonl, row 3: .*{message}"):
        kind(path=str(file))
    source = kind(path=str(file), malformed="skip")
    assert (source.num_samples("en"), source.num_malformed) == (2, 1)


def test_lines_that_are_no_json_are_skipped_and_counted_like_other_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.dumps({"prompt": "q", "label": f"a{n}"}) for n in range(3)]
    broken = ["{'prompt': 'q'}", '{"prompt": "q", "lab', '{"prompt": "q"}', lines[1] + ",", lines[0] + lines[1]]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([lines[0], broken[0], "", lines[1], *broken[1:], lines[2]]))
    with pytest.raises(
        ValueError, match="rows.jsonl, row 2: expected a JSON value .*Expecting property.*malformed=skip"
    ):
        VisualGLMJson(path=str(file))
    source = VisualGLMJson(path=str(file), malformed="skip")
    assert [source.dialogues("en", n)[0].turns[0].answer for n in range(3)] == ["a0", "a1", "a2"]
    assert [source.where("en", n) for n in range(3)] == [f"{file}, row {row}" for row in (1, 4, 9)]
    told = [record.getMessage() for record in caplog.records]
    assert source.num_malformed == 5 and "visualglm_json: 5 malformed rows left out" in told
    assert any(f"left out: {file}, row 5: expected a JSON value" in line for line in told)
    file.write_text("\n".join(broken))
    with pytest.raises(ValueError, match=r"no conversation in .*rows.jsonl \(5 malformed rows left out\)"):
        VisualGLMJson(path=str(file), malformed="skip")


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('[{"prompt": "q", ')
    (tmp_path / "line.jsonl").write_text('{"prompt": "q", "label": "a"}\n{"prompt"\n')
    (tmp_path / "gbk.json").write_bytes('[{"prompt": "问", "label": "答"}]'.encode("gbk"))
    (tmp_path / "number.json").write_text("3")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "deep.jsonl").write_text('{"prompt": "q", "label": "a"}\n' + '{"a":' * 100_000)
    for name, message in [
        ("cut.json", "cut.json: expected a JSON list, found"),
        ("line.jsonl", "line.jsonl, row 2: expected a JSON value"),
        ("gbk.json", "gbk.json: not UTF-8 at byte .*iconv -f GBK"),
        ("number.json", "number.json: expected a JSON list or JSON lines, found 3"),
        ("empty.json", "no conversation in .*empty.json"),
        ("none.json", "no file at"),
        ("deep.json", "deep.json: expected a JSON list, found .* within one another"),
        ("deep.jsonl", "deep.jsonl, row 2: expected a JSON value on a line, found .* within one another"),
    ]:
        with pytest.raises(ValueError, match=message):
            VisualGLMJson(path=str(tmp_path / name))
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert "field 'label': expected text, found lists or objects within one" in str(Malformed("label", "text", deep))
