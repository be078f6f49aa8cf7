"""model/tokenizer.py against transformers' own tokenizers, on vocabularies that the test makes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from model.tokenizer import CaptionTokenizer, train_wordpiece

CAPTIONS = [
    "a red circle above a blue square",
    "红色的圆在蓝色的方块上面",
    "two green triangles",
    "左边有一个黄色的三角形",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_wordpiece(CAPTIONS * 3, 300, tmp_path_factory.mktemp("wordpiece"))


def bert_folder(path: Path) -> Path:
    """As bert-base-* were first published: a vocab.txt and no tokenizer.json."""
    words = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s", "一", "只", "猫"]
    (path / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    (path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": len(words)}))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    return path


def xlm_r_folder(path: Path) -> Path:
    """XLM-R's conventions: <s> 0, <pad> 1, </s> 2, <unk> 3, and a unigram model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁cat", -1.0), ("猫", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>", length=8)
    tokenizer.save(str(path / "tokenizer.json"))
    special = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": {"content": "<pad>"}, "unk_token": "<unk>"}
    (path / "special_tokens_map.json").write_text(json.dumps(special))
    return path


def test_a_trained_folder_loads_in_transformers_and_gives_the_same_ids(folder: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder)
    codec = CaptionTokenizer(str(folder))
    for text in [*CAPTIONS, "A Red 圆, unseen ☃"]:
        expected = reference(text)["input_ids"]
        assert codec.encode(text) == expected
    assert (codec.pad_id, codec.unk_id, codec.eos_id) == (
        reference.pad_token_id,
        reference.unk_token_id,
        reference.sep_token_id,
    )
    assert codec.unk_id in codec.encode("☃") and codec.unk_id not in codec.encode(CAPTIONS[0])


def test_training_takes_chinese_by_character_and_repeats_itself(folder: Path, tmp_path: Path) -> None:
    codec = CaptionTokenizer(str(folder))
    assert len(codec.encode("红色的圆")) == 2 + 4
    assert len(codec.encode("a red circle")) == 2 + 3
    again = train_wordpiece(CAPTIONS * 3, 300, tmp_path)
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="no text"):
        train_wordpiece([], 300, tmp_path)


def test_decode_joins_chinese_and_leaves_special_tokens_out(folder: Path) -> None:
    codec = CaptionTokenizer(str(folder))
    for text in CAPTIONS:
        ids = [codec.bos_id("zh"), *codec.encode(text)[1:], codec.pad_id, codec.pad_id]
        assert codec.decode(ids) == text
    assert codec.decode(codec.encode("一只 a red 圆")) == codec.decode(codec.encode("一只a red圆"))


def test_shared_bos_is_one_new_token_as_in_lavis(folder: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder)
    reference.add_special_tokens({"bos_token": "[DEC]"})
    codec = CaptionTokenizer(str(folder), bos="shared")
    assert codec.vocab_size == len(reference)
    assert codec.bos_id("zh") == codec.bos_id("en") == codec.bos_id("fr") == reference.bos_token_id


def test_per_language_bos(folder: Path) -> None:
    shared = CaptionTokenizer(str(folder))
    codec = CaptionTokenizer(str(folder), bos="per_language", languages=("en", "zh"))
    assert codec.vocab_size == shared.vocab_size + 1
    assert {codec.bos_id("en"), codec.bos_id("zh")} == {codec.vocab_size - 2, codec.vocab_size - 1}
    with pytest.raises(ValueError, match=r"'fr'.*en, zh"):
        codec.bos_id("fr")
    with pytest.raises(ValueError, match="per_language"):
        CaptionTokenizer(str(folder), bos="both")


def test_a_vocab_txt_folder_is_converted(tmp_path: Path) -> None:
    codec = CaptionTokenizer(str(bert_folder(tmp_path)))
    assert codec.encode("A cats 一只猫 dog") == [3, 6, 7, 8, 9, 10, 11, 2, 4]
    assert (codec.pad_id, codec.unk_id, codec.eos_id, codec.bos_id("en"), codec.vocab_size) == (0, 2, 4, 12, 13)


def test_xlm_r_conventions_and_no_truncation(tmp_path: Path) -> None:
    codec = CaptionTokenizer(str(xlm_r_folder(tmp_path)))
    assert (codec.cls_id, codec.pad_id, codec.eos_id, codec.unk_id, codec.bos_id("zh")) == (0, 1, 2, 3, 7)
    ids = codec.encode(("a cat " * 20).strip())
    assert len(ids) == 2 + 40 and codec.pad_id not in ids


def test_special_tokens_in_a_caption_are_text_also_after_pickling(folder: Path) -> None:
    codec = CaptionTokenizer(str(folder))
    copy = pickle.loads(pickle.dumps(codec))
    for one in (codec, copy):
        ids = one.encode("a [SEP] red [DEC] circle [PAD]")
        assert ids.count(one.eos_id) == 1 and one.pad_id not in ids and one.bos_id("en") not in ids
        assert one.encode(CAPTIONS[1]) == codec.encode(CAPTIONS[1]) and one.vocab_size == codec.vocab_size


def test_folders_without_a_tokenizer_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer"):
        CaptionTokenizer(str(tmp_path))
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="no cls token"):
        CaptionTokenizer(str(tmp_path))
