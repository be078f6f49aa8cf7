"""Stage two's loss: torch's own cross-entropy; every token weighs the same however the step is cut; no rank waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batch import IGNORED
from tests.ranks import run_ranks
from tests.tiny_chat import batch_of, rows_of, tiny_chat, train_pieces
from tests.train.tiny_stage_two import CUTS, step_gradient, two_steps
from train.distributed import Ranks
from train.engine import close_process_group
from train.loss.stage_two import StageTwoLoss, next_token
from train.optim import parameter_groups
from train.stage import Stage


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces") / "ice_text.model")


def test_the_formula_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TV, label_T = torch.randn(6, 9, generator=generator), torch.tensor([3, 0, 8, 8, 1, 4])
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(logits_TV, label_T, label_smoothing=smoothing)
        found = next_token(logits_TV.to(torch.bfloat16).float(), label_T, label_smoothing=smoothing)
        torch.testing.assert_close(found.mean(), expected, atol=0.02, rtol=0)
        torch.testing.assert_close(next_token(logits_TV, label_T, label_smoothing=smoothing).mean(), expected)


def test_it_is_the_mean_over_all_labels_of_the_shifted_logits(pieces: Path) -> None:
    model = tiny_chat(pieces)
    batch = batch_of(model)
    losses, report = StageTwoLoss(weight=0.5)(model, batch, Ranks.alone())
    logits_BLV = model.llm.logits(model.hidden(batch))
    shifted = logits_BLV[:, :-1].flatten(0, 1), batch.labels_BL[:, 1:].flatten()
    torch.testing.assert_close(losses["lm"], 0.5 * F.cross_entropy(*shifted, ignore_index=IGNORED))
    token_BL = F.cross_entropy(*shifted, ignore_index=IGNORED, reduction="none").view(len(batch), -1)
    kept_BL = batch.labels_BL[:, 1:] != IGNORED
    for index, language in enumerate(batch.languages):
        is_language_B = batch.language_B == index
        expected = token_BL[is_language_B].sum(), kept_BL[is_language_B].sum().float()
        torch.testing.assert_close(report[f"lm/{language}"], expected)
        assert report[f"num_samples/{language}"][0] == 4
    right = (logits_BLV[:, :-1].argmax(-1) == batch.labels_BL[:, 1:])[kept_BL].sum().float()
    assert report["token_accuracy"] == (right, kept_BL.sum()) and report["num_images"][0] == 7
    assert not any(value.requires_grad for pair in report.values() for value in pair)


def test_each_ranks_own_mean_is_visualglms(pieces: Path) -> None:
    model = tiny_chat(pieces)
    batch = batch_of(model)
    shares = [rows_of(batch, rows) for rows in CUTS[4]]
    means = [StageTwoLoss(normalise="rank")(model, share, Ranks.alone())[0]["lm"] for share in shares]
    expected = [next_token(p.logits_TV, p.label_T).mean() for p in map(model.predict, shares)]
    torch.testing.assert_close(means, expected)
    assert abs(torch.stack(means).mean() - StageTwoLoss()(model, batch, Ranks.alone())[0]["lm"]) > 1e-3


# ------------------------------------------------------------------------------------- however the step is cut


def own_gradient(pieces: str, accumulate: int) -> dict[str, Tensor]:
    """Of the Q-Former, the projection and the language model."""
    ranks = Ranks.connect(torch.device("cpu"))
    stage = Stage(tiny_chat(Path(pieces), llm={"frozen": False}), StageTwoLoss(), ranks)
    return step_gradient(stage, ranks, accumulate)


@pytest.mark.parametrize(("accumulate", "count"), [(4, 1), (1, 2), (2, 2)])
def test_every_token_weighs_the_same_however_the_step_is_cut(pieces: Path, accumulate: int, count: int) -> None:
    expected = own_gradient(str(pieces), 1)
    assert len(expected) > 100
    for found in run_ranks(count, own_gradient, str(pieces), accumulate):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            scale = max(1.0, float(value.abs().max()))
            torch.testing.assert_close(
                found[name] / scale, value / scale, atol=2e-5, rtol=0, msg=lambda m, n=name: n + m
            )


# ------------------------------------------------------------------------- ranks with and without pictures, ZeRO


def trained(pieces: str, zero_stages: list[int]) -> dict[int, dict[str, Any]]:
    """Two steps, of which the first gives one rank nothing but text.  -> losses and weights by ZeRO stage"""
    ranks = Ranks.connect(torch.device("cpu"))
    found: dict[int, dict[str, Any]] = {}
    for zero_stage in zero_stages:
        stage = Stage(tiny_chat(Path(pieces)), StageTwoLoss(), ranks)
        groups = parameter_groups(list(stage.named_parameters()), lr=1e-3, weight_decay=0.05)
        engine, losses = two_steps(stage, groups, ranks, zero_stage)
        weights = {name: tensor.clone() for name, tensor in engine.full_weights()}
        found[zero_stage] = {"losses": losses, "weights": weights}
    close_process_group()
    return found


def test_mixed_batches_train_alike_under_every_zero_stage_and_nobody_hangs(pieces: Path) -> None:
    expected = run_ranks(1, trained, str(pieces), [0], timeout=120)[0][0]
    assert expected["losses"][0] != expected["losses"][1]
    for found in run_ranks(2, trained, str(pieces), [0, 1, 2, 3], timeout=180):
        for zero_stage in (0, 1, 2, 3):
            torch.testing.assert_close(found[zero_stage]["losses"], expected["losses"], atol=1e-4, rtol=1e-4)
            for name, value in expected["weights"].items():
                torch.testing.assert_close(found[zero_stage]["weights"][name], value, atol=2e-4, rtol=0)


def test_frozen_parts_stay_in_eval_mode(pieces: Path) -> None:
    stage = Stage(tiny_chat(pieces), StageTwoLoss(), Ranks.alone()).train()
    model: Any = stage.model
    assert not model.vision.network.training and model.qformer.training
    leaves = [m for m in model.llm.network.modules() if isinstance(m, nn.Linear | nn.LayerNorm | nn.Embedding)]
    assert leaves and not any(module.training for module in leaves)
