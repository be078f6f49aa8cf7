"""ChatGLM-6B's tokenizer makes full-width punctuation half-width; what is said in Chinese gets it back.

As `process_response` of ChatGLM-6B and VisualGLM (`model/chat.py:50-63`) does.
"""

from __future__ import annotations

import re
from typing import Any

_WIDE = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_HAN = "\u4e00-\u9fff"
_BESIDE_HAN = re.compile(f"(?<=[{_HAN}])[{''.join(_WIDE)}]|[{''.join(_WIDE)}](?=[{_HAN}])")


def restores_punctuation(codec: Any) -> bool:
    """Whether the tokenizer cannot say a full-width comma."""
    return "，" not in codec.pieces.decode(codec.pieces.encode("你，我"))


def with_full_width(text: str) -> str:
    """Punctuation beside a Chinese character becomes full-width."""
    return _BESIDE_HAN.sub(lambda found: _WIDE[found[0]], text)


def settled(text: str) -> str:
    """Without the punctuation at the end, which what follows may change."""
    return text.rstrip("".join(_WIDE))
