"""What every front end can be told on the command line, and the session it gets."""

from __future__ import annotations

import argparse
from pathlib import Path

from model.generation import Decoding
from serve.session import CHAT, Session


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="a run of finetune.py, VisualGLM-6B, or a merged folder",
    )
    group.add_argument("--checkpoint", default="newest", help="of a run: newest, best, or a name like step_300")
    group.add_argument("--adapter", type=Path, metavar="DIR", help="adapter/ of a run, or what peft saved")
    group.add_argument("--quantize", choices=["4", "8", "none"], default="none", help="bits of the language model")
    group.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    group.add_argument("--device-map", choices=["auto"], help="auto: the language model over all GPUs")
    group.add_argument("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto")
    group.add_argument("--tokenizer", type=Path, metavar="FILE", help="ice_text.model, where the folder has none")
    group.add_argument(
        "--qkv-order", choices=["blocks", "per_head"], help="of VisualGLM, where its folder says nothing"
    )
    group.add_argument("--max-tokens", type=int, default=2048, help="of a conversation, its answer included")


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument("--max-new-tokens", type=int, default=CHAT.max_new_tokens, help="of an answer")
    group.add_argument("--temperature", type=float, default=CHAT.temperature, help="0: always the likeliest token")
    group.add_argument("--top-k", type=int, default=CHAT.top_k, help="0: all tokens")
    group.add_argument("--top-p", type=float, default=CHAT.top_p, help="1: all tokens")
    group.add_argument("--repetition-penalty", type=float, default=CHAT.repetition_penalty, help="1: none")
    group.add_argument("--seed", type=int, help="of the draws; without one every answer is another")


def session_from(options: argparse.Namespace) -> Session:
    """Raises ValueError: see `model.load.load`; a package that this model needs and others do not (ChatGLM-6B's is
    SwissArmyTransformer, which needs deepspeed and triton)."""
    if options.max_tokens < 2:
        raise ValueError(f"--max-tokens is {options.max_tokens}; a conversation takes more, its answer included")
    try:
        return Session.load(
            options.model,
            options.adapter,
            quantize=options.quantize,
            device=options.device,
            device_map=options.device_map,
            dtype=options.dtype,
            tokenizer=options.tokenizer,
            qkv_order=options.qkv_order,
            checkpoint=options.checkpoint,
            max_tokens=options.max_tokens,
        )
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{options.model} needs the package {error.name!r}, which is not installed here (try scripts/setup.sh)"
        ) from error


def decoding_from(options: argparse.Namespace) -> Decoding:
    """Raises ValueError: a value out of its range."""
    return Decoding(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
