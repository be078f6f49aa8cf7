"""Random numbers that depend on a key and on nothing else: not on the rank, the device, or what was drawn before."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def keyed_uniform(row_B: Tensor, *key: int) -> Tensor:
    """One number of [0, 1) for each row of a keyed draw, the same on CPU and GPU.  -> (B,) float64

    The key's integers and the row number go through the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    """
    state = 0
    for part in key:
        state = _mix_int((state + _GOLDEN + part) & _MASK)
    bits_B = _mix(row_B.to(torch.int64) * _signed(_GOLDEN) + _signed(state))
    return _shift_right(bits_B, 11).to(torch.float64) * 2.0**-53


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)


def _mix(x: Tensor) -> Tensor:
    """As `_mix_int`; int64 products wrap as unsigned ones do."""
    x = (x ^ _shift_right(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift_right(x, 27)) * _signed(_SECOND)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical, where `>>` keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
