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

ITC's and ITG's share their query rows and leave one another alone, so training runs both as one pass (`apart`).
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


def apart(text_mask_PL: Tensor, num_query_tokens: int, *, caption: bool) -> Tensor:
    """ITC's passes and ITG's in one, of queries, caption (if there is one) and text: queries see queries, the caption
    what `text_after_query` says, the text itself.  (P, L) bool -> (P, 1, T, T) with T = Q + 2L, or Q + L."""
    num_pairs, length = text_mask_PL.shape
    text = num_query_tokens + length * caption  # where it begins
    seen_TT = torch.zeros(text + length, text + length, dtype=torch.bool, device=text_mask_PL.device)
    seen_TT[:text, :text] = True
    seen_TT[:text, num_query_tokens:text].tril_(-num_query_tokens)
    seen_TT[text:, text:] = True
    always_PQ = text_mask_PL.new_ones(num_pairs, num_query_tokens)
    real_PT = torch.cat([always_PQ, *[text_mask_PL] * (1 + caption)], dim=1)
    return (seen_TT & real_PT[:, None])[:, None]


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as attention adds it, 0 or -inf: made once for all layers, where each would make its own.

    Rows begin at multiples of 8 numbers: the fused kernel would copy others so, in every layer.
    """
    rows, length = mask.shape[:-1], mask.shape[-1]
    bias = torch.zeros(*rows, -(-length // 8) * 8, dtype=dtype, device=mask.device)[..., :length]
    return bias.masked_fill_(~mask, float("-inf"))
