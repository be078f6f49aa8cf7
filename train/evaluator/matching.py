"""What retrieval ranks by: the order of one row's candidates, and ITM's word on the best of them.

Shape letters   I = images   T = texts   K = this rank's images   R = rows of a block   C = candidates   B = images of a
                pass   Q = query tokens   E = shared embedding   M = image tokens   W = image width   L = caption length
                P = image-text pairs
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.image_memory import ImageMemory
from model.image_text import ImageTextModel
from train.distributed import Ranks
from train.evaluator import in_step
from train.evaluator.pool import Pool
from train.evaluator.predictions import Predictions

PAIRS_PER_PASS = 256  # texts that one image is matched with at a time


@dataclass(frozen=True)
class Ranking:
    """One image's or one text's candidates.

    rank   by what -> place of the first right one, from 1
    best   the first candidates, best first
    cosine of each of them
    """

    index: int
    rank: Mapping[str, int]
    best: list[int]
    cosine: list[float]


def ranked(rows: Sequence[int], cosine_RC: Tensor, right: Sequence[set[int]], number: int) -> list[Ranking]:
    """ITC's order.  `right` is of all rows, and those here have at least one; `number` candidates are kept.

    Where a model's numbers are none (NaN), nothing is nearer than anything else: the right ones come last.
    """
    pairs = [(place, candidate) for place, row in enumerate(rows) for candidate in right[row]]
    row_P, candidate_P = torch.tensor(pairs, device=cosine_RC.device).unbind(1)
    right_RC = torch.zeros(cosine_RC.shape, dtype=torch.bool, device=cosine_RC.device)
    right_RC[row_P, candidate_P] = True
    best_right_R = cosine_RC.masked_fill(~right_RC, -torch.inf).amax(dim=1)
    rank_R = 1 + (~(cosine_RC < best_right_R[:, None]) & ~right_RC).sum(dim=1)
    cosine_RN, best_RN = cosine_RC.topk(min(number, cosine_RC.shape[1]), dim=1)
    return [
        Ranking(index, {"itc": rank}, best, cosine)
        for index, rank, best, cosine in zip(rows, rank_R.tolist(), best_RN.tolist(), cosine_RN.tolist(), strict=True)
    ]


def reranked(row: Ranking, right: set[int], logits: Sequence[float], number: int) -> Ranking:
    """The best `number` by ITM logit + cosine, the others behind them in ITC's order."""
    first, behind = row.best[:number], row.best[number:]
    score = {candidate: logit + row.cosine[k] for k, (candidate, logit) in enumerate(zip(first, logits, strict=True))}
    rank = row.rank["itc"]  # a right one that ITM was not asked about stays where it was
    if found := [score[candidate] for candidate in first if candidate in right]:
        best_right = max(-math.inf if math.isnan(value) else value for value in found)
        rank = 1 + sum(not score[candidate] < best_right for candidate in first if candidate not in right)
    order = sorted(first, key=lambda candidate: -score[candidate])
    return replace(row, rank={**row.rank, "itm": rank}, best=[*order, *behind])


class Matcher:
    """This rank's images: encoded once, then matched with the texts that anybody wants matched with them.

    What the encoder made of them waits on the host, `keep_bytes` of it at most.  When the turn of a block of images
    comes, their keys and values are projected once, and serve all texts of each image without being copied.
    """

    def __init__(self, pool: Pool, batch_size: int, keep_bytes: int, device: torch.device, ranks: Ranks) -> None:
        self.pool, self.batch_size, self.keep_bytes = pool, batch_size, keep_bytes
        self.device, self.ranks = device, ranks
        self._encoded: list[Tensor | None] = []  # encoded_BMW of each block

    def encode(self, model: ImageTextModel, predictions: Predictions, name: str) -> Tensor:
        """-> query_KQE

        Args:
            name: the evaluator's.
        """
        found, kept = [], 0
        with predictions.progress(f"{name} {self.pool.language}, images", len(self.pool.own_K)) as progress:
            for rows, meant in in_step(range(len(self.pool.own_K)), self.batch_size, self.ranks):
                features = model.encode_image(self._pixels(rows))
                found.append(features.query_BQE[:meant])
                kept += features.encoded_BMW.numel() * features.encoded_BMW.element_size()
                self._encoded.append(features.encoded_BMW.cpu() if kept <= self.keep_bytes else None)
                progress.advance(meant)
        return torch.cat(found)

    def match(
        self,
        model: ImageTextModel,
        wanted: Mapping[str, Sequence[Ranking]],
        number: int,
        predictions: Predictions,
        name: str,
    ) -> Callable[[str, Ranking], list[float]]:
        """ITM logits of "match" for the best `number` candidates of every rank's rows; what an interrupted evaluation
        found out is not asked again.

        -> a function: direction and row -> the logits of those candidates
        """
        pair_P = self._own_pairs(wanted, number)
        matches = predictions.matches(name, self.pool.language, self.pool.num_images, self.pool.num_texts)
        is_new_P = torch.tensor([pair not in matches.logits for pair in pair_P.tolist()], dtype=torch.bool)
        logits_P = torch.tensor([matches.logits.get(pair, 0.0) for pair in pair_P.tolist()])
        new_P, found_P = pair_P[is_new_P], torch.zeros(int(is_new_P.sum()))
        what = f"{name} {self.pool.language}, pairs"
        with predictions.progress(what, len(pair_P), len(pair_P) - len(new_P)) as progress:
            for block, passes in self._plan(new_P):
                memory = self._project(model, block)
                for image, pairs in passes:
                    found_P[pairs] = self._match(model, memory, image, new_P[pairs] % self.pool.num_texts)
                    progress.advance(len(found_P[pairs]))
                of_block = torch.cat([torch.arange(pairs.start, pairs.stop) for _, pairs in passes])
                matches.add(new_P[of_block].tolist(), found_P[of_block].tolist())
        logits_P[is_new_P] = found_P
        gathered = self.ranks.gather_objects((pair_P, logits_P))
        all_P, logits_P = (torch.cat(parts) for parts in zip(*gathered, strict=True))
        order_P = all_P.argsort()
        sorted_P, sorted_logits_P = all_P[order_P], logits_P[order_P].double()

        def look_up(direction: str, row: Ranking) -> list[float]:
            codes_N = self._codes(direction, row.index, row.best[:number])
            return sorted_logits_P[torch.searchsorted(sorted_P, codes_N)].tolist()

        return look_up

    def _codes(self, direction: str, row: int, candidates: Sequence[int]) -> Tensor:
        """image * T + text of a row's pairs"""
        other_N, num_texts = torch.tensor(candidates), self.pool.num_texts
        return row * num_texts + other_N if direction == "image_to_text" else other_N * num_texts + row

    def _own_pairs(self, wanted: Mapping[str, Sequence[Ranking]], number: int) -> Tensor:
        """Codes of the pairs that anybody wants of this rank's images, each once, image by image."""
        mine = [
            self._codes(direction, row.index, row.best[:number]) for direction in wanted for row in wanted[direction]
        ]
        mine_P = torch.cat([torch.zeros(0, dtype=torch.int64), *mine]).unique()
        pair_P = torch.cat(self.ranks.gather_objects(mine_P)).unique()
        return pair_P[torch.isin(pair_P // self.pool.num_texts, self.pool.own_K)]

    def _plan(self, pair_P: Tensor) -> Iterator[tuple[int, list[tuple[int, slice]]]]:
        """Blocks of images, and the passes of each: the image's row, and its pairs.

        As many passes on every rank: where one has none left it makes one more of which nothing is meant.
        """
        place = {image: k for k, image in enumerate(self.pool.own_K.tolist())}
        plan: list[list[tuple[int, slice]]] = [[] for _ in self._encoded]
        first = 0
        images, counts = (pair_P // self.pool.num_texts).unique_consecutive(return_counts=True)
        for image, count in zip(images.tolist(), counts.tolist(), strict=True):
            for start in range(first, first + count, PAIRS_PER_PASS):
                pairs = slice(start, min(start + PAIRS_PER_PASS, first + count))
                plan[place[image] // self.batch_size].append((place[image], pairs))
            first += count
        calls = self.ranks.max_ints([len(passes) for passes in plan])
        lost = self.ranks.max_ints([int(encoded_BMW is None) for encoded_BMW in self._encoded])
        for block, passes in enumerate(plan):
            if lost[block]:
                self._encoded[block] = None  # whoever lacks it must ask the encoder again, and then all do
            if calls[block]:
                yield block, passes + [(block * self.batch_size, slice(0, 0))] * (calls[block] - len(passes))

    def _project(self, model: ImageTextModel, block: int) -> ImageMemory:
        """Keys and values of a block of images."""
        encoded_BMW = self._encoded[block]
        self._encoded[block] = None
        if encoded_BMW is None:
            first = block * self.batch_size
            encoded_BMW = model.vision(self._pixels(range(first, min(first + self.batch_size, len(self.pool.own_K)))))
        return model.remember(encoded_BMW.to(self.device))

    def _pixels(self, rows: Sequence[int]) -> Tensor:
        """A black picture where this rank has none."""
        found_BCHW = self.pool.image_KCHW[[row for row in rows if row < len(self.pool.own_K)]]
        if not len(found_BCHW):
            found_BCHW = found_BCHW.new_zeros(1, *found_BCHW.shape[1:])
        return found_BCHW.to(self.device)

    def _match(self, model: ImageTextModel, memory: ImageMemory, image: int, text_P: Tensor) -> Tensor:
        """-> logits_P, on the host; one forward even for no text"""
        asked_P = text_P if len(text_P) else torch.zeros(1, dtype=torch.int64)
        mask_PL = self.pool.text_mask_TL[asked_P]
        length = int(mask_PL.sum(dim=1).max())
        row_B = torch.tensor([min(image % self.batch_size, len(memory) - 1)], device=self.device)
        logits_P2 = model.match_memories(
            [memory.select(row_B).used(len(asked_P))],
            self.pool.text_ids_TL[asked_P][:, :length].to(self.device),
            mask_PL[:, :length].to(self.device),
        )
        return logits_P2[: len(text_P), 1].float().cpu()
