"""VisualGLM's fine-tuning file: [{"img": "a.png", "prompt": "...", "label": "..."}], JSON or JSON lines.

Rows without `img`, or with null in it, are text alone (VisualGLM-6B issues 347, 357).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.batch import Turn
from data.records import text_of, texts_of
from data.source.conversations import Conversation, ConversationSource


@dataclass(kw_only=True)
class VisualGLMJson(ConversationSource):
    name: str = "visualglm_json"

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        images = texts_of(row, "img")
        question = text_of(row, "prompt", empty=bool(images))
        return Conversation((Turn(question, text_of(row, "label"), len(images)),), images)
