"""REST as its clients find it: VisualGLM's over plain HTTP, OpenAI's through the real `openai` client."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion
from prometheus_client.parser import text_string_to_metric_families

from data.batch import Turn
from model.generation import Decoding
from serve.batching import LineLimits
from serve.session import CHAT, Answer, Session
from tests.serve.live import NAME, WAIT, Live, base64_of, data_url, file_of, image, live, tiny_session, wait_until

GREEDY = {"temperature": 0}
LONG = {"temperature": 0.8, "seed": 1, "max_tokens": 3000, "min_tokens": 3000}  # some seconds


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return tiny_session(tmp_path_factory.mktemp("pieces"))


@pytest.fixture(scope="module")
def server(session: Session) -> Iterator[Live]:
    with live(session) as found:
        yield found


def client_of(server: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=WAIT)


@pytest.fixture(scope="module")
def client(server: Live) -> openai.OpenAI:
    return client_of(server)


def post(server: Live, path: str = "/", **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=WAIT)


def user(*parts: str | int) -> dict[str, Any]:
    """A message of words and pictures, these by their number."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(file_of(image(part)))}}
        for part in parts
    ]
    return {"role": "user", "content": content}


# ----------------------------------------------------------------------------------------------------------- VisualGLM


def test_visualglms_request_and_answer(server: Live) -> None:
    expected, _ = server.session.chat(image(0), "描述这张图片。", temperature=0, max_new_tokens=20)
    num_prompt = len(server.session.ask(image(0), "描述这张图片。").encoded.ids)
    done = post(
        server,
        image=base64_of(file_of(image(0))),
        text="描述这张图片。",
        history=[],
        max_length=num_prompt + 20,
        min_length=50,
        top_p=0.4,
        top_k=100,
        repetition_penalty=1.0,
        **GREEDY,
    )
    assert done.status_code == 200, done.text
    found = done.json()
    assert found["result"] == found["response"] == expected
    assert found["history"] == [["描述这张图片。", expected]] and found["status"] == 200
    assert found["time"][:2] == "20" and len(found["time"]) == len("2023-05-16 20:20:10")
    again = post(server, image=base64_of(file_of(image(0))), text="内容", history=found["history"],
                 max_length=2048, **GREEDY).json()  # fmt: skip
    expected_again, _ = server.session.chat(image(0), "内容", [("描述这张图片。", expected)], temperature=0)
    assert again["result"] == expected_again and again["history"] == [*found["history"], ["内容", expected_again]]


def test_lengths_count_picture_and_words(server: Live) -> None:
    text, picture = "描述这张图片。", base64_of(file_of(image(1)))
    num_prompt = len(server.session.ask(image(1), text).encoded.ids)
    expected, _ = server.session.chat(image(1), text, temperature=0, max_new_tokens=9, min_new_tokens=7)
    found = post(server, text=text, image=picture, max_length=num_prompt + 9, min_length=num_prompt + 7, **GREEDY)
    assert found.json()["result"] == expected
    refused = post(server, text=text, image=picture, max_length=num_prompt)
    assert refused.status_code == 400 and f"which picture and text ({num_prompt} tokens) fill" in refused.text


def test_a_repetition_penalty_and_a_seed_do_something(server: Live) -> None:
    """VisualGLM takes repetition_penalty and ignores it (`api.py:35-37`)."""
    say = {"text": "What is it?", "max_length": 60}
    plain, penalised = (
        post(server, **say, **GREEDY, **more).json()["result"] for more in ({}, {"repetition_penalty": 9.0})
    )
    assert plain != penalised
    warm = {**say, "temperature": 1.5, "top_p": 1.0}
    assert post(server, **warm, seed=4).json()["result"] == post(server, **warm, seed=4).json()["result"]
    assert post(server, **warm, seed=4).json()["result"] != post(server, **warm, seed=5).json()["result"]


# -------------------------------------------------------------------------------------------------------------- OpenAI


def test_openais_client_with_several_pictures(server: Live, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    decoding = Decoding(12)
    turns = [Turn("Q\nWhat?", "blue", 1), Turn("Describe the image.", "", 2)]
    ask = server.session.asked(turns, [server.session.picture(image(n)) for n in (0, 1, 2)], decoding=decoding)
    (expected,) = server.session.answer([ask])
    messages: Any = [
        {"role": "system", "content": "Q"},
        user("What?", 0),
        {"role": "assistant", "content": "blue"},
        user(1, "Describe the image.", 2),
    ]
    found = client.chat.completions.create(model=NAME, messages=messages, max_tokens=12, **GREEDY)
    assert isinstance(found, ChatCompletion) and found.model == NAME and found.object == "chat.completion"
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.ended)
    assert choice.message.role == "assistant"
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ask.encoded.ids), expected.num_tokens)
    swapped: Any = [*messages[:3], user(2, "Describe the image.", 1)]
    other = client.chat.completions.create(model=NAME, messages=swapped, max_tokens=12, **GREEDY)
    assert other.choices[0].message.content != expected.text, "the order of pictures ought to matter"


def test_a_stream_adds_up_to_the_answer(server: Live, client: openai.OpenAI) -> None:
    how: Any = {"model": NAME, "messages": [user("What is it?", 0)], "max_tokens": 300, "seed": 3, "temperature": 1.5,
                "top_p": 1.0, "extra_body": {"min_tokens": 300, "top_k": 0}}  # fmt: skip
    whole = client.chat.completions.create(**how)
    chunks = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert "".join(delta or "" for delta in deltas) == whole.choices[0].message.content
    assert sum(bool(delta) for delta in deltas) > 5, "words ought to come as they are said"
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_stop_strings_end_an_answer_before_them(client: openai.OpenAI) -> None:
    how: Any = {
        "model": NAME,
        "messages": [user("What?")],
        "max_tokens": 60,
        "seed": 8,
        "temperature": 1.5,
        "top_p": 1.0,
    }
    text = client.chat.completions.create(**how).choices[0].message.content
    assert text is not None
    stop = text[5:8]
    expected = text[: text.index(stop)]
    stopped = client.chat.completions.create(**how, stop=["nowhere in it", stop]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (expected, "stop")
    chunks = list(client.chat.completions.create(**how, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    almost = text[-2:] + "nothing more"  # held back while it may come, and given when it did not
    chunks = list(client.chat.completions.create(**how, stop=almost, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_what_is_not_said_is_as_in_every_front_end(client: openai.OpenAI, server: Live) -> None:
    seen = []
    line = server.service.line
    before = line.answers
    try:
        object.__setattr__(line, "answers", lambda ask: seen.append(ask) or before(ask))
        client.chat.completions.create(model=NAME, messages=[user("Q")], max_tokens=3)
        post(server, text="Q", max_length=60)
    finally:
        object.__setattr__(line, "answers", before)
    for ask in seen:
        found = ask.decoding
        assert (found.temperature, found.top_k, found.top_p) == (CHAT.temperature, CHAT.top_k, CHAT.top_p)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("change", "kind", "expected"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "there is no model 'gpt-5' here, only 'tiny'"),
        ({"n": 2}, openai.BadRequestError, "n: Input should be 1"),
        ({"temperature": -1}, openai.BadRequestError, "temperature: Input should be greater"),
        ({"messages": []}, openai.BadRequestError, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, openai.BadRequestError, "nothing was asked before it"),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}]},
         openai.BadRequestError, "the last message has to be the user's"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "at most 0 items"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice: Input should be 'none' or 'auto'"),
        ({"logit_bias": {"5": 3}}, openai.BadRequestError, "logit_bias: Dictionary should have at most 0 items"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty: Input should be 0"),
    ],
)  # fmt: skip
def test_openais_client_tells_what_is_wrong(client: openai.OpenAI, change: Any, kind: type, expected: str) -> None:
    say: Any = {"model": NAME, "messages": [user("Q")], "max_tokens": 2, **change}
    with pytest.raises(kind, match=expected):
        client.chat.completions.create(**say)


def test_labels_and_neutral_values_are_taken(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "Q"}], max_completion_tokens=2, user="u", n=1, stop=[""],
        metadata={"a": "b"}, frequency_penalty=0.0, presence_penalty=0, logprobs=False,
        response_format={"type": "text"}, tools=[], tool_choice="auto", parallel_tool_calls=True, logit_bias={},
    )  # fmt: skip
    assert found.usage is not None and found.usage.completion_tokens <= 2


def test_what_is_null_was_not_given(client: openai.OpenAI, server: Live) -> None:
    """OpenAI's clients write null where nothing is meant, and an answer's own message is full of it."""
    messages: Any = [{"role": "user", "content": "Q"}]
    how: Any = {"model": NAME, "max_tokens": 9, "temperature": 0}
    first = client.chat.completions.create(messages=messages, **how)
    message = first.choices[0].message.model_dump()
    assert message["tool_calls"] is None, "this is what the test is about"
    messages += [message, {"role": "user", "content": "图片", "name": None}]
    nulls: Any = {"stream": None, "tools": None, "logit_bias": None, "top_logprobs": None, "seed": None}
    found = client.chat.completions.create(messages=messages, extra_body={"top_k": None}, **how, **nulls)
    _, history = server.session.chat(None, "Q", temperature=0, max_new_tokens=9)
    expected, _ = server.session.chat(None, "图片", history, temperature=0, max_new_tokens=9)
    assert found.choices[0].message.content == expected
    body = {"text": "Q", "temperature": 0, "max_length": 40}
    answers = [
        httpx.post(server.url, json=body | more, timeout=WAIT) for more in ({}, {"history": None, "top_p": None})
    ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["result"] == answers[1].json()["result"]


# ------------------------------------------------------------------------------------------------- many, slow, and gone


def test_64_clients_at_once_lose_no_request(session: Session) -> None:
    def say(number: int) -> dict[str, Any]:
        text = ("What is in the picture?", "描述这张图片。", "Q", "图片内容")[number % 4]
        picture = None if number % 3 == 2 else base64_of(file_of(image(number % 4)))
        return {"text": text, "image": picture, "temperature": 1.2, "top_p": 1.0, "top_k": 0, "seed": number,
                "max_length": 45 + number % 9}  # fmt: skip

    def alone(number: int) -> str:
        body = say(number)
        picture = image(number % 4) if body["image"] else None
        room = body["max_length"] - len(session.ask(picture, body["text"]).encoded.ids)
        return session.chat(
            picture, body["text"], temperature=1.2, top_p=1.0, top_k=0, seed=number, max_new_tokens=room
        )[0]

    expected = [alone(number) for number in range(64)]

    async def all_at_once(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=WAIT, limits=httpx.Limits(max_connections=64)) as client:
            return await asyncio.gather(*(client.post(url, json=say(number)) for number in range(64)))

    with live(session) as server:
        found = asyncio.run(all_at_once(server.url))
        assert [done.status_code for done in found] == [200] * 64
        assert [done.json()["result"] for done in found] == expected
        assert len(set(expected)) > 40
        counts = metrics_of(server)
        assert counts["queqiao_batch_rows_sum"] == 64
        assert counts["queqiao_batch_rows_count"] < 32, "they ought to be answered in batches"
        assert server.is_idle


def test_connections_that_say_nothing_or_half_a_head_are_closed(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvicorn keeps them for ever, and so many at most: who opens 1024 would lock everybody out."""
    monkeypatch.setattr("serve.connection.PromptConnection.HEAD_SECONDS", 0.5)
    get = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    with live(session) as server:
        place = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        for said in (b"", get, get + b"\r\n" + get[:9]):  # the last: a whole one, and half of the next
            with socket.create_connection(place, timeout=WAIT) as client:
                client.sendall(said)
                answer = b"".join(iter(lambda: client.recv(65536), b""))  # b"": closed
                assert answer.startswith(b"HTTP/1.1 200") == (get + b"\r\n" in said), answer
        with socket.create_connection(place, timeout=WAIT) as client:  # a body, and an answer, may take longer
            slow = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n"
            client.sendall(slow)
            time.sleep(1.0)
            client.sendall(b'{"text": "Q"}')
            assert client.recv(65536).startswith(b"HTTP/1.1 200")


def metrics_of(server: Live) -> dict[str, float]:
    """Counters without labels by name, others summed up."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=WAIT).text):
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def test_a_newcomer_does_not_wait_for_a_long_answer(server: Live, client: openai.OpenAI) -> None:
    with client.chat.completions.create(model=NAME, messages=[user("Q")], stream=True, max_tokens=3000,
                                        extra_body={"min_tokens": 3000}) as long:  # fmt: skip
        next(iter(long))
        client.chat.completions.create(model=NAME, messages=[user("Q")], max_tokens=3)
        assert server.service.line.num_running == 1, "the long one ought to be on its way still"
    wait_until(lambda: server.is_idle)


def test_a_client_that_leaves_ends_its_answer(server: Live, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=NAME, messages=[user("Q")], stream=True, max_tokens=3000,
                                            extra_body={"min_tokens": 3000})  # fmt: skip
    next(iter(stream))
    assert server.service.line.num_running == 1
    before = metrics_of(server)["queqiao_tokens_total"]
    stream.close()
    wait_until(lambda: server.is_idle)
    with pytest.raises(httpx.ReadTimeout):
        patience = httpx.Timeout(30, read=0.05)  # an idle machine is through in half a second
        httpx.post(f"{server.url}/", json={"text": "Q", "max_length": 3000, "min_length": 3000}, timeout=patience)
    wait_until(lambda: server.is_idle)
    assert metrics_of(server)["queqiao_tokens_total"] == before, "neither ought to have come to its end"


class Slow:
    """A session whose steps wait until they may go on."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may = threading.Event()
        real = session.answers

        class Held:
            def __init__(held, asks: Any) -> None:
                held.answers = real(asks)
                held.stop = held.answers.stop

            def __iter__(held) -> Iterator[list[Answer]]:
                self.may.wait(WAIT)
                yield from held.answers

        monkeypatch.setattr(session, "answers", Held)


def test_a_full_line_refuses_at_once(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(session, monkeypatch)
    say = {"text": "Q", "max_length": 30}
    with live(session, limits=LineLimits(waiting=2, batches=1)) as server:
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(post(server, **say).status_code)) for _ in range(3)]
        threads[0].start()
        wait_until(lambda: server.service.line.num_running == 1)
        for thread in threads[1:]:
            thread.start()
        wait_until(lambda: server.service.line.num_waiting == 2)
        refused = post(server, **say)
        assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
        assert "2 requests are waiting already" in refused.json()["error"]["message"]
        with pytest.raises(openai.RateLimitError, match="2 requests are waiting already"):
            client_of(server).chat.completions.create(model=NAME, messages=[user("Q")])
        assert httpx.get(f"{server.url}/health", timeout=WAIT).json() == {"status": "ok"}
        slow.may.set()
        for thread in threads:
            thread.join(WAIT)
        assert statuses == [200] * 3, "whoever was let in gets an answer"


def test_an_answer_that_takes_too_long_is_given_up(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(session, monkeypatch)
    with live(session, limits=LineLimits(seconds=0.3)) as server:
        done = post(server, text="Q")
        assert done.status_code == 504 and "no answer within 0.3 s" in done.json()["error"]["message"]
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", timeout=WAIT,
                          json={"messages": [user("Q")], "stream": True}) as events:  # fmt: skip
            assert events.status_code == 504, "before the first word there is a status"
        slow.may.set()
        wait_until(lambda: server.is_idle)
    with live(session, limits=LineLimits(seconds=1.0)) as server:
        say = {"messages": [user("Q")], "stream": True, "max_tokens": 4000, "min_tokens": 4000}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=say, timeout=WAIT) as events:
            assert events.status_code == 200
            *_, last = [line for line in events.iter_lines() if line]
        assert "no answer within 1 s" in last and "DONE" not in last
        wait_until(lambda: server.is_idle)


def test_what_the_model_cannot_answer_fails_alone(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    real = session.answers

    def answers(asks: Any) -> Any:
        if any("bad" in ask.dialogue.turns[-1].question for ask in asks):
            raise RuntimeError("a secret of the machine")
        return real(asks)

    monkeypatch.setattr(session, "answers", answers)
    expected, _ = session.chat(None, "Q", temperature=0, max_new_tokens=5)

    async def three(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=WAIT) as client:
            say = [{"messages": [user(text)], "max_tokens": 5, **GREEDY} for text in ("Q", "bad", "Q")]
            return await asyncio.gather(*(client.post(f"{url}/v1/chat/completions", json=body) for body in say))

    with live(session, limits=LineLimits(gather_seconds=0.3)) as server:
        found = asyncio.run(three(server.url))
        assert [done.status_code for done in found] == [200, 500, 200]
        assert [done.json()["choices"][0]["message"]["content"] for done in found[::2]] == [expected] * 2
        assert "the server's log says how" in found[1].text and "secret" not in found[1].text
        assert post(server, text="Q").status_code == 200


def test_rows_and_tokens_at_a_time_are_limited(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    most, real = [0], session.answers

    def answers(asks: Any) -> Any:
        most[0] = max(most[0], len(asks))
        return real(asks)

    monkeypatch.setattr(session, "answers", answers)

    async def eight(url: str) -> list[int]:
        async with httpx.AsyncClient(timeout=WAIT) as client:
            done = await asyncio.gather(*(client.post(url, json={"text": "Q", "max_length": 40}) for _ in range(8)))
            return [one.status_code for one in done]

    for limits, expected in ((LineLimits(rows=3), 3), (LineLimits(tokens=85), 2), (LineLimits(tokens=10), 1)):
        most[0] = 0
        with live(session, limits=LineLimits(**{**vars(limits), "gather_seconds": 0.3})) as server:
            assert asyncio.run(eight(server.url)) == [200] * 8
        assert most == [expected]


def test_metrics_are_what_happened(session: Session) -> None:
    with live(session) as server:
        done = [post(server, text="Q", max_length=40, **GREEDY), post(server, text="Q", wrong=1)]
        httpx.get(f"{server.url}/some/{'x' * 99}", timeout=WAIT)
        text = httpx.get(f"{server.url}/metrics", timeout=WAIT).text
    assert [one.status_code for one in done] == [200, 400]
    requests = [line for line in text.splitlines() if line.startswith("queqiao_requests_total")]
    assert sorted(requests) == [
        'queqiao_requests_total{method="GET",path="other",status="404"} 1.0',
        'queqiao_requests_total{method="POST",path="/",status="200"} 1.0',
        'queqiao_requests_total{method="POST",path="/",status="400"} 1.0',
    ]
    ask = session.ask(None, "Q", decoding=Decoding(40))
    assert f'queqiao_tokens_total{{kind="prompt"}} {float(len(ask.encoded.ids))}' in text
    assert "queqiao_waiting 0.0" in text and "queqiao_memory_bytes" in text


def test_an_end_is_told_to_those_who_wait(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not hang on them."""
    found: list[httpx.Response] = []
    with live(session) as server:
        say = {"text": "Q", "max_length": 4000, "min_length": 4000}
        thread = threading.Thread(target=lambda: found.append(post(server, **say)))
        thread.start()
        wait_until(lambda: server.service.line.num_running == 1)
        server.service.line.close()
        thread.join(WAIT)
        assert found[0].status_code == 500 and "shutting down" in found[0].text
        assert httpx.get(f"{server.url}/health", timeout=WAIT).status_code == 503
        late = post(server, text="Q")
        assert late.status_code == 429 and "shutting down" in late.text


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_every_promised_format_upright(server: Live, kind: str, tmp_path: Path) -> None:
    """JPEG with EXIF that says it lies on its side; GIF with a second frame that nobody looks at."""
    lying = image(0).transpose(2)  # turned left
    how: dict[str, Any] = {}
    if kind == "JPEG":
        exif = lying.getexif()
        exif[0x0112] = 6  # turned left, says the camera
        how = {"exif": exif, "quality": 100, "subsampling": 0}
    if kind == "WEBP":
        how = {"lossless": True}
    if kind == "GIF":
        how = {"save_all": True, "append_images": [image(3)]}
    raw = file_of(lying if kind == "JPEG" else image(0), kind, **how)
    expected = server.session.picture(image(0)).float()
    assert (server.service.pictures.from_bytes(raw).float() - expected).abs().max() < 4
    assert post(server, text="Q", image=base64_of(raw), max_length=60).status_code == 200


def test_turns_of_messages_in_a_row() -> None:
    from serve.openai_api import ChatMessage, turns_of

    def turns(*messages: tuple[str, str]) -> list[Turn]:
        return turns_of([ChatMessage(role=role, content=text) for role, text in messages])[0]  # type: ignore[arg-type]

    assert turns(("user", "a"), ("user", "b")) == [Turn("a\nb")]
    assert turns(("user", "a"), ("assistant", "x"), ("assistant", "y"), ("user", "b")) == [
        Turn("a", "x\ny"), Turn("b")]  # fmt: skip
    assert turns(("user", "a"), ("assistant", ""), ("user", "b")) == [Turn("a\nb")], "an answer that never came"
    assert list(itertools.chain(turns(("developer", "s"), ("user", "a")))) == [Turn("s\na")]
