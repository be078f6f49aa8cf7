"""ChatGLM3-6B: role tokens in ChatGLM2's tokenizer and network.

Layout: `tokenization_chatglm.py` of its folder (`build_chat_input`), labels: ChatGLM3's `finetune_demo`.
"""

from __future__ import annotations

from pathlib import Path

from model.llm.chatglm2 import SPECIAL, required, sentencepieces
from model.llm.glm import Glm, glm
from model.llm.glm_codec import RoleCodec, appended

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
        ids = appended(pieces, (*SPECIAL, *ROLES))
        self.end_id = required(pieces, "</s>")
        special = {"gmask": ids["[gMASK]"], "sop": ids["sop"], "eop": ids["eop"], "eos": self.end_id}
        super().__init__(
            pieces,
            {**special, **{role.strip("<|>"): ids[role] for role in ROLES}},
            pad_id=required(pieces, "<unk>"),
            stop_ids=(self.end_id, ids["<|user|>"], ids["<|observation|>"]),
            num_image_tokens=num_image_tokens,
            image_marks=(pieces.encode("<img>"), pieces.encode("</img>")),
        )


def chatglm3(
    *,
    hidden_size: int = 4096,
    num_layers: int = 28,
    num_heads: int = 32,
    num_kv_heads: int = 2,
    head_size: int = 128,
    inner_size: int = 13696,
    vocab_size: int = 65024,
    norm_eps: float = 1e-5,
    qkv_bias: bool = True,
    rope_ratio: float = 1.0,
    tied_head: bool = False,
    tokenizer: str | None = None,
    num_image_tokens: int = 32,
    frozen: bool = True,
    dtype: str = "float32",
    device: str = "cpu",
    initial_std: float | None = 0.02,
    checkpoint_activations: bool = False,
) -> Glm:
    """ChatGLM3-6B, or a smaller one of its kind (`configs/model/llm/`).

    Args:
        tokenizer: `tokenizer.model` or its folder; without one there is a network, and nobody to talk to.
        rope_ratio: as in the config.json of ChatGLM3-6B-32k and 128k.
        initial_std: see `model.llm.glm.glm`.
    """
    return glm(
        None if tokenizer is None else ChatGLM3Codec(tokenizer, num_image_tokens=num_image_tokens),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        inner_size=inner_size,
        vocab_size=vocab_size,
        norm_eps=norm_eps,
        qkv_bias=qkv_bias,
        rope_base=10000.0 * rope_ratio,
        tied_head=tied_head,
        frozen=frozen,
        dtype=dtype,
        device=device,
        initial_std=initial_std,
        checkpoint_activations=checkpoint_activations,
    )
