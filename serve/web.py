"""The page: a picture by upload or paste, a conversation, its answers as they come; in Chinese and English.

Gradio draws it.  What Gradio could also do is shut: it reports nothing to anybody, loads nothing from elsewhere, shares
no link, fetches no address, and serves no file but what this browser uploaded.
"""

from __future__ import annotations

import asyncio
import html
import os
import re
import tempfile
import time
from abc import ABCMeta
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # asked when Gradio is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from data.batch import whole_characters
from model.generation import Decoding
from serve.batching import Busy, Failed, Left, TooSlow, until
from serve.guard import Refused
from serve.memory import used_bytes
from serve.page_texts import TEXTS
from serve.request import check_length
from serve.rest import Service
from serve.session import CHAT, Ask, Exchange

# what the page asks for; Gradio answers much more: other people's addresses, recordings, code, its own monitoring
_ASKED = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|(static|assets)/[\w./@+-]+)?/?"
    r"|/gradio_api/(info|app_id|startup-events|heartbeat/\w+|queue/(join|data)|cancel|reset|upload(_progress)?)/?"
    r"|/gradio_api/file=/.+"
)
_FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")  # on people's own machines
_CSS = """
footer, #chat .wrapper > .icon-button-wrapper, #chat [data-testid="download-link"] ~ button {display: none !important}
.memory {opacity: 0.7; font-size: 0.85em}
#language .wrap {justify-content: flex-end}
#chat .message img {max-height: 12rem}
"""  # Gradio's own Clear would leave the conversation as it is; its Share uploads.  Their titles are in any language.
_KEEP_SECONDS = 24 * 3600
_LONGEST_STEP = 30.0  # seconds
_READER_COMES = 30.0  # seconds; a browser asks first, and then for what is said
_SHOWN_EVERY = 0.1  # seconds; a browser that lays out a long answer anew for every token falls behind


def _path_of(self: Any, payload: Any) -> Path | None:
    """Of an upload; nothing is opened, where Gradio's own picture tries every format that Pillow knows."""
    if payload is None:
        return None
    path, cache = Path(payload.path or "").resolve(), Path(self.GRADIO_CACHE).resolve()
    if not path.is_relative_to(cache) or not path.is_file():
        raise gr.Error("the picture was not uploaded here")
    return path


async def _uploaded(self: Any, place: Any) -> str | None:
    """What a page names as its picture has to be in the cache: Gradio's own would fetch an address, and copies a file
    from anywhere where it does not think itself running, as when it is mounted."""
    if place is not None and not Path(place).resolve().is_relative_to(Path(self.GRADIO_CACHE).resolve()):
        raise gr.Error("the picture was not uploaded here")
    found: str | None = await gr.Image.async_move_resource_to_block_cache(self, place)
    return found


# A class statement would have Gradio's metaclass write a file of stubs beside this one.  A template is drawn as what it
# is derived from.
Picture: Any = ABCMeta.__new__(
    type(gr.Image),
    "Picture",
    (gr.Image,),
    {"is_template": True, "preprocess": _path_of, "async_move_resource_to_block_cache": _uploaded},
)


@dataclass
class Conversation:
    """What the server remembers of one open page."""

    history: list[Exchange]
    shown: list[dict[str, Any]]  # messages, as Gradio shows them: texts are HTML, its copy button would copy that
    picture: Path | None = None  # shown last

    def __deepcopy__(self, _: Any) -> Conversation:
        return Conversation(list(self.history), list(self.shown), self.picture)


def add_page(app: FastAPI, service: Service, *, language: str = "en") -> None:
    """At / of the app, whose own routes come first.

    Args:
        language: where the browser prefers neither Chinese nor English.
    """
    cache = tempfile.mkdtemp(prefix="queqiao-page-")
    os.environ["GRADIO_TEMP_DIR"] = cache
    page = Page(service, language)
    gr.mount_gradio_app(
        app,
        page.blocks(),
        path="/",
        allowed_paths=[],
        blocked_paths=["/proc", "/sys", "/dev", "/etc"],
        show_error=False,
        max_file_size=service.pictures.max_bytes,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=gr.themes.Default(font=_FONTS, font_mono=("ui-monospace", "monospace")),
        css=_CSS,
    )
    mount: Any = app.router.routes[-1]
    mount.app = OnlyWhatIsAsked(mount.app, Path(cache), page.readers)


class Readers:
    """Who reads what Gradio says, by its names of open pages: it would let the model answer nobody."""

    def __init__(self) -> None:
        self._streams: Counter[str] = Counter()
        self._came = asyncio.Condition()

    @asynccontextmanager
    async def reading(self, name: str) -> AsyncIterator[None]:
        async with self._came:
            self._streams[name] += 1
            self._came.notify_all()
        try:
            yield
        finally:
            self._streams[name] -= 1
            self._streams += Counter()  # without those at 0

    async def is_there(self, name: str) -> bool:
        """Waits a while for one."""
        try:
            async with asyncio.timeout(_READER_COMES), self._came:
                return await self._came.wait_for(lambda: self._streams[name] > 0)
        except TimeoutError:
            return False


class OnlyWhatIsAsked:
    """An ASGI wrapper around Gradio's own app."""

    def __init__(self, app: ASGIApp, cache: Path, readers: Readers, most_bytes: int = 2**30) -> None:
        self.app, self.cache, self.readers, self.most_bytes = app, cache, readers, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (not _ASKED.fullmatch(scope["path"]) or "/../" in scope["path"]):
            raise Refused(404, "there is nothing at this address")
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith("/upload"):
            if sum(file.stat().st_size for file in self.cache.rglob("*") if file.is_file()) > self.most_bytes:
                raise Refused(507, "the server keeps as many pictures as it can: try again in a day")
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith("/queue/data"):
            names = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])
            async with self.readers.reading(names[-1]):
                await self.app(scope, receive, send)
            return
        await self.app(scope, receive, send)


class Running:
    """An answer on its way."""

    def __init__(self) -> None:
        self.stopping, self.ended = asyncio.Event(), asyncio.Event()


class Page:
    def __init__(self, service: Service, language: str) -> None:
        self.service, self.language = service, language
        self.running: dict[str, Running] = {}  # by Gradio's name of an open page
        self.readers = Readers()

    def blocks(self) -> gr.Blocks:
        texts = TEXTS[self.language]
        blocks = gr.Blocks(
            analytics_enabled=False,
            title=self.service.session.name,
            fill_width=True,
            delete_cache=(3600, _KEEP_SECONDS),
        )
        with blocks:
            conversation = gr.State(Conversation([], []), time_to_live=_KEEP_SECONDS)
            with gr.Row():
                heading = gr.Markdown(texts["heading"].format(name=self.service.session.name))
                language = gr.Radio(
                    [("中文", "zh"), ("English", "en")], value=self.language, show_label=False, container=False,
                    elem_id="language",
                )  # fmt: skip
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    picture = Picture(
                        label=texts["picture"], placeholder=texts["drop"], sources=["upload", "clipboard"],
                        type="filepath", image_mode=None, buttons=[], height=320, elem_id="picture",
                    )  # fmt: skip
                    with gr.Accordion(texts["settings"], open=False, elem_id="settings") as settings:
                        temperature, top_p, top_k, penalty, tokens = self.sliders(texts)
                    memory = gr.Markdown(elem_id="memory", elem_classes="memory")  # at each opening
                with gr.Column(scale=5, min_width=320):
                    chat = gr.Chatbot(
                        label=texts["chat"], height=520, render_markdown=False, buttons=[], elem_id="chat",
                        feedback_options=None, latex_delimiters=[], sanitize_html=True,
                    )  # fmt: skip
                    question = gr.Textbox(
                        placeholder=texts["question"], show_label=False, lines=1, max_lines=6, autofocus=True,
                        elem_id="question", max_length=8192,
                    )  # fmt: skip
                    with gr.Row():
                        send = gr.Button(texts["send"], variant="primary", elem_id="send")
                        stop = gr.Button(texts["stop"], interactive=False, elem_id="stop")
                        clear = gr.Button(texts["clear"], elem_id="clear")
            labelled = (heading, picture, settings, temperature, top_p, top_k, penalty, tokens, memory, chat, question,
                        send, stop, clear)  # fmt: skip
            gr.on(
                [send.click, question.submit],
                self.ask,
                [conversation, picture, question, language, temperature, top_p, top_k, penalty, tokens],
                [conversation, chat, question, send, stop, memory],
                show_progress="hidden",
                concurrency_limit=None,
                api_visibility="private",
            )
            stop.click(self.stop, None, None, api_visibility="private")
            clear.click(self.stop, None, None, api_visibility="private").then(
                self.cleared, None, [conversation, chat, picture, question, send, stop], api_visibility="private"
            )
            language.change(self.labels, [language], list(labelled), show_progress="hidden", api_visibility="private")
            blocks.load(self.opened, None, [language, *labelled], show_progress="hidden", api_visibility="private")
        return blocks.queue(max_size=self.service.line.limits.waiting, default_concurrency_limit=None, api_open=False)

    def sliders(self, texts: dict[str, str]) -> tuple[gr.Slider, ...]:
        most = self.service.session.max_tokens
        temperature = gr.Slider(0, 2, CHAT.temperature, step=0.05, **named("temperature", texts))
        top_p = gr.Slider(0, 1, CHAT.top_p, step=0.05, **named("top_p", texts))
        top_k = gr.Slider(0, 200, CHAT.top_k, step=1, **named("top_k", texts))
        penalty = gr.Slider(1, 2, CHAT.repetition_penalty, step=0.05, **named("penalty", texts))
        tokens = gr.Slider(1, most, min(CHAT.max_new_tokens, most), step=1, **named("tokens", texts))
        return temperature, top_p, top_k, penalty, tokens

    async def ask(
        self,
        conversation: Conversation,
        picture: Path | None,
        question: str,
        language: str,
        temperature: float,
        top_p: float,
        top_k: int,
        penalty: float,
        tokens: int,
        request: gr.Request,
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """An answer as it grows, in the outputs' order: conversation, chat, question, send, stop, memory."""
        if not await self.readers.is_there(str(request.session_hash)):
            return
        texts = TEXTS[language]
        is_new = picture is not None and picture != conversation.picture
        question = whole_characters(question).strip() or (texts["describe"] if is_new else "")
        try:
            check_length(question)
            decoding = Decoding(int(tokens), 0, temperature, int(top_k), top_p, penalty)
            # a picture that stays where it is was shown already
            shown = await asyncio.to_thread(self.service.pictures.from_upload, picture) if picture and is_new else None
            ask = await asyncio.to_thread(
                self.service.session.ask, shown, question, conversation.history, decoding=decoding
            )
        except ValueError as error:
            gr.Warning(str(error))
            yield conversation, gr.skip(), gr.skip(), *self.buttons(False), gr.skip()
            return
        before = [*conversation.shown]
        if is_new:
            before.append({"role": "user", "content": {"path": str(picture)}})
        before.append({"role": "user", "content": html.escape(question)})
        if ask.encoded.num_cut.get("history") or ask.encoded.num_cut.get("question"):
            gr.Info(texts["cut"])

        def now(text: str, *, is_running: bool) -> tuple[Any, ...]:
            messages = [*before, {"role": "assistant", "content": html.escape(text)}]
            kept = Conversation(ask.history(text), messages, picture or conversation.picture)
            memory = gr.skip() if is_running else self.memory(language)
            return kept, messages, "" if not text else gr.skip(), *self.buttons(is_running), memory

        text = ""
        running = self.running[str(request.session_hash)] = Running()
        try:
            yield now(text, is_running=True)
            async with aclosing(self.growing(ask, running)) as growing:
                async for text in growing:
                    yield now(text, is_running=True)
            yield now(text, is_running=False)
        finally:
            self.running.pop(str(request.session_hash), None)
            running.ended.set()

    async def growing(self, ask: Ask, running: Running) -> AsyncGenerator[str, None]:
        """An answer's text now and then, and at last whole, or as far as it came."""
        text, shown_at = "", 0.0
        answers = until(running.stopping.wait(), self.service.line.answers(ask))
        try:
            async with aclosing(answers):
                async for answer in answers:
                    text = answer.text
                    if time.monotonic() - shown_at >= _SHOWN_EVERY:
                        yield text
                        shown_at = time.monotonic()
            self.service.metrics.answered(ask, answer)
        except Left:
            pass
        except (Busy, TooSlow, Failed) as error:
            gr.Warning(str(error))
        yield text

    async def stop(self, request: gr.Request) -> None:
        """The answer of this page; whoever called finds it ended."""
        if running := self.running.get(str(request.session_hash)):
            running.stopping.set()
            await asyncio.wait_for(running.ended.wait(), _LONGEST_STEP)

    def cleared(self) -> tuple[Any, ...]:
        return Conversation([], []), [], None, "", *self.buttons(False)

    def buttons(self, is_running: bool) -> tuple[Any, Any]:
        return gr.update(interactive=not is_running), gr.update(interactive=is_running)

    def labels(self, language: str) -> list[Any]:
        texts = TEXTS[language]
        return [
            texts["heading"].format(name=self.service.session.name),
            gr.update(label=texts["picture"], placeholder=texts["drop"]),
            gr.update(label=texts["settings"]),
            *(gr.update(**named(name, texts)) for name in ("temperature", "top_p", "top_k", "penalty", "tokens")),
            self.memory(language),
            gr.update(label=texts["chat"]),
            gr.update(placeholder=texts["question"]),
            *(gr.update(value=texts[name]) for name in ("send", "stop", "clear")),
        ]

    def opened(self, request: gr.Request) -> list[Any]:
        """In the language that the browser prefers."""
        wanted = re.findall(r"\b(zh|en)\b", request.headers.get("accept-language", "").lower())
        language = wanted[0] if wanted else self.language
        return [language, *self.labels(language)]

    def memory(self, language: str) -> str:
        device = self.service.session.device
        used, total = used_bytes(device)
        where = TEXTS[language]["gpu_memory" if device.type == "cuda" else "memory"]
        return f"{where} {used / 2**30:.1f} / {total / 2**30:.1f} GiB"


def named(slider: str, texts: dict[str, str]) -> dict[str, Any]:
    return {"label": texts[slider], "info": texts.get(f"{slider}_info")}
