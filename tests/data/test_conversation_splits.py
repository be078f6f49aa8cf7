"""What must stay together is on one side: by a group's name, else by the picture, in dialogues and shards alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from data.picture_sides import warn_of_shared
from data.source.shards import ShardSource
from data.source.visualglm_json import VisualGLMJson
from data.split import held_out_share, part_of
from tests.data.dialogue_files import write_json, write_pictures
from train.config import CONFIG_DIR, build

PARTS = ("train", "test")


def rows(number: int) -> list[dict]:
    """Three rows a patient, two of them on one picture."""
    return [
        {"img": f"{n // 3}_{n % 3 // 2}.jpg", "prompt": "q", "label": f"row {n}", "patient_id": n // 3}
        for n in range(number)
    ]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_pictures(tmp_path, [f"{n}_{k}.jpg" for n in range(40) for k in range(2)])
    return write_json(tmp_path / "data.json", rows(120))


def labels(source: Any) -> list[str]:
    return [source.dialogues("en", i)[0].turns[0].answer for i in range(source.num_samples("en"))]


@pytest.mark.parametrize("group", ["patient_id", None])
def test_no_group_is_on_both_sides(file: Path, group: str | None) -> None:
    parts = {part: VisualGLMJson(path=str(file), split="75/25", part=part, group=group) for part in PARTS}
    found = {part: labels(source) for part, source in parts.items()}
    assert sorted(found["train"] + found["test"]) == sorted(row["label"] for row in rows(120))
    name = group or "img"
    groups = {row["label"]: str(row[name]) for row in rows(120)}
    sides = {part: {groups[label] for label in labels} for part, labels in found.items()}
    assert not sides["train"] & sides["test"]
    first_byte = {name: sha256(name.encode()).digest()[0] for name in groups.values()}
    expected = {name for name, byte in first_byte.items() if byte < 64}
    assert sides["test"] == expected
    assert parts["train"].fingerprint() != parts["test"].fingerprint()


def test_more_rows_move_none(tmp_path: Path, file: Path) -> None:
    before = labels(VisualGLMJson(path=str(file), split="75/25", part="test", group="patient_id"))
    write_json(file, rows(60))
    after = labels(VisualGLMJson(path=str(file), split="75/25", part="test", group="patient_id"))
    assert after and after == [label for label in before if int(label.split()[1]) < 60]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "80"}, "expected part train or test"),
        ({"split": "80", "part": "test"}, "expected train/test like 80/20"),
        ({"split": "80/20", "part": "valid"}, "part 'valid'"),
        ({"group": "patient_id"}, "visualglm_json: .* say nothing without split"),
        ({"split": "80/20", "part": "train", "group": "patient"}, "row 1: field 'patient': expected the group's name"),
        ({"split": "100/0", "part": "test"}, "no conversation in part 'test' of split 100/0"),
    ],
)
def test_impossible_splits_are_refused(file: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisualGLMJson(path=str(file), **options)


# What rows with several pictures, and people, can do to a split by picture or by patient
SEVERAL = [{"img": [f"{n}_0.jpg", f"{n}_1.jpg"], "prompt": "compare", "label": f"row {n}"} for n in range(40)]
ALONE = [{"img": f"./{n}_1.jpg", "prompt": "q", "label": f"alone {n}"} for n in range(40)]


def test_a_picture_that_would_be_on_both_sides_is_refused_by_name(tmp_path: Path, file: Path) -> None:
    write_json(file, SEVERAL)
    VisualGLMJson(path=str(file), split="75/25", part="train")
    write_json(file, SEVERAL + ALONE)
    for part in PARTS:
        with pytest.raises(ValueError) as caught:
            VisualGLMJson(path=str(file), split="75/25", part=part)
        told = str(caught.value)
        number = int(told.split(" pictures are in both parts of split 75/25: ")[0].split()[-1])
        sides = [
            {part_of(f"{n}_0.jpg\0{n}_1.jpg", 0.25), part_of(f"./{n}_1.jpg", 0.25)} == set(PARTS) for n in range(40)
        ]
        assert number == sum(sides) > 5
        assert "_1.jpg (row " in told and told.count("_1.jpg") == 5 and "set group to a field" in told
    write_json(file, [{**row, "case": n % 40} for n, row in enumerate(SEVERAL + ALONE)])
    VisualGLMJson(path=str(file), split="75/25", part="train", group="case")


def test_a_picture_of_two_patients_is_pointed_out(tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = [{"img": f"{n}_0.jpg", "prompt": "q", "label": "a", "patient_id": n} for n in range(40)]
    VisualGLMJson(path=str(write_json(file, kept)), split="75/25", part="train", group="patient_id")
    assert not caplog.records
    train = next(n for n in range(40) if part_of(str(n), 0.25) == "train")
    test = next(n for n in range(40) if part_of(str(n), 0.25) == "test")
    write_json(file, [*kept, {**kept[train], "patient_id": test}])
    source = VisualGLMJson(path=str(file), split="75/25", part="train", group="patient_id")
    (record,) = caplog.records
    assert record.levelname == "WARNING" and source.num_samples("en") > 20
    assert f"1 pictures are in both parts of split 75/25: {train}_0.jpg (row {train + 1}), since" in record.getMessage()


class Evaluator:
    name = "answers"

    def __init__(self, source: Any):
        self.source = source


def test_an_evaluator_that_asks_about_what_is_trained_on_is_pointed_out(
    tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    apart = {part: VisualGLMJson(path=str(file), split="75/25", part=part, group="patient_id") for part in PARTS}
    warn_of_shared({"mine": apart["train"]}, [Evaluator(apart["test"]), Evaluator(object()), object()])
    assert not caplog.records
    other = write_json(tmp_path / "test.json", rows(3))
    warn_of_shared({"mine": VisualGLMJson(path=str(file))}, [Evaluator(VisualGLMJson(path=str(other)))])
    (record,) = caplog.records
    expected = (
        "train.evaluator.answers asks about 2 pictures that data.source.mine trains on (0_0.jpg (row 1), 0_1.jpg ("
    )
    assert expected in record.getMessage()
    (tmp_path / "elsewhere").mkdir()  # the same name below another root is another picture
    write_pictures(tmp_path / "elsewhere", ["0_0.jpg", "0_1.jpg"])
    caplog.clear()
    moved = VisualGLMJson(path=str(other), image_root=str(tmp_path / "elsewhere"))
    warn_of_shared({"mine": VisualGLMJson(path=str(file))}, [Evaluator(moved)])
    assert not caplog.records


def test_packed_shards_are_split_the_same_way(tmp_path: Path, file: Path, repo_root: Path) -> None:
    """So that stage one, trained on shards, has not seen what fine-tuning holds out."""
    from scripts.pack_shards import main

    pairs = [{"image": row["img"], "en": row["label"], "patient_id": row["patient_id"]} for row in rows(120)]
    write_json(tmp_path / "pairs.jsonl", pairs)
    options = ["--split", "75/25", "--group", "patient_id", "--workers", "1"]
    assert not main([str(tmp_path / "pairs.jsonl"), str(tmp_path / "shards"), *options])
    for part in PARTS:
        shards = ShardSource(str(tmp_path / "shards" / part), caption_fields={"en": "en"})
        captions = {shards.read("en", i).captions[0] for i in range(shards.num_samples("en"))}
        expected = set(labels(VisualGLMJson(path=str(file), split="75/25", part=part, group="patient_id")))
        assert captions == expected


def test_the_share() -> None:
    assert held_out_share("80/20") == pytest.approx(0.2) and held_out_share("3/1") == 0.25
    found = [part_of(f"patient {n}", 0.2) for n in range(5000)]
    assert abs(found.count("test") / 5000 - 0.2) < 0.02


# ------- real data


def real(shared_dir: Path, name: str, part: str) -> Any:
    node = OmegaConf.load(CONFIG_DIR / "data" / "source" / f"{name}.yaml")[name]
    node.path = str(shared_dir.joinpath("data", *Path(node.path).parts[-2:]))  # its start depends on QUEQIAO_SHARED
    node.part = part
    return build(node)


def records(shared_dir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (shared_dir / "data" / name).read_text("utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "file", "group", "picked"),
    [
        ("xray_vqa", "xray_vqa/qa.jsonl", "image_id", lambda row: True),
        ("xray_report", "xray/records.jsonl", "patient_id", lambda row: bool(row["report_en"].strip())),
    ],
)
def test_no_patient_and_no_picture_of_the_x_rays_is_on_both_sides(
    shared_dir: Path, name: str, file: str, group: str, picked: Callable[[dict], bool]
) -> None:
    sources = {part: real(shared_dir, name, part) for part in PARTS}
    kept = [row for row in records(shared_dir, file) if picked(row)]
    group_of = {row["image"]: row[group] for row in records(shared_dir, file)}
    groups: dict[str, set[str]] = {}
    pictures: dict[str, set[str]] = {}
    contents: dict[str, set[bytes]] = {}
    for part, source in sources.items():
        numbers = range(source.num_samples("en"))
        groups[part] = {source.group_of("en", i) for i in numbers}
        pictures[part] = {source.images_of("en", i)[0] for i in numbers}
        contents[part] = {sha256(source.read("en", i).images[0]).digest() for i in numbers}
        assert {group_of[picture] for picture in pictures[part]} == groups[part]
    assert sum(source.num_samples("en") for source in sources.values()) == len(kept)
    for sides in (groups, pictures, contents):
        assert sides["train"] and sides["test"] and not sides["train"] & sides["test"]
    assert groups["train"] | groups["test"] == {row[group] for row in kept}
