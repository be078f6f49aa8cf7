"""Retrieval against a plain loop: several captions an image, several images a text, alone and on several ranks."""

from __future__ import annotations

from itertools import compress
from pathlib import Path
from typing import Any

import pytest
import torch

from data.transform import EvalTransform
from model.image_text import ImageTextModel
from model.tokenizer import CaptionTokenizer
from tests.ranks import run_ranks
from tests.train.tiny_evaluation import CPU, Album, codec, scenes, small_model, train_tokenizer
from train.distributed import Ranks
from train.evaluator.matching import Matcher, ranked, reranked
from train.evaluator.predictions import MATCHES, Predictions, read_predictions
from train.evaluator.retrieval import RetrievalEvaluator
from train.json_lines import json_lines

ALONE = Ranks.alone()
PLACES = ("r@1", "r@3", "mean")
# Five captions or one or two; a query with three images; an image nobody asks for; one twice; one that cannot be read.
QUERY, OTHER = ("a green star", "q1"), ("two red circles", "q2")
SAMPLES: list[tuple[int, list[Any]] | None] = [
    (0, ["a red circle", "one red circle", "the circle is red", "red", "circle"]),
    (1, ["a blue square", QUERY]),
    None,
    (2, []),
    (3, [QUERY, OTHER]),
    (1, ["a square in blue"]),
    (4, [OTHER]),
    (5, [QUERY]),
    (6, ["a red circle", "a yellow heart on the left"]),
]
# The same, written out: pictures of the images, captions, and which belong together.
PICTURES = [0, 1, 2, 3, 4, 5, 6]
CAPTIONS = [
    "a red circle", "one red circle", "the circle is red", "red", "circle", "a blue square", "a green star",
    "two red circles", "a square in blue", "a red circle", "a yellow heart on the left",
]  # fmt: skip
BELONG = {0: {0, 1, 2, 3, 4}, 1: {5, 6, 8}, 2: set(), 3: {6, 7}, 4: {7}, 5: {6}, 6: {9, 10}}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def evaluator_of(folder: Path, **options: Any) -> RetrievalEvaluator:
    settings = {"captions_per_image": None, "rerank": 4, "recall": (1, 3), "batch_size": 2, "max_text_tokens": 40}
    return RetrievalEvaluator(
        Album(SAMPLES), EvalTransform(image_size=32), codec(folder), **{**settings, "examples": 2, **options}
    )


@torch.no_grad()
def plain_recall(tokenizer: CaptionTokenizer, model: ImageTextModel, *, rerank: int, same: bool) -> dict[str, float]:
    """One image and one text at a time, as one reads the protocol of LAVIS."""
    model.eval()
    transform = EvalTransform(image_size=32)
    images = [model.encode_image(transform.picture(scenes().picture(number))[None]) for number in PICTURES]
    texts = [torch.tensor([tokenizer.encode(caption)]) for caption in CAPTIONS]
    masks = [torch.ones_like(ids, dtype=torch.bool) for ids in texts]
    belong = {
        (i, t)
        for i in BELONG
        for t in range(len(CAPTIONS))
        if t in BELONG[i] or (same and CAPTIONS[t] in {CAPTIONS[own] for own in BELONG[i]})
    }
    cosine, logit = {}, {}
    for i, image in enumerate(images):
        for t, ids in enumerate(texts):
            text_E = model.encode_text(ids, masks[t])[0]
            cosine[i, t] = max(float(query_E @ text_E) for query_E in image.query_BQE[0])
            logit[i, t] = float(model.match(image, ids, masks[t])[0, 1])
    expected = {}
    for how in ("itc", "itm"):
        means = []
        for direction in ("image_to_text", "text_to_image"):
            forward = direction == "image_to_text"
            hits, asked = {1: 0, 3: 0}, 0
            for row in range(len(images) if forward else len(texts)):
                pairs = [(row, c) if forward else (c, row) for c in range(len(texts) if forward else len(images))]
                order = sorted(pairs, key=lambda pair: -cosine[pair])
                if how == "itm":
                    best, rest = order[:rerank], order[rerank:]
                    order = sorted(best, key=lambda pair: -(logit[pair] + cosine[pair])) + rest
                if not belong & set(pairs):
                    continue
                asked += 1
                for k in hits:
                    hits[k] += any(pair in belong for pair in order[:k])
            found = {f"r@{k}": hit / asked for k, hit in hits.items()}
            found["mean"] = sum(found.values()) / 2
            means.append(found["mean"])
            expected |= {f"{how}/{direction}/{key}": value for key, value in found.items()}
        expected[f"{how}/mean"] = sum(means) / 2
    return expected


@pytest.mark.parametrize(("rerank", "same"), [(4, True), (2, False), (128, True)])
def test_equals_a_plain_loop(tokenizer_dir: Path, rerank: int, same: bool) -> None:
    """Also where more candidates are asked for than there are.  `same`: what reads like a right caption is one."""
    tokenizer = codec(tokenizer_dir)
    model = small_model(tokenizer.vocab_size)
    expected = plain_recall(tokenizer, model, rerank=rerank, same=same)
    evaluator = evaluator_of(tokenizer_dir, rerank=rerank, same_text_is_right=same)
    found = evaluator(model, device=CPU, ranks=ALONE)
    twins = evaluator.right(evaluator.pools.of("en", ALONE))["text_to_image"]
    assert twins[0] == twins[9] == {0, 6} if same else (twins[0], twins[9]) == ({0}, {6})
    assert {key: found.metrics[f"en/{key}"] for key in expected} == pytest.approx(expected)
    assert len(set(expected.values())) > 4  # numbers that could differ
    assert (found.metrics["en/num_images"], found.metrics["en/num_texts"]) == (7, 11)
    assert any("pool of 7 images and 11 texts, 1 samples could not be read" in line for line in found.lines)
    assert any(line.startswith("  ITM text to image: R@1 ") and "mean" in line for line in found.lines)
    assert found.pictures.keys() == {"en"}


@pytest.mark.parametrize("same", [True, False])
def test_a_row_tells_which_of_its_candidates_are_right(tokenizer_dir: Path, same: bool) -> None:
    """Of a picture in two rows the captions of both, and with `same` what reads like one of another picture's."""
    predictions = Predictions(ALONE)
    model = small_model(codec(tokenizer_dir).vocab_size)
    evaluator_of(tokenizer_dir, same_text_is_right=same)(model, device=CPU, ranks=ALONE, predictions=predictions)
    belong = {(i, t) for i, texts in BELONG.items() for t in texts} | ({(0, 9), (6, 0)} if same else set())
    names = [f"sample {number}" for number in (0, 1, 3, 4, 6, 7, 8)]
    expected = [(text, [names[i] for i in PICTURES if (i, t) in belong]) for t, text in enumerate(CAPTIONS)]
    rows = predictions.known("retrieval", "en/text_to_image")
    found = [(row["query"], sorted(compress(row["best"], row["best_right"]))) for row in rows.values()]
    assert sorted(found) == sorted(expected)
    right = {(i, t) for t, row in rows.items() for i in compress(row["best_index"], row["best_right"])}
    for i, row in predictions.known("retrieval", "en/image_to_text").items():
        assert row["best_right"] == [(i, t) in right for t in row["best_index"]]


def test_both_languages_apart_and_one_direction_alone(tokenizer_dir: Path) -> None:
    evaluator = RetrievalEvaluator(
        scenes(), EvalTransform(image_size=32), codec(tokenizer_dir), rerank=0, recall=[1], directions=["text_to_image"]
    )
    found = evaluator(small_model(codec(tokenizer_dir).vocab_size), device=CPU, ranks=ALONE).metrics
    expected = {"itc/text_to_image/r@1", "itc/text_to_image/mean", "itc/mean", "num_images", "num_texts"}
    assert found.keys() == {f"{language}/{key}" for language in ("zh", "en") for key in expected}


def test_a_model_that_finds_everything_alike_finds_nothing() -> None:
    """Candidates that score as high as the right one stand before it."""
    cosine_RC = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.1, 0.9, 0.4, 0.3]])
    alike, other = ranked([0, 1], cosine_RC, [{2}, {0, 3}], 4)
    assert (alike.rank["itc"], other.rank["itc"]) == (4, 3)
    assert other.best[:1] == [1]
    asked = reranked(other, {0, 3}, [0.0, 1.0, 1.0], 3)  # 1, 2 and 3 get 0.9, 1.4 and 1.3
    assert asked.rank == {"itc": 3, "itm": 2} and asked.best == [2, 3, 1, 0]
    assert reranked(alike, {2}, [0.0] * 4, 4).rank["itm"] == 4
    assert reranked(other, {0}, [9.0, 9.0], 2).rank == {"itc": 3, "itm": 3}, "ITM was not asked about it"


def test_a_model_whose_numbers_are_none_finds_nothing() -> None:
    """NaN is not larger than anything: counting what is would put every right one first."""
    nan = float("nan")
    (broken,) = ranked([0], torch.full((1, 4), nan), [{2}], 4)
    assert broken.rank["itc"] == 4
    (one,) = ranked([0], torch.tensor([[0.5, nan, 0.4, 0.6]]), [{0}], 4)
    assert one.rank["itc"] == 3
    (fine,) = ranked([0], torch.tensor([[0.9, 0.5, 0.4, 0.3]]), [{0, 3}], 4)
    assert reranked(fine, {0, 3}, [nan] * 4, 4).rank == {"itc": 1, "itm": 3}
    assert reranked(fine, {0, 3}, [nan, 1.0, 0.0, 1.0], 4).rank["itm"] == 2, "3 gets 1.3, 1 gets 1.5, 2 gets 0.4"


def test_the_model_is_left_as_it_was(tokenizer_dir: Path) -> None:
    model = small_model(codec(tokenizer_dir).vocab_size)
    model.train()
    model.vision.eval()  # type: ignore[attr-defined]
    expected = {name: module.training for name, module in model.named_modules()}
    assert len(set(expected.values())) == 2
    evaluator_of(tokenizer_dir)(model, device=CPU, ranks=ALONE)
    assert {name: module.training for name, module in model.named_modules()} == expected


def test_images_that_no_memory_is_left_for_are_encoded_again(tokenizer_dir: Path) -> None:
    model = small_model(codec(tokenizer_dir).vocab_size)
    encoded = []
    model.vision.register_forward_hook(lambda module, inputs, output: encoded.append(len(output)))  # type: ignore[operator]
    expected = evaluator_of(tokenizer_dir)(model, device=CPU, ranks=ALONE).metrics
    assert encoded == [2, 2, 2, 1], "each image once"
    encoded.clear()
    assert evaluator_of(tokenizer_dir, keep_gib=0)(model, device=CPU, ranks=ALONE).metrics == expected
    assert encoded == [2, 2, 2, 1] * 2


def interrupted(folder: Path, file: Path, after: int) -> list[int]:
    """An evaluation that ends within its re-ranking, or goes on with one.  -> how many texts each pass matched"""
    matched: list[int] = []
    match = Matcher._match

    def counted(self: Matcher, model: ImageTextModel, memory: Any, image: int, text_P: torch.Tensor) -> torch.Tensor:
        if len(matched) == after:
            raise KeyboardInterrupt
        matched.append(len(text_P))
        return match(self, model, memory, image, text_P)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Matcher, "_match", counted)
        predictions = Predictions(ALONE, file)
        evaluator_of(folder)(small_model(codec(folder).vocab_size), device=CPU, ranks=ALONE, predictions=predictions)
        predictions.close()
    return matched


def test_re_ranking_goes_on_where_it_was_interrupted(tokenizer_dir: Path, tmp_path: Path) -> None:
    expected = interrupted(tokenizer_dir, tmp_path / "whole.jsonl", 1000)
    assert len(expected) == 7, "a pass for each image"
    file, kept = tmp_path / "parts.jsonl", tmp_path / MATCHES
    with pytest.raises(KeyboardInterrupt):
        interrupted(tokenizer_dir, file, 5)
    assert read_predictions(file) == [] and len(json_lines(kept)[0]) == 2, "two blocks of two images"
    with kept.open("a", encoding="utf-8") as cut:
        cut.write('\n{"of": ["retr')
    with pytest.raises(KeyboardInterrupt):
        interrupted(tokenizer_dir, file, 2)
    assert len(json_lines(kept)[0]) == 3
    assert interrupted(tokenizer_dir, file, 1000) == expected[6:]
    assert file.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not kept.exists()


def test_matches_of_another_pool_are_not_taken(tmp_path: Path) -> None:
    predictions = Predictions(ALONE, tmp_path / "some.jsonl")
    predictions.matches("retrieval", "en", 7, 9).add([3, 1], [0.5, -1.25])
    assert predictions.matches("retrieval", "en", 7, 9).logits == {3: 0.5, 1: -1.25}
    for other in (("retrieval", "en", 7, 8), ("retrieval", "zh", 7, 9), ("other", "en", 7, 9)):
        assert predictions.matches(*other).logits == {}


def on_rank(folder: str, file: str) -> tuple[dict[str, float], int, list[dict[str, Any]]]:
    ranks = Ranks.connect(CPU)
    model = small_model(codec(Path(folder)).vocab_size)
    evaluator = evaluator_of(Path(folder), batch_size=1)
    predictions = Predictions(ranks, Path(file))
    found = evaluator(model, device=CPU, ranks=ranks, predictions=predictions)
    predictions.close()
    # everything stands in the file now, so the model is not asked again
    again = Predictions(ranks, Path(file))
    nobody: Any = torch.nn.Identity()
    assert evaluator(nobody, device=CPU, ranks=ranks, predictions=again).metrics == found.metrics
    again.close()
    ranks.barrier()
    return dict(found.metrics), len(found.pictures), read_predictions(Path(file))


def test_three_ranks_find_what_one_finds(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Two do so in tests/test_evaluate.py."""
    expected, pictures, lines = on_rank(str(tokenizer_dir), str(tmp_path / "alone"))
    assert pictures == 1
    parts = [(line["part"], line["index"], line["rank"]) for line in lines]
    assert [index for part, index, _ in parts if part == "en/image_to_text"] == [0, 1, 3, 4, 5, 6]
    for rank, found in enumerate(run_ranks(3, on_rank, str(tokenizer_dir), str(tmp_path / "several"))):
        assert found[0] == expected
        assert found[1] == (1 if rank == 0 else 0)
        assert [(line["part"], line["index"], line["rank"]) for line in found[2]] == parts
