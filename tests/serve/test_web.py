"""The page, in a real browser (Debian's Chromium), and what Gradio might do behind it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from serve.page_texts import TEXTS
from serve.session import Session
from tests.serve.live import WAIT, Live, base64_of, file_of, image, live, tiny_session, wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# no look-ups at Google's when it starts
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
         "--no-first-run", "--disable-gpu")  # fmt: skip
MS = WAIT * 1000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = os.environ.get("QUEQIAO_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium (Debian: apt install chromium), or name one: QUEQIAO_CHROMIUM")
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # it refuses to be root in one
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=found, args=[*QUIET, *sandbox])
        yield made
        made.close()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return tiny_session(tmp_path_factory.mktemp("pieces"), max_tokens=30_000)


@pytest.fixture(scope="module")
def server(session: Session) -> Iterator[Live]:
    with live(session, page=True) as found:
        yield found


def opened(browser: Browser, server: Live, language: str = "en-US", **how: Any) -> Page:
    page = browser.new_page(locale=language, **how)
    page.set_default_timeout(MS)
    page.goto(server.url)
    wait_for_labels(page)
    return page


def wait_for_labels(page: Page) -> None:
    """In the browser's language, and with them the memory in use."""
    page.wait_for_selector("#memory:has-text('GiB')")


def ask(page: Page, question: str) -> None:
    page.fill("#question textarea", question)
    page.click("#send")


def said(page: Page, count: int) -> list[str]:
    """All of so many answers, once the last is whole."""
    expect(page.locator("#chat .bot .message-content")).to_have_count(count, timeout=MS)
    expect(page.locator("#send")).to_be_enabled(timeout=MS)
    return [text.strip() for text in page.locator("#chat .bot .message-content").all_inner_texts()]


def set_number(page: Page, label: str, value: str) -> None:
    """Gradio forgets what is typed within milliseconds of a folded part's unfolding, faster than any hand."""
    field = page.locator(f'input[type=number][aria-label*="{label}"]')
    for _ in range(10):
        field.fill(value)
        field.press("Tab")
        page.wait_for_timeout(300)
        if field.input_value() == value:
            return
    raise AssertionError(f"{label} does not take {value}")


def squeezed(text: str) -> str:
    return "".join(text.split())


def test_upload_ask_read_clear(browser: Browser, server: Live) -> None:
    picture = file_of(image(0))
    decoding = {"temperature": 0, "max_new_tokens": 30}
    first, history = server.session.chat(picture, "What is in the picture?", **decoding)
    second, _ = server.session.chat(None, "图片", history, **decoding)
    alone, _ = server.session.chat(None, "What is in the picture?", **decoding)
    assert len({first, second, alone}) == 3
    page = opened(browser, server)
    seen: list[str] = []
    page.on("request", lambda request: seen.append(request.url))
    page.reload()
    wait_for_labels(page)
    page.click("#settings button")
    set_number(page, "Temperature", "0")
    set_number(page, "Tokens of an answer", "30")
    page.set_input_files("#picture input[type=file]", {"name": "a.png", "mimeType": "image/png", "buffer": picture})
    page.wait_for_selector("#picture img")
    ask(page, "What is in the picture?")
    assert squeezed(said(page, 1)[0]) == squeezed(first)
    assert page.locator("#chat img").count() == 1 and "GiB" in page.inner_text("#memory")
    expect(page.locator("#question textarea")).to_have_value("")
    ask(page, "图片")
    assert list(map(squeezed, said(page, 2))) == [squeezed(first), squeezed(second)]
    assert page.locator("#chat img").count() == 1, "the same picture is shown once"
    page.click("#clear")
    expect(page.locator("#chat .message-content")).to_have_count(0, timeout=MS)
    expect(page.locator("#picture img")).to_have_count(0, timeout=MS)
    ask(page, "What is in the picture?")
    assert squeezed(said(page, 1)[0]) == squeezed(alone), "nothing ought to be remembered"
    places = {urlsplit(url).netloc for url in seen if urlsplit(url).scheme in ("http", "https", "ws", "wss")}
    assert places == {urlsplit(server.url).netloc}, "nothing from elsewhere, and nothing to elsewhere"
    page.close()


def test_stop_keeps_what_was_said(browser: Browser, server: Live) -> None:
    page = opened(browser, server)
    page.click("#settings button")
    set_number(page, "Tokens of an answer", "20000")
    before = server.session.answers
    try:
        endless(server.session)
        ask(page, "Q")
        answer = page.locator("#chat .bot .message-content")
        expect(answer).to_have_count(1, timeout=MS)
        growing = {answer.inner_text() for _ in range(200) if not page.wait_for_timeout(20)}
        assert len(growing) > 3, "words ought to appear as they come"
        page.click("#stop")
        (said_then,) = said(page, 1)
        assert len(said_then) > 3 and server.is_idle
        expect(page.locator("#stop")).to_be_disabled(timeout=MS)
        ask(page, "Q")
        wait_until(lambda: not server.is_idle)
        page.close()
        wait_until(lambda: server.is_idle)  # whoever closes the page ends the answer
    finally:
        server.session.answers = before  # type: ignore[method-assign]


def endless(session: Session) -> None:
    """Answers that never end by themselves."""
    from dataclasses import replace

    real = session.answers

    def answers(asks: Any) -> Any:
        return real([replace(ask, decoding=replace(ask.decoding, min_new_tokens=20_000)) for ask in asks])

    session.answers = answers  # type: ignore[method-assign]


def test_clear_during_an_answer(browser: Browser, server: Live) -> None:
    page = opened(browser, server)
    page.click("#settings button")
    set_number(page, "Tokens of an answer", "20000")
    before = server.session.answers
    try:
        endless(server.session)
        ask(page, "Q")
        expect(page.locator("#chat .bot .message-content")).to_have_count(1, timeout=MS)
        page.click("#clear")
        expect(page.locator("#chat .message-content")).to_have_count(0, timeout=MS)
        wait_until(lambda: server.is_idle)
        page.wait_for_timeout(300)
        assert page.locator("#chat .message-content").count() == 0, "nothing of it comes back"
    finally:
        server.session.answers = before  # type: ignore[method-assign]
        page.close()


def test_texts_are_shown_as_they_are(browser: Browser, server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradio takes them for HTML: half of them would be missing, and they could draw forms and ask for addresses."""
    text = 'a<b and c>d &lt; <b>x</b> <img src="/health"> <form action="https://evil.example"><input>'
    real = server.session.answers

    def answers(asks: Any) -> Iterator[Any]:
        from dataclasses import replace

        for several in real(asks):
            yield [answer and replace(answer, text=text) for answer in several]

    monkeypatch.setattr(server.session, "answers", answers)
    page = opened(browser, server)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(urlsplit(request.url).path))
    ask(page, text)
    assert said(page, 1) == [text]
    assert page.locator("#chat .user .message-content").inner_text().strip() == text
    assert page.locator("#chat form, #chat .message-content img, #chat b").count() == 0 and "/health" not in asked
    page.close()


def test_a_picture_can_be_pasted(browser: Browser, server: Live) -> None:
    page = opened(browser, server, permissions=["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async (text) => {
            const raw = Uint8Array.from(atob(text), character => character.charCodeAt(0));
            const blob = new Blob([raw], {type: "image/png"});
            await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
        }""",
        base64_of(file_of(image(1))),
    )
    page.click('#picture button[aria-label="Paste from clipboard"]')
    page.wait_for_selector("#picture img")
    page.close()


def test_both_languages(browser: Browser, server: Live) -> None:
    page = opened(browser, server, "zh-CN")
    zh, en = TEXTS["zh"], TEXTS["en"]
    expect(page.locator("#send")).to_have_text(zh["send"], timeout=MS)
    assert zh["settings"] in page.inner_text("#settings")
    page.click("#language label:has-text('English')")
    for name in ("send", "stop", "clear"):
        expect(page.locator(f"#{name}")).to_have_text(en[name], timeout=MS)
    expect(page.locator("#question textarea")).to_have_attribute("placeholder", en["question"], timeout=MS)
    assert TEXTS["zh"].keys() == TEXTS["en"].keys()
    page.close()


@pytest.mark.parametrize("language", ["en-US", "zh-CN", "de-DE"])
def test_gradio_s_own_clear_and_share_are_hidden_in_every_language(
    browser: Browser, server: Live, language: str
) -> None:
    """Gradio translates their titles: its Share uploads, its Clear would leave what the model remembers."""
    page = opened(browser, server, language)
    picture = {"name": "a.png", "mimeType": "image/png", "buffer": file_of(image(0))}
    page.set_input_files("#picture input[type=file]", picture)
    page.wait_for_selector("#picture img")
    page.click("#settings button")
    page.locator("#settings input[type=number]").last.fill("1")
    ask(page, "Q")
    said(page, 1)
    page.wait_for_selector("#chat .download-link")
    hidden = ("Clear", "Share", "清空对话", "分享", "Chat leeren", "Teilen")
    titles = page.locator("#chat button").evaluate_all("all => all.map(one => one.title)")
    shown = page.locator("#chat button:visible").evaluate_all("all => all.map(one => one.title)")
    assert len(titles) - len(shown) == 2, (titles, shown)
    assert not set(shown) & set(hidden), shown
    page.close()


def test_a_broken_picture_is_a_sentence(browser: Browser, server: Live) -> None:
    page = opened(browser, server)
    broken = {"name": "a.png", "mimeType": "image/png", "buffer": file_of(image(0))[:60]}
    page.set_input_files("#picture input[type=file]", broken)
    page.wait_for_selector("#picture img")
    ask(page, "Q")
    page.wait_for_selector("text=truncated image")
    expect(page.locator("#send")).to_be_enabled(timeout=MS)
    page.close()


# ------------------------------------------------------------------------------------------- without a browser: Gradio


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file=/proc/self/environ"),
        ("GET", f"/gradio_api/file={Path(__file__).resolve()}"),
        ("GET", "/gradio_api/file=http://127.0.0.1:1/"),
        ("GET", "/gradio_api/file=/tmp/../etc/passwd"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1:1/"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/gradio_api/deep_link?session_hash=a"),
        ("GET", "/monitoring"),
        ("GET", "/static/../../../../../../etc/passwd"),
        ("GET", "/assets/..%2f..%2f..%2fetc%2fpasswd"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/call/ask"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/login"),
    ],
)
def test_what_gradio_could_do_is_shut(server: Live, method: str, path: str) -> None:
    found = httpx.request(method, server.url + path, json={}, timeout=WAIT, follow_redirects=False)
    assert found.status_code in (403, 404, 405, 422) and "root:" not in found.text


def joined(server: Live, picture: Any, question: str = "Q", *, name: str, tokens: int = 4) -> httpx.Response:
    """The page's own call, with a picture of the sender's making."""
    config = httpx.get(f"{server.url}/config", timeout=WAIT).json()
    (asking,) = [one["id"] for one in config["dependencies"] if len(one["inputs"]) > 5]
    data = [None, picture, question, "en", 0, 1, 0, 1, tokens]
    body = {"data": data, "fn_index": asking, "session_hash": name, "trigger_id": None}
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{server.url}/gradio_api/queue/join", content=json.dumps(body), headers=headers, timeout=WAIT)


def join(server: Live, picture: Any, question: str = "Q") -> str:
    """-> what the events of such a call say"""
    answer = joined(server, picture, question, name="hostile0")
    return events_of(server, "hostile0") if answer.status_code == 200 else answer.text


def events_of(server: Live, name: str) -> str:
    found = ""
    with httpx.stream("GET", f"{server.url}/gradio_api/queue/data?session_hash={name}", timeout=WAIT) as events:
        for line in events.iter_lines():
            found += line
            if "process_completed" in line or "unexpected_error" in line:
                return found
    return found


def test_nobody_is_answered_who_does_not_read(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradio's queue would take the model's time for calls whose answers nobody fetches."""
    asked: list[str] = []
    ask = server.session.ask
    monkeypatch.setattr(server.session, "ask", lambda *a, **k: asked.append(a[1]) or ask(*a, **k))
    for number in range(5):
        assert joined(server, None, f"unread {number}", name=f"silent{number}").status_code == 200
    assert '"success":true' in join(server, None, "read").replace(" ", "")
    assert asked == ["read"]
    assert joined(server, None, "left", name="leaves", tokens=20_000).status_code == 200
    with httpx.stream("GET", f"{server.url}/gradio_api/queue/data?session_hash=leaves", timeout=WAIT) as events:
        next(line for line in events.iter_lines() if "process_generating" in line)
        assert not server.is_idle
    wait_until(lambda: server.is_idle)
    monkeypatch.setattr("serve.web._READER_COMES", 0.0)
    assert joined(server, None, "too late", name="late").status_code == 200
    time.sleep(0.5)
    assert "process_completed" in events_of(server, "late")
    assert asked == ["read", "left"]


@pytest.mark.parametrize(
    "place", ["/etc/passwd", "http://127.0.0.1:{port}/x.png", "file:///etc/passwd", "../../etc/passwd"]
)
def test_a_picture_is_an_upload_and_nothing_else(server: Live, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", lambda *a, **k: asked.append(a))
    monkeypatch.setattr(server.session, "ask", lambda *a, **k: asked.append(a))
    place = place.replace("{port}", server.url.rpartition(":")[2])
    for picture in ({"path": place, "meta": {"_type": "gradio.FileData"}},
                    {"path": place, "url": place, "meta": {"_type": "gradio.FileData"}}):  # fmt: skip
        found = join(server, picture)
        assert '"success":false' in found.replace(" ", ""), found[-500:]
    assert asked == []


@pytest.mark.parametrize(("question", "asked"), [("a" * 32_769, []), ("Q\ud83d", ["Q"])])
def test_a_question_is_no_longer_than_a_requests(
    server: Live, monkeypatch: pytest.MonkeyPatch, question: str, asked: list[str]
) -> None:
    """The field's own limit is the browser's alone."""
    found: list[str] = []
    real = server.session.ask

    def ask(picture: Any, text: str, *more: Any, **named: Any) -> Any:
        found.append(text)
        return real(picture, text, *more, **named)

    monkeypatch.setattr(server.session, "ask", ask)
    said = join(server, None, question=question)
    assert found == asked and ("this server takes 32768" in said) == (not asked), said[-500:]


def test_uploads_without_end_are_refused(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.web.OnlyWhatIsAsked.__init__.__defaults__", (250,))
    with live(session, page=True) as server:
        url, files = f"{server.url}/gradio_api/upload", [("a.png", bytes([n]) * 100) for n in range(4)]
        found = [httpx.post(url, files={"files": file}, timeout=WAIT) for file in files]
        assert [one.status_code for one in found] == [200, 200, 200, 507] and "as many pictures" in found[-1].text


def test_an_upload_of_any_size_is_refused(session: Session) -> None:
    with live(session, page=True, reader={"max_bytes": 1000}, max_body=10_000) as server:
        url = f"{server.url}/gradio_api/upload"
        for size, statuses in ((2000, (413,)), (20_000, (413, 500)), (100, (200,))):
            found = httpx.post(url, files={"files": ("a.png", b"a" * size)}, timeout=WAIT)
            assert found.status_code in statuses, (size, found.text)
        assert httpx.get(f"{server.url}/health", timeout=WAIT).json() == {"status": "ok"}
        assert httpx.get(server.url, timeout=WAIT, headers={"Host": "evil.example"}).status_code == 403


# ------- servers of their own, last: Gradio has one folder of uploads a process


def test_behind_a_token_and_an_open_page_does_not_hold_up_the_end(
    browser: Browser, session: Session, capfd: pytest.CaptureFixture[str]
) -> None:
    with live(session, page=True, token="secret") as server:
        assert httpx.get(server.url, timeout=WAIT).status_code == 401
        page = opened(browser, server, http_credentials={"username": "anybody", "password": "secret"})
        page.click("#settings button")
        set_number(page, "Tokens of an answer", "3")
        ask(page, "Q")
        said(page, 1)
    assert "exceeded" not in capfd.readouterr().err, "uvicorn waits 5 seconds for its tasks, then cancels them"
    page.close()
