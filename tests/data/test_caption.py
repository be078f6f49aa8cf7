"""Caption cleaning and choice."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from data.caption import clean_caption, clean_chinese, clean_english, draw_caption
from data.caption_report import caption_report, print_caption_report
from data.keyed import keyed_rng
from data.source import RawSample
from tests.data.shard_files import LetterCodec, MemorySource


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Dog.", "a dog"),
        ('  "Two" (old) men:  a #1; ~ photo!\n', "two old men a 1 photo"),
        ("well-known, it's 50% off?", "well-known, it's 50% off?"),
        ("tab\tstays\t\tand two become one", "tab\tstays and two become one"),
        ("...", ""),
        (" ".join(["word"] * 60), " ".join(["word"] * 50)),
    ],
)
def test_english_as_blip_cleans_it(text: str, expected: str) -> None:
    assert clean_english(text) == expected


def test_english_equals_the_steps_of_lavis() -> None:
    """The steps of BlipCaptionProcessor.pre_caption, one after the other, on random strings."""
    alphabet = "aB.!\"()*#:;~ \n\tß中,'-"
    for n in range(300):
        letters = keyed_rng("text", 0, n).integers(len(alphabet), size=40)
        text = "".join(alphabet[i] for i in letters)
        expected = re.sub(r"([.!\"()*#:;~])", " ", text.lower())
        expected = re.sub(r"\s{2,}", " ", expected).rstrip("\n").strip(" ")
        words = expected.split(" ")
        expected = " ".join(words[:50]) if len(words) > 50 else expected
        assert clean_english(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("一只 黑色 的狗。", "一只黑色的狗。"),
        ("ＡＢＣ１２３", "abc123"),
        ("你好，世界！", "你好，世界！"),
        ("第①名　冠军", "第①名冠军"),
        ("用 Python 3 写的", "用 python 3 写的"),
        ("a  b\n\nc", "a b c"),
        ("零\u200b宽\ufeff字\x00符", "零宽字符"),
        ("中" * 150, "中" * 100),
        (" \u3000\t", ""),
    ],
)
def test_chinese(text: str, expected: str) -> None:
    assert clean_chinese(text) == expected
    assert clean_chinese(expected) == expected


def test_other_languages_keep_what_they_are() -> None:
    assert clean_caption("  Ein  Hund. ", "de") == "Ein Hund."
    assert clean_caption("A Dog.", "en") == "a dog" and clean_caption("一 只", "zh") == "一只"


def drawn(sample: RawSample, language: str = "en", n: int = 2000) -> Counter[str]:
    return Counter(draw_caption(sample, language, keyed_rng("d", 0, i)) for i in range(n))


def test_candidates_are_drawn_alike() -> None:
    counts = drawn(RawSample(b"", ("a", "b", "c", "d"), "k"))
    assert set(counts) == {"a", "b", "c", "d"} and all(400 < count < 600 for count in counts.values())


def test_keywords_follow_the_name_half_the_time() -> None:
    sample = RawSample(b"", ("shoe",), "k", keywords=("red", "heel", "shoe", " ", "big"), max_keywords=2)
    counts = drawn(sample)
    assert 900 < counts.pop("shoe") < 1100
    keywords = [tuple(caption.removeprefix("shoe, ").split(", ")) for caption in counts]
    expected = {(a,) for a in ("red", "heel", "big")} | {
        (a, b) for a in "red heel big".split() for b in "red heel big".split() if a != b
    }
    assert set(keywords) == expected
    assert set(drawn(RawSample(b"", ("shoe",), "k", keywords=("red",)))) == {"shoe"}  # max_keywords is 0
    chinese = RawSample(b"", ("鞋",), "k", keywords=("红",), max_keywords=4)
    assert set(drawn(chinese, "zh")) == {"鞋", "鞋，红"}


def test_the_report_counts_by_language(capsys) -> None:
    class Codec(LetterCodec):
        def encode(self, text: str) -> list[int]:
            return [2, *(self.unk_id if ord(c) > 127 or c == "x" else ord(c) for c in text), 3]

    class Source(MemorySource):
        def read(self, language: str, index: int) -> RawSample:
            sample = super().read(language, index)
            return RawSample(
                sample.image, ("一二x" if language == "zh" else "abc" if index % 4 else "a" * 60,), sample.key
            )

    report = caption_report({"a": Source({"zh": 7, "en": 40}, bad=[0])}, Codec(), max_text_tokens=32)
    assert report["zh"].captions == 6 and report["zh"].unknown_rate == 1 and report["zh"].truncated_rate == 0
    assert report["en"].captions == 39 and report["en"].tokens == 30 * 5 + 9 * 62 and report["en"].longest == 62
    assert report["en"].unknown_rate == 0 and report["en"].truncated_rate == pytest.approx(9 / 39)
    table = print_caption_report(report, max_text_tokens=32)
    assert "100.00%" in table and table in capsys.readouterr().out


@pytest.mark.parametrize("language", ["zh", "en", "fr"])
def test_half_an_emoji_is_left_out(language: str) -> None:
    assert clean_caption("a cat \ud83d", language) == "a cat"
    clean_caption("a cat \ud83d", language).encode("utf-8")
