"""In which precision a map computes here and now."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast would cast `x` to before a matrix product; its own dtype where there is no autocast."""
    on = x.device.type
    autocast = on != "meta" and torch.is_autocast_enabled(on)
    return torch.get_autocast_dtype(on) if autocast else x.dtype
