"""Which language a text is in, by its script, where the data does not say."""

from __future__ import annotations

_HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
LETTERS_PER_WORD = 4  # a Chinese character carries about as much as that many Latin letters


def language_of(text: str) -> str:
    """ "zh" where Han characters outweigh Latin letters ("CT 显示肺部感染" is Chinese), else "en"."""
    han = sum(any(low <= ord(character) <= high for low, high in _HAN) for character in text)
    latin = sum(character.isascii() and character.isalpha() for character in text)
    return "zh" if han * LETTERS_PER_WORD > latin else "en"
