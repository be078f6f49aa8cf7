"""BLEU and ROUGE-L of free answers, and what closed questions are worth, for Chinese and English.

Words are runs of letters and digits; each Han character is a word of its own, as usual where Chinese has no word
boundaries.  Case and punctuation do not count.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3400-\u9fff\uf900-\ufaff]+")


def words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]], *, longest: int = 4) -> float:
    """Corpus BLEU (Papineni et al., ACL 2002): geometric mean of clipped n-gram precisions up to `longest`, times the
    brevity penalty against the reference nearest in length; not smoothed, so 0 where no n-gram of a length occurs."""
    found, possible = [0] * longest, [0] * longest
    num_words = num_reference_words = 0
    for answer, right in zip(answers, references, strict=True):
        mine, theirs = words(answer), [words(text) for text in right]
        num_words += len(mine)
        num_reference_words += min((len(r) for r in theirs), key=lambda n: (abs(n - len(mine)), n))
        for n in range(1, longest + 1):
            grams = _grams(mine, n)
            most: Counter[tuple[str, ...]] = Counter()
            for reference in theirs:
                most |= _grams(reference, n)
            found[n - 1] += sum((grams & most).values())
            possible[n - 1] += sum(grams.values())
    if not all(found):
        return 0.0
    precision = math.fsum(math.log(f / p) for f, p in zip(found, possible, strict=True)) / longest
    return math.exp(precision + min(0.0, 1 - num_reference_words / num_words))


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean F1 of the longest common subsequence (Lin, ACL 2004), against the best reference of each answer."""
    scores = []
    for answer, right in zip(answers, references, strict=True):
        mine = words(answer)
        scores.append(max(_lcs_f1(mine, words(text)) for text in right))
    return math.fsum(scores) / len(scores)


def majority_share(right: Sequence[str]) -> float:
    """How often the most frequent answer is right: what a model gets that looks at nothing."""
    return Counter(right).most_common(1)[0][1] / len(right)


def _grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _lcs_f1(mine: Sequence[str], theirs: Sequence[str]) -> float:
    if not mine or not theirs:
        return float(not mine and not theirs)
    row = [0] * (len(theirs) + 1)
    for word in mine:
        before = 0
        for column, other in enumerate(theirs, start=1):
            before, row[column] = row[column], before + 1 if word == other else max(row[column], row[column - 1])
    common = row[-1]
    return 2 * common / (len(mine) + len(theirs))
