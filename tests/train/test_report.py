"""The report: what it reads from a run's folder, which samples it shows, and that nobody's caption becomes code."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data.decode import open_image, upright
from data.source.synthetic import SceneSource
from model.build import build
from tests.train.tiny_evaluation import CPU, codec, small_model, train_tokenizer
from train.distributed import Ranks
from train.evaluator.predictions import Predictions
from train.report.attention import Look, Looks, overlay
from train.report.chart import MOST_POINTS, Line, chart, spoken, thinned, training_charts
from train.report.page import Options, collect, html, uri, write_report
from train.report.records import PredictionSet, RunRecord, read_run, read_runs
from train.report.results import columns, tables
from train.report.samples import Samples, retrieved, side_by_side

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)"> "&\' 不是代码'
NODE = {
    "_target_": "train.evaluator.retrieval.RetrievalEvaluator",
    "source": {"_target_": "data.source.synthetic.SceneSource", "num_scenes": 6, "split": "held_out", "image_size": 32},
    "transform": {"_target_": "data.transform.EvalTransform", "image_size": 32},
}
SCENES = SceneSource(6, split="held_out", image_size=32)
KEYS = [SCENES.read("en", index).key for index in range(6)]
IN_ENGLISH = ("en/image_to_text", "en/text_to_image")


def caption_of(index: int) -> str:
    return SCENES.read("en", index).captions[0]


def train_line(step: int, loss: float) -> dict[str, Any]:
    itc = {"itc": 0.5 * loss, "itc/zh": loss + 0.1, "itc/en": loss - 0.1}
    speeds = {"lr": 1e-3, "grad_norm": 1.0, "skips": step // 4, "samples_per_second": 100.0, "data_wait": 0.25}
    return {"kind": "train", "step": step, "loss": 0.5 * loss, **itc, **speeds}


def write_lines(file: Path, lines: Sequence[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    file.write_text("\n".join(texts) + "\n", "utf-8")


def write_evaluation(run: Path, step: int, rows: Sequence[dict[str, Any]], nodes: dict[str, Any]) -> Path:
    folder = run / f"eval/step_{step}"
    write_lines(folder / "predictions.jsonl", rows)
    (folder / "config.yaml").write_text(yaml.safe_dump({"checkpoint": f"step_{step}", "evaluator": nodes}))
    metrics = {"retrieval/en/itc/image_to_text/r@1": 0.5, "retrieval/en/num_images": 6, "caption/en/13a/bleu_4": 0.25}
    (folder / "metrics.json").write_text(json.dumps({"metrics": metrics}))
    return folder


def ranking(
    index: int, rank: int, best: Sequence[str], query: str = "", part: str = "en/image_to_text"
) -> dict[str, Any]:
    """`rank` is the place of the only right one."""
    places = [KEYS.index(text) if text in KEYS else 0 for text in best]
    right = [place == rank for place in range(1, len(best) + 1)]
    own = {"query": query or KEYS[index], "rank": {"itc": 1, "itm": rank}, "best": list(best), "best_index": places}
    return {"evaluator": "retrieval", "part": part, "index": index, **own, "best_right": right}


def said(index: int, caption: str) -> dict[str, Any]:
    references = list(SCENES.read("en", index).captions)
    return {
        "evaluator": "caption", "part": "en", "index": index, "key": KEYS[index], "caption": caption,
        "references": references,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Resumed after step 4, still going, its last line cut off; evaluated before and after."""
    folder = tmp_path / "runs" / "small"
    config = {
        "run": {"name": "small", "dir": str(folder), "wandb": {"timeout": 150.0}},  # a busy machine starts it slowly
        "train": {"steps": 20, "global_batch_size": 8, "loss": {"itc": {"weight": 0.5}}, "evaluator": {"r": NODE}},
        "model": {"qformer": {"_target_": "model.qformer.QFormer", "hidden_size": 32, "num_layers": 2}},
    }  # fmt: skip
    lines: list[Any] = [train_line(step, 4.0 / step) for step in (1, 2, 3, 4, 5)]
    lines += [{"kind": "event", "step": 4, "event": "resumed", "checkpoint": "step_4"}]
    lines += [train_line(5, 0.7), train_line(6, 0.6)]
    lines += [{"kind": "eval", "step": s, "evaluator": "retrieval", "en/itc/image_to_text/r@1": s / 10} for s in (2, 6)]
    skip = {"reason": "truncated image", "source": "s", "shard": "a.tar", "key": HOSTILE}
    lines += [{"kind": "event", "step": 3, "event": "skip", **skip}]
    write_lines(folder / "metrics.jsonl", [*lines, '{"kind": "train", "step": 7, "lo'])
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    other = caption_of(3)
    rows = [
        ranking(0, 1, [caption_of(0), other]),
        ranking(1, 2, [HOSTILE, caption_of(1)]),
        ranking(2, 5, [HOSTILE, other]),
        ranking(0, 1, [KEYS[4], KEYS[2]], caption_of(4), "en/text_to_image"),
        ranking(1, 2, [KEYS[3], KEYS[5]], caption_of(5), "en/text_to_image"),
    ]
    nodes = {"retrieval": NODE, "caption": {**NODE, "judge": {"_target_": "data.source.synthetic.SceneJudge"}}}
    write_evaluation(folder, 2, [said(0, "a"), said(1, caption_of(1)), said(2, "b"), said(3, other)], nodes)
    after = [said(0, caption_of(0)), said(1, HOSTILE), said(2, "c"), said(3, other)]
    write_evaluation(folder, 6, [*rows, *after], nodes)
    return folder


class Tags(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def samples(_: str) -> Samples:
    return Samples(NODE)


# -------------------------------------------------------------------------------------------------------------- records


def test_a_run_that_goes_on_after_a_broken_line_and_a_resume(run: Path) -> None:
    found = read_run(run)
    assert found.broken == 1 and found.last_step == 6 and found.wanted_steps == 20
    assert found.series("loss")[0] == [1, 2, 3, 4, 5, 6], "a step stands there once"
    assert found.series("loss")[1][4] == pytest.approx(0.35), "and the last written counts"
    assert found.parts() == {"itc": ["zh", "en"]} and found.loss_weight("itc") == 0.5
    assert [made.step for made in found.predictions] == [2, 6]


def test_what_is_no_run_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder .*nowhere"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no metrics.jsonl"):
        read_run(tmp_path)


def test_where_no_page_can_be_written_is_told_before_anything_is_drawn(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.report.page.collect", lambda *_: pytest.fail("drawn"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"is a folder: name the page's file, such as .*/report\.html"):
        write_report([run], tmp_path)
    with pytest.raises(ValueError, match=r"file/page\.html cannot be written .*--out"):
        write_report([run], tmp_path / "file" / "page.html")


def test_runs_of_one_name_keep_apart(run: Path, tmp_path: Path) -> None:
    second = shutil.copytree(run, tmp_path / "elsewhere" / "small")
    names = [found.name for found in read_runs([run, second, run])]
    assert len(names) == 2 and names[0] != names[1] and all("small" in name for name in names)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"train": {"evaluator": {"a": {"note": "small; not for clinical use"}}}}, "Small; not for clinical use"),
        ({"data": {"source": {"path": "data/xray/records.jsonl"}}}, "Not for clinical use"),
        ({"data": {"source": {"path": "data/cats.jsonl"}}}, None),
    ],
)  # fmt: skip
def test_x_rays_carry_their_warning(tmp_path: Path, config: dict[str, Any], expected: str | None) -> None:
    write_lines(tmp_path / "metrics.jsonl", [train_line(1, 1.0)])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert read_run(tmp_path).notes == (() if expected is None else (expected,))
    page = html(collect(read_runs([tmp_path]), Options(attention="no")))
    assert ("不得用于临床" in page) == (expected is not None)


def test_what_training_predicts_is_kept_for_the_first_time_and_the_newest(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [train_line(1, 1.0)])
    for step in (0, 3, 6):
        made = Predictions(Ranks.alone())
        made.add("caption", "en", [said(0, f"after {step}")])
        made.keep(tmp_path, step, {"caption/en/exactly_right": 0.5})
    kept = read_run(tmp_path).predictions
    found = {one.step: one.parts["caption", "en"][0]["caption"] for one in kept}
    assert found == {0: "after 0", 6: "after 6"} and all(one.in_training for one in kept)
    again = Predictions(Ranks.alone())
    again.add("caption", "en", [said(0, "begun anew")])
    again.keep(tmp_path, 0, {})
    assert [one.parts["caption", "en"][0]["caption"] for one in read_run(tmp_path).predictions] == ["begun anew"]


# -------------------------------------------------------------------------------------------------- numbers and samples


def test_results_stand_beside_each_other_with_their_sources(run: Path) -> None:
    made = columns(read_runs([run]))
    assert [column.name for column in made] == ["step 2", "step 6"]
    assert made[1].source == str(run / "eval/step_6/metrics.json")
    by_name = {table.evaluator: table for table in tables(made)}
    assert by_name["retrieval"].rows == (("English, ITC, image to text: R@1", ("50.0 %", "50.0 %")),)
    assert by_name["retrieval"].sizes == "English: 6 images"
    assert by_name["caption"].rows == (("English, by 13a, BLEU-4", ("0.250", "0.250")),)
    shutil.rmtree(run / "eval")
    made = columns(read_runs([run]))
    assert [column.name for column in made] == ["step 2, in training", "step 6, in training"]
    assert tables(made)[0].rows == (("English, ITC, image to text: R@1", ("20.0 %", "60.0 %")),)


def test_successes_and_failures_with_their_own_pictures(run: Path) -> None:
    images, texts = retrieved(read_run(run).predictions[-1], samples, 4)
    assert (images.number, images.number_right, images.how) == (3, 1, "itm")
    assert [query.rank for query in images.right] == [1] and [query.rank for query in images.wrong] == [2, 5]
    marks = [[candidate.right for candidate in query.candidates] for query in images.right + images.wrong]
    assert marks == [[True, False], [False, True], [False, False]]
    assert [bool(query.own) for query in images.wrong] == [False, True] and images.wrong[1].own == caption_of(2)
    for query, index in zip(images.right + images.wrong, (0, 1, 2), strict=True):
        expected = upright(open_image(SCENES.read("en", index).image))
        assert query.picture is not None and np.array_equal(np.asarray(query.picture), np.asarray(expected))
    assert [candidate.right for candidate in texts.right[0].candidates] == [True, False]
    assert [candidate.right for candidate in texts.wrong[0].candidates] == [False, True]


def test_all_captions_of_a_picture_in_several_rows_are_right(tmp_path: Path) -> None:
    """One caption a row, as many files have it, and two pictures of which the same is said: marked as measured."""
    belong = [("a.jpg", "a red circle"), ("a.jpg", "one red circle"), ("b.jpg", "a blue square"),
              ("b.jpg", "a square in blue"), ("c.jpg", "a blue square")]  # fmt: skip
    for number, name in enumerate(("a.jpg", "b.jpg", "c.jpg")):
        SCENES.picture(number).save(tmp_path / name)
    write_lines(tmp_path / "rows.jsonl", [{"image": name, "en": text} for name, text in belong])
    source = {"_target_": "data.source.jsonl_pairs.JsonlPairs", "path": str(tmp_path / "rows.jsonl")}
    node = {**NODE, "source": {**source, "caption_fields": {"en": "en"}}}
    tokenizer = codec(train_tokenizer(tmp_path / "tokenizer"))
    predictions = Predictions(Ranks.alone())
    evaluator = build({**node, "rerank": 0, "examples": 0}, codec=tokenizer)
    evaluator(small_model(tokenizer.vocab_size), device=CPU, ranks=Ranks.alone(), predictions=predictions)
    parts = {(evaluator.name, part): predictions.known(evaluator.name, part) for part in IN_ENGLISH}
    made = PredictionSet(tmp_path, "step_1", {evaluator.name: node}, parts, {})
    images, texts = retrieved(made, lambda _: Samples(node), 9)
    queries = [*images.right, *images.wrong]
    assert len(queries) == 3
    for query in queries:
        for caption in query.candidates:
            assert caption.right == ((query.text, caption.text) in belong), (query.text, caption.text)
        assert bool(query.own) == (not any(caption.right for caption in query.candidates))
    assert max(sum(bool(caption.right) for caption in query.candidates) for query in queries) > 1
    queries = [*texts.right, *texts.wrong]
    assert len(queries) == 5
    for query in queries:
        for picture in query.candidates:
            assert picture.right == ((picture.text, query.text) in belong), (query.text, picture.text)
        assert len(query.candidates) == 3, "so every picture was asked about"


def test_the_right_caption_beside_others_is_the_one_found_first() -> None:
    """Not another one of that picture, of which the place would not be true."""
    row = {**ranking(0, 4, [HOSTILE, "b", "c", "written by another", "e"]), "best_right": [False] * 3 + [True] * 2}
    (found,) = retrieved(PredictionSet(Path(), "step_1", {}, {("retrieval", IN_ENGLISH[0]): {0: row}}, {}), samples, 4)
    assert found.wrong[0].own == "written by another"


def test_predictions_of_before_do_not_tell_what_is_right(run: Path) -> None:
    """What is known to be right is marked, and nobody knows of the rest."""
    file = run / "eval/step_6/predictions.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    write_lines(file, [{key: value for key, value in row.items() if key != "best_right"} for row in rows])
    images, texts = retrieved(read_run(run).predictions[-1], samples, 4)
    marks = [[candidate.right for candidate in query.candidates] for query in images.right + images.wrong]
    assert marks == [[True, None], [None, True], [None, None]]
    assert images.wrong[1].own == caption_of(2)
    assert [[candidate.right for candidate in query.candidates] for query in texts.right + texts.wrong] == [
        [True, None],
        [None, True],
    ]
    assert 'title="not judged"' in html(collect(read_runs([run]), Options(attention="no")))


def test_a_sample_behind_equal_pictures_is_found_by_its_key() -> None:
    """In a pool equal pictures are one, so a sample's place there is at most its place in the source."""
    found = samples("").pair("en", 1, KEYS[4])
    assert found is not None and found.key == KEYS[4]
    assert samples("").pair("en", 1, "no such key") is None


def test_before_and_after_side_by_side(run: Path) -> None:
    sets = [(f"step {made.step}", made) for made in read_run(run).predictions]
    judged = Samples({**NODE, "judge": {"_target_": "data.source.synthetic.SceneJudge"}})
    (found,) = side_by_side(sets, lambda _: judged, 8)
    assert found.kinds == {"became right": 1, "became wrong": 1, "wrong both times": 1, "right both times": 1}
    by_kind = dict(zip(found.kinds, found.rows, strict=True))
    assert by_kind["became right"].answers == (("a", False), (caption_of(0), True))
    assert by_kind["became wrong"].answers == ((caption_of(1), True), (HOSTILE, False))
    (alone,) = side_by_side(sets[:1], lambda _: judged, 8)
    assert alone.kinds == {"wrong": 2, "right": 2}


def test_without_its_source_a_sample_has_no_picture_and_the_page_says_why(run: Path) -> None:
    gone = {**NODE, "source": {"_target_": "data.source.shards.ShardSource", "paths": "/nowhere", "language": "en"}}
    assert "/nowhere" in Samples(gone).problem and Samples(gone).pair("en", 0, "k") is None
    file = run / "eval/step_6/config.yaml"
    about = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**about, "evaluator": {"retrieval": gone, "caption": gone}}))
    page = html(collect(read_runs([run]), Options(attention="no")))
    assert "Pictures could not be read here" in page and "/nowhere" in page and "no picture here" in page


# --------------------------------------------------------------------------------------------------------- the page


def test_captions_are_text_and_nothing_asks_the_network(run: Path) -> None:
    page = html(collect(read_runs([run]), Options(attention="no")))
    tags = Tags(page)
    assert "".join(tags.text).count(HOSTILE) >= 3, "as a caption, as an answer, as a key"
    names = {name for name, _ in tags.found}
    assert not names & {"script", "iframe", "object", "embed", "link", "form", "base"}
    for name, attributes in tags.found:
        assert not any(key.startswith("on") for key in attributes), (name, attributes)
        for key in ("src", "href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith(("data:", "#")), (name, attributes[key])
    (policy,) = (a["content"] for n, a in tags.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'") and "http" not in policy
    assert "@import" not in page and "url(http" not in page


def test_the_page_of_a_run_without_evaluation_or_steps(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"kind": "event", "step": 0, "event": "saved"}])
    page = html(collect(read_runs([tmp_path]), Options()))
    assert (
        "Nothing was measured to the end yet" in page and "No step was logged yet" in page and "No predictions" in page
    )
    assert "no evaluator of this run has pictures" in page


def test_several_runs_are_compared(run: Path, tmp_path: Path) -> None:
    second = shutil.copytree(run, tmp_path / "other")
    config = yaml.safe_load((second / "config.yaml").read_text())
    config["train"]["global_batch_size"] = 16
    (second / "config.yaml").write_text(yaml.safe_dump(config))
    out = write_report([run, second], options=Options(attention="no"))
    assert out == second.resolve() / "report/comparison.html"
    text = "".join(Tags(out.read_text("utf-8")).text)
    assert "train.global_batch_size" in text and "small, step 6" in text and "other, step 6" in text
    assert "ITC loss, Chinese" in text, "a colour stands for a run, so languages have charts of their own"
    assert Image.open(out.with_name("comparison_curves.png")).width > 500


def test_how_to_read_attention_is_said_once_for_all_runs(run: Path, tmp_path: Path) -> None:
    content = collect(read_runs([run, shutil.copytree(run, tmp_path / "other")]), Options(attention="no"))
    told = "Weights of the cross-attention"
    assert told not in html(content), "nothing is drawn that could be read"
    tile = Image.new("RGB", (8, 8))
    for group in content["attention"]:
        group["looks"] = Looks("step_6", (Look("en, sample 0", tile, (tile,), (tile,), 0.0),), num_heads=4)
    assert html(content).count(told) == 1 and html(content).count("step_6</code>, 4 heads.") == 2


def test_pictures_go_to_wandb_under_the_run_s_own_id(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    from tests.train.wandb_files import offline_runs

    write_report([run], options=Options(attention="no"), wandb="offline")
    assert "did not finish" not in capsys.readouterr().err
    ((run_id, rows),) = offline_runs(run)
    assert run_id == (run / "wandb/run_id.txt").read_text()
    logged = {key.split("/")[1].split(".")[0] for row in rows for key in row if key.startswith("report/")}
    expected = {file.stem.removeprefix("report_") for file in (run / "report").glob("report_*.png")}
    assert logged == expected >= {"curves", "retrieval_en_image_to_text", "caption_en"}


def test_a_small_drawing_stays_exact_and_a_photograph_becomes_small() -> None:
    assert uri(Image.new("RGB", (64, 64), "red")).startswith("data:image/png;base64,")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8))
    assert uri(noise).startswith("data:image/jpeg;base64,")


def test_curves_keep_their_ends_and_their_mean() -> None:
    steps = list(range(1, 4001))
    thin_steps, values = thinned(steps, [float(step) for step in steps])
    assert len(thin_steps) <= MOST_POINTS and thin_steps[-1] == 4000
    assert np.mean(values) == pytest.approx(np.mean(steps))


def test_a_drawing_takes_the_page_s_colours_and_escapes_names() -> None:
    made = chart("loss", [Line("<b>&$x$", [1, 2], [1.0, 2.0], "#ff0000"), Line("_z", [1, 2], [1.0, 2.0], "#00ff00")])
    assert "currentColor" in made.svg and "<style" not in made.svg and "<b>" not in made.svg
    assert "&lt;b&gt;&amp;$x$" in made.svg and "_z" in made.svg


@pytest.mark.parametrize("last", [1, 3, 20])
def test_steps_are_whole_numbers(last: int) -> None:
    steps = list(range(1, last + 1))
    made = chart("loss", [Line("run", steps, [1000.0 + step for step in steps], "#ff0000")], whole=True)
    labels = re.findall(r">\s*([\d.]+)\s*</text>", made.svg)
    assert labels and not [label for label in labels if "." in label], labels


def test_a_run_of_one_step_is_seen_and_a_loss_is_named_once() -> None:
    run = RunRecord(Path(), "r", {}, [{"kind": "train", "step": 1, "loss": 2.0}], [], [])
    (made,) = training_charts([run])
    assert made.title == "Loss"
    assert (np.asarray(made.picture) == (0x3B, 0x7D, 0xC4)).all(axis=-1).any(), "a line through one point is invisible"


def test_a_query_that_looks_everywhere_alike_looks_dim() -> None:
    picture_CHW, even_RR, one_RR = torch.full((3, 8, 8), 128, dtype=torch.uint8), torch.ones(4, 4), torch.zeros(4, 4)
    one_RR[1, 1] = 1.0
    even, one = (np.asarray(overlay(picture_CHW, it)).astype(float).mean(axis=2) for it in (even_RR, one_RR))
    assert even.std() < 1 and even.mean() < 0.6 * one.max()
    row, column = np.unravel_index(one.argmax(), one.shape)
    assert (row // 36, column // 36) == (1, 1), "bright where it looks"


def test_numbers_have_names_for_people() -> None:
    assert spoken("zh/itm/image_to_text/r@10") == "Chinese, ITM, image to text, R@10"


def test_the_reader_of_a_run_says_what_state_it_is_in(run: Path) -> None:
    from train.report.facts import facts, skipped

    found: RunRecord = read_run(run)
    rows = dict(facts([found])["rows"])
    assert rows["state"][0].startswith("step 6 of 20; last written")
    assert rows["left out of the log"] == ["1 line that could not be read"]
    assert rows["waiting for data"] == ["25.0% of the time (median)"]
    assert rows["Q-Former"] == ["32 wide, 2 layers"], "not once more that it is one"
    assert skipped(found)["total"] == 1 and skipped(found)["rows"][0][:2] == ("truncated image", 1)


def test_parts_are_called_as_people_call_them(run: Path) -> None:
    from train.report.facts import facts

    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] |= {
        "llm": {"_target_": "model.llm.warm_up.warm_up", "_partial_": True, "hidden_size": 64, "num_layers": 2},
        "adapter": {"_target_": "model.adapter.NoAdapter"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    rows = dict(facts([read_run(run)])["rows"])
    assert rows["language model"] == ["ChatGLM, warmed up first: 64 wide, 2 layers"] and rows["adapter"] == ["none"]
