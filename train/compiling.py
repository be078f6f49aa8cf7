"""torch.compile for the blocks a network repeats: applied from outside, the networks know nothing of it.

At a batch of a hundred a full-size Q-Former waits for Python, which launches some eight thousand kernels a step.  A
compiled block launches a few.  Blocks of one kind share their code, so a network of twelve compiles as fast as one of
two; shapes are dynamic, since captions are padded to the batch's longest.
"""

from __future__ import annotations

import torch
from torch import nn

# One code for every way through a block: kind of block x pass x training or not; torch gives up at 8.
_WAYS_THROUGH_A_BLOCK = 64


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of every `nn.ModuleList` of two or more of one class, outermost lists only."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside or not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        if len({type(block) for block in module}) == 1:
            found += list(module)
            inside |= {part for block in module for part in block.modules()}
    return found


def compile_blocks(model: nn.Module, *, zero_stage: int, backend: str = "inductor") -> int:
    """Compiles them in place, at their first use; names of parameters stay.  -> how many

    Raises:
        ValueError: under ZeRO-3, whose hooks gather the weights inside every module's call.
    """
    if zero_stage == 3:
        raise ValueError("train.compile=true does not go with train.engine.zero_stage=3: use ZeRO 0, 1 or 2")
    torch._dynamo.config.recompile_limit = _WAYS_THROUGH_A_BLOCK
    blocks = repeated_blocks(model)
    for block in blocks:
        block.compile(dynamic=True, backend=backend)
    return len(blocks)
