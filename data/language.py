"""Which language a text is in, by its script, where the data does not say."""

from __future__ import annotations

import re
from collections.abc import Sequence

from data.batch import Turn

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LATIN = re.compile("[A-Za-z]")
LETTERS_PER_WORD = 4  # a Chinese character carries about as much as that many Latin letters


def language_of_turns(turns: Sequence[Turn]) -> str:
    """Of a conversation: its last question's, as whoever is asked sees no answer; without a question its answer's."""
    last = turns[-1]
    return language_of(last.question if last.question.strip() else last.answer)


def language_of(text: str) -> str:
    """ "zh" where Han characters outweigh Latin letters ("CT 显示肺部感染" is Chinese), else "en"."""
    han = len(_HAN.findall(text))
    return "zh" if han * LETTERS_PER_WORD > (len(_LATIN.findall(text)) if han else 0) else "en"
