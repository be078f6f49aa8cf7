"""Retrieval and VQA sets in the layouts they are published in: every format gives the pairs it means."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from data.batch import Dialogue, Turn
from data.source import BadSample
from data.source.coco_cn import CocoCn
from data.source.dialogue_shards import DialogueShards
from data.source.flickr30k_cn import Flickr30kCn, joined
from data.source.jsonl_pairs import JsonlPairs
from data.source.karpathy import KarpathyJson
from data.source.muge import MugeTable
from data.source.pairs import PairSource
from data.source.vqa_v2 import VqaV2
from tests.data.shard_files import jpeg


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def pairs(source: PairSource, language: str) -> dict[str, tuple[str, ...]]:
    """key -> captions, of all that can be read"""
    samples = [source.read(language, index) for index in range(source.num_samples(language))]
    return {sample.key: sample.captions for sample in samples}


# ------------------------------------------------------------------------------------------------------------ Karpathy


@pytest.fixture
def karpathy(tmp_path: Path) -> Path:
    images = [
        {"filepath": "val2014", "sentids": [770337, 771687], "filename": "COCO_val2014_000000391895.jpg", "imgid": 0,
         "split": "test", "cocoid": 391895, "sentences": [
            {"tokens": ["a", "man"], "raw": "A man with a red helmet on a small moped.", "imgid": 0, "sentid": 770337},
            {"tokens": ["man"], "raw": "Man riding a motor bike on a dirt road.", "imgid": 0, "sentid": 771687}]},
        {"filepath": "train2014", "sentids": [1], "filename": "COCO_train2014_000000057870.jpg", "imgid": 40504,
         "split": "train", "cocoid": 57870, "sentences": [{"raw": "A restaurant.", "sentid": 1}]},
        {"filepath": "val2014", "sentids": [2], "filename": "COCO_val2014_000000000042.jpg", "imgid": 3,
         "split": "restval", "cocoid": 42, "sentences": [{"raw": "Shoes and a dog.", "sentid": 2}]},
        {"filename": "1007129816.jpg", "sentids": [3], "imgid": 9, "split": "val", "sentences": [{"raw": "The man."}]},
    ]  # fmt: skip
    for number, image in enumerate(images):
        write(tmp_path / "images" / str(image.get("filepath", "")) / str(image["filename"]), jpeg(number))
    return write(tmp_path / "dataset_coco.json", json.dumps({"images": images, "dataset": "coco"}))


def test_karpathys_splits(karpathy: Path) -> None:
    root = str(karpathy.parent / "images")
    test = KarpathyJson(path=str(karpathy), image_root=root)
    assert pairs(test, "en") == {
        "val2014/COCO_val2014_000000391895.jpg": (
            "A man with a red helmet on a small moped.", "Man riding a motor bike on a dirt road."
        )
    }  # fmt: skip
    assert test.read("en", 0).image == jpeg(0)
    training = KarpathyJson(path=str(karpathy), image_root=root, split=["train", "restval"])
    assert list(pairs(training, "en").values()) == [("A restaurant.",), ("Shoes and a dog.",)]
    flickr = KarpathyJson(path=str(karpathy), image_root=root, split="val")
    assert pairs(flickr, "en") == {"1007129816.jpg": ("The man.",)}, "Flickr's have no filepath"
    assert test.fingerprint() != training.fingerprint()
    with pytest.raises(ValueError, match="has no split dev; it has restval, test, train, val"):
        KarpathyJson(path=str(karpathy), image_root=root, split="dev")


def test_a_picture_outside_its_root_is_refused(karpathy: Path) -> None:
    text = karpathy.read_text().replace('"1007129816.jpg"', '"../secret.jpg"')
    write(karpathy, text)
    with pytest.raises(ValueError, match=r"image 4: field 'picture': expected a path below image_root"):
        KarpathyJson(path=str(karpathy), image_root=str(karpathy.parent / "images"), split="val")


def test_a_wrong_root_is_said_at_the_start(karpathy: Path) -> None:
    with pytest.raises(ValueError, match=r"none of \d+ pictures looked for is there .*image_root"):
        KarpathyJson(path=str(karpathy), image_root=str(karpathy.parent))


# ------------------------------------------------------------------------------------------------------------- COCO-CN


@pytest.fixture
def coco_cn(tmp_path: Path) -> Path:
    folder = tmp_path / "coco-cn-version1805v1.1"
    write(folder / "coco-cn_train.txt", "COCO_train2014_000000000036\n")
    write(folder / "coco-cn_val.txt", "COCO_val2014_000000000042\n")
    write(folder / "coco-cn_test.txt", "COCO_val2014_000000000073\nCOCO_train2014_000000000081\n")
    human = (
        "COCO_train2014_000000000036#0\t一个女人拿着红色的雨伞\n"
        "COCO_val2014_000000000073#0\t两辆摩托车停在路边\n"
        "COCO_val2014_000000000042#0\t一只狗\n"
        "COCO_val2014_000000000073#1\t路边停着摩托车\n"
        "COCO_train2014_000000000081#0\t一架飞机在天空中飞行\n"
    )
    write(folder / "imageid.human-written-caption.txt", human)
    write(folder / "imageid.manually-translated-caption.txt", "COCO_val2014_000000000073#0\t一辆摩托车。\n")
    write(tmp_path / "images/train2014/COCO_train2014_000000000036.jpg", jpeg(36))
    write(tmp_path / "images/val2014/COCO_val2014_000000000073.jpg", jpeg(73))
    write(tmp_path / "images/COCO_train2014_000000000081.jpg", jpeg(81))
    return folder


def test_coco_cn(coco_cn: Path) -> None:
    root = str(coco_cn.parent / "images")
    source = CocoCn(path=str(coco_cn), image_root=root)
    assert source.languages == ("zh",)
    assert pairs(source, "zh") == {
        "COCO_val2014_000000000073": ("两辆摩托车停在路边", "路边停着摩托车"),
        "COCO_train2014_000000000081": ("一架飞机在天空中飞行",),
    }
    assert [source.read("zh", index).image for index in range(2)] == [jpeg(73), jpeg(81)], "in its folder, or in none"
    assert list(pairs(CocoCn(path=str(coco_cn), image_root=root, part="train"), "zh")) == [
        "COCO_train2014_000000000036"
    ]
    translated = CocoCn(path=str(coco_cn), image_root=root, captions="manually-translated")
    assert pairs(translated, "zh") == {"COCO_val2014_000000000073": ("一辆摩托车。",)}
    write(coco_cn / "imageid.human-written-caption.txt", "COCO_val2014_000000000073#0 没有制表符\n")
    with pytest.raises(ValueError, match=r"caption\.txt, line 1: expected id#number, a tab and a caption"):
        CocoCn(path=str(coco_cn), image_root=root)


# -------------------------------------------------------------------------------------------------------- Flickr30k-CN


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    for number in (1007129816, 1009434119):
        write(tmp_path / "flickr30k-images" / f"{number}.jpg", jpeg(number % 100))
    return str(tmp_path / "flickr30k-images")


@pytest.mark.parametrize(
    ("name", "lines", "expected"),
    [
        (
            "flickr30kzhmbosontest",
            "1007129816#zhm#0 一个:m 男人:n 戴着:v 帽子:n 。:wj\n"
            "1007129816#zhm#1 男人:n ：:wm 戴:v 帽子:n\n"
            "1009434119#zhm#0 一只:m 狗:n 在:p 跑:v 。:wj\n",
            {"1007129816.jpg": ("一个男人戴着帽子。", "男人：戴帽子"), "1009434119.jpg": ("一只狗在跑。",)},
        ),
        (
            "flickr30kzhbbosonval",
            "1007129816#zhb#0 一个 男人  戴着 帽子\n1009434119#zhb#0 狗\n7#zhb#0 不在 名单\n",
            {"1007129816.jpg": ("一个男人，戴着帽子",), "1009434119.jpg": ("狗",)},
        ),
    ],
)
def test_flickr30k_cn(tmp_path: Path, pictures: str, name: str, lines: str, expected: dict[str, Any]) -> None:
    folder = tmp_path / "flickr30k-cn" / name
    write(folder / "ImageSets" / f"{name}.txt", "1007129816\n1009434119\n")
    write(folder / "TextData" / f"seg.{name}.caption.txt", lines)
    assert pairs(Flickr30kCn(path=str(folder), image_root=pictures), "zh") == expected


def test_flickr30k_cn_with_more_lists_than_its_own(tmp_path: Path, pictures: str) -> None:
    folder = tmp_path / "flickr30kzhmbosontest"
    write(folder / "ImageSets" / "another.txt", "1009434119\n")
    write(folder / "TextData" / f"seg.{folder.name}.caption.txt", "1007129816#zhm#0 狗:n\n")
    own = write(folder / "ImageSets" / f"{folder.name}.txt", "1007129816\n")
    source = Flickr30kCn(path=str(folder), image_root=pictures)
    assert pairs(source, "zh") == {"1007129816.jpg": ("狗",)}
    own.rename(own.with_name("third.txt"))
    with pytest.raises(ValueError, match=r"ImageSets has 2 lists, and none is called flickr30kzhmbosontest\.txt"):
        Flickr30kCn(path=str(folder), image_root=pictures)


@pytest.mark.parametrize(
    "lines",
    [
        "1007129816\t一个男人，戴着帽子。\n1009434119\t狗\n1007129816\t男人\n",  # Flickr30k-CNA
        "1007129816.jpg#0\t一个男人，戴着帽子。\n1009434119.jpg#0\t狗\n1007129816.jpg#1\t男人\n",
        "image,caption\n1007129816.jpg,一个男人，戴着帽子。\n1009434119.jpg,狗\n1007129816.jpg,男人\n",
    ],
)
def test_the_kin_of_flickr30k_cn(tmp_path: Path, pictures: str, lines: str) -> None:
    source = Flickr30kCn(path=str(write(tmp_path / "test.txt", lines)), image_root=pictures)
    assert pairs(source, "zh") == {"1007129816.jpg": ("一个男人，戴着帽子。", "男人"), "1009434119.jpg": ("狗",)}


def test_flickrs_english_list_and_a_line_that_is_none(tmp_path: Path, pictures: str) -> None:
    file = write(tmp_path / "flickr30k_test_karpathy.txt", "image,caption\n1007129816.jpg,The man, with a hat.\n")
    assert pairs(Flickr30kCn(path=str(file), image_root=pictures, language="en"), "en") == {
        "1007129816.jpg": ("The man, with a hat.",)
    }
    write(file, "nothing\n")
    with pytest.raises(ValueError, match="line 1: expected an image, a tab or a comma, and a caption"):
        Flickr30kCn(path=str(file), image_root=pictures)
    assert joined("3:m :wky 米:q", tagged=True) == "3米"


def test_a_list_may_be_real_csv(tmp_path: Path, pictures: str) -> None:
    """Spreadsheets put quotes around a caption with a comma; a caption may also be in quotes of its own."""
    lines = [
        "image,caption",
        '1007129816.jpg,"一个男人, 戴着帽子"',
        '1007129816.jpg,"He said ""hi"", then left"',
        '1009434119.jpg,"Sit" and "stay"',
        '1009434119.jpg,"',
    ]
    source = Flickr30kCn(path=str(write(tmp_path / "list.csv", "\r\n".join(lines))), image_root=pictures)
    assert pairs(source, "zh") == {
        "1007129816.jpg": ("一个男人, 戴着帽子", 'He said "hi", then left'),
        "1009434119.jpg": ('"Sit" and "stay"', '"'),
    }


# ---------------------------------------------------------------------------------------------------------------- MUGE

QUERIES = [
    {"query_id": 8426, "query_text": "胖妹妹松紧腰长裤", "item_ids": [42967]},
    {"query_id": 8428, "query_text": "高级感托特包斜挎", "item_ids": [1076345, 517602]},
    {"query_id": 8429, "query_text": "托特包", "item_ids": [517602]},
]


def as_chinese_clip(query: dict[str, Any]) -> dict[str, Any]:
    return {"text_id": query["query_id"], "text": query["query_text"], "image_ids": query["item_ids"]}


def muge(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> MugeTable:
    table = [
        f"{item}\t{(base64.urlsafe_b64encode if item % 2 else base64.b64encode)(jpeg(item % 97)).decode()}\n"
        for item in (42967, 517602, 600000, 1076345)
    ]
    images = write(tmp_path / "MR_valid_imgs.tsv", "".join(table))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    queries = write(tmp_path / "MR_valid_queries.jsonl", lines)
    return MugeTable(images=str(images), queries=str(queries), **options)


@pytest.mark.parametrize("rename", [dict, as_chinese_clip])
def test_muge(tmp_path: Path, rename: Any) -> None:
    source = muge(tmp_path, [rename(query) for query in QUERIES])
    assert pairs(source, "zh") == {
        "42967": ("胖妹妹松紧腰长裤",),
        "517602": ("高级感托特包斜挎", "托特包"),
        "1076345": ("高级感托特包斜挎",),
    }
    samples = [source.read("zh", index) for index in range(3)]
    assert [sample.image for sample in samples] == [jpeg(item % 97) for item in (42967, 517602, 1076345)]
    assert [sample.caption_ids for sample in samples] == [("8426",), ("8428", "8429"), ("8428",)]


def test_a_byte_order_mark_is_no_part_of_an_id(tmp_path: Path) -> None:
    images = Path(muge(tmp_path, QUERIES).images)
    images.write_bytes(b"\xef\xbb\xbf" + images.read_bytes())
    again = MugeTable(images=str(images), queries=str(tmp_path / "MR_valid_queries.jsonl"))
    assert pairs(again, "zh") == pairs(muge(tmp_path, QUERIES), "zh")


def test_muges_pool_has_the_pictures_that_nobody_asked_for(tmp_path: Path) -> None:
    source = muge(tmp_path, QUERIES, unpaired="keep")
    assert list(pairs(source, "zh").items())[2] == ("600000", ())
    assert source.num_samples("zh") == 4


def test_what_is_no_muge(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"row 1: field 'item_ids': expected .*test part is published without"):
        muge(tmp_path, [{"query_id": 352962, "query_text": "厚底系带帆布鞋女"}])
    with pytest.raises(ValueError, match="unpaired is 'all'; expected keep or leave_out"):
        muge(tmp_path, QUERIES, unpaired="all")
    source = muge(tmp_path, [*QUERIES, {"query_id": 1, "query_text": "鞋", "item_ids": [7]}])
    assert source.num_samples("zh") == 3 and "1 pictures that queries name are not in" in caplog.text
    table = tmp_path / "MR_valid_imgs.tsv"
    write(table, table.read_bytes().replace(b"517602\t/9j/", b"517602\t????"))
    with pytest.raises(BadSample, match="image cannot be read"):
        source.read("zh", 1)


# --------------------------------------------------------------------------------------------------------------- JSONL


def test_jsonl_pairs(tmp_path: Path) -> None:
    rows = [
        {"image": "a.jpg", "zh": "雪地里的一只狐狸", "en": ["a fox in the snow", "a fox"], "image_id": "1"},
        {"image": "b.jpg", "en": "a bear"},
    ]
    for number, name in enumerate("ab"):
        write(tmp_path / f"{name}.jpg", jpeg(number))
    file = write(tmp_path / "pairs.jsonl", "\n".join(json.dumps(row) for row in rows))
    source = JsonlPairs(path=str(file))
    assert source.languages == ("en", "zh")
    assert pairs(source, "zh") == {"a.jpg": ("雪地里的一只狐狸",)}
    assert pairs(source, "en") == {"a.jpg": ("a fox in the snow", "a fox"), "b.jpg": ("a bear",)}
    assert [source.read("en", index).image_id for index in range(2)] == ["1", "b.jpg"]
    lavis = write(tmp_path / "coco_karpathy_test.json", json.dumps([{"image": "b.jpg", "caption": ["x", "y"]}]))
    assert pairs(JsonlPairs(path=str(lavis), caption_fields={"en": "caption"}), "en") == {"b.jpg": ("x", "y")}
    with pytest.raises(ValueError, match="not a single picture with a caption"):
        JsonlPairs(path=str(lavis))


def test_pairs_may_be_asked_about(tmp_path: Path) -> None:
    """Captions as answers to a prompt: what stage two is measured on."""
    write(tmp_path / "a.jpg", jpeg(0))
    file = write(tmp_path / "pairs.jsonl", json.dumps({"image": "a.jpg", "en": ["a fox", "a red fox"]}))
    source = DialogueShards(JsonlPairs(path=str(file)), {"en": ["What?"]})
    expected = tuple(Dialogue((Turn("What?", answer, 1),), "en") for answer in ("a fox", "a red fox"))
    assert source.dialogues("en", 0) == expected


# ----------------------------------------------------------------------------------------------------------------- VQA


def test_vqa_v2(tmp_path: Path) -> None:
    questions = {
        "info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014", "license": {},
        "questions": [{"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}],
    }  # fmt: skip
    said = ["down"] * 6 + ["at table", "skateboard", "down", "table"]
    answers = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number, answer in enumerate(said, start=1)
    ]
    annotation = {"question_type": "none of the above", "multiple_choice_answer": "down", "answers": answers,
                  "image_id": 262148, "answer_type": "other", "question_id": 262148000}  # fmt: skip
    write(tmp_path / "val2014/COCO_val2014_000000262148.jpg", jpeg(5))
    asked = write(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", json.dumps(questions))
    answered = write(tmp_path / "v2_mscoco_val2014_annotations.json", json.dumps({"annotations": [annotation]}))
    options: dict[str, Any] = {"path": str(asked), "image_root": str(tmp_path / "val2014")}
    source = VqaV2(annotations=str(answered), suffix=" Short answer:", **options)
    expected = [Dialogue((Turn("Where is he looking? Short answer:", answer, 1),), "en") for answer in said]
    assert list(source.dialogues("en", 0)) == expected
    sample = source.read("en", 0)
    assert sample.images == (jpeg(5),) and len(sample.dialogues) == 10
    write(answered, json.dumps({"annotations": []}))
    with pytest.raises(ValueError, match="row 1: field 'answers': expected what people answered"):
        VqaV2(annotations=str(answered), **options)
