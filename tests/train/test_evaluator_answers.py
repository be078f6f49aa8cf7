"""Answers about pictures: what counts as right, BLEU and ROUGE-L by hand, and any number of ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from data.source.scene_dialogues import REPHRASE, SceneDialogues
from data.transform import EvalTransform
from model.llm.warm_up import load, warm_up
from model.qformer import QFormer
from model.vision.encoder import eva_vit
from model.visual_chat import VisualChatModel
from tests.ranks import run_ranks
from train.distributed import Ranks
from train.evaluator.answers import AnswerEvaluator, closed_and_open, is_right
from train.evaluator.text_metrics import bleu, majority_share, rouge_l, words


def test_what_counts_as_right() -> None:
    assert is_right("A red circle.", ["a Red circle"]) and is_right("红色 的圆，", ["红色的圆"])
    assert is_right("ＡＢ 12", ["x", "ab12"]) and not is_right("a red circl", ["a red circle"])


def test_words_of_both_languages() -> None:
    assert words("Lungs: clear, 左肺CT正常!") == ["lungs", "clear", "左", "肺", "ct", "正", "常"]


def test_bleu_by_hand() -> None:
    # Papineni et al., example 2: "the" seven times finds two of its seven unigrams
    answer, right = "the the the the the the the", ("The cat is on the mat.", "There is a cat on the mat.")
    assert bleu([answer], [right], longest=1) == pytest.approx(2 / 7)
    # 4 of 5 words, 2 of 4 pairs; one word shorter than its reference
    found = bleu(["a red circle is small"], [("a red square is small now",)], longest=2)
    assert found == pytest.approx(math.sqrt(4 / 5 * 2 / 4) * math.exp(1 - 6 / 5))
    assert bleu(["no"], [("yes",)]) == 0.0 and bleu(["a b c d e"], [("a b c d e",)]) == pytest.approx(1.0)


def test_rouge_l_by_hand() -> None:
    # Lin, section 3.1: S1 "police killed the gunman", S2 "police kill the gunman": common 3 of 4 and 4
    assert rouge_l(["police kill the gunman"], [("police killed the gunman",)]) == pytest.approx(3 / 4)
    assert rouge_l(["the gunman kill police"], [("police killed the gunman",)]) == pytest.approx(2 / 4)
    assert rouge_l(["左肺正常", ""], [("右肺", "左肺不正常"), ("x",)]) == pytest.approx((2 * 4 / 9 + 0) / 2)


def test_closed_questions_beside_the_most_frequent_answer() -> None:
    right = [("Yes",), ("no",), ("No",), ("left lung",)]
    found = closed_and_open(["yes", "yes", "No.", "the left lung"], right, {"yes", "no"})
    assert found["closed/right"] == pytest.approx(2 / 3) and found["closed/majority"] == pytest.approx(2 / 3)
    assert (found["closed/num_questions"], found["open/num_questions"], found["open/exactly_right"]) == (3, 1, 0)
    assert found["open/bleu_1"] == pytest.approx(2 / 3) and found["open/rouge_l"] == pytest.approx(4 / 5)
    assert majority_share(["a", "b", "a", "c"]) == 0.5


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


def evaluated(folder: str) -> tuple[dict[str, Any], tuple[str, ...]]:
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
        source_of(), EvalTransform(image_size=64), llm.codec, max_new_tokens=60, batch_size=2, closed=[], num_samples=3
    )
    found = evaluator(model, device=torch.device("cpu"), ranks=ranks)
    assert model.training, "the model is left in the mode it was in"
    return dict(found.metrics), found.lines


def test_a_warmed_up_model_says_what_it_learnt_on_any_number_of_ranks(folder: Path) -> None:
    expected, lines = evaluated(str(folder))
    assert expected["zh/exactly_right"] == expected["en/exactly_right"] == 1.0, lines
    assert expected["en/num_questions"] == 3 and expected["en/open/rouge_l"] == pytest.approx(1.0)
    assert any(REPHRASE["zh"][:4] in line for line in lines)
    for found, _ in run_ranks(2, evaluated, str(folder)):
        assert found == expected


def test_a_warm_up_is_not_repeated(folder: Path) -> None:
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert warm_up(dialogues=[], folder=folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="no dialogue to warm"):
        warm_up(dialogues=[], folder=folder / "other")
