"""Stage two's loss: the language model's, on the tokens of the answers.

1. the formula   2. which pass feeds it

Shape letters   T = tokens to predict   V = vocabulary   B = rows
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from data.batch import DialogueBatch
from model.visual_chat import VisualChatModel
from train.distributed import Ranks
from train.loss.settings import Smoothing, Weight
from train.loss.stage_one import LossValue, report_by_language, total


def next_token(logits_TV: Tensor, label_T: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """-log p(w_t+1 | pictures, w_1..t) of each token, in fp32.  -> (T,)"""
    return F.cross_entropy(logits_TV.float(), label_T, label_smoothing=label_smoothing, reduction="none")


@dataclass(frozen=True)
class StageTwoLoss:
    """`normalise`: `global` divides by the tokens of the whole step, so that every token weighs the same however the
    batch is cut among ranks and micro-batches; `rank` is VisualGLM, each micro-batch's mean over its own tokens."""

    weight: Weight = 1.0
    label_smoothing: Smoothing = 0.0
    normalise: Literal["global", "rank"] = "global"

    def __call__(
        self, model: VisualChatModel, batch: DialogueBatch, ranks: Ranks
    ) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """-> (weighted losses by name, report)"""
        found = model.predict(batch)
        token_T = next_token(found.logits_TV, found.label_T, label_smoothing=self.label_smoothing)
        sum_B = token_T.new_zeros(len(batch)).index_add(0, found.row_T, token_T)
        count_B = token_T.new_zeros(len(batch)).index_add(0, found.row_T, token_T.new_ones(len(token_T)))
        if self.normalise == "rank":
            value = token_T.sum() / max(batch.num_target_tokens, 1)
        else:
            assert batch.step_target_tokens > 0, "the ranks have not agreed on the step's token count: batch.agreed"
            value = token_T.sum() * (ranks.count * batch.num_micro_steps / batch.step_target_tokens)
        right = (found.logits_TV.detach().argmax(dim=1) == found.label_T).sum().float()
        own = {"token_accuracy": (right, count_B.sum()), "num_images": total(batch.image_row_G >= 0)}
        loss = LossValue(value, sum_B, count_B, own)
        return {"lm": self.weight * value}, report_by_language({"lm": loss}, batch)
