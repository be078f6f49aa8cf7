"""Where the queries look: the cross-attention's weights, which the fused attention of `model/qformer.py` never holds.

Shape letters   B = images   A = heads   Q = query tokens   M = image tokens   H = hidden size   D = H / A
                R = rows and columns of patches
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from model.image_memory import ImageMemory, split_heads
from model.qformer import QFormer


@torch.no_grad()
def cross_attention_weights(qformer: QFormer, memory: ImageMemory) -> list[Tensor]:
    """softmax(Q K^T / sqrt(D)) of every cross-attention, first layer first, in the pass `see`: queries and image alone.

    Returns:
        weight_BAQM of each; the last dimension sums to 1.  weight @ value is what the fused attention returns.
    """
    asked: dict[nn.Module, Tensor] = {}

    def remember(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        asked[module] = arguments[0]

    looking = qformer.looking()
    hooks = [attention.register_forward_pre_hook(remember) for attention in looking]
    try:
        qformer.see(memory)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for attention, (key_BAMD, _) in zip(looking, memory.layers(), strict=True):
        query_BAQD = split_heads(attention.query(asked[attention]), attention.num_heads)
        score_BAQM = query_BAQD.float() @ key_BAMD.float().mT / math.sqrt(query_BAQD.shape[-1])
        found.append(score_BAQM.softmax(dim=-1))
    return found


def on_patches(weight_BAQM: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the heads, laid out as the patches lie in the picture.

    Encoders put what is no patch (class token, registers) before the patches, which are a square.

    Returns:
        map_BQRR, and other_BQ: the share of the weight that lies on tokens which are no patch.  Together they sum to 1.
    """
    weight_BQM = weight_BAQM.float().mean(dim=1)
    num_tokens = weight_BQM.shape[-1]
    side = math.isqrt(num_tokens)
    num_others = num_tokens - side * side
    return weight_BQM[..., num_others:].unflatten(-1, (side, side)), weight_BQM[..., :num_others].sum(dim=-1)
