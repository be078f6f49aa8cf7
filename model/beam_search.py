"""Beam search over the key-value cache, all rows of a batch at once.

As transformers does it by default (`generation/utils.py`, `_beam_search`, early_stopping=False): a row is done when its
best open beam, at its length so far, is no better than the worst of its finished answers.

Shape letters   B = rows   L = length of the prompts   D = the model's width   K = beams   C = candidates
                N = new tokens   V = vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.generation import NOT_NUMBERS, Chooser, Decoding
from model.llm.base import LanguageModel

NEVER = float("-inf")


@torch.no_grad()
def beam_search(
    llm: LanguageModel,
    embedded_BLD: Tensor,
    ids_BL: Tensor,
    mask_BL: Tensor,
    rows: Sequence[Decoding],
    *,
    never_early: bool = False,
) -> Tensor:
    """-> ids_BN, the best answer of each row as `model.generation.generate` gives it

    Args:
        rows: of as many beams each, and the same limits; see `model.generation.Decoding`.
    Raises:
        ValueError: rows that differ in more than their repetition penalty, or logits that are no numbers.
    """
    assert llm.codec is not None
    first, num_rows, device = _alike(rows), len(ids_BL), ids_BL.device
    num_beams = first.num_beams
    stop = torch.tensor(llm.codec.stop_ids, device=device)
    hidden_BD, cache = llm.prefill(embedded_BLD, ids_BL, mask_BL, room=first.max_new_tokens)
    spread_BK = torch.arange(num_rows, device=device).repeat_interleave(num_beams)
    llm.select(cache, spread_BK)
    hidden_BKD = hidden_BD[spread_BK.to(hidden_BD.device)]
    chooser = Chooser([row for row in rows for _ in range(num_beams)], ids_BL[spread_BK], mask_BL[spread_BK],
                      llm.codec, llm.vocab_size)  # fmt: skip

    beams = _Beams(first, num_rows, stop, llm.codec.pad_id)
    for step in range(first.max_new_tokens):
        log_p_BKV = llm.logits(hidden_BKD).to(device).float().log_softmax(dim=-1)
        if bool(log_p_BKV.isnan().any()):  # would be the likeliest of all
            raise ValueError(NOT_NUMBERS)
        log_p_BKV = chooser.adjusted(log_p_BKV, step).unflatten(0, (num_rows, num_beams))
        parent_BK = beams.grow(log_p_BKV, step)
        if step + 1 == first.max_new_tokens or not (never_early or beams.any_open):
            break
        from_BK = (parent_BK + num_beams * torch.arange(num_rows, device=device)[:, None]).flatten()
        llm.select(cache, from_BK)
        chooser.seen_BV = chooser.seen_BV[from_BK]
        token_BK = beams.said_BKN[:, :, step].flatten()
        chooser.saw(token_BK)
        hidden_BKD = llm.extend(token_BK, cache)
    best_BN = beams.best_BKN[:, 0]
    ends_BN = torch.isin(best_BN, stop)
    length_B = torch.where(ends_BN.any(dim=1), ends_BN.int().argmax(dim=1) + 1, first.max_new_tokens)
    return best_BN[:, : int(length_B.max())]


class _Beams:
    """The open beams of every row and its best finished answers, both from the likeliest on."""

    def __init__(self, decoding: Decoding, num_rows: int, stop: Tensor, pad_id: int) -> None:
        num_beams, length = decoding.num_beams, decoding.max_new_tokens
        self.num_beams, self.length, self.length_penalty = num_beams, length, decoding.length_penalty
        self.stop = stop
        self.score_BK = torch.full((num_rows, num_beams), NEVER, device=stop.device)
        self.score_BK[:, 0] = 0.0  # all beams are still the same
        self.said_BKN = torch.full((num_rows, num_beams, length), pad_id, device=stop.device)
        self.best_BKN, self.best_score_BK = self.said_BKN.clone(), torch.full_like(self.score_BK, NEVER)
        self.open_B1 = torch.ones(num_rows, 1, dtype=torch.bool, device=stop.device)

    @property
    def any_open(self) -> bool:
        """Waits for the device."""
        return bool(self.open_B1.any())

    def grow(self, log_p_BKV: Tensor, step: int) -> Tensor:
        """One more token, number `step` from 0.  -> parent_BK, the beam that each one now goes on from"""
        total_B = (self.score_BK[..., None] + log_p_BKV).flatten(1)
        # enough that as many beams go on even if every stop id of every beam is among them
        score_BC, place_BC = total_B.topk(min((1 + len(self.stop)) * self.num_beams, total_B.shape[1]))
        parent_BC, token_BC = place_BC // log_p_BKV.shape[2], place_BC % log_p_BKV.shape[2]
        new_BCN = _rows(self.said_BKN, parent_BC)
        new_BCN[:, :, step] = token_BC
        ended_BC = torch.isin(token_BC, self.stop) | (step + 1 == self.length)

        length = (step + 1) ** self.length_penalty
        is_best_BC = ended_BC & self.open_B1
        is_best_BC[:, self.num_beams :] = False  # an answer has to be among the best to count
        final_BC = (score_BC / length).masked_fill(~is_best_BC, NEVER)
        self.best_score_BK, kept_BK = torch.cat([self.best_score_BK, final_BC], dim=1).topk(self.num_beams)
        self.best_BKN = _rows(torch.cat([self.best_BKN, new_BCN], dim=1), kept_BK)

        self.score_BK, going_BK = score_BC.masked_fill(ended_BC, NEVER).topk(self.num_beams)
        self.said_BKN = _rows(new_BCN, going_BK)
        self.open_B1 = self.open_B1 & (self.score_BK[:, :1] / length > self.best_score_BK[:, -1:])
        return parent_BC.gather(1, going_BK)


def _alike(rows: Sequence[Decoding]) -> Decoding:
    """The first, which the others are like."""
    for row in rows:
        if (row.max_new_tokens, row.length_penalty) != (rows[0].max_new_tokens, rows[0].length_penalty):
            raise ValueError("max_new_tokens and length_penalty have to be the same for all rows of a beam search")
    return rows[0]


def _rows(table_BKN: Tensor, index_BC: Tensor) -> Tensor:
    """-> table_BCN, the rows that the index names"""
    return table_BKN.gather(1, index_BC[..., None].expand(-1, -1, table_BKN.shape[2]))
