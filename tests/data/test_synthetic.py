"""Scenes are deterministic, held-out compositions stay out, and captions say what is there."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data.source.compositions import LANGUAGES
from data.source.synthetic import ARRANGEMENTS, PHRASINGS, Scene, SceneSource, Thing, is_right

RED_CIRCLE, BLUE_STAR = Thing("circle", "red", "large"), Thing("star", "blue", "small")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_sample_follows_from_seed_and_index_alone() -> None:
    one, other = SceneSource(50, seed=3), SceneSource(900, seed=3)  # neither the order of reading nor the number counts
    for index in (17, 4, 17):
        expected, got = other.read("en", index), one.read("en", index)
        assert got.captions == expected.captions
        assert np.array_equal(pixels(got.image), pixels(expected.image))
    assert not np.array_equal(pixels(one.picture(4)), pixels(SceneSource(50, seed=4).picture(4)))


def test_languages_share_pictures() -> None:
    source = SceneSource(5)
    zh, en = source.read("zh", 2), source.read("en", 2)
    assert np.array_equal(pixels(zh.image), pixels(en.image))
    assert zh.image_id == en.image_id and zh.captions != en.captions


def test_held_out_compositions_never_occur_in_training() -> None:
    held_out = {scene.name for scene in map(SceneSource(1500, split="held_out", seed=1).scene, range(1500))}
    assert len(held_out) == 1500  # a pool to retrieve from has every composition once
    for seed in (0, 1):
        training = SceneSource(6000, seed=seed)
        names = [training.scene(index).name for index in range(6000)]
        assert not held_out & set(names)
        assert {training.scene(index).split for index in range(6000)} == {"training"}


def test_a_fifth_of_the_compositions_is_held_out() -> None:
    things = [Thing(shape, colour, "small") for shape in ("star", "moon") for colour in ("red", "blue", "green")]
    scenes = [
        Scene((a, b), arrangement)
        for a in things
        for b in things
        for arrangement in ("pair in a row", "pair in a column")
    ]
    share = np.mean([scene.split == "held_out" for scene in scenes])
    assert 0.08 < share < 0.35  # 72 scenes: 0.2 within three deviations


def test_pictures_of_one_composition_differ() -> None:
    source = SceneSource(4000, objects=(1, 0, 0))
    names = [source.scene(index).name for index in range(4000)]
    name, count = Counter(names).most_common(1)[0]
    assert count > 1
    first, second = [index for index in range(4000) if names[index] == name][:2]
    assert not np.array_equal(pixels(source.picture(first)), pixels(source.picture(second)))


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        (
            "en",
            [
                "a large red circle to the left of a small blue star",
                "a large red circle and to its right a small blue star",
                "on the left is a large red circle, on the right is a small blue star",
            ],
        ),
        (
            "zh",
            [
                "一个红色的大圆形在一个蓝色的小五角星的左边",
                "一个红色的大圆形，右边有一个蓝色的小五角星",
                "左边是一个红色的大圆形，右边是一个蓝色的小五角星",
            ],
        ),
    ],
)
def test_captions_say_what_is_there(language: str, expected: list[str]) -> None:
    assert Scene((RED_CIRCLE, BLUE_STAR), "pair in a row").captions(language) == expected


def test_the_picture_shows_what_the_captions_say() -> None:
    red, blue = np.array([214, 40, 48]), np.array([38, 92, 214])
    source = SceneSource(3000, objects=(0, 1, 0))
    seen = 0
    for index in range(3000):
        scene = source.scene(index)
        colours = [thing.colour for thing in scene.things]
        if sorted(colours) != ["blue", "red"]:
            continue
        image = pixels(source.picture(index))
        where = {
            name: np.argwhere(np.abs(image - colour).sum(axis=2) < 60)
            for name, colour in (("red", red), ("blue", blue))
        }
        axis = 1 if scene.arrangement == "pair in a row" else 0
        first, second = (where[colour].mean(axis=0)[axis] for colour in colours)
        assert first < second, scene.name
        sizes = [thing.size for thing in scene.things]
        if scene.things[0].shape == scene.things[1].shape and sizes == ["small", "large"]:
            assert len(where[colours[0]]) < len(where[colours[1]]), scene.name
        seen += 1
    assert seen > 20


def test_is_right_accepts_every_phrasing_and_nothing_else() -> None:
    scene = Scene((RED_CIRCLE, BLUE_STAR), "pair in a row")
    swapped = Scene((BLUE_STAR, RED_CIRCLE), "pair in a row")
    for language in LANGUAGES:
        for caption in scene.captions(language):
            assert is_right(caption, scene, language)
            assert not is_right(caption, swapped, language)
            assert not is_right(caption, scene, "zh" if language == "en" else "en")
    # as tokenizers decode: spaces between characters, before commas; other punctuation and case
    assert is_right(" ".join("左边是一个红色的大圆形,右边是一个蓝色的小五角星"), scene, "zh")
    assert is_right("On the left is a large red circle , on the right is a small blue star", scene, "en")
    assert not is_right("", scene, "en")


def test_no_two_compositions_share_a_caption() -> None:
    things = (RED_CIRCLE, BLUE_STAR, Thing("moon", "orange", "small"))
    for language in LANGUAGES:
        said = Counter(
            caption
            for arrangement, places in ARRANGEMENTS.items()
            for turn in range(3)
            for caption in Scene((things[turn:] + things[:turn])[: len(places)], arrangement).captions(language)
        )
        assert set(said.values()) == {1}
        assert set(PHRASINGS[language]) == set(ARRANGEMENTS)


def test_write_pairs_gives_pictures_and_all_phrasings(tmp_path) -> None:
    source = SceneSource(6, seed=2)
    pairs = [json.loads(line) for line in source.write_pairs(tmp_path).read_text("utf-8").splitlines()]
    assert len(pairs) == 6
    for index, pair in enumerate(pairs):
        for language in LANGUAGES:
            assert pair[language] == source.scene(index).captions(language)
        with Image.open(tmp_path / pair["image"]) as image:
            assert np.array_equal(pixels(image), pixels(source.picture(index)))
        assert pair["image_id"] == source.read("en", index).image_id


def test_fingerprint_tells_sources_apart() -> None:
    same = SceneSource(5).fingerprint()
    assert SceneSource(5).fingerprint() == same
    json.dumps(same)
    for other in (
        SceneSource(6),
        SceneSource(5, seed=1),
        SceneSource(5, split="held_out"),
        SceneSource(5, image_size=48),
    ):
        assert other.fingerprint() != same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_scenes": 0}, "at least 1, got 0"),
        ({"split": "test"}, "'training' or 'held_out', got 'test'"),
        ({"objects": [0, 0, 0]}, r"three numbers from 0 up, got \[0.0, 0.0, 0.0\]"),
        ({"objects": [1, 1]}, "three numbers"),
        ({"languages": ["en", "fr"]}, "zh and en, not in 'fr'"),
        ({"num_scenes": 900, "split": "held_out", "objects": [1, 0, 0]}, "different compositions for 900 scenes"),
    ],
)
def test_bad_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SceneSource(**{"num_scenes": 10, **options})
