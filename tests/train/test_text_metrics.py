"""BLEU, ROUGE-L and CIDEr by hand and against sacrebleu; the words that count; VQA accuracy as the challenge counts."""

from __future__ import annotations

import math

import pytest

from data.source.synthetic import SceneSource
from train.evaluator.text_metrics import majority_share, text_scores, tokenizer_named, told, words
from train.evaluator.vqa_accuracy import SPELLINGS, normalised, vqa_accuracy


def score(metric: str, answers: list[str], references: list[list[str]], language: str = "en") -> float:
    return text_scores(answers, references, language)[metric]


@pytest.mark.parametrize(
    ("tokenizer", "text", "expected"),
    [
        ("char", "Lungs: clear, 左肺ＣＴ正常，３.5厘米！", "lungs clear 左 肺 ct 正 常 3.5 厘 米"),
        ("jieba", "左边是一个红色的大圆形。", "左边 是 一个 红色 的 大 圆形"),
        ("13a", "A \"man's\" dog (running); 3.5 cm -- isn't it?", "a man's dog running 3.5 cm isn't it"),
        ("13a", "A woman’s “acceptable” boot", "a woman's acceptable boot"),
        ("intl", "L'été, déjà!", "l été déjà"),
    ],
)
def test_the_words_that_count(tokenizer: str, text: str, expected: str) -> None:
    assert words(text, tokenizer) == expected


def test_jieba_keeps_its_cache_to_itself(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("QUEQIAO_CACHE", str(home))
    tokenizer_named.cache_clear()
    assert words("红色的圆", "jieba") == "红色 的 圆"
    assert [file.name for file in (home / "jieba").iterdir()] == ["jieba.cache"]
    assert (home / "jieba").stat().st_mode & 0o077 == 0


def test_bleu_by_hand() -> None:
    # Papineni et al., example 2: "the" seven times finds two of its seven unigrams
    the_cat = ["The cat is on the mat.", "There is a cat on the mat."]
    assert score("13a/bleu_1", ["the the the the the the the"], [the_cat]) == pytest.approx(2 / 7)
    # of 6 words 5, of 5 pairs 3, of 4 threes 2, of 3 fours 1 are found; one word shorter than the reference
    found = score("13a/bleu_4", ["a red circle is left of"], [["a red circle is small , left of it"]])
    assert found == pytest.approx((6 / 6 * 4 / 5 * 2 / 4 * 1 / 3) ** 0.25 * math.exp(1 - 8 / 6), rel=1e-6)
    assert score("13a/bleu_4", ["no"], [["yes"]]) == pytest.approx(0.0, abs=1e-6)
    assert score("13a/bleu_4", ["A b c d e."], [["a b c d e"]]) == pytest.approx(1.0)


def test_rouge_l_by_hand() -> None:
    """coco-caption's: precision and recall of the best reference each, weighed by beta = 1.2."""

    def f(precision: float, recall: float) -> float:
        return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)

    right = ["a red square here"]
    assert score("13a/rouge_l", ["a red circle"], [right]) == pytest.approx(f(2 / 3, 2 / 4))
    assert score("13a/rouge_l", ["a red circle"], [[*right, "circle"]]) == pytest.approx(f(2 / 3, 1))
    assert score("char/rouge_l", ["左肺正常", ""], [["右肺", "左肺不正常"], ["无"]], "zh") == pytest.approx(
        f(1, 4 / 5) / 2
    )


def test_cider_by_hand() -> None:
    """Two pictures.  "a" is said of both, so it weighs nothing; of one to four words, one and two agree or do not."""
    assert score("13a/cider", ["a b", "a b"], [["a b"], ["a c"]]) == pytest.approx((10 * (1 + 1 + 0 + 0) / 4 + 0) / 2)
    # one pair more, or less, than the reference: a Gaussian of sigma 6; the second b and the pair "b b" find no other
    gauss = math.exp(-1 / (2 * 6**2))
    first, second = 10 * (1 / 2 + 1 / math.sqrt(2) + 0 + 0) / 4 * gauss, 10 * (1 + 0 + 0 + 0) / 4 * gauss
    found = score("13a/cider", ["a b b", "c"], [["a b"], ["a c"]])
    assert found == pytest.approx((first + second) / 2)
    assert score("13a/cider", ["a b"], [["a b"]]) == 0.0, "one picture: every word is said of all pictures"


def test_bleu_is_sacrebleus() -> None:
    from sacrebleu import corpus_bleu

    source = SceneSource(60, seed=3)
    for language, tokenizer in (("zh", "jieba"), ("zh", "char"), ("en", "13a")):
        captions = [own for i in range(60) if len(own := source.scene(i).captions(language)) > 2]
        assert len(captions) > 20
        answers, references = [own[0] for own in captions[1:]] + [captions[0][0]], [own[1:3] for own in captions]
        streams = [[words(own[k], tokenizer) for own in references] for k in range(2)]
        said = [words(answer, tokenizer) for answer in answers]
        expected = corpus_bleu(said, streams, tokenize="none", smooth_method="none", force=True).score / 100
        assert 0 < expected < 1
        assert score(f"{tokenizer}/bleu_4", answers, references, language) == pytest.approx(expected, rel=1e-5)


def test_every_score_is_told_with_its_tokenizer() -> None:
    char, jieba = told(text_scores(["红色的圆"], [["红色的大圆"]], "zh"))
    assert char.startswith("BLEU-1 ") and "CIDEr 0.000" in char and "(Chinese characters, sacrebleu 2." in char
    assert "(jieba 0.42.1, precise mode)" in jieba
    (only,) = told(text_scores(["a b"], [["a b"]], "en"))
    assert "BLEU-4" in only and "ROUGE-L 1.000" in only and "(13a, sacrebleu 2." in only


def test_the_most_frequent_answer() -> None:
    assert majority_share(["a", "b", "a", "c"]) == 0.5


# -------------------------------------------------------------------------------------------------------- VQA accuracy


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_annotators(agreeing: int, expected: float) -> None:
    """Each annotator is left out once: of those who agree, nine minus one are left in `agreeing` of ten cases."""
    others = [f"other {number}" for number in range(10 - agreeing)]
    assert vqa_accuracy("Red.", ["red"] * agreeing + others) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The two Dogs", "2 dogs"),
        ("none", "0"),
        ("ten\n", "10"),
        ("an apple, a pear", "apple pear"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("at 5. p.m.", "at 5 pm"),
        ("dont know!", "don't know"),
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("red-blue", "red blue"),
        ("red -blue", "red blue"),
        ("left/right", "left right"),
        ("'twas", "'twas"),
        ("theatre", "theatre"),
    ],
)
def test_the_challenges_normalisation(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


def test_annotations_lose_their_punctuation_only_where_they_differ() -> None:
    """As the original: where all ten say "o.k." nobody's answer can equal it."""
    assert vqa_accuracy("o.k.", ["o.k."] * 10) == 0.0
    assert vqa_accuracy("o.k.", ["o.k."] * 9 + ["fine"]) == 1.0
    assert vqa_accuracy("two", ["two"] * 9 + ["2"]) == pytest.approx(0.3), "and they keep their words"


def test_the_table_of_contractions_is_the_challenges() -> None:
    assert len(SPELLINGS) == 114  # its 121 less those in capitals or that change nothing
    assert {SPELLINGS[word] for word in ("aint", "weve", "oclock", "twas")} == {"ain't", "we've", "o'clock", "'twas"}
