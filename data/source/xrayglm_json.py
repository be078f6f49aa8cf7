"""XrayGLM's reports: {"annotations": [{"image_id": "2_1", "caption": "..."}]}, pictures named by `image_id`.

VisualGLM's and XrayGLM's own loaders cannot read this file (XrayGLM issues 12, 36, 65).  Views of one study ("2_1" and
"2_2") share its report, so without a `group` a split keeps them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from data.batch import Turn
from data.records import text_of
from data.source.conversations import Conversation, ConversationSource


@dataclass(kw_only=True)
class XrayGLMJson(ConversationSource):
    """
    Args:
        prompts: language -> questions; one is drawn for each report, by (seed, step, row).
        suffix: what follows `image_id` in the picture's name.
    """

    prompts: Mapping[str, Sequence[str]]
    suffix: str = ".png"
    name: str = "xrayglm_json"
    rows_under: ClassVar[str | None] = "annotations"

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        name = text_of(row, "image_id")
        turn = Turn("", text_of(row, "caption"), 1)
        return Conversation((turn,), (name + self.suffix,), prompts=self.prompts, group=name.rpartition("_")[0] or name)
