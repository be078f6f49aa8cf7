"""Makes the READMEs' pictures from a finished demo: its own two, its report, the page and the terminal.

    python scripts/screenshots.py outputs/demo docs/images

Every word in them is what the programs say: scripts/serve.py in Chromium and scripts/chat.py at a pseudo-terminal, in
either language, asked about report/unseen.png what the fine-tuning asks, at temperature 0.  Needs Chromium and Chinese
fonts (Debian: apt install chromium fonts-noto-cjk).
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import os
import pty
import re
import select
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
LOCALES = {"zh": "zh-CN", "en": "en-US"}
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH = 1150  # pixels of a picture; what is shown there is narrower, since READMEs make it smaller again
WAIT = 600.0  # seconds for a model to load or to answer, on a machine that does much else
MAX_BYTES = 200_000
OWN = {"demo.png": "examples.png", "demo_answers.png": "answers.png"}  # what scripts/demo.sh draws itself
PAGE = "report.html"
PROMPT, MORE = "$ ", "> "  # the shell's
TERMINAL_WIDTH = 940
TERMINAL_STYLE = """
body { margin: 0; }
main { display: flex; align-items: flex-start; gap: 24px; padding: 16px 20px; background: #1e1f26; }
pre { flex: 1; margin: 0; color: #e8e8ec; font: 16px/1.5 "Noto Sans Mono CJK SC", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
img { width: 150px; margin-top: 4px; }
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, metavar="DEMO_DIR", help="as scripts/demo.sh leaves it")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="where the pictures go")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    try:
        demo = Demo.at(options.demo)
        options.out.mkdir(parents=True, exist_ok=True)
        for name, own in OWN.items():
            shutil.copyfile(ROOT / demo.report / own, options.out / name)
        with chromium() as browser:
            for name, picture in pictures(browser, demo):
                file = options.out / f"{name}.png"
                save(picture, file)
                print(f"{file}  {picture.width} x {picture.height}, {file.stat().st_size / 1000:.0f} kB", flush=True)
    except ValueError as error:
        raise SystemExit(f"screenshots: {error}") from error


@dataclass(frozen=True)
class Demo:
    """What is shown of a finished demo, with paths as a user types them in the repository's root."""

    report: Path  # the folder
    model: Path
    picture: Path
    questions: dict[str, str]  # by language: what the fine-tuning asks about grey pictures

    @classmethod
    def at(cls, folder: Path) -> Self:
        """Raises ValueError: not finished."""
        folder = folder.resolve()
        folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
        model, config = folder / "finetune", folder / "finetune" / "config.yaml"
        report = folder / "report"
        for needed in (config, model / "adapter", *(report / name for name in (*OWN.values(), PAGE, "unseen.png"))):
            if not (ROOT / needed).exists():
                raise ValueError(f"there is no {needed}: bash scripts/demo.sh --dir {folder} makes it")
        from omegaconf import OmegaConf

        from train.config import build

        source = build(OmegaConf.load(ROOT / config).train.evaluator.reports.source)
        asked = {language: source.dialogues(language, 0)[0].turns[0].question for language in LOCALES}
        return cls(report, model, report / "unseen.png", asked)


def pictures(browser: Any, demo: Demo) -> Iterator[tuple[str, Image.Image]]:
    """Names without their endings, and pictures."""
    yield "report", report_picture(browser, demo.report / PAGE)
    with server(demo.model) as url:
        for language in LOCALES:
            yield f"page_{language}", page_picture(browser, demo, url, language)
    for language in LOCALES:
        yield f"terminal_{language}", terminal_picture(browser, demo, conversation(demo, language))


def save(picture: Image.Image, file: Path) -> None:
    """As a PNG, with 256 colours where it would be too large otherwise.

    Raises ValueError: it is too large even so.
    """
    colours = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE)
    for shown in (picture, colours):
        shown.save(file, optimize=True)
        if file.stat().st_size <= MAX_BYTES:
            return
    raise ValueError(f"{file} has {file.stat().st_size} bytes, more than {MAX_BYTES}")


# ---------------------------------------------------------------------------------------------------------- the browser


@contextmanager
def chromium() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise ValueError("no playwright; it is in the dev extras") from error
    found = os.environ.get("QUEQIAO_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if found is None:
        raise ValueError("no Chromium (Debian: apt install chromium), or name one: QUEQIAO_CHROMIUM")
    arguments = ["--disable-background-networking", "--no-first-run", "--disable-gpu", "--font-render-hinting=none"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=arguments if os.geteuid() else [*arguments, "--no-sandbox"]
        )
        try:
            yield browser
        finally:
            browser.close()


def opened(browser: Any, width: int, height: int, **how: Any) -> Any:
    page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=WIDTH / width, **how)
    page.set_default_timeout(1000 * WAIT)
    return page


def shot(page: Any, part: str = "html") -> Image.Image:
    """An element of a page, once fonts and pictures are there; the page is closed then."""
    page.evaluate("document.fonts.ready")
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    raw = page.locator(part).screenshot(animations="disabled", caret="hide")
    page.close()  # the server would wait for it
    return Image.open(io.BytesIO(raw)).convert("RGB")


# ----------------------------------------------------------------------------------------------------------- the report


# what a picture of the whole has no room for; nothing that stays is changed
PRUNED = """() => {
  const prune = (all, stays) => [...all].forEach((one, i, every) => stays(one, i, every.length) || one.remove());
  const after = (heading, stays) => prune(document.querySelectorAll(`${heading} ~ *`), stays);
  const drawn = one => [...one.querySelectorAll("text")].map(text => text.textContent);
  let looks = 0, title = "";
  prune(document.querySelectorAll("section"), one => one.querySelector("#training, #attention, #said"));
  after("#training", one => one.matches(".charts"));
  prune(document.querySelectorAll(".chart"), one => drawn(one).some(text => /^(ITC|ITM|LM) loss$/.test(text)));
  after("#attention", one => looks === 0 && (one.matches(".look") ? ++looks : true));
  after("#said", one => (title = one.matches("h3, .source") ? one.textContent : title).startsWith("reports,"));
  document.querySelectorAll(".said tbody").forEach(body => prune(body.rows, (_, i, all) => i === 0 || i === all - 1));
  document.querySelector("footer").remove();
  document.body.style.paddingBottom = "1rem";
  return ["#training", ".chart:nth-of-type(3)", ".look", ".said"].filter(part => !document.querySelector(part));
}"""


def report_picture(browser: Any, report: Path) -> Image.Image:
    """Its heading; curves of the losses, attention to one picture, some reports of pictures before and after.

    Raises ValueError: the report has none of these.
    """
    page = opened(browser, 1060, 1000, color_scheme="light")
    page.goto((ROOT / report).resolve().as_uri())
    if missing := page.evaluate(PRUNED):
        raise ValueError(f"{report} has no {', '.join(missing)}: bash scripts/demo.sh writes it of all three runs")
    return shot(page)


# ------------------------------------------------------------------------------------------------------------- the page


@contextmanager
def server(model: Path) -> Iterator[str]:
    """scripts/serve.py, once it answers.  -> its address"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "scripts/serve.py", "--model", str(model), "--device", "cpu", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + WAIT
    try:
        while not answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > until:
                raise ValueError(f"{shlex.join(command)} did not start")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=WAIT) as found:
            return bool(found.status == 200)
    except urllib.error.URLError:
        return False


def page_picture(browser: Any, demo: Demo, url: str, language: str) -> Image.Image:
    from playwright.sync_api import expect

    from serve.page_texts import TEXTS

    texts, patience = TEXTS[language], 1000 * WAIT
    page = opened(browser, 960, 640, color_scheme="light", locale=LOCALES[language])
    page.goto(url)
    expect(page.locator("#send")).to_have_text(texts["send"], timeout=patience)
    page.click("#settings button")
    temperature = page.locator(f'#settings input[type=number][aria-label*="{texts["temperature"]}"]')
    temperature.fill("0")
    temperature.press("Tab")
    page.click("#settings button")  # the first one folds them again
    page.set_input_files("#picture input[type=file]", ROOT / demo.picture)
    page.wait_for_selector("#picture img")
    page.fill("#question textarea", demo.questions[language])
    page.click("#send")
    expect(page.locator("#chat .bot .message-content")).to_have_count(1, timeout=patience)
    expect(page.locator("#send")).to_be_enabled(timeout=patience)
    page.mouse.move(0, 0)
    return shot(page)


# --------------------------------------------------------------------------------------------------------- the terminal


def conversation(demo: Demo, language: str) -> list[tuple[str, str]]:
    """(what the terminal ends with, what is then typed)"""
    from serve.terminal import TEXTS

    texts = TEXTS[language]
    return [
        (PROMPT, f"python scripts/chat.py --model {shlex.quote(str(demo.model))} --temperature 0 \\"),
        (MORE, f"    --lang {language} --question {shlex.quote(demo.questions[language])}"),
        (texts["picture"], str(demo.picture)),
        (texts["question"], "stop"),
        (PROMPT, "exit"),
    ]


def terminal_picture(browser: Any, demo: Demo, turns: list[tuple[str, str]]) -> Image.Image:
    """What a shell shows, as a terminal with a Chinese font draws it, beside the picture that is talked about."""
    text, _, _ = typed(turns).rpartition(PROMPT)  # without the shell's last, empty prompt
    page = opened(browser, TERMINAL_WIDTH, 600)
    talked_about = base64.b64encode((ROOT / demo.picture).read_bytes()).decode()
    page.set_content(
        f"<style>{TERMINAL_STYLE}</style>"
        f'<main><pre>{html.escape(text.strip())}</pre><img src="data:image/png;base64,{talked_about}"></main>'
    )
    return shot(page, "main")


def typed(turns: list[tuple[str, str]]) -> str:
    """All that a shell at a pseudo-terminal shows while these lines are typed into it."""
    import termios

    end, inside = pty.openpty()
    termios.tcsetwinsize(inside, (40, 1000))  # so wide that the browser alone breaks lines, which draws them
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    told = {"PS1": PROMPT, "PS2": MORE, "TERM": "xterm", "LC_ALL": "C.UTF-8", "PATH": path, "HISTFILE": ""}
    process = subprocess.Popen(
        ["setsid", "--ctty", "bash", "--norc", "--noprofile", "-i"],
        cwd=ROOT, env={**os.environ, **told}, stdin=inside, stdout=inside, stderr=inside,
    )  # fmt: skip
    os.close(inside)
    shown = ""
    try:
        for prompt, line in turns:
            shown += read_until(end, prompt)
            os.write(end, f"{line}\n".encode())
    finally:
        os.close(end)  # which hangs up on the shell and on what runs there
        process.wait(WAIT)
    return shown


def read_until(end: int, prompt: str) -> str:
    """-> what comes at a pseudo-terminal, until it ends with the prompt and no more comes"""
    raw, until = b"", time.monotonic() + WAIT
    while time.monotonic() < until:
        if select.select([end], [], [], 0.5)[0]:
            raw += os.read(end, 65536)
        elif raw and (text := plain(raw.decode(errors="replace"))).endswith(prompt):
            return text
    raise ValueError(f"waited for {prompt!r}; at the terminal's end: {raw[-500:].decode(errors='replace')!r}")


def plain(shown: str) -> str:
    """Without a terminal's control sequences, of which none may be one that moves what is shown.

    Raises ValueError: one is.
    """
    text = re.sub(r"\x1b\[\?2004[hl]", "", shown)  # readline's, around what is typed
    text = re.sub(r"\r*\n\r*", "\n", text)
    if found := re.search(r"[\x00-\x09\x0b-\x1f\x7f].{0,20}", text):
        raise ValueError(f"the terminal got {found[0]!r}, which cannot be drawn as lines of text")
    return text


if __name__ == "__main__":
    main()
