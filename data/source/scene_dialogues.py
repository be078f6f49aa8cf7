"""Synthetic scenes as dialogues: questions about the picture with every right answer, and questions without a picture.

What `experiment=smoke_stage_two` and the demo train on; see `data/source/synthetic.py` for the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.batch import Dialogue, Turn
from data.keyed import keyed_rng
from data.source import RawDialogue
from data.source.compositions import LANGUAGES, Split
from data.source.synthetic import COLOURS, SHAPES, Scene, SceneSource

QUESTIONS = {
    "zh": ("描述这张图片。", "图片里有什么？", "请说明图中的内容。"),
    "en": ("Describe the picture.", "What is in the picture?", "Say what the picture shows."),
}
REPHRASE = {"zh": "换一种说法：{}", "en": "Say it in other words: {}"}
ABOUT = {  # about the thing at a place, or about all of them
    "thing": {"zh": "{}是什么？", "en": "What is {}?"},
    "colour": {"zh": "{}的是什么颜色？", "en": "What colour is the one {}?"},
    "shape": {"zh": "{}的是什么形状？", "en": "What shape is the one {}?"},
    "count": {"zh": "图里有几个东西？", "en": "How many things are there?"},
}
NUMBERS = {"zh": ("一个", "两个", "三个"), "en": ("one", "two", "three")}
_ROW = {"zh": ("左边", "中间", "右边"), "en": ("on the left", "in the middle", "on the right")}
_COLUMN = {"zh": ("上面", "中间", "下面"), "en": ("at the top", "in the middle", "at the bottom")}
_ALONE = {"zh": ("图里",), "en": ("in the picture",)}


class SceneDialogues:
    """Sample `index` of a language: one scene, one question, and as candidates every right answer to it.

    ask               kinds of questions, relative to each other: caption, or one of `ABOUT`
    text_only_every   every so many-th sample has no picture and asks to say a caption in other words; 0: none
    all others        as `Compositions`
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
        ask: Mapping[str, float] | None = None,
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
        self.kinds = Kinds(ask or {"caption": 1}, ("caption", *ABOUT), source=name, seed=seed)

    def num_samples(self, language: str) -> int:
        return self.scenes.num_samples(language)

    def dialogues(self, language: str, index: int) -> tuple[Dialogue, ...]:
        scene = self.scenes.scene(index)
        captions = scene.captions(language)
        if self.is_text_only(index):
            question = REPHRASE[language].format(captions[0])
            return tuple(Dialogue((Turn(question, caption),), language) for caption in captions[1:])
        kind, number = self.kinds.draw(index, len(scene.things))
        if kind == "caption":
            questions = QUESTIONS[language]
            question, answers = questions[index % len(questions)], captions
        else:
            question, answers = about(scene, kind, number, language)
        return tuple(Dialogue((Turn(question, answer, 1),), language) for answer in answers)

    def descriptions(self, language: str, index: int) -> tuple[str, ...]:
        """What the picture shows, in every language of the source and every phrasing."""
        if self.is_text_only(index):
            return ()
        return tuple(text for name in self.languages for text in self.scenes.scene(index).captions(name))

    def is_text_only(self, index: int) -> bool:
        return self.text_only_every > 0 and index % self.text_only_every == self.text_only_every - 1

    def where(self, language: str, index: int) -> str:
        return f"{self.name}, {self.scenes.split} scene {index}"

    def read(self, language: str, index: int) -> RawDialogue:
        images = () if self.is_text_only(index) else (self.scenes.picture(index),)
        return RawDialogue(self.dialogues(language, index), images, key=f"scene {index}", shard=self.name)

    def fingerprint(self) -> Mapping[str, Any]:
        return {**self.scenes.fingerprint(), "kind": "scene dialogues", "text_only_every": self.text_only_every,
                "ask": self.kinds.weights,
                "questions": [list(map(list, QUESTIONS.values())), list(REPHRASE.values()), ABOUT]}  # fmt: skip


class Kinds:
    """Which kind of question sample `index` asks, about which of its things: the same in every language."""

    def __init__(self, weights: Mapping[str, float], known: Sequence[str], *, source: str, seed: int) -> None:
        self.weights = {kind: float(weight) for kind, weight in weights.items()}
        if set(self.weights) - set(known) or min(self.weights.values()) < 0 or not sum(self.weights.values()):
            raise ValueError(
                f"source {source!r}: ask weighs kinds of questions, {', '.join(known)}, against each other with "
                f"numbers from 0 up, got {self.weights}"
            )
        self._seed, self._total = seed, sum(self.weights.values())

    def draw(self, index: int, num_things: int) -> tuple[str, int]:
        rng = keyed_rng("kind of question", self._seed, index)
        share = [weight / self._total for weight in self.weights.values()]
        return str(rng.choice(list(self.weights), p=share)), int(rng.integers(num_things))


def places(arrangement: str, num_things: int, language: str) -> tuple[str, ...]:
    """Where each thing is, seen from the others."""
    if num_things == 1:
        return _ALONE[language]
    words = (_ROW if arrangement.endswith("row") else _COLUMN)[language]
    return words if num_things == 3 else (words[0], words[2])


def about(scene: Scene, kind: str, number: int, language: str) -> tuple[str, list[str]]:
    """A question of a kind, about thing `number` if about one, and every right answer."""
    question = ABOUT[kind][language].format(places(scene.arrangement, len(scene.things), language)[number])
    thing, english = scene.things[number], language == "en"
    answers = {
        "thing": ("a " if english else "一个") + thing.words(language),
        "colour": COLOURS[thing.colour][0] if english else COLOURS[thing.colour][1],
        "shape": SHAPES[thing.shape][0 if english else 1],
        "count": NUMBERS[language][len(scene.things) - 1],
    }
    return question, [answers[kind]]
