"""One stage = one model + its objectives: the object between the loop and the model, and what the engine wraps.

Stage two and domain fine-tuning are this class with another model and other objectives.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, Self

from torch import Tensor, nn

from data.batch import Report
from train.distributed import Ranks


class Objectives(Protocol):
    """model, batch, ranks -> (weighted losses by name, report)"""

    def __call__(self, model: Any, batch: Any, ranks: Ranks) -> tuple[dict[str, Tensor], Report]: ...


class StageOutput(NamedTuple):
    """A tuple, because ZeRO-3 hangs its backward hooks on the tensors of tuples and dicts, and of nothing else."""

    losses: dict[str, Tensor]  # weighted scalars; their sum is back-propagated
    report: Report  # name -> (sum, count), detached; adds up over ranks and micro-batches


class Stage(nn.Module):
    """Batch in, named losses out."""

    def __init__(self, model: nn.Module, objectives: Objectives, ranks: Ranks) -> None:
        super().__init__()
        self.model, self.objectives, self.ranks = model, objectives, ranks
        self.train()

    def forward(self, batch: Any) -> StageOutput:
        losses, report = self.objectives(self.model, batch, self.ranks)
        return StageOutput(losses, report)

    def train(self, mode: bool = True) -> Self:
        """Parts that do not train stay in eval mode: no dropout in a frozen encoder."""
        super().train(mode)
        for module in self.modules():
            own = list(module.parameters())
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()
        return self
