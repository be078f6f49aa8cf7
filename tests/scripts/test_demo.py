"""The demo's own page; the demo itself runs in the slow tier (tests/slow/test_demo.py)."""

from __future__ import annotations

import runpy
from pathlib import Path

from PIL import Image

from data.source.synthetic import SceneJudge
from data.transform import EvalTransform
from tests.conftest import ROOT
from tests.train.tiny_evaluation import codec, scenes, small_model, train_tokenizer
from train.distributed import Ranks
from train.evaluator.caption import CaptionEvaluator
from train.evaluator.retrieval import RetrievalEvaluator


def test_its_picture_shows_what_was_found_and_said_in_both_languages(tmp_path: Path) -> None:
    words = codec(train_tokenizer(tmp_path))
    asked = (scenes(), EvalTransform(image_size=32), words)
    evaluators = {
        "retrieval": RetrievalEvaluator(*asked, rerank=3, examples=0),
        "caption": CaptionEvaluator(*asked, judge=SceneJudge(), max_new_tokens=4, examples=0),
    }
    demo = runpy.run_path(str(ROOT / "scripts/demo.py"), run_name="demo")
    curves = Image.new("RGB", (90, 50))
    found = demo["draw_report"](small_model(words.vocab_size), evaluators, curves, Ranks.alone(), number=2)
    assert found.height > 50 + 2 * 32 and found.width >= 90
    assert found.getpixel((5, 5)) == (0, 0, 0), "the curves are above"
