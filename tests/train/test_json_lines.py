"""Files with an object on each line: what a caption from the web may hold, and what a killed writer leaves."""

from __future__ import annotations

from pathlib import Path

from train.distributed import Ranks
from train.evaluator.before_after import first_and_last
from train.evaluator.predictions import Predictions, read_predictions
from train.json_lines import json_lines
from train.tracking import MetricsFile

# Half a character; U+2028, U+2029, U+0085, U+001C: ends of lines to Python's `splitlines`, letters to JSON
TEXTS = ["one\u2028two", "one\u2029two", "one\x85two", "one\x1ctwo", "一\n二", "half \ud83d"]


def test_predictions_come_back_whole(tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    rows = [{"index": i, "answer": text} for i, text in enumerate(TEXTS)]
    made = Predictions(Ranks.alone(), file)
    made.add("answers", "en", rows)
    made.close()
    written = read_predictions(file)
    assert [row["answer"] for row in written] == TEXTS
    again = Predictions(Ranks.alone(), file)
    assert [again.known("answers", "en")[i]["answer"] for i in range(len(TEXTS))] == TEXTS
    again.close()
    assert read_predictions(file) == written


def test_metrics_come_back_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for _ in range(2):  # the second resumes, and keeps what the first wrote
        metrics = MetricsFile(file, 0)
        metrics.write("eval", 0, {"evaluator": TEXTS[0], "value": 1.0})
        metrics.close()
    assert first_and_last(file)[TEXTS[0]][0]["value"] == 1.0


def test_what_is_no_object_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": "\xe2\x80\xa8"}\n\n[1]\n{"b": \xff}\r\n{"c": 1}\r\n{"d": ')
    assert json_lines(file) == ([{"a": "\u2028"}, {"c": 1}], 3)
