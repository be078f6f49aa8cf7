"""One gradient and two steps on the dialogues of `tests.tiny_chat`, on any number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.tiny_chat import batch_of, rows_of
from tests.train.tiny_training import tiny_engine
from train.distributed import Ranks
from train.engine import Engine, store_frozen
from train.optim import ParameterGroup
from train.stage import Stage

# micro-steps times ranks -> the rows of each
CUTS = {1: [[0, 1, 2, 3, 4, 5, 6, 7]], 4: [[0, 1], [2, 3], [4, 5], [6, 7]], 2: [[0, 1, 2, 3], [4, 5, 6, 7]]}


def step_gradient(stage: Stage, ranks: Ranks, accumulate: int) -> dict[str, Tensor]:
    """And the loss, averaged over ranks as the engine does."""
    whole = batch_of(stage.model)  # type: ignore[arg-type]
    loss = torch.zeros(())
    for micro_step, rows in enumerate(CUTS[accumulate * ranks.count][ranks.rank :: ranks.count]):
        part = stage(rows_of(whole, rows, accumulate, micro_step)).losses["lm"] / accumulate
        part.backward()
        loss += part.detach()
    found = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    return {name: ranks.sum(value) / ranks.count for name, value in {**found, "loss": loss}.items()}


def two_steps(stage: Stage, groups: list[ParameterGroup], ranks: Ranks, zero_stage: int) -> tuple[Engine, list[float]]:
    """Of four rows each; the first gives one rank of two nothing but text.  -> the losses over all ranks"""
    whole = batch_of(stage.model)  # type: ignore[arg-type]
    store_frozen(stage, "fp32")
    engine = tiny_engine(stage, groups, zero_stage=zero_stage, micro_batch_size=4 // ranks.count, eps=1e-6)
    losses = []
    for order in ([1, 4, 0, 3], [2, 6, 5, 7]):
        batch = rows_of(whole, order[ranks.rank * 4 // ranks.count :][: 4 // ranks.count])
        tokens = rows_of(whole, order).num_target_tokens
        loss = engine(batch.agreed(step_target_tokens=tokens, text_length=0)).losses["lm"]
        engine.backward(loss)
        engine.step(1.0)
        losses.append(float(ranks.sum(loss.detach())) / ranks.count)
    return engine, losses
