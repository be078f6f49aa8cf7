"""ChatGLM3-6B: role tokens in ChatGLM2's tokenizer and network.

Layout: `tokenization_chatglm.py` of its folder (`build_chat_input`), labels: ChatGLM3's `finetune_demo`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.llm.chatglm2 import required, sentencepieces, special_ids
from model.llm.glm import Glm, family, glm
from model.llm.glm_codec import RoleCodec

ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


class ChatGLM3Codec(RoleCodec):
    """See `RoleCodec`; the last answer ends in </s>.

    Args:
        path: `tokenizer.model`, or the folder that holds it.
        num_image_tokens: positions of one picture.
    Raises:
        ValueError: no such file, or one without `</s>` or `<unk>`.
    """

    def __init__(self, path: str | Path, *, num_image_tokens: int) -> None:
        pieces = sentencepieces(path)
        special = special_ids(pieces, ROLES)
        self.end_id = special["eos"]
        super().__init__(
            pieces,
            special,
            pad_id=required(pieces, "<unk>"),
            stop_ids=(self.end_id, special["user"], special["observation"]),
            num_image_tokens=num_image_tokens,
        )


@family(num_layers=28, vocab_size=65024, norm_eps=1e-5)
def chatglm3(*, rope_ratio: float = 1.0, **rest: Any) -> Glm:
    """ChatGLM3-6B, or a smaller one of its kind (`configs/model/llm/`); see `model.llm.glm.glm`.

    Args:
        rope_ratio: as in the config.json of ChatGLM3-6B-32k and 128k.
    """
    return glm(ChatGLM3Codec, rope_base=10000.0 * rope_ratio, **rest)
