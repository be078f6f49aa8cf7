"""Synthetic scenes as dialogues: a question about the picture with every right answer, and questions without a picture.

What `experiment=smoke_stage_two` trains on; see `data/source/synthetic.py` for the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.batch import Dialogue, Turn
from data.source import RawDialogue
from data.source.synthetic import LANGUAGES, SceneSource, Split

QUESTIONS = {
    "zh": ("描述这张图片。", "图片里有什么？", "请说明图中的内容。"),
    "en": ("Describe the picture.", "What is in the picture?", "Say what the picture shows."),
}
REPHRASE = {"zh": "换一种说法：{}", "en": "Say it in other words: {}"}


class SceneDialogues:
    """Sample `index` of a language: one scene, one question, and as candidates every phrasing of its answer.

    text_only_every   every so many-th sample has no picture and asks to say a caption in other words; 0: none
    all others        as `SceneSource`
    """

    scans = True

    def __init__(
        self,
        num_scenes: int,
        *,
        name: str = "scene_dialogues",
        split: Split = "training",
        seed: int = 0,
        image_size: int = 64,
        objects: Sequence[float] = (1, 4, 1),
        languages: Sequence[str] = LANGUAGES,
        distinct: bool | None = None,
        text_only_every: int = 0,
    ) -> None:
        if text_only_every < 0:
            raise ValueError(f"source {name!r}: text_only_every is {text_only_every}; it is 0 or more")
        self.scenes = SceneSource(
            num_scenes,
            name=name,
            split=split,
            seed=seed,
            image_size=image_size,
            objects=objects,
            languages=languages,
            distinct=distinct,
        )
        self.name, self.languages, self.text_only_every = name, self.scenes.languages, text_only_every

    def num_samples(self, language: str) -> int:
        return self.scenes.num_samples(language)

    def dialogues(self, language: str, index: int) -> tuple[Dialogue, ...]:
        captions = self.scenes.scene(index).captions(language)
        if self.is_text_only(index):
            question = REPHRASE[language].format(captions[0])
            return tuple(Dialogue((Turn(question, caption),), language) for caption in captions[1:])
        questions = QUESTIONS[language]
        question = questions[index % len(questions)]
        return tuple(Dialogue((Turn(question, caption, 1),), language) for caption in captions)

    def is_text_only(self, index: int) -> bool:
        return self.text_only_every > 0 and index % self.text_only_every == self.text_only_every - 1

    def where(self, language: str, index: int) -> str:
        return f"{self.name}, {self.scenes.split} scene {index}"

    def read(self, language: str, index: int) -> RawDialogue:
        images = () if self.is_text_only(index) else (self.scenes.picture(index),)
        return RawDialogue(self.dialogues(language, index), images, key=f"scene {index}", shard=self.name)

    def fingerprint(self) -> Mapping[str, Any]:
        return {**self.scenes.fingerprint(), "kind": "scene dialogues", "text_only_every": self.text_only_every,
                "questions": [list(map(list, QUESTIONS.values())), list(REPHRASE.values())]}  # fmt: skip
