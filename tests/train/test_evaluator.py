"""Captions judged and scored, the pool that evaluators read, and the pictures they draw; alone and on three ranks."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.source.synthetic import SceneJudge, SceneSource
from data.transform import EvalTransform
from tests.ranks import run_ranks
from tests.train.tiny_evaluation import CPU, NUM_SCENES, Album, codec, scenes, small_model, train_tokenizer
from train.distributed import Ranks
from train.evaluator import own_share
from train.evaluator.caption import CaptionEvaluator, before_end
from train.evaluator.picture import BUNDLED_FONT, chinese_font_path, text_beside_images
from train.evaluator.pool import Pool, read_pool
from train.evaluator.predictions import Predictions, Progress
from train.evaluator.text_metrics import text_scores

ALONE = Ranks.alone()


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


# ------------------------------------------------------------------------------------------------------------ captions


@dataclass
class Parrot:
    """Says what it was told, one caption for each image of a pool, and ends it with [SEP] and some rest."""

    ids: list[list[int]]
    spoken: int = 0

    def modules(self) -> list:
        return []

    def eval(self) -> None: ...

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW

    def generate(self, features: Tensor, bos: Tensor, *, eos_id: int, pad_id: int, max_new_tokens: int) -> Tensor:
        rows = self.ids[self.spoken : self.spoken + len(features)]
        self.spoken += len(features)
        assert len(set(bos.tolist())) == 1
        return torch.tensor([row + [pad_id] * (max_new_tokens - len(row)) for row in rows])


def test_captions_are_judged_one_by_one(tokenizer_dir: Path) -> None:
    source, tokenizer = scenes(), codec(tokenizer_dir)
    said = {
        language: [source.scene(i if i % 3 else 0).captions(language)[i % 2] for i in range(NUM_SCENES)]
        for language in ("zh", "en")
    }
    expected = sum(1 for i in range(NUM_SCENES) if i % 3 or i == 0) / NUM_SCENES
    parrot = Parrot([tokenizer.encode(text)[1:] for language in ("zh", "en") for text in said[language]])
    evaluator = CaptionEvaluator(source, EvalTransform(image_size=32), tokenizer, SceneJudge(), batch_size=4)
    found = evaluator(parrot, device=CPU, ranks=ALONE)  # type: ignore[arg-type]
    for language in ("zh", "en"):
        assert found.metrics[f"{language}/exactly_right"] == pytest.approx(expected)
        references = [source.scene(i).captions(language) for i in range(NUM_SCENES)]
        scores = text_scores([tokenizer.decode(tokenizer.encode(t)) for t in said[language]], references, language)
        assert {key: found.metrics[f"{language}/{key}"] for key in scores} == pytest.approx(scores)
        assert 0.5 < found.metrics[f"{language}/{'jieba' if language == 'zh' else '13a'}/bleu_4"] < 1
    assert set(found.pictures) == {"zh", "en"}


def test_pictures_without_captions_are_not_measured(tokenizer_dir: Path) -> None:
    """MUGE's that no query asks for are candidates of retrieval, and right for nothing here."""
    tokenizer = codec(tokenizer_dir)
    parrot = Parrot([tokenizer.encode(text)[1:] for text in ("a red circle", "a blue star", "a green square")])
    album = Album([(0, ["a red circle"]), (1, []), (2, ["a green square"])])
    found = CaptionEvaluator(album, EvalTransform(image_size=32), tokenizer)(parrot, device=CPU, ranks=ALONE)  # type: ignore[arg-type]
    assert found.metrics["en/num_images"] == 2 and found.metrics["en/13a/rouge_l"] == 1
    assert found.lines[0] == "caption en: 2 captions" and set(found.pictures) == {"en"}


def test_what_follows_the_end_is_cut() -> None:
    assert before_end([5, 6, 3, 7, 3], 3) == [5, 6]
    assert before_end([5, 6], 3) == [5, 6]


# ------------------------------------------------------------------------------------------------------------ the pool


def pool_of(source: Album, folder: Path, **options: int | None) -> Pool:
    settings = {"num_samples": None, "captions_per_image": None, "max_text_tokens": 40, **options}
    return read_pool(source, "en", EvalTransform(image_size=32), codec(folder), ALONE, **settings)  # type: ignore[arg-type]


def test_a_pool_knows_who_belongs_to_whom(tokenizer_dir: Path) -> None:
    """Equal pictures are one image; a query is one text for all its images; an image without a text stays."""
    query = ("a bag", "q1")
    album = Album(
        [(0, ["A dog.", "a cat"]), None, (1, [query]), (0, ["a cat", "a cow"]), (2, []), (3, [query, "a dog"])]
    )
    pool = pool_of(album, tokenizer_dir)
    assert [sample.key for sample in pool.samples] == ["sample 0", "sample 2", "sample 4", "sample 5"]
    assert pool.captions == ("a dog", "a cat", "a bag", "a cow", "a dog")
    assert pool.pair_P2.tolist() == [[0, 0], [0, 1], [0, 3], [1, 2], [3, 2], [3, 4]]
    assert pool.references[0] == ("A dog.", "a cat", "a cow") and pool.references[2] == ()
    assert pool.num_left_out == 1 and pool.own_K.tolist() == [0, 1, 2, 3]
    expected = EvalTransform(image_size=32).picture(scenes().picture(3))
    assert torch.equal(pool.pictures([3], ALONE)[3], expected)


def test_captions_of_an_image_begin_with_another_one_each(tokenizer_dir: Path) -> None:
    pool = pool_of(Album([(i, ["a", "b", "c"]) for i in range(4)]), tokenizer_dir, captions_per_image=1)
    assert pool.captions == ("a", "b", "c", "a")


def test_more_samples_asked_for_than_there_are(tokenizer_dir: Path) -> None:
    with pytest.raises(ValueError, match="asks for 7 samples of 'en'; source 'album' has 2"):
        pool_of(Album([(0, ["a"]), (1, ["b"])]), tokenizer_dir, num_samples=7)
    with pytest.raises(ValueError, match="none of the 2 samples"):
        pool_of(Album([None, None]), tokenizer_dir)


@pytest.mark.parametrize(("number", "count"), [(5, 4), (3, 4), (8, 2), (7, 2), (1, 3)])
def test_every_row_has_one_owner(number: int, count: int) -> None:
    shares = [list(own_share(number, Ranks(rank, count))) for rank in range(count)]
    assert [row for share in shares for row in share] == list(range(number))
    assert max(map(len, shares)) == -(-number // count)


# ---------------------------------------------------------------------------------------------------- many ranks, twice


def said_on_rank(folder: str, file: str) -> tuple[dict, list[str], int]:
    """Captions of five pictures; how often the model was asked."""
    ranks = Ranks.connect(CPU)
    tokenizer = codec(Path(folder))
    model = small_model(tokenizer.vocab_size, seed=4)  # one that says different things of different images
    with torch.no_grad():  # random weights might end every caption at once
        model.qformer.language_head.decoder.bias[tokenizer.eos_id] = -100.0
    evaluator = CaptionEvaluator(
        Album([(0, ["a"]), (1, ["b"]), None, (2, ["c"]), (3, ["d"]), (4, ["e"])]),
        EvalTransform(image_size=32), tokenizer, SceneJudge(), max_new_tokens=8, batch_size=1,
    )  # fmt: skip
    asked, encode = [0], model.encode_image

    def counting(image: Tensor) -> object:
        asked[0] += 1
        return encode(image)

    model.encode_image = counting  # type: ignore[method-assign, assignment]
    path = Path(file)
    predictions = Predictions(ranks, path)
    found = evaluator(model, device=CPU, ranks=ranks, predictions=predictions)
    predictions.close()
    ranks.barrier()
    return dict(found.metrics), path.read_text().splitlines(), asked[0]


def test_three_ranks_say_what_one_says_and_go_on_where_it_stopped(tokenizer_dir: Path, tmp_path: Path) -> None:
    expected, lines, asked = said_on_rank(str(tokenizer_dir), str(tmp_path / "alone"))
    assert asked == 5 and len(lines) == 5 and len(set(lines)) == 5 and expected["en/num_images"] == 5
    cut_off = tmp_path / "predictions.jsonl"
    cut_off.write_text("\n".join([lines[1], lines[4], lines[2][:-9]]), encoding="utf-8")
    for metrics, rewritten, times in run_ranks(3, said_on_rank, str(tokenizer_dir), str(cut_off)):
        assert metrics == expected
        assert rewritten == lines
        assert times == 1  # three were left, one for each rank


# ------------------------------------------------------------------------------------------------------------ pictures


def test_the_bundled_font_has_every_character_of_the_captions() -> None:
    from PIL import ImageFont

    face = ImageFont.truetype(str(BUNDLED_FONT), 20)
    missing = face.getmask("\uffff").getbbox(), bytes(face.getmask("\uffff"))
    source = SceneSource(400)
    characters = {
        c for i in range(400) for language in ("zh", "en") for t in source.scene(i).captions(language) for c in t
    }
    for character in sorted(characters - {" "}):
        mask = face.getmask(character)
        assert (mask.getbbox(), bytes(mask)) != missing, character
    assert chinese_font_path().is_file()


def test_right_and_wrong_captions_have_their_colours() -> None:
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    right, wrong = (
        np.asarray(text_beside_images([(image, [("左边是一个红色的大圆形", is_right)])], columns=1)).astype(int)
        for is_right in (True, False)
    )
    text = slice(130, None)
    assert (right[:, text, 1] - right[:, text, 0]).max() > 80  # green
    assert (wrong[:, text, 0] - wrong[:, text, 1]).max() > 80  # red


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_with_the_time_left(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bar at a terminal, else a line now and then; what an earlier evaluation had done counts, not its pace."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setattr(Progress, "EVERY", 0.0)
    clock = itertools.count(100.0, 10.0)
    monkeypatch.setattr("train.evaluator.predictions.time.monotonic", lambda: next(clock))
    with Progress("answers en", 50, 20, shown=True) as progress:
        time.sleep(0.2)  # the bar is drawn ten times a second at most
        progress.advance(10)
    said = capsys.readouterr()
    if terminal:
        assert "answers en" in said.err and "30/50" in said.err and not said.out
    else:
        assert said.out.splitlines()[0].startswith("answers en: 30 of 50, 0:0") and not said.err
    with Progress("answers en", 50, 20, shown=False) as silent:
        silent.advance(30)
    assert capsys.readouterr() == ("", "")
