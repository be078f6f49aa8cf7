"""OpenAI's chat completions, as far as a model that looks at pictures can give them.

Taken: text and `image_url` parts, several pictures anywhere in the user's messages, streaming, stop strings, and how
tokens are drawn.  What would change the answer and cannot be done (tools, n > 1, logprobs ...) is refused; what only
labels the request is taken and left aside.  The models here know no system message: its words go before the first
question.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from torch import Tensor

from data.batch import Turn
from serve.pictures import PictureReader
from serve.request import Number, Strict, Whole, check_length
from serve.session import CHAT, Answer, Ask


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageURL(Strict):
    url: str
    detail: Literal["auto", "low", "high", "original"] = "auto"  # every picture is seen at the encoder's one size


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=256)]
    name: str | None = None
    annotations: list[Any] | None = None  # comes back in the messages of OpenAI's own clients

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def urls(self) -> list[str]:
        if isinstance(self.content, str):
            return []
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(Strict):
    type: Literal["text"]


class ChatRequest(Strict):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    # not OpenAI's, but what other servers of local models call them (openai's client: extra_body=)
    top_k: Whole | None = None
    repetition_penalty: Number | None = None
    min_tokens: Whole | None = None
    # only with the values that change nothing
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    # labels
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("frequency_penalty", "presence_penalty", mode="before")
    @classmethod
    def _nought(cls, value: Any) -> Any:
        return 0 if value == 0 and not isinstance(value, bool) else value  # 0.0 is no Literal

    @property
    def stops(self) -> list[str]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]


def ask_of(request: ChatRequest, pictures: PictureReader, *, max_pictures: int) -> Ask:
    """Raises ValueError."""
    check_length(*(message.text for message in request.messages), *request.stops)
    num_pictures = sum(len(message.urls) for message in request.messages)
    if num_pictures > max_pictures:
        raise ValueError(f"{num_pictures} pictures in one request; this server takes {max_pictures}")
    turns, urls = turns_of(request.messages)
    said: dict[str, Any] = {
        "max_new_tokens": request.max_completion_tokens or request.max_tokens,
        "min_new_tokens": request.min_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "repetition_penalty": request.repetition_penalty,
        "seed": None if request.seed is None else request.seed % 2**63,
    }
    decoding = replace(CHAT, **{name: value for name, value in said.items() if value is not None})
    shown: list[Tensor] = [pictures.from_url(url) for url in urls]
    return pictures.session.asked(turns, shown, decoding=decoding)


def turns_of(messages: Sequence[ChatMessage]) -> tuple[list[Turn], list[str]]:
    """-> turns, and the addresses of their pictures in order.  Raises ValueError."""
    turns: list[Turn] = []
    urls: list[str] = []
    asked: list[str] = []  # what waits for an answer
    num_images = 0
    for number, message in enumerate(messages):
        if message.role == "assistant":
            if message.urls:
                raise ValueError(f"messages.{number} is the assistant's and holds a picture; only a user's can")
            if not turns and not asked and not num_images:
                raise ValueError(f"messages.{number} is the assistant's, but nothing was asked before it")
            if not asked and not num_images:  # a second one in a row
                last = turns.pop()
                turns.append(replace(last, answer=f"{last.answer}\n{message.text}"))
                continue
            if message.text.strip():
                turns.append(Turn("\n".join(asked), message.text, num_images))
                asked, num_images = [], 0
            continue
        if message.role != "user" and message.urls:
            raise ValueError(f"messages.{number} is the {message.role}'s and holds a picture; only a user's can")
        urls += message.urls
        num_images += len(message.urls)
        if message.text.strip():
            asked.append(message.text)
    if messages[-1].role != "user":
        raise ValueError("the last message has to be the user's")
    turns.append(Turn("\n".join(asked), "", num_images))
    return turns, urls


class Stopper:
    """Cuts an answer before the first of some strings; while it grows, what may become one of them waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops

    def cut(self, answer: Answer) -> Answer:
        found = [place for stop in self.stops if (place := answer.text.find(stop)) >= 0]
        if found:
            return replace(answer, text=answer.text[: min(found)], ended="stop")
        return answer

    def sure(self, text: str) -> str:
        held = 0
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(text)), held, -1):
                if text.endswith(stop[:length]):
                    held = length
                    break
        return text[: len(text) - held]


class Completion:
    """The objects of one answer."""

    def __init__(self, ask: Ask, model: str) -> None:
        self.ask = ask
        self.common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.ended or "stop"}
        return {**self.common, "object": "chat.completion", "choices": [choice], "usage": self.usage(answer)}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self.common, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        return {**self.common, "object": "chat.completion.chunk", "choices": [], "usage": self.usage(answer)}

    def usage(self, answer: Answer) -> dict[str, int]:
        num_prompt = len(self.ask.encoded.ids)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": answer.num_tokens,
            "total_tokens": num_prompt + answer.num_tokens,
        }
