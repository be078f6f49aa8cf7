"""Captions: which of a sample's candidates is used, and how each language is cleaned."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

import numpy as np

from data.batch import whole_characters
from data.source import RawSample

_BLIP_PUNCTUATION = re.compile(r'[.!"()*#:;~]')
_TWO_SPACES = re.compile(r"\s{2,}")
_ANY_SPACE = re.compile(r"\s+")
# CJK ideographs with their extensions, CJK punctuation, full-width forms: a space beside these carries no meaning
_WIDE = "\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_SPACE_BETWEEN_WIDE = re.compile(f"(?<=[{_WIDE}]) (?=[{_WIDE}])")
_ZH_JOINT, _EN_JOINT = "，", ", "


def clean_english(text: str, *, max_words: int = 50) -> str:
    """What LAVIS' BlipCaptionProcessor does (lavis/processors/blip_processors.py).

    Lower case, each of . ! " ( ) * # : ; ~ becomes a space, runs of white space become one, at most 50 words.
    """
    text = _TWO_SPACES.sub(" ", _BLIP_PUNCTUATION.sub(" ", text.lower()))
    text = text.rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def clean_chinese(text: str, *, max_characters: int = 100) -> str:
    """Full-width letters and digits to ASCII, control characters out, no spaces between Chinese characters, lower case.

    NFKC is applied to letters, digits and spaces alone: on the rest it would turn ，！？ into ASCII and ① into 1, which
    tokenizers of Chinese keep apart.  (BLIP's cut after 50 words would never cut: Chinese has no spaces.)
    """
    letters = "".join(_narrow(character) for character in unicodedata.normalize("NFC", text))
    text = _ANY_SPACE.sub(" ", letters).strip().lower()
    return _SPACE_BETWEEN_WIDE.sub("", text)[:max_characters].rstrip()


def _narrow(character: str) -> str:
    if character.isspace():
        return " "
    if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co"}:
        return ""
    narrow = unicodedata.normalize("NFKC", character)
    return narrow if narrow.isascii() and narrow.isalnum() and unicodedata.category(character) != "No" else character


def clean_plain(text: str) -> str:
    """White space only: for captions that were written for this purpose."""
    return _ANY_SPACE.sub(" ", text).strip()


CLEANERS: dict[str, Callable[[str], str]] = {"zh": clean_chinese, "en": clean_english}


def clean_caption(text: str, language: str) -> str:
    """By language; one without a cleaner of its own keeps its case and punctuation."""
    return CLEANERS.get(language, clean_plain)(whole_characters(text))


def is_empty(text: str) -> bool:
    """Whether nothing of it can be seen: white space, control and zero-width characters at most."""
    return all(unicodedata.category(character)[0] in "ZC" for character in text)


def draw_caption(sample: RawSample, language: str, rng: np.random.Generator) -> str:
    """One of the candidates; half the time followed by keywords, one to `max_keywords` of them, in any order."""
    caption = sample.captions[int(rng.integers(len(sample.captions)))]
    keywords = [word for word in sample.keywords if word.strip() and word != caption]
    most = min(sample.max_keywords, len(keywords))
    if most and rng.random() < 0.5:
        chosen = rng.permutation(len(keywords))[: int(rng.integers(1, most + 1))]
        caption = (_ZH_JOINT if language == "zh" else _EN_JOINT).join([caption, *(keywords[i] for i in chosen)])
    return caption
