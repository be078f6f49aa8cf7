"""What a block of ChatGLM-6B computes, with SwissArmyTransformer's modules: 2-D rotary positions and fused attention.

Shape letters   B = rows   L = length   D = width   A = heads   E = D / A   N = vectors of a head   S = keys seen
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.autocast import compute_dtype

ROTARY_BASE = 10000.0


def rotation(position_B2L: Tensor, head_size: int, frequency_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """-> (2, B, L, 1, 2, E / 2): cos and sin for the two halves of a head, one for each kind of position.

    ChatGLM-6B keeps its frequencies in half precision and was trained so; the angles are fp32.
    """
    half = head_size // 2
    exponent = torch.arange(0, half, 2, device=position_B2L.device).float() / half
    frequency = (1.0 / ROTARY_BASE**exponent).to(frequency_dtype).float()
    angle_BL2 = position_B2L.transpose(1, 2).float()[..., None] * frequency
    angle = torch.cat([angle_BL2, angle_BL2], dim=-1)[:, :, None]
    return torch.stack([angle.cos(), angle.sin()]).to(dtype)


class _Rotate(torch.autograd.Function):
    """Three kernels each way, where autograd's own graph of the formula has twice as many."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, sin, -1), None, None  # a rotation's transpose is the rotation back


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    halves = x.unflatten(-1, (2, -1))
    (first, second), out = halves.chunk(2, dim=-1), halves * cos
    out_first, out_second = out.chunk(2, dim=-1)
    sin_first, sin_second = sin.chunk(2, dim=-1)
    out_first.addcmul_(second, sin_first, value=-direction)
    out_second.addcmul_(first, sin_second, value=direction)
    return out.flatten(-2)


def rotate(x_BLANE: Tensor, cos_sin: Tensor) -> Tensor:
    """`x` (B, L, A, N, E): N vectors of each head, turned alike.  `cos_sin` from `rotation`."""
    cos, sin = cos_sin.unsqueeze(-3)
    return _Rotate.apply(x_BLANE, cos, sin)


def run_block(
    block: Any, hidden_BLD: Tensor, mask: Tensor | None, cos_sin: Tensor, cached: Any, *, alpha: float
) -> Tensor:
    """One of SAT's blocks, as `ChatGLMLayerMixin.layer_forward` has it: the residual is what was normalised, times
    alpha = sqrt(2 x number of blocks).

    Under autocast a norm returns fp32; it is cast once for all maps that read it, adapters included.
    """
    dtype = compute_dtype(hidden_BLD)
    normed_BLD = block.input_layernorm(hidden_BLD)
    hidden_BLD = attend(block.attention, normed_BLD.to(dtype), mask, cos_sin, cached).add(normed_BLD, alpha=alpha)
    normed_BLD = block.post_attention_layernorm(hidden_BLD)
    mlp = block.mlp
    inner = mlp.activation_func(mlp.dense_h_to_4h(normed_BLD.to(dtype)))
    return mlp.dense_4h_to_h(inner).add(normed_BLD, alpha=alpha)


def attend(attention: Any, x_BLD: Tensor, mask: Tensor | None, cos_sin: Tensor, cached: Any) -> Tensor:
    """The self-attention of one block.  `cached`: (key, value, used), filled from `used` on, read from 0; or None."""
    qkv_BLA3E = attention.query_key_value(x_BLD).unflatten(-1, (attention.num_attention_heads, 3, -1))
    query_key, value = qkv_BLA3E.split([2, 1], dim=-2)
    query_BLAE, key_BLAE = rotate(query_key, cos_sin).unbind(-2)
    query_BALE = query_BLAE.transpose(1, 2)
    key_BASE, value_BASE = key_BLAE.transpose(1, 2), value.squeeze(-2).transpose(1, 2)
    if cached is not None:
        all_keys, all_values, used = cached
        end = used + x_BLD.shape[1]
        all_keys[:, :, used:end], all_values[:, :, used:end] = key_BASE, value_BASE
        key_BASE, value_BASE = all_keys[:, :, :end], all_values[:, :, :end]
    context_BALE = F.scaled_dot_product_attention(query_BALE, key_BASE, value_BASE, attn_mask=mask)
    return attention.dense(context_BALE.transpose(1, 2).flatten(2))
