"""Pictures of conversations are opened late and below their root, and what is wrong with them is told at the start."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from data import picture_files
from data.batch import Dialogue, Turn
from data.decode import looks_whole, open_image
from data.source import BadSample, conversations
from data.source.visualglm_json import VisualGLMJson
from tests.data.dialogue_files import write_json, write_pictures
from tests.data.shard_files import jpeg

VISUALGLM = [
    {"img": "a.jpg", "prompt": "背景里有什么内容？", "label": "蒙蒙细雨。"},
    {"img": "b.jpg", "prompt": "What is it?", "label": " a dog "},
    {"prompt": "Who are you?", "label": "I am a model."},
]


def test_a_missing_picture_is_a_bad_sample_and_no_error_at_the_start(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["b.jpg"])
    source = VisualGLMJson(path=str(write_json(tmp_path / "data.json", VISUALGLM)))
    with pytest.raises(BadSample) as bad:
        source.read("zh", 0)
    assert (bad.value.reason, bad.value.key) == ("no image", "row 1, a.jpg") and bad.value.shard.endswith("data.json")
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(
        ValueError, match=r"none of 2 pictures looked at can be used.*image_root.*a.jpg \(row 1\): no image"
    ):
        VisualGLMJson(path=str(tmp_path / "data.json"))


def test_pictures_that_a_training_would_stumble_over_are_told_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As they lie about where X-rays come from: a picture that is missing, an export that is none, one cut short."""
    write_pictures(tmp_path, ["影像 2024.jpg", "fine.jpg"])
    (tmp_path / "IM0001.dcm").write_bytes(bytes(128) + b"DICM" + bytes(500))
    (tmp_path / "cut.jpg").write_bytes(jpeg(1)[:15])
    names = ["影像 2024.jpg", "IM0001.dcm", "fine.jpg", "missing.png", "cut.jpg"]
    file = write_json(tmp_path / "a.jsonl", [{"img": name, "prompt": "q", "label": "a"} for name in names])
    source = VisualGLMJson(path=str(file))
    (told,) = [record.getMessage() for record in caplog.records]
    assert "visualglm_json: 3 of 5 pictures looked at (60.0%) cannot be used; a training takes others instead" in told
    expected = (
        "IM0001.dcm (row 2): DICOM file (export it as PNG); missing.png (row 4): no image; cut.jpg (row 5): trunc"
    )
    assert expected in told
    with pytest.raises(BadSample) as bad:
        open_image(source.read("en", 1).images[0])
    assert bad.value.reason == "DICOM file (export it as PNG)"


def opened_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files looked into from now on."""
    names: list[str] = []
    monkeypatch.setattr(picture_files, "looks_whole", lambda path: names.append(path.name) or looks_whole(path))
    return names


def test_of_each_kind_some_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A picture that was cut in its middle has a header like any other; it comes after many that are missing."""
    write_pictures(tmp_path, [f"{n}.jpg" for n in range(40)])
    (tmp_path / "cut.jpg").write_bytes(jpeg(1, (200, 150))[:-100])
    names = [f"{n}.jpg" for n in range(60)] + ["cut.jpg"]
    VisualGLMJson(path=str(write_json(tmp_path / "a.jsonl", [{"img": n, "prompt": "q", "label": "a"} for n in names])))
    (told,) = [record.getMessage() for record in caplog.records]
    assert "21 of 61 pictures" in told and "20 no image, 1 truncated image." in told
    assert "44.jpg (row 45): no image; cut.jpg (row 61): truncated image" in told and "45.jpg" not in told


def test_a_picture_is_looked_at_once_and_by_the_first_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{n}.jpg" for n in range(64)]
    write_pictures(tmp_path, names)
    rows = [{"img": name, "prompt": f"q{n}", "label": "a"} for n in range(3) for name in names]
    file = write_json(tmp_path / "a.jsonl", rows)
    opened = opened_files(monkeypatch)
    for _ in range(2):  # the second is another source: the picture's own file has not changed
        VisualGLMJson(path=str(file))
        assert sorted(opened) == sorted(names)
    (tmp_path / "7.jpg").write_bytes(jpeg(1) + b"more")
    VisualGLMJson(path=str(file))
    assert opened[64:] == ["7.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(jpeg(2) + b"longer")
    logger = logging.getLogger("data")
    logger.setLevel(logging.ERROR)  # as train.run.start has it on other ranks
    try:
        VisualGLMJson(path=str(file))
    finally:
        logger.setLevel(logging.NOTSET)
    assert len(opened) == 66


def test_of_many_rows_some_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{n}.jpg" for n in range(19)]
    write_pictures(tmp_path, names)
    monkeypatch.setattr(conversations, "NUM_LOOKED_AT", 10)
    opened = opened_files(monkeypatch)
    VisualGLMJson(path=str(write_json(tmp_path / "a.jsonl", [{"img": n, "prompt": "q", "label": "a"} for n in names])))
    assert opened == names[::2]


def test_pictures_with_more_behind_their_end_hold_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(8):
        (tmp_path / f"{n}.jpg").write_bytes(jpeg(n) + bytes(100))
    decoded: list[Path] = []
    monkeypatch.setattr(picture_files, "check_whole", decoded.append)
    monkeypatch.setattr(picture_files, "NUM_FALSE_ALARMS", 3)
    monkeypatch.setattr(picture_files, "_false_alarms", [])
    rows = [{"img": f"{n}.jpg", "prompt": "q", "label": "a"} for n in range(8)]
    VisualGLMJson(path=str(write_json(tmp_path / "a.jsonl", rows)))
    assert [path.name for path in decoded] == ["0.jpg", "1.jpg", "2.jpg"]


def test_a_link_out_of_the_root_is_not_followed(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["outside.jpg", "root/b.jpg"])
    (tmp_path / "root" / "a.jpg").symlink_to(tmp_path / "outside.jpg")
    source = VisualGLMJson(path=str(write_json(tmp_path / "root" / "data.json", VISUALGLM)))
    with pytest.raises(BadSample, match="picture outside image_root"):
        source.read("zh", 0)


def test_words_open_nothing(tmp_path: Path) -> None:
    """VisualGLM opens what stands between <img> and </img> in the text of anybody."""
    write_pictures(tmp_path, ["a.jpg"])
    text = f"<img>{tmp_path / 'a.jpg'}</img> file://{tmp_path / 'a.jpg'}"
    source = VisualGLMJson(path=str(write_json(tmp_path / "data.json", [{"prompt": text, "label": "a"}])))
    found = source.read("en", 0)
    assert found.images == () and found.dialogues == (Dialogue((Turn(text, "a"),), "en"),)


def test_pictures_are_opened_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, [f"{n}.jpg" for n in range(200)])
    rows = [{"img": f"{n}.jpg", "prompt": "q", "label": "a"} for n in range(200)]
    opened = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read_bytes(path))
    source = VisualGLMJson(path=str(write_json(tmp_path / "data.json", rows)))
    [source.dialogues("en", i) for i in range(200)]
    assert len(opened) <= 1
    source.read("en", 7)
    assert opened[-1] == "7.jpg" and len(opened) <= 2
