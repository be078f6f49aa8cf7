"""Grey scenes: what the report says is what was drawn, held-out compositions stay held out."""

from __future__ import annotations

import random

import numpy as np
import pytest

from data.source.grey_scenes import NORMAL_SHARE, QUESTIONS, GreyScene, GreyScenes, draw_grey


def test_reports_say_the_finding_and_nothing_else() -> None:
    things = (("circle", "small"), ("star", "large"))
    scene = GreyScene(things, "pair in a row", ("crack", 1))
    assert scene.reports("en")[0] == "a small circle to the left of a large star. a crack in the star on the right"
    assert scene.reports("zh")[2] == "左边是一个小圆形，右边是一个大五角星。右边的五角星上有裂纹"
    normal = GreyScene(things[:1], "centre", None)
    assert normal.reports("zh") == ["一个小圆形在正中间。未见异常", "正中间有一个小圆形。未见异常"]
    assert GreyScene(things[:1], "centre", ("spot", 0)).found("en") == "a dark spot in the circle in the picture"


@pytest.mark.parametrize("kind", ["spot", "crack"])
def test_a_finding_darkens_its_own_thing_alone(kind: str) -> None:
    things = (("circle", "large"), ("square", "large"))
    plain, marked = (
        np.asarray(draw_grey(GreyScene(things, "pair in a row", finding), random.Random(5), 64)).astype(int)
        for finding in (None, (kind, 1))
    )
    assert (marked[..., 0] == marked[..., 2]).all(), "no colour"
    darker = (plain - marked)[..., 0]
    assert darker.min() >= -12 and darker.max() > 60, "dark on any shade but the outline's"
    rows, columns = np.nonzero(darker > 20)
    assert len(rows) >= 10 and abs(columns - 0.74 * 64).max() < 0.18 * 64 and abs(rows - 32).max() < 0.2 * 64


def test_samples_are_the_same_in_both_languages_and_every_time() -> None:
    source, again = GreyScenes(200, ask={"report": 1, "finding": 1}), GreyScenes(200, ask={"report": 1, "finding": 1})
    asked = {"report": 0, "finding": 0}
    for index in range(200):
        zh, en = source.dialogues("zh", index), source.dialogues("en", index)
        kind = next(kind for kind, texts in QUESTIONS.items() if texts["zh"] == zh[0].turns[0].question)
        assert QUESTIONS[kind]["en"] == en[0].turns[0].question and zh == again.dialogues("zh", index)
        scene = source.scene(index)
        expected = scene.reports("en") if kind == "report" else [scene.found("en")]
        assert [dialogue.turns[0].answer for dialogue in en] == expected
        assert source.descriptions("en", index) == (*scene.reports("zh"), *scene.reports("en"))
        asked[kind] += 1
    assert 70 < asked["report"] < 130
    read = source.read("zh", 3)
    assert read.images[0].tobytes() == again.read("en", 3).images[0].tobytes()  # type: ignore[union-attr]
    assert sum(source.scene(i).finding is None for i in range(200)) == pytest.approx(200 * NORMAL_SHARE, abs=30)


def test_held_out_scenes_fingerprints_and_errors() -> None:
    training, held_out = GreyScenes(500), GreyScenes(100, split="held_out", seed=1)
    names = {held_out.scene(i).name for i in range(100)}
    assert len(names) == 100 and not names & {training.scene(i).name for i in range(500)}
    assert training.fingerprint() == GreyScenes(500).fingerprint() != held_out.fingerprint()
    assert training.fingerprint() != GreyScenes(500, ask={"finding": 1}).fingerprint()
    assert held_out.where("zh", 3) == "grey_scenes, held_out scene 3"
    with pytest.raises(ValueError, match="num_scenes must be at least 1"):
        GreyScenes(0)
    with pytest.raises(ValueError, match="source 'grey_scenes': objects weighs .* three numbers from 0 up"):
        GreyScenes(5, objects=(1, 2))
    with pytest.raises(IndexError, match="there is no scene 500"):
        training.scene(500)
    with pytest.raises(ValueError, match="ask weighs kinds of questions, report, finding"):
        GreyScenes(5, ask={"colour": 1})
    with pytest.raises(ValueError, match="different compositions for 400 scenes"):
        GreyScenes(400, split="held_out", objects=(1, 0, 0))
