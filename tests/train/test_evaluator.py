"""Retrieval and caption evaluators against plain loops, alone and on two ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.source import BadSample, RawSample
from data.source.synthetic import SceneJudge, SceneSource
from data.transform import EvalTransform
from model.image_text import ImageTextModel
from model.qformer import QFormer
from model.tokenizer import CaptionTokenizer, train_wordpiece
from model.vision import eva_vit
from tests.ranks import run_ranks
from train.distributed import Ranks
from train.evaluator import evaluating
from train.evaluator.caption import CaptionEvaluator, before_end
from train.evaluator.picture import BUNDLED_FONT, chinese_font_path, text_beside_images
from train.evaluator.pool import own_share, read_pool
from train.evaluator.retrieval import RetrievalEvaluator, recall_at

CPU = torch.device("cpu")
NUM_SCENES = 11


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = SceneSource(300)
    texts = [text for i in range(300) for language in ("zh", "en") for text in source.scene(i).captions(language)]
    return train_wordpiece(texts, 400, tmp_path_factory.mktemp("tokenizer"))


def codec(folder: Path) -> CaptionTokenizer:
    return CaptionTokenizer(str(folder), bos="per_language")


def scenes() -> SceneSource:
    return SceneSource(NUM_SCENES, split="held_out", image_size=32)


def small_model(vocab_size: int, seed: int = 0) -> ImageTextModel:
    vision = eva_vit(image_size=32, patch_size=8, width=24, num_layers=1, num_heads=2, mlp_width=48, frozen=False)
    qformer = QFormer(
        vocab_size=vocab_size,
        image_width=24,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=64,
        num_query_tokens=3,
        max_positions=48,
    )
    model = ImageTextModel(vision, qformer, embed_dim=16)
    torch.manual_seed(seed)
    for parameter in model.parameters():  # random but far from indifferent: no ties, no equal captions
        torch.nn.init.normal_(parameter, std=0.7)
    return model


def retrieval(folder: Path, **options: object) -> RetrievalEvaluator:
    settings = {"rerank": 4, "batch_size": 3, "max_text_tokens": 40, "examples": 2, **options}
    return RetrievalEvaluator(scenes(), EvalTransform(image_size=32), codec(folder), **settings)  # type: ignore[arg-type]


@torch.no_grad()
def plain_recall(evaluator: RetrievalEvaluator, model: ImageTextModel, language: str) -> dict[str, float]:
    """One image and one text at a time, as one reads the protocol of LAVIS."""
    model.eval()
    pool = evaluator.pools[language]
    images = [model.encode_image(image[None]) for image in pool.image_ICHW]
    texts = [
        (ids[None, : int(mask.sum())], mask[None, : int(mask.sum())])
        for ids, mask in zip(pool.text_ids_TL, pool.text_mask_TL, strict=True)
    ]
    cosine = np.array(
        [
            [max(float(query @ model.encode_text(*text)[0]) for query in image.query_BQE[0]) for text in texts]
            for image in images
        ]
    )
    owner = pool.image_of_T.tolist()
    expected: dict[str, float] = {}
    for direction in ("image_to_text", "text_to_image"):
        forward = direction == "image_to_text"
        table = cosine if forward else cosine.T
        for how in ("itc", "itm"):
            hits = {k: 0 for k in evaluator.recall}
            for row, scores in enumerate(table):
                order = sorted(range(len(scores)), key=lambda column: -scores[column])
                if how == "itm":
                    best = order[: evaluator.rerank]
                    logit = {c: _match(model, images, texts, *((row, c) if forward else (c, row))) for c in best}
                    order = (
                        sorted(best, key=lambda column: -(logit[column] + scores[column])) + order[evaluator.rerank :]
                    )
                for k in hits:
                    hits[k] += any(
                        pool.captions[t] in {pool.captions[o] for o, i in enumerate(owner) if i == image}
                        for image, t in (((row, c) if forward else (c, row)) for c in order[:k])
                    )
            expected |= {f"{how}/{direction}/r@{k}": hit / len(table) for k, hit in hits.items()}
    return expected


def _match(model: ImageTextModel, images: list, texts: list, image: int, text: int) -> float:
    return float(model.match(images[image], *texts[text])[0, 1])


def test_equals_a_plain_loop(tokenizer_dir: Path) -> None:
    evaluator = retrieval(tokenizer_dir, captions_per_image=2)
    model = small_model(codec(tokenizer_dir).vocab_size)
    found = evaluator(model, device=CPU, ranks=Ranks.alone())
    for language in ("zh", "en"):
        expected = plain_recall(evaluator, model, language)
        assert len(expected) == 12
        assert {key: found.metrics[f"{language}/{key}"] for key in expected} == pytest.approx(expected)
        assert len(set(expected.values())) > 3  # numbers that could differ
        assert found.metrics[f"{language}/num_images"] == NUM_SCENES
        assert found.metrics[f"{language}/num_texts"] == 2 * NUM_SCENES
    assert any(f"pool of {NUM_SCENES} images and {2 * NUM_SCENES} texts" in line for line in found.lines)


def test_more_candidates_asked_for_than_there_are(tokenizer_dir: Path) -> None:
    model = small_model(codec(tokenizer_dir).vocab_size)
    all_of_them, more = (retrieval(tokenizer_dir, rerank=k) for k in (NUM_SCENES, 128))
    expected = all_of_them(model, device=CPU, ranks=Ranks.alone()).metrics
    assert more(model, device=CPU, ranks=Ranks.alone()).metrics == expected


def test_an_identical_caption_is_a_right_one(tokenizer_dir: Path) -> None:
    """Text 2 reads like text 0, so it is right for image 0 too, whichever of the two ranks first."""

    class Twins:
        name, languages = "twins", ("en",)

        def num_samples(self, language: str) -> int:
            return 3

        def read(self, language: str, index: int) -> RawSample:
            image = Image.new("RGB", (32, 32), (80 * index, 0, 0))
            return RawSample(image, ("a red star", "a blue moon", "a red star")[index : index + 1], str(index))

        def fingerprint(self) -> dict:
            return {}

    pool = read_pool(
        Twins(),
        "en",
        EvalTransform(image_size=32),
        codec(tokenizer_dir),
        num_samples=None,
        captions_per_image=None,
        max_text_tokens=20,
    )
    expected = torch.tensor([[True, False, True], [False, True, False], [True, False, True]])
    assert torch.equal(pool.is_right(), expected)
    score_IT = torch.tensor([[0.1, 0.2, 0.9], [0.3, 0.2, 0.1], [0.5, 0.4, 0.1]])
    assert recall_at(score_IT, pool.is_right(), 1) == pytest.approx(2 / 3)
    assert recall_at(score_IT, pool.is_right(), 2) == 1.0


def test_the_model_is_left_as_it_was(tokenizer_dir: Path) -> None:
    model = small_model(codec(tokenizer_dir).vocab_size)
    model.train()
    model.vision.eval()  # type: ignore[attr-defined]
    expected = {name: module.training for name, module in model.named_modules()}
    assert len(set(expected.values())) == 2
    retrieval(tokenizer_dir)(model, device=CPU, ranks=Ranks.alone())
    assert {name: module.training for name, module in model.named_modules()} == expected


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
    found = evaluator(parrot, device=CPU, ranks=Ranks.alone())  # type: ignore[arg-type]
    for language in ("zh", "en"):
        assert found.metrics[f"{language}/exactly_right"] == pytest.approx(expected)
    assert set(found.pictures) == {"zh", "en"}


def test_what_follows_the_end_is_cut() -> None:
    assert before_end([5, 6, 3, 7, 3], 3) == [5, 6]
    assert before_end([5, 6], 3) == [5, 6]


def test_unreadable_samples_are_left_out(tokenizer_dir: Path) -> None:
    class Holes(SceneSource):
        def read(self, language: str, index: int) -> RawSample:
            if index % 2:
                raise BadSample("truncated image")
            return super().read(language, index)

    options = {"captions_per_image": 1, "max_text_tokens": 40}
    pool = read_pool(Holes(6), "en", EvalTransform(image_size=32), codec(tokenizer_dir), num_samples=6, **options)
    assert [sample.key for sample in pool.samples] == [SceneSource(6).read("en", i).key for i in (0, 2, 4)]
    assert pool.image_of_T.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="asks for 7 samples of 'en'; source 'scenes' has 6"):
        read_pool(Holes(6), "en", EvalTransform(image_size=32), codec(tokenizer_dir), num_samples=7, **options)


@pytest.mark.parametrize(("number", "count"), [(5, 4), (3, 4), (8, 2), (7, 2), (1, 3)])
def test_every_row_has_one_owner_and_every_rank_as_many(number: int, count: int) -> None:
    shares = [own_share(number, Ranks(rank, count)) for rank in range(count)]
    assert len({len(rows) for rows, _ in shares}) == 1
    owned = [row for rows, own in shares for row in rows[:own].tolist()]
    assert owned == list(range(number))
    gathered = torch.cat([rows for rows, _ in shares])[:number]
    assert gathered.tolist() == list(range(number))


def _on_rank(folder: str) -> tuple[dict, list, int]:
    torch.set_num_threads(1)
    ranks = Ranks.connect(CPU)
    tokenizer = codec(Path(folder))
    model = small_model(tokenizer.vocab_size, seed=4)  # one that says different things of different images
    # 4 rows on 3 ranks: the last rank has none of its own, and must not count the last row once more
    evaluator = retrieval(Path(folder), num_samples=4, rerank=2)
    found = evaluator(model, device=CPU, ranks=ranks)
    captions = CaptionEvaluator(
        scenes(), EvalTransform(image_size=32), tokenizer, SceneJudge(), max_new_tokens=8, batch_size=4
    )
    with torch.no_grad():  # random weights might end every caption at once
        model.qformer.language_head.decoder.bias[tokenizer.eos_id] = -100.0
    with evaluating(model):
        said = captions.captions(model, captions.pools["zh"], CPU, ranks)
        score_IT, _ = dict(evaluator.scores(model, evaluator.pools["en"], CPU, ranks))["itm"]
    return {**found.metrics, "said": said}, score_IT.tolist(), len(found.pictures)


def test_three_ranks_find_what_one_finds(tokenizer_dir: Path) -> None:
    expected, expected_score_IT, num_pictures = _on_rank(str(tokenizer_dir))
    assert len(set(expected["said"])) > 2
    assert num_pictures == 2
    for rank, (metrics, score_IT, pictures) in enumerate(run_ranks(3, _on_rank, str(tokenizer_dir))):
        assert metrics == expected
        assert np.array(score_IT) == pytest.approx(np.array(expected_score_IT), abs=1e-5)
        assert pictures == (2 if rank == 0 else 0)


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
