"""Synthetic bilingual scenes: coloured shapes, where they are, and captions in Chinese and English that say so.

A first run needs pictures and captions, and this project ships none.  A scene is drawn from its *composition* (which
objects, which sizes and colours, how they are arranged), and everything a caption says is in the composition, so
whether a caption is right can be decided exactly.  Which compositions are held out: see `compositions.py`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from data.source import RawSample
from data.source.compositions import COUNTS, HELD_OUT_SHARE, Composition, Compositions, check_language

# name: (English, Chinese, RGB).  Far apart even for a picture of 64 pixels.
COLOURS = {
    "red": ("red", "红色", (214, 40, 48)),
    "orange": ("orange", "橙色", (245, 140, 24)),
    "yellow": ("yellow", "黄色", (250, 218, 40)),
    "green": ("green", "绿色", (44, 150, 66)),
    "blue": ("blue", "蓝色", (38, 92, 214)),
    "purple": ("purple", "紫色", (136, 58, 172)),
    "pink": ("pink", "粉色", (255, 158, 192)),
    "white": ("white", "白色", (252, 252, 252)),
}
SHAPES = {
    "circle": ("circle", "圆形"),
    "square": ("square", "正方形"),
    "triangle": ("triangle", "三角形"),
    "star": ("star", "五角星"),
    "heart": ("heart", "爱心"),
    "moon": ("moon", "月牙"),
}
# name: (English, Chinese, radius as a share of the picture's side)
SIZES = {"small": ("small", "小", 0.115), "large": ("large", "大", 0.18)}
OUTLINE = (24, 24, 28)  # the same for all colours: a shape is then the same lines whatever it is filled with
BACKGROUNDS = ((206, 220, 232), (222, 214, 200), (204, 224, 206), (228, 208, 216), (214, 214, 222))

# arrangement -> where its objects' centres are, in shares of the side
_PLACES = {
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
    "centre": (0.5, 0.5),
}
ARRANGEMENTS: dict[str, tuple[tuple[float, float], ...]] = {
    **{place: (centre,) for place, centre in _PLACES.items()},
    "pair in a row": ((0.26, 0.5), (0.74, 0.5)),
    "pair in a column": ((0.5, 0.26), (0.5, 0.74)),
    "three in a row": ((0.17, 0.5), (0.5, 0.5), (0.83, 0.5)),
    "three in a column": ((0.5, 0.17), (0.5, 0.5), (0.5, 0.83)),
}
_OF_COUNT = {n: tuple(name for name, places in ARRANGEMENTS.items() if len(places) == n) for n in COUNTS}

# {0}, {1}, {2} are the objects from left to right or from top to bottom, and are named in this order: so what is said
# first follows from the picture alone, not from a choice that the rest of the caption must keep to.
PHRASINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "pair in a row": (
            "a {0} to the left of a {1}",
            "a {0} and to its right a {1}",
            "on the left is a {0}, on the right is a {1}",
        ),
        "pair in a column": (
            "a {0} above a {1}",
            "a {0} and below it a {1}",
            "at the top is a {0}, at the bottom is a {1}",
        ),
        "three in a row": (
            "from left to right, a {0}, a {1} and a {2}",
            "on the left is a {0}, in the middle a {1}, on the right a {2}",
        ),
        "three in a column": (
            "from top to bottom, a {0}, a {1} and a {2}",
            "at the top is a {0}, in the middle a {1}, at the bottom a {2}",
        ),
    },
    "zh": {
        "pair in a row": (
            "一个{0}在一个{1}的左边",
            "一个{0}，右边有一个{1}",
            "左边是一个{0}，右边是一个{1}",
        ),
        "pair in a column": (
            "一个{0}在一个{1}的上方",
            "一个{0}，下方有一个{1}",
            "上面是一个{0}，下面是一个{1}",
        ),
        "three in a row": ("从左到右依次是{0}、{1}和{2}", "左边是{0}，中间是{1}，右边是{2}"),
        "three in a column": ("从上到下依次是{0}、{1}和{2}", "上面是{0}，中间是{1}，下面是{2}"),
    },
}
_PLACE_WORDS = {
    "top left": ("in the top left corner", "左上角"),
    "top right": ("in the top right corner", "右上角"),
    "bottom left": ("in the bottom left corner", "左下角"),
    "bottom right": ("in the bottom right corner", "右下角"),
    "centre": ("in the centre", "正中间"),
}
for _place, (_en, _zh) in _PLACE_WORDS.items():
    PHRASINGS["en"][_place] = (f"a {{0}} {_en}", f"{_en} there is a {{0}}")
    PHRASINGS["zh"][_place] = (f"一个{{0}}在{_zh}", f"{_zh}有一个{{0}}")


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    shape: str
    colour: str
    size: str

    def words(self, language: str) -> str:
        if language == "en":
            return f"{SIZES[self.size][0]} {COLOURS[self.colour][0]} {SHAPES[self.shape][0]}"
        return f"{COLOURS[self.colour][1]}的{SIZES[self.size][1]}{SHAPES[self.shape][1]}"


@dataclass(frozen=True)
class Scene(Composition):
    """A composition: its objects from left to right or from top to bottom, and how they are arranged."""

    things: tuple[Thing, ...]
    arrangement: str

    @property
    def name(self) -> str:
        return self.arrangement + ": " + ", ".join(f"{t.size} {t.colour} {t.shape}" for t in self.things)

    def captions(self, language: str) -> list[str]:
        """Every phrasing that says what is there, and no other."""
        check_language(language)
        words = [thing.words(language) for thing in self.things]
        return [pattern.format(*words) for pattern in PHRASINGS[language][self.arrangement]]


def is_right(caption: str, scene: Scene, language: str) -> bool:
    """Whether `caption` is one of the phrasings of `scene`, apart from case, punctuation and white space.

    A tokenizer's decoder puts spaces where it likes (between Chinese characters, before commas), so they do not count.
    """
    return _bare(caption) in {_bare(right) for right in scene.captions(language)}


class SceneJudge:
    """`is_right` for an evaluator, which has the sample: the captions of a sample are all phrasings of its scene."""

    def __call__(self, caption: str, sample: RawSample, language: str) -> bool:
        return _bare(caption) in {_bare(right) for right in sample.captions}


class SceneSource(Compositions[Scene]):
    """Scenes as a source of samples: sample `index` of a language, the same bytes for the same (seed, split, index).

    Both languages show the same pictures; the captions of a sample are all phrasings of its language.  `image_id` is
    the composition: two pictures of one composition have the same captions, so neither is a negative of the other.
    """

    def read(self, language: str, index: int) -> RawSample:
        scene = self.scene(index)
        return RawSample(
            image=self.picture(index),
            captions=tuple(scene.captions(language)),
            key=f"{self.split}-{self.seed}-{index:07d}",
            shard=self.name,
            image_id=scene.name,
        )

    def fingerprint(self) -> Mapping[str, Any]:
        rules = [SHAPES, COLOURS, SIZES, OUTLINE, BACKGROUNDS, ARRANGEMENTS, PHRASINGS, HELD_OUT_SHARE]
        return {
            **super().fingerprint(),
            "kind": "scenes",
            "distinct": self._distinct is not None,
            "rules": hashlib.sha256(json.dumps(rules, ensure_ascii=False).encode()).hexdigest()[:16],
        }

    def picture(self, index: int) -> Image.Image:
        return draw(self.scene(index), self.keyed_random("picture", index), self.image_size)

    def write_pairs(self, folder: str | Path) -> Path:
        """Pictures and PAIRS.jsonl as `scripts/pack_shards.py` reads them, all phrasings of each language in a list.

        Returns the path of the JSONL.
        """
        folder = Path(folder)
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        path = folder / "PAIRS.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for index in range(self._num_scenes):
                scene, relative = self.scene(index), f"pictures/{index:07d}.png"
                self.picture(index).save(folder / relative)
                captions = {language: scene.captions(language) for language in self.languages}
                pair = {"image": relative, **captions, "image_id": scene.name}
                file.write(json.dumps(pair, ensure_ascii=False) + "\n")
        return path

    def compose(self, count: int, random_: random.Random) -> Scene:
        things = tuple(
            Thing(random_.choice(list(SHAPES)), random_.choice(list(COLOURS)), random_.choice(list(SIZES)))
            for _ in range(count)
        )
        return Scene(things, random_.choice(_OF_COUNT[count]))


def draw(scene: Scene, random_: random.Random, image_size: int) -> Image.Image:
    """RGB picture of `scene`; places, sizes, shades and background vary a little with `random_`."""
    scale = 4  # drawn large and shrunk: smooth edges
    side = image_size * scale
    image = _background(random_, side)
    pen = ImageDraw.Draw(image)
    crowding = 0.72 if len(scene.things) == 3 else 1.0
    for thing, (x, y) in zip(scene.things, ARRANGEMENTS[scene.arrangement], strict=True):
        centre = (side * (x + random_.uniform(-0.012, 0.012)), side * (y + random_.uniform(-0.012, 0.012)))
        radius = side * SIZES[thing.size][2] * crowding * random_.uniform(0.97, 1.03)
        fill = tuple(min(255, max(0, value + random_.randint(-8, 8))) for value in COLOURS[thing.colour][2])
        pen.polygon(_outline(thing.shape, centre, radius), fill=fill, outline=OUTLINE, width=round(scale * 1.25))
    return image.resize((image_size, image_size), Image.Resampling.LANCZOS)


def _background(random_: random.Random, side: int) -> Image.Image:
    """A pale colour that darkens a little towards one side."""
    base, (dx, dy) = random_.choice(BACKGROUNDS), (random_.uniform(-14, 14), random_.uniform(-14, 14))
    corners = Image.new("RGB", (2, 2))
    for x, y in itertools.product((0, 1), repeat=2):
        shift = (dx * (x - 0.5) + dy * (y - 0.5)) + random_.uniform(-3, 3)
        corners.putpixel((x, y), tuple(int(value + shift) for value in base))
    return corners.resize((side, side), Image.Resampling.BILINEAR)


def _outline(shape: str, centre: tuple[float, float], radius: float) -> list[tuple[float, float]]:
    """Corners of `shape` around `centre`; all shapes cover about the same area."""
    x0, y0 = centre
    turn = math.tau
    if shape == "circle":
        points = [_polar(turn * k / 48, 1.0) for k in range(48)]
    elif shape == "square":
        points = [(sx * 0.9, sy * 0.9) for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    elif shape == "triangle":
        points = [(x, y + 0.16) for x, y in (_polar(turn * k / 3, 1.28) for k in range(3))]
    elif shape == "star":
        points = [_polar(turn * k / 10, 1.3 if k % 2 == 0 else 0.56) for k in range(10)]
    elif shape == "heart":
        points = []
        for k in range(48):
            t = turn * k / 48
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((16 * math.sin(t) ** 3 / 14, -(y + 2.5) / 14))
    else:
        assert shape == "moon", shape
        tip, hollow = math.radians(52), 0.7  # a disc of radius 1.25 less a disc around (hollow, 0) through the tips
        tip_x, tip_y = 1.25 * math.cos(tip), 1.25 * math.sin(tip)
        reach, tip_in = math.hypot(tip_x - hollow, tip_y), math.atan2(tip_y, tip_x - hollow)
        rim = [tip + (turn - 2 * tip) * k / 32 for k in range(33)]
        bay = [turn - tip_in - (turn - 2 * tip_in) * k / 32 for k in range(33)]
        points = [(1.25 * math.cos(a) + 0.2, 1.25 * math.sin(a)) for a in rim]
        points += [(hollow + reach * math.cos(a) + 0.2, reach * math.sin(a)) for a in bay]
    return [(x0 + radius * x, y0 + radius * y) for x, y in points]


def _polar(angle: float, radius: float) -> tuple[float, float]:
    """Clockwise from the top."""
    return radius * math.sin(angle), -radius * math.cos(angle)


def _bare(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if unicodedata.category(c)[0] in "LN")
