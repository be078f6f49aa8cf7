"""Scenes as dialogues: every candidate is right, text-only samples say the same scene, held-out ones stay held out."""

from __future__ import annotations

import pytest

from data.source.scene_dialogues import ABOUT, QUESTIONS, REPHRASE, SceneDialogues, about
from data.source.synthetic import Scene, Thing


def test_a_question_with_every_right_answer() -> None:
    source = SceneDialogues(30, text_only_every=5)
    for language in source.languages:
        asked = set()
        for index in range(30):
            found, captions = source.dialogues(language, index), source.scenes.scene(index).captions(language)
            sample = source.read(language, index)
            assert sample.dialogues == found and len(sample.images) == found[0].num_images
            assert {dialogue.language for dialogue in found} == {language}
            answers = [dialogue.turns[0].answer for dialogue in found]
            if index % 5 == 4:
                assert found[0].num_images == 0 and answers == captions[1:]
                assert found[0].turns[0].question == REPHRASE[language].format(captions[0])
            else:
                assert found[0].num_images == 1 and answers == captions
                assert sample.images[0].tobytes() == source.scenes.picture(index).tobytes()  # type: ignore[union-attr]
                asked |= {dialogue.turns[0].question for dialogue in found}
        assert asked == set(QUESTIONS[language])


def test_questions_about_things() -> None:
    things = (Thing("circle", "red", "small"), Thing("star", "blue", "large"), Thing("moon", "pink", "large"))
    expected = {
        ("thing", 0, "en"): ("What is at the top?", "a small red circle"),
        ("thing", 2, "zh"): ("下面是什么？", "一个粉色的大月牙"),
        ("colour", 1, "en"): ("What colour is the one in the middle?", "blue"),
        ("shape", 1, "zh"): ("中间的是什么形状？", "五角星"),
        ("count", 0, "en"): ("How many things are there?", "three"),
    }
    scene = Scene(things, "three in a column")
    for (kind, number, language), (question, answer) in expected.items():
        assert about(scene, kind, number, language) == (question, [answer])
    pair = Scene(things[:2], "pair in a row")
    assert about(pair, "shape", 1, "en") == ("What shape is the one on the right?", ["star"])
    alone = Scene(things[:1], "top left")
    assert about(alone, "colour", 0, "zh") == ("图里的是什么颜色？", ["红色"])


def test_kinds_of_questions_come_by_weight_and_the_same_in_both_languages() -> None:
    source = SceneDialogues(400, ask={"caption": 2, "colour": 1, "count": 1})
    kinds = []
    for index in range(400):
        question = source.dialogues("en", index)[0].turns[0].question
        kind = "caption" if question in QUESTIONS["en"] else "count" if "many" in question else "colour"
        kinds.append(kind)
        zh = source.dialogues("zh", index)[0].turns[0].question
        assert (zh in QUESTIONS["zh"]) == (kind == "caption") and (zh == ABOUT["count"]["zh"]) == (kind == "count")
        scene = source.scenes.scene(index)
        assert source.descriptions("en", index) == (*scene.captions("zh"), *scene.captions("en"))
    assert 160 < kinds.count("caption") < 240 and 70 < kinds.count("colour") < 130
    assert source.fingerprint() != SceneDialogues(400).fingerprint()
    with pytest.raises(ValueError, match="ask weighs kinds of questions, caption, thing"):
        SceneDialogues(5, ask={"size": 1})
    assert SceneDialogues(4, text_only_every=1).descriptions("zh", 0) == ()


def test_held_out_scenes_and_fingerprints() -> None:
    training, held_out = SceneDialogues(50), SceneDialogues(20, split="held_out", seed=1)
    names = {training.scenes.scene(i).name for i in range(50)}
    assert not names & {held_out.scenes.scene(i).name for i in range(20)}
    assert training.fingerprint() == SceneDialogues(50).fingerprint() != held_out.fingerprint()
    assert training.fingerprint() != SceneDialogues(50, text_only_every=2).fingerprint()
    assert held_out.where("zh", 3) == "scene_dialogues, held_out scene 3"
    with pytest.raises(ValueError, match="text_only_every is -1"):
        SceneDialogues(5, text_only_every=-1)
