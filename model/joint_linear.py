"""Several linear maps of the same input as one matrix product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.autocast import compute_dtype


def joint_linear(x: Tensor, maps: Sequence[nn.Linear]) -> Tensor:
    """What each map makes of `x`, one behind the other in the last dimension.

    The weights stay where they are, under the names that checkpoints know, and are joined for each product: that costs
    less than more products, more casts of `x` under autocast, and the sum of their gradients.  Without gradients it
    does not (a word's row is smaller than the weights), and maps with an adapter or in few bits are no plain
    `nn.Linear`: these are asked one by one.
    """
    x = x.to(compute_dtype(x))
    if not torch.is_grad_enabled() or any(type(each) is not nn.Linear for each in maps):
        return torch.cat([each(x) for each in maps], dim=-1)
    return F.linear(x, torch.cat([each.weight for each in maps]), torch.cat([each.bias for each in maps]))
