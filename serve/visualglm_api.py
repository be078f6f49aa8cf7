"""VisualGLM's REST request and answer (`api.py:13-51`), with what its README promises of them.

The answer is under both names, "result" of its code and "response" of its README; min_length and repetition_penalty,
which it takes and ignores, do what they say; a text is never searched for pictures (`chat.py:72-92`).
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from serve.pictures import PictureReader
from serve.request import Number, Seed, Strict, Whole, check_length
from serve.session import CHAT, Answer, Ask

Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


class ChatRequest(Strict):
    """
    Args:
        image: the file's bytes in base64; none, or an empty one, for a conversation without a picture.
        max_length, min_length: of prompt, picture and answer together, in tokens, as VisualGLM counts.
    """

    text: str
    image: str | None = None
    history: list[Pair] = Field(default=[], max_length=1000)
    max_length: Annotated[Whole, Field(ge=1)] = 2048
    min_length: Whole = 0
    temperature: Number = CHAT.temperature
    top_p: Number = CHAT.top_p
    top_k: Whole = CHAT.top_k
    repetition_penalty: Number = CHAT.repetition_penalty
    seed: Seed | None = None


def ask_of(request: ChatRequest, pictures: PictureReader) -> Ask:
    """Raises ValueError."""
    check_length(request.text, *(text for pair in request.history for text in pair))
    picture = pictures.from_base64(request.image) if request.image else None
    decoding = replace(
        CHAT,
        max_new_tokens=min(CHAT.max_new_tokens, request.max_length),
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        repetition_penalty=request.repetition_penalty,
        seed=request.seed,
    )
    ask = pictures.session.ask(picture, request.text, request.history, decoding=decoding)
    num_prompt = len(ask.encoded.ids)
    if num_prompt >= request.max_length:
        raise ValueError(
            f"max_length is {request.max_length}, which picture and text ({num_prompt} tokens) fill: give a larger one"
        )
    most = min(ask.decoding.max_new_tokens, request.max_length - num_prompt)
    least = min(max(0, request.min_length - num_prompt), most)
    return replace(ask, decoding=replace(ask.decoding, max_new_tokens=most, min_new_tokens=least))


def answer_of(request: ChatRequest, answer: Answer) -> dict[str, Any]:
    return {
        "result": answer.text,
        "response": answer.text,
        "history": [*request.history, [request.text, answer.text]],
        "status": 200,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
