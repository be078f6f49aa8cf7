"""scripts/report.py on a run with a real checkpoint, and its page in a real browser, as a person would open it."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.browser import opened_page
from tests.conftest import ROOT
from tests.test_evaluate import begun, write_checkpoint

SECTIONS = ("runs", "results", "training", "retrieval", "attention", "said")


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/report.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as pretrain leaves it, measured and reported by one command."""
    run = tmp_path_factory.mktemp("runs") / "demo"
    write_checkpoint(run, 2, begun(run))
    (run / "checkpoints/latest").symlink_to("step_2")
    lines = [
        {"kind": "train", "step": step, "loss": 5.0, "itc": 2.0 / step, "itc/zh": 2.0, "itc/en": 1.0, "lr": 0.001,
         "skips": 0, "samples_per_second": 9.0, "data_wait": 0.1} for step in (1, 2)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:  # in this process, which has everything loaded
        patch.setattr(sys, "argv", ["report.py", str(run), "--evaluate", "--looks", "1", "--examples", "2"])
        runpy.run_path(str(ROOT / "scripts/report.py"), run_name="__main__")
    return run / "report/report.html"


def test_one_file_and_its_pictures(page: Path) -> None:
    assert page.stat().st_size < 2**20
    names = {file.name for file in page.parent.glob("report_*.png")}
    assert names >= {"report_curves.png", "report_attention_1.png", "report_caption_zh.png"}
    assert "report_retrieval_zh_image_to_text.png" in names


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(page: Path, width: int, scheme: str) -> None:
    with opened_page(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True) as shown:
        complaints: list[str] = []
        asked: list[str] = []
        shown.on("console", lambda message: complaints.append(message.text))
        shown.on("pageerror", lambda error: complaints.append(str(error)))
        shown.on("request", lambda request: asked.append(request.url.partition(":")[0]))
        shown.goto(page.as_uri())
        assert complaints == [] and set(asked) <= {"file", "data"}
        for section in SECTIONS:
            assert shown.locator(f"#{section}").is_visible(), section
        assert shown.locator(".chart svg").count() >= 4, "ITC, learning rate, throughput, waiting for data"
        assert shown.locator(".chart svg text", has_text="ITC loss").is_visible()
        assert shown.locator(".card").count() >= 8 and shown.locator(".said tbody tr").count() >= 4
        # smoke.yaml: 4 queries; the picture, its looking layers, then the queries
        queries = OmegaConf.load(page.parents[1] / "config.yaml").model.qformer.num_query_tokens
        assert shown.locator(".look .queries img").count() == queries
        broken = "[...document.images].filter(image => !(image.complete && image.naturalWidth > 0)).length"
        assert shown.evaluate(broken) == 0 and shown.evaluate("document.images.length") > 20
        assert shown.evaluate("document.documentElement.scrollWidth") <= width, "wider than the screen"
        paper = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(251, 251, 250)", "dark": "rgb(22, 23, 27)"}[scheme]
        ink = shown.evaluate("getComputedStyle(document.querySelector('.chart svg text')).fill")
        assert ink == shown.evaluate("getComputedStyle(document.body).color"), "drawings take the page's colours"


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    done = call(tmp_path)
    assert done.returncode == 1 and "holds no metrics.jsonl" in done.stderr and "Traceback" not in done.stderr
