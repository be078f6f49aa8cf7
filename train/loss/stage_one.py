"""Stage one's three losses: ITC, ITM and ITG of BLIP-2 (arXiv:2301.12597, section 3.1).

Part 1 is the maths, pure functions of tensors.  Part 2 says which pass of the model feeds which formula.
Where the paper is silent, LAVIS decides (`blip2_models/blip2_qformer.py`); where we differ, a setting reproduces it.

Shape letters   B = pairs on this rank           N = pairs on all ranks    P = 3B candidate pairs of ITM
                Q = query tokens                 E = shared embedding      L = caption length
                T = caption tokens to predict    V = vocabulary            H = hidden size
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import DialogueBatch, ImageTextBatch, Report
from model.image_text import ImageTextModel, Seen
from train.distributed import Ranks
from train.loss.draw import keyed_uniform
from train.loss.settings import Smoothing, Weight

# ----------------------------------------------------------------------------------------------------- 1. the maths


def query_text_similarity(query_XQE: Tensor, text_YE: Tensor) -> Tensor:
    """sim[x, y] = max_q <query[x, q], text[y]>: the best of an image's Q views.  One matrix product, fp32."""
    num_images, num_queries, _ = query_XQE.shape
    with torch.autocast(query_XQE.device.type, enabled=False):
        all_pairs = query_XQE.float().flatten(0, 1) @ text_YE.float().T
    return all_pairs.view(num_images, num_queries, len(text_YE)).amax(dim=1)


def image_text_contrastive(
    sim_BN: Tensor, own_column_B: Tensor, barred_BN: Tensor, *, label_smoothing: float
) -> Tensor:
    """ITC, one direction: H(target, softmax(sim)) for each row.  -> (B,)

    `barred` columns are duplicates of a row's own pair: neither right nor wrong, they leave the denominator, and the
    smoothing is spread over the columns that remain.  (A large negative number in their place would leave the
    smoothing on them and make the loss infinite or meaningless.)
    """
    log_p_BN = sim_BN.masked_fill(barred_BN, -torch.inf).log_softmax(dim=1)
    own_B = log_p_BN.gather(1, own_column_B[:, None]).squeeze(1)
    num_kept_B = (~barred_BN).sum(dim=1)
    mean_B = log_p_BN.masked_fill(barred_BN, 0.0).sum(dim=1) / num_kept_B
    return -(1 - label_smoothing) * own_B - label_smoothing * mean_B


def draw_hard_negative(sim_BN: Tensor, not_negative_BN: Tensor, uniform_B: Tensor, *, floor: float = 0.0) -> Tensor:
    """index ~ softmax(sim) + floor over the columns that are negatives: the more alike, the likelier.  -> (B,) int64

    By inverse CDF, so that one uniform number a row decides, whatever rank draws it.  ALBEF (arXiv:2107.07651) section
    3.2; floor 0 is LAVIS since 2023-07, floor 1e-4 LAVIS as of the paper, whose softmax has the row's own pair in it:
    the surer a model is of that, the more even its draw.  A row of no negatives draws column 0: the caller must leave
    it out.
    """
    sim_BN = sim_BN.detach().double()
    if not floor:  # the same distribution without the own pair, whose weight would leave the others none
        sim_BN = sim_BN.masked_fill(not_negative_BN, -torch.inf)
    weight_BN = (sim_BN.softmax(dim=1) + floor).masked_fill(not_negative_BN, 0.0)
    cumulative_BN = weight_BN.cumsum(dim=1)
    total_B1 = cumulative_BN[:, -1:]
    below_B1 = total_B1.nextafter(torch.zeros_like(total_B1))  # rounding may have brought the product up to the total
    # right: the first column whose cumulative weight exceeds the threshold, so it has a weight of its own
    index_B = torch.searchsorted(cumulative_BN, torch.minimum(uniform_B[:, None] * total_B1, below_B1), right=True)
    return index_B.squeeze(1).masked_fill(not_negative_BN.all(dim=1), 0)


def image_text_matching(match_logits_P2: Tensor, is_match_P: Tensor) -> Tensor:
    """ITM: H(is_match, softmax(logits)) for each candidate: B true pairs, B with a hard image, B with a hard text."""
    return F.cross_entropy(match_logits_P2.float(), is_match_P, reduction="none")


def image_grounded_text_generation(next_logits_TV: Tensor, next_id_T: Tensor, *, label_smoothing: float) -> Tensor:
    """ITG: -log p(w_t+1 | w_1..t, queries) for each token, with label smoothing over the vocabulary.  -> (T,)"""
    return F.cross_entropy(next_logits_TV.float(), next_id_T, label_smoothing=label_smoothing, reduction="none")


def same_pair(image_key_X: Tensor, text_key_X: Tensor, image_key_Y: Tensor, text_key_Y: Tensor) -> Tensor:
    """True where two pairs have the same image or the same caption: no negatives of one another.  -> (X, Y) bool"""
    return (image_key_X[:, None] == image_key_Y) | (text_key_X[:, None] == text_key_Y)


# ---------------------------------------------------------------------------------- 2. which pass feeds which formula


@dataclass(frozen=True)
class LossValue:
    """A loss, and what it says of each row: `sum_B / count_B` is the row's own mean, for the log by language."""

    value: Tensor  # scalar; its mean over ranks and micro-batches is the loss of the whole step
    sum_B: Tensor
    count_B: Tensor
    report: Report


@dataclass(frozen=True)
class Contrast:
    """Every image of this rank against every text of all ranks, and the other way round."""

    sim_i2t_BN: Tensor  # divided by the temperature, fp32
    sim_t2i_BN: Tensor
    own_column_B: Tensor
    same_BN: Tensor  # pairs that are no negatives of the row's: itself and its duplicates
    num_with_negatives: Tensor  # of all N pairs, those that have any negative; 0-dim

    @property
    def duplicate_BN(self) -> Tensor:
        return self.same_BN.scatter(1, self.own_column_B[:, None], False)

    @property
    def has_negative_B(self) -> Tensor:
        return ~self.same_BN.all(dim=1)


def compare(
    model: ImageTextModel,
    batch: ImageTextBatch,
    seen: Seen,
    ranks: Ranks,
    *,
    itc_gather: Literal["full", "anchor"],
    mask_duplicates: bool,
) -> Contrast:
    """What ITC and ITM share.  `full` lets the gradient through the gather, so that a global batch trains the same
    model on any number of ranks; `anchor` is LAVIS, whose gathered features are constants."""
    gather = {"full": ranks.gather, "anchor": ranks.gather_constant}[itc_gather]
    query_NQE, text_NE = gather(seen.query_BQE), gather(seen.text_BE)
    temperature = model.temperature()
    own_column_B = ranks.own_rows(len(batch), text_NE.device)
    if mask_duplicates:
        image_key_N, text_key_N = ranks.gather_constant(torch.stack([batch.image_key_B, batch.text_key_B], 1)).unbind(1)
        same_BN = same_pair(batch.image_key_B, batch.text_key_B, image_key_N, text_key_N)
        num_with_negatives = (~same_pair(image_key_N, text_key_N, image_key_N, text_key_N)).any(dim=1).sum()
    else:
        same_BN = F.one_hot(own_column_B, len(text_NE)).bool()
        num_with_negatives = torch.tensor(len(text_NE) if len(text_NE) > 1 else 0, device=text_NE.device)
    return Contrast(
        sim_i2t_BN=query_text_similarity(seen.query_BQE, text_NE) / temperature,
        sim_t2i_BN=query_text_similarity(query_NQE, seen.text_BE).T / temperature,
        own_column_B=own_column_B,
        same_BN=same_BN,
        num_with_negatives=num_with_negatives,
    )


@dataclass(frozen=True)
class ImageTextContrastive:
    weight: Weight = 1.0
    label_smoothing: Smoothing = 0.1
    gather: Literal["full", "anchor"] = "full"

    def __call__(self, contrast: Contrast) -> LossValue:
        i2t_B, t2i_B = (
            image_text_contrastive(
                sim_BN, contrast.own_column_B, contrast.duplicate_BN, label_smoothing=self.label_smoothing
            )
            for sim_BN in (contrast.sim_i2t_BN, contrast.sim_t2i_BN)
        )
        row_B = (i2t_B + t2i_B) / 2
        report = {"num_with_duplicate": total(contrast.duplicate_BN.any(dim=1))}
        return LossValue(row_B.mean(), row_B, torch.ones_like(row_B), report)


@dataclass(frozen=True)
class ImageTextMatching:
    """`seed` keys the draw of the negatives; `negative_floor` 1e-4 is LAVIS as of the paper, 0 LAVIS since 2023-07."""

    weight: Weight = 1.0
    seed: int = 0
    negative_floor: Weight = 0.0

    def draw(self, batch: ImageTextBatch, contrast: Contrast) -> tuple[Tensor, Tensor]:
        """For text b a hard image, for image b a hard text: columns of N."""
        image_draw, text_draw = (
            keyed_uniform(batch.row_B, self.seed, batch.step, batch.micro_step, which) for which in (0, 1)
        )
        floor = self.negative_floor
        hard_image_B = draw_hard_negative(contrast.sim_t2i_BN, contrast.same_BN, image_draw, floor=floor)
        hard_text_B = draw_hard_negative(contrast.sim_i2t_BN, contrast.same_BN, text_draw, floor=floor)
        return hard_image_B, hard_text_B

    def __call__(
        self,
        model: ImageTextModel,
        batch: ImageTextBatch,
        seen: Seen,
        contrast: Contrast,
        ranks: Ranks,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> LossValue:
        """`negatives` replaces the draw, for parity with a reference that drew its own."""
        hard_image_B, hard_text_B = self.draw(batch, contrast) if negatives is None else negatives
        logits_P2 = match_candidates(model, batch, seen, ranks, hard_image_B, hard_text_B)
        is_match_P = torch.arange(len(logits_P2), device=logits_P2.device).lt(len(batch)).long()
        candidate_3B = image_text_matching(logits_P2, is_match_P).view(3, -1)
        right_3B = (logits_P2.argmax(dim=1) == is_match_P).view(3, -1)
        # A row whose every column is a duplicate has no negative; it leaves ITM, its true pair too.
        kept_B = contrast.has_negative_B
        sum_B = candidate_3B.sum(dim=0).masked_fill(~kept_B, 0.0)
        count_B = 3.0 * kept_B
        value = ranks.count * sum_B.sum() / (3 * contrast.num_with_negatives).clamp(min=1)
        right = right_3B.sum(dim=0).masked_fill(~kept_B, 0).sum()
        report = {"itm_accuracy": (right.float(), count_B.sum()), "num_without_negative": total(~kept_B)}
        return LossValue(value, sum_B, count_B, report)


def match_candidates(
    model: ImageTextModel,
    batch: ImageTextBatch,
    seen: Seen,
    ranks: Ranks,
    hard_image_B: Tensor,
    hard_text_B: Tensor,
) -> Tensor:
    """The true pairs, each text with its hard image, each image with its hard text.  -> match_logits_P2

    Own images are remembered already, and the true pair and the hard text share that memory.  A hard image of this rank
    is picked from it; among several ranks its encoder output travels and is remembered here, so that no gradient has to
    travel back to a frozen encoder.
    """
    if ranks.count == 1:
        hard_memory = seen.memory.select(hard_image_B)
    else:
        hard_memory = model.remember(ranks.fetch_rows(seen.encoded_BMW, hard_image_B))
    ids_BL, mask_BL = batch.text_ids_BL, batch.text_mask_BL
    ids_mask_N2L = ranks.gather_constant(torch.stack([ids_BL, mask_BL.long()], dim=1))
    hard_ids_BL, hard_mask_BL = ids_mask_N2L[hard_text_B].unbind(dim=1)
    # One memory serves two blocks of pairs, so these come first here; the true pair leads the result.
    logits_P2 = model.match_memories(
        [seen.memory.used(2), hard_memory],
        torch.cat([ids_BL, hard_ids_BL, ids_BL]),
        torch.cat([mask_BL, hard_mask_BL.bool(), mask_BL]),
    )
    true_B2, hard_text_B2, hard_image_B2 = logits_P2.chunk(3)
    return torch.cat([true_B2, hard_image_B2, hard_text_B2])


@dataclass(frozen=True)
class ImageGroundedTextGeneration:
    """`normalise`: `global` divides by the tokens of the whole step, so that every token weighs the same; `rank` is
    LAVIS, each rank's mean over its own tokens, the ranks averaged."""

    weight: Weight = 1.0
    label_smoothing: Smoothing = 0.1
    normalise: Literal["global", "rank"] = "global"

    def __call__(self, model: ImageTextModel, batch: ImageTextBatch, seen: Seen, ranks: Ranks) -> LossValue:
        # Logits only where a token is to be predicted; their number is known on the host, so nothing waits for the GPU.
        is_target = batch.text_mask_BL[:, 1:].flatten()
        num_targets = batch.num_target_tokens
        target_T = (~is_target).to(torch.uint8).argsort(stable=True)[:num_targets]
        logits_TV = model.vocabulary_logits(seen.caption_BLH[:, :-1].flatten(0, 1)[target_T])
        token_T = image_grounded_text_generation(
            logits_TV, batch.text_ids_BL[:, 1:].flatten()[target_T], label_smoothing=self.label_smoothing
        )
        row_T = target_T // (batch.text_length - 1)
        sum_B = token_T.new_zeros(len(batch)).index_add(0, row_T, token_T)
        count_B = batch.text_mask_BL[:, 1:].sum(dim=1).float()
        if self.normalise == "rank":
            return LossValue(token_T.mean(), sum_B, count_B, {})
        assert batch.step_target_tokens > 0, "the ranks have not agreed on the step's token count: call batch.agreed"
        scale = ranks.count * batch.num_micro_steps / batch.step_target_tokens
        return LossValue(token_T.sum() * scale, sum_B, count_B, {})


@dataclass(frozen=True)
class StageOneLoss:
    """The objectives of stage one; one that is None is neither computed nor reported."""

    itc: ImageTextContrastive | None = None
    itm: ImageTextMatching | None = None
    itg: ImageGroundedTextGeneration | None = None
    mask_duplicates: bool = True

    def __post_init__(self) -> None:
        if self.itc is None and self.itm is None and self.itg is None:
            raise ValueError("train.loss: itc, itm and itg are all null; a run learns by one of them at least")

    def __call__(
        self, model: ImageTextModel, batch: ImageTextBatch, ranks: Ranks
    ) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """-> (weighted losses by name, report)"""
        seen = model.look(batch, caption=self.itg is not None)
        values: dict[str, LossValue] = {}
        weights: dict[str, float] = {}
        if self.itc is not None or self.itm is not None:
            gather = "full" if self.itc is None else self.itc.gather
            contrast = compare(model, batch, seen, ranks, itc_gather=gather, mask_duplicates=self.mask_duplicates)
        if self.itc is not None:
            values["itc"], weights["itc"] = self.itc(contrast), self.itc.weight
        if self.itm is not None:
            values["itm"], weights["itm"] = self.itm(model, batch, seen, contrast, ranks), self.itm.weight
        if self.itg is not None:
            values["itg"], weights["itg"] = self.itg(model, batch, seen, ranks), self.itg.weight
        report = report_by_language(values, batch)
        report["temperature"] = (model.temperature().detach().squeeze(), torch.ones((), device=batch.row_B.device))
        return {name: weights[name] * loss.value for name, loss in values.items()}, report


def report_by_language(
    values: Mapping[str, LossValue], batch: ImageTextBatch | DialogueBatch
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and counts that add up over ranks and micro-batches: `itc/zh`, ..., `num_samples/zh`, ..."""
    report: dict[str, tuple[Tensor, Tensor]] = {}
    for index, language in enumerate(batch.languages):
        is_language_B = batch.language_B == index
        for name, loss in values.items():
            mean = (loss.sum_B.detach() * is_language_B).sum(), (loss.count_B * is_language_B).sum()
            report[f"{name}/{language}"] = mean
        report[f"num_samples/{language}"] = total(is_language_B)
    for loss in values.values():
        report.update(loss.report)
    return report


def total(is_one_B: Tensor) -> tuple[Tensor, Tensor]:
    """A report entry that is a number of rows, not a mean."""
    return is_one_B.sum().float(), torch.zeros((), device=is_one_B.device)
