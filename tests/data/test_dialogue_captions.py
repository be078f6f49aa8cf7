"""Dialogues as image-text pairs: what a caption is, and that splits stay those of the dialogues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.source import BadSample
from data.source.columns import ColumnSource
from data.source.dialogue_captions import DialogueCaptions
from tests.data.dialogue_files import write_pictures

ROWS = [{"image": f"{n}.png", "patient_id": n // 2, "asked": "Is it round?", "answer": f"no {n}"} for n in range(40)]


def source(folder: Path, part: str, **kinds: object) -> ColumnSource:
    write_pictures(folder, [str(row["image"]) for row in ROWS])
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return ColumnSource(path=str(file), language="en", split="70/30", part=part, group="patient_id", **kinds)  # type: ignore[arg-type]


def test_a_caption_is_question_and_answer_or_the_answer_alone(tmp_path: Path) -> None:
    dialogues = source(tmp_path, "train", columns={"image": "image", "question": "asked", "answer": "answer"})
    asked, alone = DialogueCaptions(dialogues), DialogueCaptions(dialogues, question=False)
    assert asked.languages == ("en",) and asked.num_samples("en") == dialogues.num_samples("en") > 20
    assert asked.fingerprint() != alone.fingerprint()
    for index in range(asked.num_samples("en")):
        row = next(row for row in ROWS if row["image"] == dialogues.images_of("en", index)[0])
        sample = asked.read("en", index)
        assert sample.captions == (f"Is it round? {row['answer']}",)
        assert sample.image == (tmp_path / str(row["image"])).read_bytes()
        assert alone.read("en", index).captions == (row["answer"],)


def test_several_prompts_are_as_many_captions_but_one_answer(tmp_path: Path) -> None:
    prompts = {"en": ["Finding:", "It shows"]}
    dialogues = source(tmp_path, "test", columns={"image": "image", "answer": "answer"}, prompts=prompts)
    answer = dialogues.dialogues("en", 0)[0].turns[0].answer
    assert DialogueCaptions(dialogues).read("en", 0).captions == (f"Finding: {answer}", f"It shows {answer}")
    assert DialogueCaptions(dialogues, question=False).read("en", 0).captions == (answer,)


def test_a_dialogue_without_a_picture_is_a_bad_sample(tmp_path: Path) -> None:
    dialogues = source(tmp_path, "train", columns={"question": "asked", "answer": "answer"})
    with pytest.raises(BadSample, match=r"not one picture .*0 pictures"):
        DialogueCaptions(dialogues).read("en", 0)
