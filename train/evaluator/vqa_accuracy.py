"""VQA accuracy as the VQA challenge counts it, with its answer normalisation.

After VQA's `vqaEval.py` (GT-Vision-Lab/VQA, PythonEvaluationTools), what it does and not what it means to do: only the
answer given is freed of articles and has its numbers in digits (the annotations are so already), annotations lose their
punctuation only where they differ, and a period after a digit goes like any other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NEEDED = 3  # annotators that must agree with an answer for it to count in full

_ARTICLES = ("a", "an", "the")
_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number) for number, word in enumerate("one two three four five six seven eight nine ten".split(), start=1)
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# A word that lacks exactly one of its apostrophes is one of these.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
SPELLINGS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTIONS for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def vqa_accuracy(answer: str, annotated: Sequence[str]) -> float:
    """min(annotators who say the same / 3, 1), averaged over leaving each annotator out.  For ten of them: 0, 0.3, 0.6,
    0.9 or 1."""
    said = normalised(answer)
    if len(set(annotated)) > 1:
        annotated = [without_punctuation(text) for text in annotated]
    agreeing = sum(text == said for text in annotated)
    left_out = [agreeing - (text == said) for text in annotated]
    return sum(min(1.0, number / NEEDED) for number in left_out) / len(annotated)


def normalised(answer: str) -> str:
    """An answer as the challenge compares it: lower case, no punctuation, no articles, numbers up to ten in digits."""
    spoken = without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in spoken.lower().split()]
    return " ".join(SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def without_punctuation(text: str) -> str:
    """A sign goes where a space is beside one like it, or the text has a number like 1,000; else it becomes a space."""
    found = text
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    for sign in _PUNCTUATION:
        found = found.replace(sign, "" if in_number or f"{sign} " in text or f" {sign}" in text else " ")
    return _PERIOD.sub("", found, count=32)  # the original hands over re.UNICODE, which is 32, as the count
