"""BLEU, ROUGE-L and CIDEr of captions, reports and free answers, each under the name of its tokenizer.

The scorers are pycocoevalcap's, which published captioning numbers come from; they need no Java.  Its tokenizer does
(Stanford's PTBTokenizer), so the words are these, and a score says which:

char    Chinese: every Han character is a word, other text by 13a (sacrebleu's `zh`)
jieba   Chinese: jieba's precise mode
13a     English: mteval-v13a (sacrebleu), near to PTBTokenizer: on three small sets BLEU-4 differed by 0.006 at most
intl    other languages: mteval-v14's international tokenizer (sacrebleu)

As coco-caption does after PTBTokenizer, case is folded and punctuation left out; full-width letters and digits are made
half-width.  CIDEr weighs words by how many of the pool's images have them in a reference: it depends on the pool, and
is 0 for a single image.
"""

from __future__ import annotations

import functools
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from data.shard_list import cache_home

TOKENIZERS = {"zh": ("char", "jieba"), "en": ("13a",)}
OTHERS = ("intl",)
SHORT = {"bleu_1": "BLEU-1", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L", "cider": "CIDEr"}
# Left out as coco-caption leaves them out (its list is in PTBTokenizer's spelling), and their Chinese likes.
PUNCTUATION = frozenset(".?!,:;-'\"`()[]{}…—·。？！，：；、“”‘’（）【】「」《》〈〉")

STRAIGHT = str.maketrans("‘’“”", "''\"\"")  # 13a knows no other quotes


def text_scores(answers: Sequence[str], references: Sequence[Sequence[str]], language: str) -> dict[str, float]:
    """{"<tokenizer>/bleu_4": 0.31, ...} with BLEU-1, BLEU-4, ROUGE-L (0 to 1) and CIDEr (0 to 10).

    Args:
        references: of each answer, one or more.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    found: dict[str, float] = {}
    for name in TOKENIZERS.get(language, OTHERS):
        said = {number: [words(answer, name)] for number, answer in enumerate(answers)}
        right = {number: [words(text, name) for text in texts] for number, texts in enumerate(references)}
        bleu, _ = Bleu(4).compute_score(right, said, verbose=0)
        values = {
            "bleu_1": bleu[0],
            "bleu_4": bleu[3],
            "rouge_l": Rouge().compute_score(right, said)[0],
            "cider": Cider().compute_score(right, said)[0],
        }
        found |= {f"{name}/{metric}": float(value) for metric, value in values.items()}
    return found


def told(scores: Mapping[str, float]) -> list[str]:
    """A line for each tokenizer, with its version."""
    lines = []
    for name in dict.fromkeys(key.split("/")[0] for key in scores if "/" in key):
        values = "  ".join(
            f"{short} {scores[f'{name}/{metric}']:.3f}"
            for metric, short in SHORT.items()
            if f"{name}/{metric}" in scores
        )
        lines.append(f"{values}   ({described(name)})")
    return lines


def described(name: str) -> str:
    """What a tokenizer is, for whoever compares the numbers."""
    if name == "jieba":
        return f"jieba {version('jieba')}, precise mode"
    return {"char": "Chinese characters", "13a": "13a", "intl": "intl"}[name] + f", sacrebleu {version('sacrebleu')}"


def words(text: str, tokenizer: str) -> str:
    """The words that count, a space between each and the next."""
    text = unicodedata.normalize("NFKC", text).lower()
    tokens = tokenizer_named(tokenizer)(text.translate(STRAIGHT) if tokenizer == "13a" else text)
    return " ".join(token for token in tokens if not PUNCTUATION.issuperset(token))


def majority_share(right: Sequence[str]) -> float:
    """How often the most frequent answer is right: what a model gets that looks at nothing."""
    return Counter(right).most_common(1)[0][1] / len(right)


@functools.cache
def tokenizer_named(name: str) -> Callable[[str], list[str]]:
    if name == "jieba":
        cut = _jieba().cut
        return lambda text: "".join(f"{word} " for word in cut(text)).split()
    made: Any
    if name == "char":
        from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh as made
    elif name == "13a":
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a as made
    else:
        from sacrebleu.tokenizers.tokenizer_intl import TokenizerV14International as made
    tokenize = made()
    return lambda text: tokenize(text).split()


def _jieba() -> Any:
    """An own instance: quiet, its cache in this user's folder and not in /tmp, where anybody could leave one."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources is deprecated, says setuptools
        import jieba
    jieba.setLogLevel(logging.WARNING)
    made = jieba.Tokenizer()
    folder = cache_home() / "jieba"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    made.tmp_dir = str(folder)
    return made
