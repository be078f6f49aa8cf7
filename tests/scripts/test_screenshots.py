"""`scripts/screenshots.py`: what a terminal showed is what is drawn, and what a report lacks is named."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import screenshots
from scripts.screenshots import MORE, PROMPT, PRUNED, Demo, plain, save, typed
from tests.browser import opened_page
from tests.conftest import ROOT

PART = '<section><h2 id="{}">{}</h2>{}</section>'
CHART = '<figure class="chart"><svg><text>{}</text></svg></figure>'
LOOK = '<figure class="look">{}</figure>'
SAID = '<h3>{}, Chinese</h3><table class="said"><tbody>{}</tbody></table>'
ROWS = "".join(f"<tr><td>{text}</td></tr>" for text in ("one", "two", "three"))


def test_all_that_a_shell_shows_and_nothing_else() -> None:
    asks, says = "read -p '问：' answer; \\", 'printf "%s\\n" "答：$answer"'
    shown = typed([(PROMPT, asks), (MORE, says), ("问：", "月牙"), (PROMPT, "exit")])
    assert shown == f"{PROMPT}{asks}\n{MORE}{says}\n问：月牙\n答：月牙\n{PROMPT}"


@pytest.mark.parametrize("moved", ["a\x1b[2K", "a\x1b[31mred", "one\rtwo", "a\x08"])
def test_what_moves_or_colours_is_refused_and_not_drawn_wrong(moved: str) -> None:
    assert plain("\x1b[?2004h$ ls\r\n\x1b[?2004l\ra\r\n") == "$ ls\na\n"
    with pytest.raises(ValueError, match="cannot be drawn"):
        plain(moved)


def test_a_picture_too_large_loses_colours_and_then_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screenshots, "MAX_BYTES", 15_000)
    noise = np.random.default_rng(0).integers(0, 256, (150, 150, 3))
    smooth = Image.fromarray((noise // 128 + np.linspace(0, 240, 150)[:, None, None]).astype("uint8"))
    save(smooth, tmp_path / "a.png")
    found = Image.open(tmp_path / "a.png")
    assert found.mode == "P" and found.size == smooth.size and (tmp_path / "a.png").stat().st_size <= 15_000
    with pytest.raises(ValueError, match="more than 15000"):
        save(Image.fromarray(noise.astype("uint8")), tmp_path / "b.png")


def test_parts_of_a_report_are_chosen_and_a_missing_one_is_named(tmp_path: Path) -> None:
    charts = "".join(map(CHART.format, ("ITC loss", "ITC loss, Chinese", "ITM loss", "LM loss")))
    parts = {
        "runs": "<p>of the runs</p>",
        "training": f'<div class="charts">{charts}</div><p>about charts</p>',
        "attention": "<p>how to read</p>" + LOOK.format("first") + LOOK.format("second"),
        "said": SAID.format("captions", ROWS) + SAID.format("reports", ROWS) + '<p class="source">From there</p>',
    }
    file = tmp_path / "report.html"

    def write(**changed: str) -> None:
        sections = "".join(PART.format(name, name, text) for name, text in {**parts, **changed}.items())
        file.write_text(f"<!doctype html><body><main>{sections}</main><footer>command</footer></body>")

    write()
    with opened_page() as page:
        page.goto(file.as_uri())
        assert page.evaluate(PRUNED) == []
        expected = "training ITC loss ITM loss LM loss attention how to read first said reports, Chinese one three"
        assert "".join(page.text_content("body").split()) == "".join(expected.split())
        write(said="")
        page.goto(file.as_uri())
        assert page.evaluate(PRUNED) == [".said"]


def test_the_report_has_what_is_chosen_from_it() -> None:
    template = (ROOT / "train/report/page.html.jinja").read_text("utf-8")
    ids, classes = (set(re.findall(rf'["(, ]{mark}([a-z]+)', PRUNED)) for mark in ("#", r"\."))
    assert ids == {"training", "attention", "said"} and classes == {"charts", "chart", "look", "said", "source"}
    assert [one for one in ids if f'heading("{one}"' not in template] == []
    assert [one for one in classes if f'class="{one}"' not in template] == []


def test_an_unfinished_demo_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finetune/config.yaml: bash scripts/demo.sh"):
        Demo.at(tmp_path)
