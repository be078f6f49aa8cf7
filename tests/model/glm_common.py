"""Small tokenizers with the special tokens of ChatGLM2, ChatGLM3 and GLM-4, and small networks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from model.llm.chatglm2 import chatglm2
from model.llm.chatglm3 import chatglm3
from model.llm.glm import Glm
from model.llm.glm4 import glm4
from model.visual_chat import VisualChatModel
from tests.tiny_chat import tiny_sight

BUILD = {"chatglm2": chatglm2, "chatglm3": chatglm3, "glm4": glm4}
TEXTS = [
    "[Round 1] 问：这张图片的背景里有什么内容？ 答：这张图片的背景是蒙蒙细雨。",
    "What is in the picture? A red circle on the left of a blue square. <img> </img>",
    "描述这张图片。两个绿色的三角形，还有一个红色的圆。",
    "Describe the image. Two green triangles and one more.",
]
GLM4_SPECIAL = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
]


def train_sentencepieces(path: Path) -> Path:
    """`tokenizer.model` with what ChatGLM2's has: bytes for what it does not know, </s> 2, <unk> 0, text left alone."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def train_byte_pairs(path: Path, special: list[str] | None = None) -> Path:
    """`tokenizer.json` as transformers converts GLM-4's: byte-level BPE, special tokens after the pieces."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    names = GLM4_SPECIAL if special is None else special
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if "[gMASK]" in names:  # the -hf folders put these two before every text by themselves
        prefix = [(name, tokenizer.token_to_id(name)) for name in ("[gMASK]", "<sop>")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=prefix)
    tokenizer.save(str(path))
    return path


def small_glm(family: str, tokenizer: Path | None = None, *, seed: int = 0, **changes: Any) -> Glm:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 16,
        "inner_size": 48,
        "vocab_size": 600,
        "num_image_tokens": 5,
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "frozen": False,
        "initial_std": 0.3,
    }
    return BUILD[family](**{**settings, **changes})


def visual_chat(llm: Glm) -> VisualChatModel:
    torch.manual_seed(1)
    return VisualChatModel(*tiny_sight(vision_layers=1, qformer_layers=2), llm).eval()
