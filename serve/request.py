"""A request's JSON -> a checked object; whatever is wrong with it is one sentence."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import ClientDisconnect, Request

from serve.guard import Refused

MAX_TEXT = 32_768  # characters of all texts of a request: far more than any of the models reads
_DEEPEST = 32
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
# What `model.generation.Decoding` checks is not said again; these keep its numbers within what tensors hold.
Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]
Number = Annotated[float, Field(ge=0, le=1000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Found = TypeVar("Found", bound=BaseModel)


class Strict(BaseModel):
    """A mistyped name or a number in quotes is an error, not something else that happens.

    A field that is null was not given, as OpenAI's clients mean it: they send many, and send back those of answers.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


async def read(request: Request, kind: type[Found], *, seconds: float) -> Found:
    """Raises Refused: 400 (wrong), 408 (too slow), 415 (another type)."""
    sent_as = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if sent_as != "application/json":
        raise Refused(415, f"this server takes application/json, not {sent_as or 'a body without a Content-Type'}")
    try:
        async with asyncio.timeout(seconds):
            raw = await request.body()
    except TimeoutError:
        raise Refused(408, f"the request did not arrive within {seconds:g} s") from None
    except ClientDisconnect:
        raise Refused(400, "the request broke off") from None
    return await asyncio.to_thread(parsed, raw, kind)


def parsed(raw: bytes, kind: type[Found]) -> Found:
    """Raises Refused."""
    try:
        found = json.loads(raw.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError:
        raise Refused(400, "the request is not UTF-8") from None
    except RecursionError:
        raise Refused(400, "the request is nested too deeply") from None
    except ValueError as error:
        raise Refused(400, f"the request is no JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise Refused(400, f"the request has to be a JSON object, not {_shown(found)}")
    check_texts(found)
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise Refused(400, _sentence(error)) from None


def check_texts(found: Any, depth: int = 0) -> None:
    """Raises Refused: halves of characters, which no tokenizer takes and no answer could repeat; too deep nesting."""
    if depth > _DEEPEST:
        raise Refused(400, "the request is nested too deeply")
    if isinstance(found, str):
        if _HALF_CHARACTER.search(found):
            raise Refused(400, r"a text holds half a character (\ud800 to \udfff)")
    elif isinstance(found, dict):
        for name, value in found.items():
            check_texts(name, depth + 1)
            check_texts(value, depth + 1)
    elif isinstance(found, list):
        for value in found:
            check_texts(value, depth + 1)


def check_length(*texts: str) -> None:
    """Raises ValueError."""
    length = sum(map(len, texts))
    if length > MAX_TEXT:
        raise ValueError(f"the texts have {length} characters together; this server takes {MAX_TEXT}")


async def prepared(make: Callable[[], Any], *, seconds: float) -> Any:
    """Decoding pictures and tokenizing, beside the server's loop.  Raises Refused with 400 where it raises
    ValueError."""
    try:
        async with asyncio.timeout(seconds):
            return await asyncio.to_thread(make)
    except TimeoutError:
        raise Refused(503, "the server is too busy to look at the request: try again in a moment") from None
    except ValueError as error:
        raise Refused(400, str(error)) from error


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _sentence(error: ValidationError) -> str:
    # of several that a value could have been, the one that it came nearest to
    first = max(error.errors(include_url=False, include_context=False), key=lambda found: len(found["loc"]))
    parts = [str(part) for part in first["loc"] if part != "str" and "[" not in str(part)]
    place = (
        ".".join(part for part, before in zip(parts, ["", *parts], strict=False) if part != before or part.isdigit())
        or "the request"
    )
    what = {"extra_forbidden": "is not known here", "missing": "is missing"}.get(first["type"])
    # what pydantic says may repeat what was sent, however long it is
    return f"{place[:200]} {what}" if what else f"{place[:200]}: {first['msg'][:300]}, not {_shown(first['input'])}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."
