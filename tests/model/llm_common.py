"""A small sentencepiece model with ChatGLM-6B's special tokens, and a small ChatGLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.llm import pieces
from model.llm.chatglm import ChatGLM, ChatGLMCodec, chatglm

SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
TEXTS = [
    "<img></img>问：这张图片的背景里有什么内容？\n答：这张图片的背景是蒙蒙细雨。",
    "<img></img>Q:What is in the picture?\nA:A red circle on the left of a blue square.",
    "问：描述这张图片。\n答：两个绿色的三角形，还有一个红色的圆。",
    "Q:Describe the image.\nA:Two green triangles and one more.",
]


def train_pieces(path: Path, special: list[str] | None = None) -> Path:
    """`ice_text.model` of some 100 pieces."""
    return pieces.train_pieces(TEXTS * 5, path, vocab_size=200, special=SPECIAL if special is None else special)


def small_chatglm(tokenizer: Path | None, *, seed: int = 0, **changes: Any) -> ChatGLM:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "inner_size": 48,
        "vocab_size": 256,
        "num_image_tokens": 5,
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "ids": {"bos": 250, "gmask": 251, "mask": 252} if tokenizer is None else None,
        "frozen": False,
        "initial_std": 0.3,
    }
    return chatglm(**{**settings, **changes}).eval()


def codec_of(llm: ChatGLM) -> ChatGLMCodec:
    assert isinstance(llm.codec, ChatGLMCodec)
    return llm.codec
