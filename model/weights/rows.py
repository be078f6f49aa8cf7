"""The rows of a joint query-key-value map: in blocks (all q, all k, all v), or head by head (q1, k1, v1, q2, ...).

SAT since 0.4.1 keeps blocks; Hugging Face's ChatGLM-6B, SAT before 0.4.1 (and with it XrayGLM), and this project keep
them head by head.  No file says which: `visualglm.md` 2.7.
"""

from __future__ import annotations

from torch import Tensor


def head_by_head(blocks: Tensor, num_heads: int) -> Tensor:
    """(3 * A * E, ...) in blocks -> the same rows head by head."""
    return blocks.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)


def in_blocks(by_head: Tensor, num_heads: int) -> Tensor:
    """The way back."""
    return by_head.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
