"""A small domain of its own for the demo's fine-tuning: grey pictures of shapes with a finding to report, or none.

Colour does not count here, and what does, a dark spot or a crack in one of the shapes, occurs in no other scene.
A composition, its finding included, is held out by its hash alone (`compositions.py`).
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from data.batch import Dialogue, Turn
from data.source import RawDialogue
from data.source.compositions import LANGUAGES, Composition, Compositions, Split
from data.source.scene_dialogues import Kinds, places
from data.source.synthetic import ARRANGEMENTS, COLOURS, PHRASINGS, SHAPES, SIZES, Scene, Thing, draw

QUESTIONS = {
    "report": {"zh": "写出这张灰度图的报告。", "en": "Report on this grey picture."},
    "finding": {"zh": "有什么异常？", "en": "What is abnormal?"},
}
FINDINGS = {"spot": ("a dark spot", "黑点"), "crack": ("a crack", "裂纹")}
NOTHING = {"zh": "未见异常", "en": "nothing abnormal"}
NORMAL_SHARE = 0.3


@dataclass(frozen=True)
class GreyScene(Composition):
    """Shapes and sizes of a scene, and what is wrong with which of them; `finding` is None where nothing is."""

    things: tuple[tuple[str, str], ...]  # (shape, size)
    arrangement: str
    finding: tuple[str, int] | None

    @property
    def name(self) -> str:
        return f"{self.arrangement}: {self.things}: {self.finding}"

    def found(self, language: str) -> str:
        """The finding in words."""
        if self.finding is None:
            return NOTHING[language]
        kind, number = self.finding
        shape = SHAPES[self.things[number][0]][0 if language == "en" else 1]
        place = places(self.arrangement, len(self.things), language)[number]
        if language == "en":
            return f"{FINDINGS[kind][0]} in the {shape} {place}"
        return f"{place}的{shape}上有{FINDINGS[kind][1]}"

    def reports(self, language: str) -> list[str]:
        """What there is, in every phrasing, and the finding."""
        column = 0 if language == "en" else 1
        glue, end = (" ", ". ") if language == "en" else ("", "。")
        words = [f"{SIZES[size][column]}{glue}{SHAPES[shape][column]}" for shape, size in self.things]
        return [f"{phrase.format(*words)}{end}{self.found(language)}" for phrase in
                PHRASINGS[language][self.arrangement]]  # fmt: skip


class GreyScenes(Compositions[GreyScene]):
    """Sample `index` of a language: one grey scene, one question, and as candidates every right answer to it.

    ask          how often it is the whole report, how often the finding alone
    all others   as `Compositions`
    """

    scans = True
    key = "grey "

    def __init__(
        self,
        num_scenes: int,
        *,
        name: str = "grey_scenes",
        split: Split = "training",
        seed: int = 0,
        image_size: int = 64,
        objects: Sequence[float] = (1, 4, 0.5),
        languages: Sequence[str] = LANGUAGES,
        ask: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(num_scenes, name=name, split=split, seed=seed, image_size=image_size, objects=objects,
                         languages=languages)  # fmt: skip
        self.kinds = Kinds(ask or {"report": 1}, tuple(QUESTIONS), source=name, seed=seed)

    def picture(self, index: int) -> Image.Image:
        return draw_grey(self.scene(index), self.keyed_random("picture", index), self.image_size)

    def dialogues(self, language: str, index: int) -> tuple[Dialogue, ...]:
        scene = self.scene(index)
        kind, _ = self.kinds.draw(index, 1)
        answers = scene.reports(language) if kind == "report" else [scene.found(language)]
        question = QUESTIONS[kind][language]
        return tuple(Dialogue((Turn(question, answer, 1),), language) for answer in answers)

    def descriptions(self, language: str, index: int) -> tuple[str, ...]:
        """What the picture shows, in every language of the source and every phrasing."""
        return tuple(text for name in self.languages for text in self.scene(index).reports(name))

    def where(self, language: str, index: int) -> str:
        return f"{self.name}, {self.split} scene {index}"

    def read(self, language: str, index: int) -> RawDialogue:
        return RawDialogue(
            self.dialogues(language, index), (self.picture(index),), key=f"scene {index}", shard=self.name
        )

    def fingerprint(self) -> Mapping[str, Any]:
        rules = repr([QUESTIONS, FINDINGS, NOTHING, NORMAL_SHARE, SHAPES, SIZES, ARRANGEMENTS, PHRASINGS])
        return {
            **super().fingerprint(),
            "kind": "grey scenes",
            "ask": self.kinds.weights,
            "rules": hashlib.sha256(rules.encode()).hexdigest()[:16],
        }

    def compose(self, count: int, random_: random.Random) -> GreyScene:
        things = tuple((random_.choice(list(SHAPES)), random_.choice(list(SIZES))) for _ in range(count))
        arrangement = random_.choice([name for name, where in ARRANGEMENTS.items() if len(where) == count])
        normal = random_.random() < NORMAL_SHARE
        finding = None if normal else (random_.choice(list(FINDINGS)), random_.randrange(count))
        return GreyScene(things, arrangement, finding)


def draw_grey(scene: GreyScene, random_: random.Random, image_size: int) -> Image.Image:
    """RGB picture without colour; shades, places and sizes vary with `random_`."""
    things = tuple(Thing(shape, random_.choice(list(COLOURS)), size) for shape, size in scene.things)
    picture = draw(Scene(things, scene.arrangement), random_, image_size).convert("L")
    if scene.finding is not None:
        scale = 4
        mask = Image.new("L", (image_size * scale, image_size * scale))
        kind, number = scene.finding
        (x, y), (shape, size) = ARRANGEMENTS[scene.arrangement][number], scene.things[number]
        radius = image_size * scale * SIZES[size][2] * (0.72 if len(things) == 3 else 1.0)
        centre = (image_size * scale * x - (0.55 * radius if shape == "moon" else 0.0), image_size * scale * y)
        _mark(ImageDraw.Draw(mask), kind, centre, radius, random_)
        picture.paste(10, mask=mask.resize((image_size, image_size), Image.Resampling.LANCZOS))
    return picture.convert("RGB")


def _mark(
    pen: ImageDraw.ImageDraw, kind: str, centre: tuple[float, float], radius: float, random_: random.Random
) -> None:
    (x, y), turn = centre, random_.uniform(0, math.tau)
    if kind == "spot":
        x, y = x + 0.1 * radius * math.cos(turn), y + 0.1 * radius * math.sin(turn)
        pen.ellipse((x - 0.48 * radius, y - 0.48 * radius, x + 0.48 * radius, y + 0.48 * radius), fill=255)
    else:
        bends = [random_.uniform(-0.22, 0.22) * radius for _ in range(5)]
        line = [(x + bend, y + radius * (0.45 * k - 0.9)) for k, bend in enumerate(bends)]
        pen.line(line, fill=255, width=max(1, round(0.26 * radius)), joint="curve")
