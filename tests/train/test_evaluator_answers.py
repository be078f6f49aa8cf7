"""Answers about pictures: what counts as right, closed and open questions, and any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from data.batch import IGNORED, Dialogue, DialogueBatch, EncodedDialogue, Turn
from data.source import BadSample, RawDialogue
from data.source.scene_dialogues import REPHRASE, SceneDialogues
from data.transform import EvalTransform
from model.generation import Decoding
from model.llm.warm_up import load, warm_up
from model.qformer import QFormer
from model.vision.encoder import eva_vit
from model.visual_chat import VisualChatModel
from tests.ranks import run_ranks
from train.distributed import Ranks
from train.evaluator.answers import AnswerEvaluator, is_right
from train.evaluator.predictions import Predictions
from train.evaluator.text_metrics import text_scores


def test_what_counts_as_right() -> None:
    assert is_right("A red circle.", ["a Red circle"]) and is_right("红色 的圆，", ["红色的圆"])
    assert is_right("ＡＢ 12", ["x", "ab12"]) and not is_right("a red circl", ["a red circle"])


class Questions:
    """Text-only questions with what each annotator said; None stands for a picture that cannot be read."""

    name, languages, scans = "questions", ("en",), True

    def __init__(self, samples: Sequence[tuple[str, list[str]] | None]) -> None:
        self.samples = list(samples)

    def num_samples(self, language: str) -> int:
        return len(self.samples)

    def dialogues(self, language: str, index: int) -> tuple[Dialogue, ...]:
        question, answers = self.samples[index] or ("lost", ["x"])
        return tuple(Dialogue((Turn(question, answer),), "en") for answer in answers)

    def where(self, language: str, index: int) -> str:
        return f"row {index}"

    def read(self, language: str, index: int) -> RawDialogue:
        if self.samples[index] is None:
            raise BadSample("no image")
        return RawDialogue(self.dialogues(language, index), (), key=f"row {index}")

    def fingerprint(self) -> Mapping[str, Any]:
        return {}


class Parrot(torch.nn.Module):
    """Model and tokenizer in one: says what it was told, in turn."""

    pad_id, stop_ids, num_image_tokens = 0, (0,), 4

    def __init__(self, said: Sequence[str]) -> None:
        super().__init__()
        self.said, self.spoken = list(said), 0

    def encode(self, dialogue: Dialogue, *, max_tokens: int | None = None) -> EncodedDialogue:
        return EncodedDialogue((1, 2), (IGNORED, IGNORED), ())

    def decode(self, ids: Sequence[int]) -> str:
        return self.said[ids[0]]

    def generate(self, batch: DialogueBatch, decoding: Any, *, never_early: bool) -> torch.Tensor:
        self.spoken += len(batch)
        return torch.arange(self.spoken - len(batch), self.spoken)[:, None]


def test_closed_and_open_questions_apart() -> None:
    asked = [
        ("is it", ["Yes"] * 7 + ["no"] * 3),
        ("can it", ["no"] * 9 + ["yes"]),
        ("does it", ["no"] * 10),
        None,
        ("where is it", ["left lung"] * 2 + ["lung"] * 8),
    ]
    parrot: Any = Parrot([" Yes\n", "yes", "No.", "the left lung"])
    evaluator = AnswerEvaluator(
        Questions(asked), EvalTransform(image_size=64), parrot, closed=["yes", "no"], vqa=True, batch_size=2
    )
    found = evaluator(parrot, device=torch.device("cpu"), ranks=Ranks.alone())
    expected = {
        "exact_match": 0.5,
        "normalised_match": 0.75,
        "vqa_accuracy": (0.0 + 0.3 + 1.0 + 0.6) / 4,  # "Yes" of the annotators keeps its capital
        "num_questions": 4,
        "closed/num_questions": 3,
        "closed/normalised_match": 1.0,
        "closed/majority": 2 / 3,
        "closed/vqa_accuracy": 1.3 / 3,
        "open/num_questions": 1,
        "open/normalised_match": 0.0,
        "open/vqa_accuracy": 0.6,
    }
    assert {key: found.metrics[f"en/{key}"] for key in expected} == pytest.approx(expected)
    scores = text_scores(["the left lung"], [["left lung", "lung"]], "en")
    assert {key: found.metrics[f"en/open/{key}"] for key in scores} == pytest.approx(scores)
    told = "\n".join(found.lines)
    assert "4 questions" in told and "1 could not be read" in told and "13a, sacrebleu" in told, told


def test_too_few_annotators_for_vqa_accuracy_are_told() -> None:
    """Of one annotator, leaving each out leaves nobody: 0, however right the answer is."""
    parrot: Any = Parrot(["yes", "no", "red"])
    asked = [("is it", ["yes"]), ("can it", ["no"] * 3), ("which", ["red"] * 4)]
    evaluator = AnswerEvaluator(Questions(asked), EvalTransform(image_size=64), parrot, vqa=True)
    found = evaluator(parrot, device=torch.device("cpu"), ranks=Ranks.alone())
    assert found.metrics["en/vqa_accuracy"] == pytest.approx((0 + 2 / 3 + 1) / 3)
    assert any("2 questions have 3 annotators or fewer" in line for line in found.lines)


# ------------------------------------------------------------------------------------------- a small model, warmed up


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learns a handful of text-only answers by heart."""
    source = source_of()
    dialogues = [d for language in source.languages for i in range(4) for d in source.dialogues(language, i)[:1]]
    return warm_up(
        dialogues=dialogues,
        folder=tmp_path_factory.mktemp("warm") / "llm",
        hidden_size=48,
        num_layers=2,
        num_heads=2,
        inner_size=96,
        num_image_tokens=4,
        steps=120,
        batch_size=8,
        lr=5e-3,
    )


def source_of() -> SceneDialogues:
    return SceneDialogues(4, objects=(1, 0, 0), text_only_every=1)


def evaluated(folder: str, file: str, decoding: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...], list[str]]:
    ranks = Ranks.connect(torch.device("cpu"))
    torch.manual_seed(0)
    vision = eva_vit(image_size=64, patch_size=16, width=24, num_layers=1, num_heads=2, mlp_width=48)
    qformer = QFormer(
        vocab_size=1, pad_id=0, image_width=24, hidden_size=32, num_layers=2, num_heads=4, num_query_tokens=4
    )
    llm = load(Path(folder))
    model = VisualChatModel(vision, qformer, llm)
    assert llm.codec is not None
    evaluator = AnswerEvaluator(
        source_of(), EvalTransform(image_size=64), llm.codec, batch_size=2, closed=[], num_samples=3,
        decoding=Decoding(max_new_tokens=60, **decoding),
    )  # fmt: skip
    predictions = Predictions(ranks, Path(file))
    found = evaluator(model, device=torch.device("cpu"), ranks=ranks, predictions=predictions)
    predictions.close()
    ranks.barrier()
    assert model.training, "the model is left in the mode it was in"
    return dict(found.metrics), found.lines, Path(file).read_text(encoding="utf-8").splitlines()


def test_a_warmed_up_model_says_what_it_learnt_on_any_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    expected, lines, rows = evaluated(str(folder), str(tmp_path / "alone"), {})
    assert expected["zh/exact_match"] == expected["en/exact_match"] == 1.0, lines
    assert expected["en/num_questions"] == 3 and expected["en/open/13a/rouge_l"] == pytest.approx(1.0)
    assert any(REPHRASE["zh"][:4] in line for line in lines)
    cut_off = tmp_path / "cut_off"
    cut_off.write_text("\n".join([*rows[1:3], rows[4][:30]]), encoding="utf-8")
    for found, _, again in run_ranks(2, evaluated, str(folder), str(cut_off), {}):
        assert found == expected
        assert again == rows


def test_what_is_drawn_belongs_to_the_question(folder: Path, tmp_path: Path) -> None:
    """However many were asked beside it: an evaluation that goes on draws what it would have drawn."""
    hot = {"temperature": 5.0}
    _, _, rows = evaluated(str(folder), str(tmp_path / "whole"), hot)
    part = tmp_path / "part"
    part.write_text(rows[0] + "\n", encoding="utf-8")
    assert evaluated(str(folder), str(part), hot)[2] == rows
    assert len({row.partition('"answer"')[2] for row in rows}) == len(rows), "it does draw"


def test_a_warm_up_is_not_repeated(folder: Path) -> None:
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert warm_up(dialogues=[], folder=folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="no dialogue to warm"):
        warm_up(dialogues=[], folder=folder / "other")


@pytest.mark.parametrize(
    ("said", "right"),
    [("35", "3.5"), ("1.25 cm", "12.5 cm"), ("5", "-5"), ("<5", ">5"), ("1/2", "12"), ("10:30", "1030"), ("+", "-"),
     ("C", "C++"), ("", "-"), ("", "😀"), ("😀", "😡"), ("म", "मी"), ("5%", "5"), ("1-2", "12"), ("3,5", "35"),
     ("C#", "C")],
)  # fmt: skip
def test_another_answer_is_not_taken_for_the_same(said: str, right: str) -> None:
    assert not is_right(said, [right]) and not is_right(right, [said]) and is_right(said, [said])


@pytest.mark.parametrize(
    ("said", "right"),
    [("A cat.", "a cat"), ("猫。", "猫"), ("“Yes!”", "yes"), ("ＣＴ", "ct"), ("left-sided", "left sided"),
     ("1,000", "1000"),
     ("\u22125", "-5"), ("covid-19", "COVID 19"), ("no, none", "No; none"), ("10：30", "10:30"), ("`x`~", "x"),
     ("It is 5.", "it is 5"), ("...", " ... ")],
)  # fmt: skip
def test_spellings_of_one_answer(said: str, right: str) -> None:
    assert is_right(said, [right]) and is_right(right, [said])
