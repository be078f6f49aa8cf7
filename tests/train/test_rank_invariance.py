"""A global batch trains the same model on any number of ranks: loss AND gradient, negatives included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data.batch import ImageTextBatch
from tests.ranks import run_ranks
from tests.tiny import random_batch, share_of, tiny_stage
from train.distributed import Ranks
from train.loss.stage_one import compare

GLOBAL_BATCH = 8
KINDS = ("all different", "some duplicates", "one pair against its copies", "a pair without negatives")


def global_batch(kind: str) -> ImageTextBatch:
    batch = random_batch(GLOBAL_BATCH)
    if kind == "some duplicates":
        return replace(
            batch,
            image_key_B=torch.tensor([0, 1, 2, 3, 0, 5, 2, 7]),
            text_key_B=torch.tensor([10, 11, 12, 13, 14, 15, 16, 11]),
        )
    if kind == "one pair against its copies":
        return replace(batch, image_key_B=torch.tensor([0, 0, 0, 0, 0, 0, 0, 1]))
    if kind == "a pair without negatives":  # row 0 shares its image or its caption with every other row
        return replace(
            batch,
            image_key_B=torch.tensor([0, 0, 0, 0, 4, 5, 6, 7]),
            text_key_B=torch.tensor([10, 11, 12, 13, 10, 10, 10, 10]),
        )
    assert kind == "all different"
    return batch


def loss_and_gradient(kind: str, frozen: bool) -> dict[str, Tensor]:
    """Averaged over the ranks, as the engine does."""
    ranks = Ranks.connect(torch.device("cpu"))
    batch = share_of(global_batch(kind), ranks.rank, ranks.count)
    stage = tiny_stage(ranks, frozen=frozen)
    output = stage(batch)
    torch.stack(list(output.losses.values())).sum().backward()
    found = {name: loss.detach() for name, loss in output.losses.items()}
    found |= {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    found = {name: ranks.sum(value) / ranks.count for name, value in found.items()}
    found |= {f"report {name}": ranks.sum(torch.stack(pair)) for name, pair in output.report.items()}
    contrast = compare(stage.model, batch, stage.model.look(batch), ranks, itc_gather="full", mask_duplicates=True)
    image_B, text_B = stage.objectives.itm.draw(batch, contrast)
    return found | {"hard image": ranks.gather(image_B), "hard text": ranks.gather(text_B)}


CASES = [(kind, frozen) for kind in KINDS for frozen in (True, False)]


def every_case() -> list[dict[str, Tensor]]:
    return [loss_and_gradient(kind, frozen) for kind, frozen in CASES]


@pytest.mark.parametrize("count", [2, 4])
def test_loss_and_gradient_do_not_depend_on_the_number_of_ranks(count: int) -> None:
    expected_cases = every_case()
    for found_cases in run_ranks(count, every_case):
        for case, expected, found in zip(CASES, expected_cases, found_cases, strict=True):
            assert found.keys() == expected.keys()
            assert any(name.startswith("model.vision.") for name in expected) != case[1], "who trains?"
            for name, value in expected.items():
                if not name.startswith("report temperature"):
                    told = f"{case} {name}"
                    torch.testing.assert_close(
                        found[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, t=told: f"{t}: {m}"
                    )


def micro_batch_gradient(accumulate: int) -> dict[str, Tensor]:
    """ITG alone: its tokens weigh the same in one batch, in micro-batches and on ranks; ITC's pool does change."""
    from train.loss.stage_one import ImageGroundedTextGeneration, StageOneLoss

    ranks = Ranks.connect(torch.device("cpu"))
    stage = tiny_stage(ranks, losses=StageOneLoss(itg=ImageGroundedTextGeneration()))
    for micro_step in range(accumulate):
        micro = share_of(random_batch(GLOBAL_BATCH), micro_step, accumulate)
        own = replace(share_of(micro, ranks.rank, ranks.count), num_micro_steps=accumulate, micro_step=micro_step)
        (stage(own).losses["itg"] / accumulate).backward()
    return {n: ranks.sum(p.grad) / ranks.count for n, p in stage.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("accumulate", "count"), [(4, 1), (1, 2), (2, 2)])
def test_every_caption_token_weighs_the_same_however_the_step_is_cut(accumulate: int, count: int) -> None:
    expected = micro_batch_gradient(1)
    for found in run_ranks(count, micro_batch_gradient, accumulate):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
