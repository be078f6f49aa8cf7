"""Hugging Face `datasets` as dialogues: pictures inside or beside, one or several, opened when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.batch import Dialogue, Turn
from data.source import BadSample
from data.source.hf_datasets import HfDataset
from tests.data.dialogue_files import everything, write_pictures
from tests.data.shard_files import jpeg

TEXTS = {"q": ["What?", "谁？", "Why?"], "a": ["A dog.", "狗。", "So."], "patient": ["p", "q", "p"]}
COLUMNS = {"image": "picture", "question": "q", "answer": "a"}
EXPECTED = [
    ("row 1", Dialogue((Turn("What?", "A dog.", 1),), "en")),
    ("row 3", Dialogue((Turn("Why?", "So."),), "en")),
    ("row 2", Dialogue((Turn("谁？", "狗。", 1),), "zh")),
]


def dataset(pictures: list, feature: Any) -> Any:
    from datasets import Dataset, Features, Value

    features = Features({**{name: Value("string") for name in TEXTS}, "picture": feature})
    return Dataset.from_dict({**TEXTS, "picture": pictures}, features=features)


def rows(source: Any) -> list[tuple[str, Dialogue]]:
    return [(where.rpartition(", ")[2], dialogue) for where, dialogue in everything(source)]


@pytest.mark.parametrize("kind", ["parquet", "parquet folder", "folder", "bytes"])
def test_pictures_inside(tmp_path: Path, kind: str) -> None:
    from datasets import Image, Value

    if kind == "bytes":
        data = dataset([jpeg(0), jpeg(1), None], Value("binary"))
    else:
        data = dataset([{"bytes": jpeg(0), "path": None}, {"bytes": jpeg(1), "path": None}, None], Image())
    (tmp_path / "set").mkdir()
    if kind == "folder":
        data.save_to_disk(tmp_path / "set")
    else:
        data.to_parquet(tmp_path / "set" / "part.parquet")
    path = tmp_path / "set" / ("part.parquet" if kind == "parquet" else "")
    source = HfDataset(path=str(path), columns=COLUMNS, cache_dir=str(tmp_path / "cache"))
    assert rows(source) == EXPECTED
    assert source.read("en", 0).images == (jpeg(0),) and source.read("zh", 0).images == (jpeg(1),)
    assert source.read("en", 1).images == ()
    grouped = HfDataset(
        path=str(path), columns=COLUMNS, cache_dir=str(tmp_path / "cache"), split="1/1", part="train", group="patient"
    )
    assert {grouped.group_of(n, i) for n in grouped.languages for i in range(grouped.num_samples(n))} in ({"p"}, {"q"})


def test_pictures_without_names_are_split_by_a_column_alone(tmp_path: Path) -> None:
    """In a table every picture is the first of its row: by that, all rows would be on one side."""
    from datasets import Image

    dataset([{"bytes": jpeg(n), "path": None} for n in (0, 1, 0)], Image()).save_to_disk(tmp_path / "set")
    options = {"path": str(tmp_path / "set"), "columns": COLUMNS, "split": "1/1", "part": "train"}
    with pytest.raises(ValueError, match="split=1/1 needs group: .*name a column"):
        HfDataset(**options)
    assert HfDataset(**options, group="patient").group == "patient"


SPLITS = {"train": [0, 1], "test": [2], "validation": [1, 2], "train_sft": [0]}  # rows of each


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("train-00000-of-00001", "test-00000-of-00001"), {"train": "train", "test": "test", "eval": "test"}),
        (("chest_train.2", "chest val"), {"train": "train", "validation": "validation", "dev": "validation"}),
        (("data/train-00000-of-00001", "data/train_sft-00000-of-00001"), {"train": "train", "train_sft": "train_sft"}),
        (("train/0000", "test/0000"), {"train": "train", "test": "test"}),
        (("data/train/0000", "data/test/0000", "other/train-0"), {"train": "train", "test": "test"}),
        (("strain", "contrast"), {"train": "train"}),  # words that only hold one
    ],
)
def test_a_folder_gives_the_split_asked_for(tmp_path: Path, files: tuple[str, ...], expected: dict[str, str]) -> None:
    """A data set cloned from the hub: rows of another split would be trained on without a word."""
    folder = tmp_path / "test_set"  # what lies above the folder tells nothing
    for file in files:
        write_split(folder / f"{file}.parquet", next((s for s in ("train_sft", "test", "val") if s in file), "train"))
    for hub_split, split in expected.items():
        assert answers(tmp_path, folder, hub_split=hub_split) == {TEXTS["a"][row] for row in SPLITS[split]}
    with pytest.raises(ValueError, match=r"test_set has no split 'holdout'; it has \['"):
        answers(tmp_path, folder, hub_split="holdout")


def test_files_that_tell_no_split_among_some_that_do(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name in ("train.parquet", "test.parquet"):
        write_split(folder / name, name.removesuffix(".parquet"))
    assert answers(tmp_path, folder / "*.parquet") == {"A dog.", "狗。"}  # a glob over several: hub_split
    assert answers(tmp_path, folder / "te*.parquet") == answers(tmp_path, folder / "test.parquet") == {"So."}
    for name in ("more.parquet", "train_and_test.parquet"):
        write_split(folder / name, "train")
        with pytest.raises(ValueError, match=rf"{name} tells no split, others tell \['test', 'train'\]: name"):
            answers(tmp_path, folder)
        (folder / name).unlink()


def write_split(file: Path, split: str) -> None:
    from datasets import Value

    file.parent.mkdir(parents=True, exist_ok=True)
    rows_of = SPLITS["validation" if split == "val" else split]
    dataset([None] * 3, Value("string")).select(rows_of).to_parquet(file)


def answers(tmp_path: Path, path: Path, **options: Any) -> set[str]:
    source = HfDataset(path=str(path), columns=COLUMNS, cache_dir=str(tmp_path / "cache"), **options)
    return {dialogue.turns[0].answer for _, dialogue in rows(source)}


@pytest.mark.parametrize("kind", ["parquet", "folder"])
@pytest.mark.parametrize("columns", [COLUMNS, {"question": "q", "answer": "a"}])
def test_no_picture_is_decoded_by_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, columns: dict[str, str]
) -> None:
    """Nor read, where it stands in a column that the map leaves out."""
    from datasets import Dataset, Features, Image, Value

    files = [{"bytes": jpeg(n), "path": None} for n in range(3)]
    named = {"picture": files, "mask": [{"bytes": b"broken", "path": None}] * 3, "language": ["fr", "en", "fr"]}
    pictures = {"picture": Image(), "mask": Image(), "language": Value("string")}
    features = Features({**{name: Value("string") for name in TEXTS}, **pictures})
    data = Dataset.from_dict({**TEXTS, **named}, features=features)
    (tmp_path / "set").mkdir()
    data.save_to_disk(tmp_path / "set") if kind == "folder" else data.to_parquet(tmp_path / "set" / "a.parquet")
    decoded: list[Any] = []
    monkeypatch.setattr(Image, "decode_example", lambda self, value, **_: decoded.append(value))
    parts: list[dict[str, Any]] = [{}, {"split": "1/1", "part": "test", "group": "patient"}]
    for part in parts:
        source = HfDataset(path=str(tmp_path / "set"), columns=columns, cache_dir=str(tmp_path / "cache"), **part)
        assert set(source.languages) <= {"en", "fr"}  # the row's own field, which no map has to name
        for language in source.languages:
            images = source.read(language, 0).images
            assert len(images) == ("image" in columns) and all(isinstance(image, bytes) for image in images)
    assert not decoded


def test_several_pictures_a_row_and_turns(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Image, List, Value

    said = [{"from": "human", "value": "<image><image> Which?"}, {"from": "gpt", "value": "Both."}]
    files = [{"bytes": jpeg(n), "path": None} for n in range(2)]
    features = Features({"pics": List(Image()), "said": List({"from": Value("string"), "value": Value("string")})})
    Dataset.from_dict({"pics": [files], "said": [said]}, features=features).save_to_disk(tmp_path / "set")
    source = HfDataset(path=str(tmp_path / "set"), columns={"image": "pics", "turns": "said"})
    assert rows(source) == [("row 1", Dialogue((Turn("Which?", "Both.", 2),), "en"))]
    assert source.read("en", 0).images == (jpeg(0), jpeg(1))


def test_paths_in_a_column_of_text_or_of_pictures(tmp_path: Path) -> None:
    from datasets import Value

    write_pictures(tmp_path / "set", ["a.jpg", "b.jpg"])
    dataset(["a.jpg", "b.jpg", None], Value("string")).to_parquet(tmp_path / "set" / "text.parquet")
    source = HfDataset(path=str(tmp_path / "set"), columns=COLUMNS, cache_dir=str(tmp_path / "cache"))
    assert rows(source) == EXPECTED and source.read("zh", 0).images == (jpeg(1),)

    write_pictures(tmp_path, ["outside.jpg"])
    paths = [{"bytes": None, "path": path} for path in ("a.jpg", str(tmp_path / "outside.jpg"), "none\0.jpg")]
    dataset(paths, {"bytes": Value("binary"), "path": Value("string")}).to_parquet(tmp_path / "set2" / "inside.parquet")
    source = HfDataset(
        path=str(tmp_path / "set2" / "*.parquet"),
        columns=COLUMNS,
        image_root=str(tmp_path / "set"),
        cache_dir=str(tmp_path / "cache"),
    )
    assert source.read("en", 0).images == (jpeg(0),)
    for language, index, reason in [("zh", 0, "picture outside image_root"), ("en", 1, "image cannot be read")]:
        with pytest.raises(BadSample) as bad:
            source.read(language, index)
        assert bad.value.reason == reason


def test_what_is_not_there(tmp_path: Path) -> None:
    from datasets import Value

    dataset(["a.jpg"] * 3, Value("string")).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"has no column \['pic'\]; it has .*'picture'"):
        HfDataset(path=str(tmp_path / "set"), columns={**COLUMNS, "image": "pic"})
    with pytest.raises(ValueError, match=r"has no column \['study'\]"):
        HfDataset(path=str(tmp_path / "set"), columns=COLUMNS, split="1/1", part="train", group="study")


def test_layouts_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    from datasets import Dataset

    (tmp_path / "empty").mkdir()
    for name, content in (("broken", b"PAR1garbage"), ("short", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.parquet").write_bytes(content)
    write_split(tmp_path / "mixed/a.parquet", "train")
    Dataset.from_dict({"q": [1], "z": ["b"]}).to_parquet(tmp_path / "mixed/b.parquet")
    for name in ("cut", "lost"):
        Dataset.from_dict({"q": ["a"], "a": ["b"]}).save_to_disk(tmp_path / name)
    (tmp_path / "cut/state.json").write_text("{")
    (tmp_path / "lost/data-00000-of-00001.arrow").unlink()
    for name, expected in (
        ("empty", r"is neither a folder of save_to_disk nor are there \*.parquet in it or in its data/"),
        ("broken", "cannot be read .*magic bytes"),
        ("short", "cannot be read .*0 bytes"),
        ("mixed", "cannot be read .*column"),
        ("cut", "cannot be read .*line 1"),
        ("lost", r"cannot be read .*00001\.arrow"),
        ("none/*.parquet", "there is no file at .*working directory"),
        ("none", "there is no file at .*working directory"),
    ):
        with pytest.raises(ValueError, match=f"(?s)hf_datasets: .*{expected}") as told:
            answers(tmp_path, tmp_path / name)
        assert str(tmp_path / name) in str(told.value)


def test_a_folder_with_brackets(tmp_path: Path) -> None:
    write_split(tmp_path / "set [1]/train.parquet", "train")
    assert answers(tmp_path, tmp_path / "set [1]") == answers(tmp_path, tmp_path / "set [1]/train.parquet")


def test_a_name_that_the_hub_does_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    for fault in (ConnectionError("Couldn't reach it"), datasets.exceptions.DatasetNotFoundError("no such set")):

        def refuse(*_: Any, fault: Exception = fault, **__: Any) -> None:
            raise fault

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        with pytest.raises(
            ValueError, match=rf"{fault}\); there is no file at owner/set .*a local folder.* HF_ENDPOINT"
        ):
            HfDataset(path="owner/set", columns=COLUMNS)
        for path in (
            "data/part.parquet",
            "./set",
            "../owner/set",
            "a/b/c",
            "https://example.com/set",
        ):  # never asked for
            with pytest.raises(ValueError, match="there is no file at") as told:
                HfDataset(path=path, columns=COLUMNS)
            assert str(fault) not in str(told.value)
