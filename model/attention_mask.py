"""The three attention patterns of BLIP-2 (arXiv:2301.12597, figure 2), as boolean masks: True may attend.

Shape letters   P = image-text pairs   Q = query tokens   L = caption length   T = Q + L
The 1s in a mask's shape are the heads and, where every row sees the same, the rows.

        ITC: apart             ITM: together            ITG: prefix + causal
        q q q t t t            q q q t t t              q q q t t t
      q x x x . . .          q x x x x x x            q x x x . . .
      q x x x . . .          q x x x x x x            q x x x . . .
      q x x x . . .          q x x x x x x            q x x x . . .
      t . . . x x x          t x x x x x x            t x x x x . .
      t . . . x x x          t x x x x x x            t x x x x x .
      t . . . x x x          t x x x x x x            t x x x x x x

Queries never hold padding, so ITC's query pass needs no mask; ITG's query rows are that same pass, whose keys and
values the text rows reuse.  Padding is never attended to.
"""

import torch
from torch import Tensor


def text_alone(text_mask_PL: Tensor) -> Tensor:
    """ITC's text pass: every row sees the real tokens.  (P, L) bool -> (P, 1, 1, L)."""
    return text_mask_PL[:, None, None, :]


def query_with_text(text_mask_PL: Tensor, num_query_tokens: int) -> Tensor:
    """ITM: queries and text see one another, both ways.  (P, L) bool -> (P, 1, 1, T)."""
    always_PQ = text_mask_PL.new_ones(len(text_mask_PL), num_query_tokens)
    return torch.cat([always_PQ, text_mask_PL], dim=1)[:, None, None, :]


def text_after_query(text_mask_PL: Tensor, num_query_tokens: int) -> Tensor:
    """ITG's text rows: all queries and the text up to themselves (UniLM).  (P, L) bool -> (P, 1, L, T)."""
    num_pairs, length = text_mask_PL.shape
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=text_mask_PL.device).tril()
    text_PLL = causal_LL & text_mask_PL[:, None, :]
    query_PLQ = text_PLL.new_ones(num_pairs, length, num_query_tokens)
    return torch.cat([query_PLQ, text_PLL], dim=2)[:, None]


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as attention adds it, 0 or -inf: made once for all layers, where each would make its own.

    Rows begin at multiples of 8 numbers: the fused kernel would copy others so, in every layer.
    """
    rows, length = mask.shape[:-1], mask.shape[-1]
    bias = torch.zeros(*rows, -(-length // 8) * 8, dtype=dtype, device=mask.device)[..., :length]
    return bias.masked_fill_(~mask, float("-inf"))
