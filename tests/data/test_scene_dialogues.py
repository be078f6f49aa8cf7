"""Scenes as dialogues: every candidate is right, text-only samples say the same scene, held-out ones stay held out."""

from __future__ import annotations

import pytest

from data.source.scene_dialogues import QUESTIONS, REPHRASE, SceneDialogues


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


def test_held_out_scenes_and_fingerprints() -> None:
    training, held_out = SceneDialogues(50), SceneDialogues(20, split="held_out", seed=1)
    names = {training.scenes.scene(i).name for i in range(50)}
    assert not names & {held_out.scenes.scene(i).name for i in range(20)}
    assert training.fingerprint() == SceneDialogues(50).fingerprint() != held_out.fingerprint()
    assert training.fingerprint() != SceneDialogues(50, text_only_every=2).fingerprint()
    assert held_out.where("zh", 3) == "scene_dialogues, held_out scene 3"
    with pytest.raises(ValueError, match="text_only_every is -1"):
        SceneDialogues(5, text_only_every=-1)
