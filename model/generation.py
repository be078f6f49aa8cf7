"""Answers token by token, with the key-value cache: greedy or sampled, every row in its own way; beams are next door.

A row's answer does not depend on the rows beside it: masks, positions and random numbers are its own.

Shape letters   B = rows   L = length of the prompts   D = the model's width   V = vocabulary   N = new tokens
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.batch import DialogueCodec
from model.llm.base import LanguageModel

NOT_NUMBERS = (
    "the language model's logits are not numbers (NaN): in float16 its values overflow; use bfloat16 or float32"
)


@dataclass(frozen=True)
class Decoding:
    """How the tokens of one answer are chosen; as it stands, always the most likely one.

    Each of temperature, top_k and top_p works alone; together they come in this order, as in transformers.

    Args:
        max_new_tokens: of the answer alone, its end included; the prompt does not count.
        min_new_tokens: the answer does not end before it has so many; the prompt does not count.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: only that many most likely tokens, and their equals; 0: all.
        top_p: only the most likely tokens that together have this probability; 1: all, 0: the most likely alone.
        repetition_penalty: logits of tokens that were said before, in the answer or in the words of the prompt, are
            divided by it where they are positive and multiplied where they are negative (arXiv 1909.05858).  Image
            tokens and what ends an answer are never counted as said.
        num_beams: more than 1 is beam search; it takes the likeliest answer it finds and draws nothing.
        length_penalty: of beams: the logarithm of an answer's probability is divided by its length to this power.
        seed: of the draws; None takes one from torch's own generator.
    Raises:
        ValueError: a value out of its range, or beams that are to be sampled.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("top_k", 0), ("num_beams", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; expected a whole number, {least} or more")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; expected 0 (the most likely token) or more")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected a probability, 0 to 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; expected 0.01 to 100 (1 is none)")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; expected a whole number of 64 bits")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"num_beams={self.num_beams} and temperature={self.temperature}: beam search draws nothing; set one of "
                f"them to 1 beam or temperature 0"
            )


class Generation:
    """A batch of answers on its way.

    Args:
        embedded_BLD: the prompts with their pictures; rows are padded on the right.
        ids_BL: what was embedded, `codec.pad_id` at image tokens.
        mask_BL: bool, True on real tokens.
        decoding: one for all rows, or one for each; without beams.
    """

    @torch.no_grad()
    def __init__(
        self,
        llm: LanguageModel,
        embedded_BLD: Tensor,
        ids_BL: Tensor,
        mask_BL: Tensor,
        decoding: Decoding | Sequence[Decoding],
    ) -> None:
        assert llm.codec is not None, "without a codec nobody knows where an answer ends"
        rows = for_each_row(decoding, len(ids_BL))
        assert all(row.num_beams == 1 for row in rows), "beams are beam_search's"
        self.llm, self.codec, self.rows = llm, llm.codec, rows
        self.chooser = Chooser(rows, ids_BL, mask_BL, llm.codec, llm.vocab_size)
        self.room = max(row.max_new_tokens for row in rows)
        self.hidden_BD, self.cache = llm.prefill(embedded_BLD, ids_BL, mask_BL, room=self.room)
        self.last_B: Tensor | None = None
        self.num_said = 0
        self.running = [True] * len(rows)

    @torch.no_grad()
    def step(self) -> list[int | None]:
        """The next token of each row, a stop id included; None for a row that has ended.

        Raises:
            ValueError: logits that are no numbers.
        """
        if self.last_B is not None:
            self.hidden_BD = self.llm.extend(self.last_B, self.cache)
        device = self.chooser.device
        next_B = self.chooser(self.llm.logits(self.hidden_BD).to(device), self.num_said)
        self.num_said += 1
        said = next_B.tolist()
        if -1 in said:
            raise ValueError(NOT_NUMBERS)
        found = [token if running else None for token, running in zip(said, self.running, strict=True)]
        self.last_B = torch.where(
            torch.tensor(self.running, device=device), next_B, torch.full_like(next_B, self.codec.pad_id)
        )
        for row, token in enumerate(found):
            if token in self.codec.stop_ids or self.num_said == self.rows[row].max_new_tokens:
                self.running[row] = False
        return found

    def stop(self, row: int) -> None:
        """Nobody waits for the rest of this row's answer."""
        self.running[row] = False

    def __iter__(self) -> Iterator[list[int | None]]:
        while any(self.running):
            yield self.step()


@torch.no_grad()
def generate(
    llm: LanguageModel,
    embedded_BLD: Tensor,
    ids_BL: Tensor,
    mask_BL: Tensor,
    decoding: Decoding | Sequence[Decoding],
    *,
    never_early: bool = False,
) -> Tensor:
    """Whole answers.  -> ids_BN: a stop id, where one came, is kept, and padding follows

    Args:
        never_early: runs every step although all answers have ended, as ranks must that share a model's weights.
    """
    assert llm.codec is not None
    rows = for_each_row(decoding, len(ids_BL))
    if rows[0].num_beams > 1:
        from model.beam_search import beam_search

        return beam_search(llm, embedded_BLD, ids_BL, mask_BL, rows, never_early=never_early)
    generation = Generation(llm, embedded_BLD, ids_BL, mask_BL, rows)
    said = list(generation)
    while never_early and generation.num_said < generation.room:
        generation.step()
    pad = llm.codec.pad_id
    table = [[pad if token is None else token for token in step] for step in said]
    return torch.tensor(table, device=ids_BL.device).T.contiguous()


def for_each_row(decoding: Decoding | Sequence[Decoding], num_rows: int) -> Sequence[Decoding]:
    """Raises ValueError where beams differ: a batch has so many for every row."""
    rows = [decoding] * num_rows if isinstance(decoding, Decoding) else list(decoding)
    assert len(rows) == num_rows > 0, f"{len(rows)} ways of decoding for {num_rows} rows"
    beams = sorted({row.num_beams for row in rows})
    if len(beams) > 1:
        raise ValueError(f"rows with {beams} beams in one batch: give all the same, or ask apart")
    return rows


# ---------------------------------------------------------------------------------------------- one token for each row


class Chooser:
    """Logits of the next position -> the next token of each row, as that row wants it."""

    def __init__(
        self, rows: Sequence[Decoding], ids_BL: Tensor, mask_BL: Tensor, codec: DialogueCodec, vocab_size: int
    ) -> None:
        self.device = ids_BL.device

        def column(value: Callable[[Decoding], float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([value(row) for row in rows], dtype=dtype, device=self.device)

        self.temperature_B = column(lambda row: row.temperature)
        self.top_k_B = column(lambda row: row.top_k, torch.int64)
        self.top_p_B = column(lambda row: row.top_p)
        self.penalty_B = column(lambda row: row.repetition_penalty)
        self.min_tokens_B = column(lambda row: row.min_new_tokens, torch.int64)
        self.penalises = any(row.repetition_penalty != 1 for row in rows)
        self.samples = any(row.temperature > 0 for row in rows)
        self.restricts = any(row.temperature > 0 and (row.top_k > 0 or row.top_p < 1) for row in rows)
        self.longest_minimum = max(row.min_new_tokens for row in rows)
        self.stop = torch.tensor(codec.stop_ids, device=self.device)
        self.seen_BV = said_before(ids_BL, mask_BL, codec, vocab_size if self.penalises else 0)
        self.uniform_BN = uniforms(rows).to(self.device) if self.samples else None

    def __call__(self, logits_BV: Tensor, num_said: int) -> Tensor:
        """-> next_B; -1 where the logits are not numbers"""
        logits_BV = self.adjusted(logits_BV.float(), num_said)
        next_B = logits_BV.argmax(dim=-1)
        if self.uniform_BN is not None:
            drawn_B = self._drawn(logits_BV, self.uniform_BN[:, num_said])
            next_B = torch.where(self.temperature_B > 0, drawn_B, next_B)
        self.saw(next_B)
        return next_B.masked_fill(logits_BV.isnan().any(dim=-1), -1)

    def adjusted(self, logits_BV: Tensor, num_said: int) -> Tensor:
        """What has been said weighs less, and nothing ends too early."""
        if self.penalises:
            logits_BV = penalise(logits_BV, self.seen_BV, self.penalty_B)
        if num_said < self.longest_minimum:
            early_B = self.min_tokens_B > num_said
            ends_V = torch.zeros(logits_BV.shape[1], dtype=torch.bool, device=logits_BV.device)
            ends_V[self.stop] = True
            logits_BV = logits_BV.masked_fill(early_B[:, None] & ends_V, float("-inf"))
        return logits_BV

    def saw(self, next_B: Tensor) -> None:
        if self.penalises:
            self.seen_BV.scatter_(1, next_B[:, None], True)

    def _drawn(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        warm_B = torch.where(self.temperature_B > 0, self.temperature_B, 1.0)
        # The largest is 0: a tiny temperature then leaves the likeliest, where dividing alone would overflow.
        logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / warm_B[:, None]
        if self.restricts:
            logits_BV = restrict(logits_BV, self.top_k_B, self.top_p_B)
        return draw(logits_BV, uniform_B)


def said_before(ids_BL: Tensor, mask_BL: Tensor, codec: Any, vocab_size: int) -> Tensor:
    """-> seen_BV: the words of the prompts, without padding, image tokens, and what ends an answer"""
    if not vocab_size:
        return torch.zeros(len(ids_BL), 0, dtype=torch.bool, device=ids_BL.device)
    stop = torch.tensor(codec.stop_ids, device=ids_BL.device)
    is_word_BL = mask_BL & (ids_BL != codec.pad_id) & ~torch.isin(ids_BL, stop)
    count_BV = torch.zeros(len(ids_BL), vocab_size, dtype=torch.int32, device=ids_BL.device)
    count_BV.scatter_add_(1, ids_BL, is_word_BL.int())
    return count_BV > 0


def penalise(logits_BV: Tensor, seen_BV: Tensor, penalty_B: Tensor) -> Tensor:
    penalty_B1 = penalty_B[:, None]
    less_BV = torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return torch.where(seen_BV, less_BV, logits_BV)


def restrict(logits_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """-> logits_BV, -inf where a token may not be drawn: top-k first, top-p of what that leaves"""
    sorted_BV, index_BV = logits_BV.sort(dim=-1, descending=True)
    vocab_size = logits_BV.shape[1]
    rank_B = torch.where(top_k_B > 0, top_k_B, vocab_size).clamp(max=vocab_size) - 1
    least_B1 = sorted_BV.gather(1, rank_B[:, None])
    sorted_BV = sorted_BV.masked_fill(sorted_BV < least_B1, float("-inf"))
    probability_BV = sorted_BV.softmax(dim=-1)
    likelier_BV = probability_BV.cumsum(dim=-1) - probability_BV  # the probability of all that come before it
    is_out_BV = (likelier_BV >= top_p_B[:, None]) & (top_p_B < 1)[:, None]
    is_out_BV[:, 0] = False
    is_out_BV |= sorted_BV == float("-inf")
    return logits_BV.masked_fill(is_out_BV.scatter(1, index_BV, is_out_BV), float("-inf"))


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """By inverse CDF, so that one number of a row's own decides, whatever the batch.  -> drawn_B"""
    cumulative_BV = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    found_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    return found_B1[:, 0].clamp(max=logits_BV.shape[1] - 1)


def uniforms(rows: Sequence[Decoding]) -> Tensor:
    """A row's random numbers, all drawn at once on the CPU, the same on any device.  -> uniform_BN"""
    longest = max(row.max_new_tokens for row in rows)
    uniform_BN = torch.zeros(len(rows), longest, dtype=torch.float64)
    for number, row in enumerate(rows):
        seed = int(torch.randint(2**62, ())) if row.seed is None else row.seed
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(row.max_new_tokens, dtype=torch.float64, generator=generator)
        uniform_BN[number, : row.max_new_tokens] = drawn
    return uniform_BN


# --------------------------------------------------------------------------------------------------- tokens into text


class GrowingText:
    """The text of an answer while its tokens come: only what no later token changes, so that it can be shown.

    A character in UTF-8 may take several tokens, a piece for white space is spelt out by some models, and so on: all
    tokens are decoded each time, and the end is held back as long as it may become something else.
    """

    def __init__(self, codec: DialogueCodec) -> None:
        self.codec = codec
        self.ids: list[int] = []
        self.shown = ""

    def push(self, token: int) -> str:
        """-> the text so far"""
        self.ids.append(token)
        text = self.codec.decode(self.ids)
        sure = text[: len(text) - _unsure(text)]
        if len(sure) > len(self.shown) and sure.startswith(self.shown):
            self.shown = sure
        return self.shown

    def finish(self) -> str:
        """-> the whole answer"""
        self.shown = self.codec.decode(self.ids)
        return self.shown


_HALF = "\ufffd"  # what decoders write for a character whose bytes are not all there
_LONGEST_NAME = len("<|blank_80|>")


def _unsure(text: str) -> int:
    """How many characters at the end may still change: half a character, or the beginning of a piece spelt out."""
    half = len(text) - len(text.rstrip(_HALF))
    opened = text.rfind("<", max(0, len(text) - half - _LONGEST_NAME))
    return len(text) - opened if opened >= 0 and ">" not in text[opened:] else half
