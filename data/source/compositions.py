"""What sources of drawn scenes share: which composition sample `index` shows, and which ones are held out.

A scene is drawn from its *composition*, a few words that say everything its captions may say.  Whether a composition is
for training or held out follows from its hash alone: held-out compositions never occur in training, whatever the seed
and the number of samples.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

Split = Literal["training", "held_out"]
LANGUAGES = ("zh", "en")
HELD_OUT_SHARE = 0.2
COUNTS = (1, 2, 3)  # of objects in a scene


class Composition:
    """What a scene is drawn from."""

    things: tuple[Any, ...]

    @property
    def name(self) -> str:
        """Says the composition and nothing else: equal names, equal compositions."""
        raise NotImplementedError

    @property
    def split(self) -> Split:
        return "held_out" if _hash(self.name) < HELD_OUT_SHARE * 2**64 else "training"


SceneT = TypeVar("SceneT", bound=Composition)


class Compositions(Generic[SceneT]):
    """Random access to scenes: the same one for the same (seed, split, index).  A source writes `compose` for its own.

    num_scenes  pictures, and therefore samples of each language
    objects     how often a scene has one, two, three objects, relative to each other
    distinct    no composition twice, what a pool to retrieve from needs (default: on for held-out scenes)

    Raises ValueError: a value out of its range, or more distinct compositions than are found.
    """

    key = ""  # before the key of every draw: two kinds of scenes are drawn differently

    def __init__(
        self,
        num_scenes: int,
        *,
        name: str = "scenes",
        split: Split = "training",
        seed: int = 0,
        image_size: int = 64,
        objects: Sequence[float] = (1, 4, 0.5),
        languages: Sequence[str] = LANGUAGES,
        distinct: bool | None = None,
    ) -> None:
        if num_scenes < 1:
            raise ValueError(f"source {name!r}: num_scenes must be at least 1, got {num_scenes}")
        if split not in ("training", "held_out"):
            raise ValueError(f"source {name!r}: split must be 'training' or 'held_out', got {split!r}")
        for language in languages:
            check_language(language)
        self.name, self.seed, self.image_size = name, seed, image_size
        self.split: Split = split
        self.languages, self.objects = tuple(languages), tuple(map(float, objects))
        if len(self.objects) != len(COUNTS) or min(self.objects) < 0 or sum(self.objects) == 0:
            raise ValueError(
                f"source {name!r}: objects weighs scenes of one, two and three objects against each other and takes "
                f"three numbers from 0 up, got {list(self.objects)}"
            )
        self._num_scenes = num_scenes
        self._distinct = self._draw_distinct() if (split == "held_out" if distinct is None else distinct) else None

    def num_samples(self, language: str) -> int:
        return self._num_scenes if language in self.languages else 0

    def scene(self, index: int) -> SceneT:
        """The composition of sample `index`; random access, O(1)."""
        if not 0 <= index < self._num_scenes:
            raise IndexError(f"source {self.name!r} has {self._num_scenes} scenes, there is no scene {index}")
        if self._distinct is not None:
            return self._distinct[index]
        return self._draw(self.keyed_random("composition", index))

    def compose(self, count: int, random_: random.Random) -> SceneT:
        """Any scene of `count` things."""
        raise NotImplementedError

    def keyed_random(self, what: str, index: int) -> random.Random:
        return random.Random(_hash(f"{self.key}{what}/{self.split}/{self.seed}/{index}"))

    def fingerprint(self) -> Mapping[str, Any]:
        """Equal for sources that hold the same samples, with what a source says of its own rules."""
        return {
            "split": self.split,
            "seed": self.seed,
            "num_scenes": self._num_scenes,
            "image_size": self.image_size,
            "objects": list(self.objects),
            "languages": list(self.languages),
        }

    def _draw(self, random_: random.Random) -> SceneT:
        while True:
            (count,) = random_.choices(COUNTS, self.objects)
            scene = self.compose(count, random_)
            if len(set(scene.things)) == count and scene.split == self.split:
                return scene

    def _draw_distinct(self) -> list[SceneT]:
        random_, scenes = self.keyed_random("compositions", 0), dict[str, SceneT]()
        for _ in range(50 * self._num_scenes):
            if len(scenes) == self._num_scenes:
                break
            scene = self._draw(random_)
            scenes.setdefault(scene.name, scene)
        if len(scenes) < self._num_scenes:
            raise ValueError(
                f"source {self.name!r}: found only {len(scenes)} different compositions for {self._num_scenes} scenes; "
                "ask for fewer, or for more objects in a scene"
            )
        return list(scenes.values())


def check_language(language: str) -> None:
    if language not in LANGUAGES:
        raise ValueError(f"scenes are described in {' and '.join(LANGUAGES)}, not in {language!r}")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
