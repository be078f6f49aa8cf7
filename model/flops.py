"""What a training step of stage two costs in floating-point operations: matrix products and attention, a multiply-add
counted as 2.

Counted is the arithmetic that is done: no gradient of frozen weights, none of activations below the first thing that
trains, logits at labels alone, and blocks that are recomputed once more.  Not counted is what fused attention computes
again for itself, and what QLoRA spends on turning 4 bits into 16.

Shape letters   B = rows   L = length   G = pictures   M = image tokens of the encoder   Q = query tokens
                T = tokens to predict
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from data.batch import DialogueBatch

if TYPE_CHECKING:
    from model.visual_chat import VisualChatModel


@dataclass
class Counter:
    """Operations so far, and whether what comes out needs a gradient (`trains`)."""

    trains: bool = False
    flops: float = 0.0

    def linears(self, module: nn.Module, rows: float) -> None:
        """All linear maps inside `module`, which `rows` pass in the order they stand in; adapters included.

        A map costs its forward once more for the gradient of its input, where that is asked for, and once more for the
        gradient of its weight, where that trains.
        """
        for linear in _linears(module):
            learns = linear.weight.requires_grad
            self.flops += rows * _cost(linear) * (1 + int(self.trains) + int(learns))
            self.trains |= learns

    def attention(self, queries: float, keys: float, width: int) -> None:
        """`queries` of all rows, `keys` of one; the backward pass is twice the forward."""
        self.flops += 4 * queries * keys * width * (3 if self.trains else 1)


def stage_two(model: VisualChatModel, batch: DialogueBatch) -> float:
    """Of a whole batch, forward and backward."""
    images = max(len(batch.image_row_G), 1)  # without any, an empty one is looked at
    counter = Counter()
    _encoder(counter, model.vision, images)
    _qformer(counter, model, images)
    counter.linears(model.projection, images * model.qformer.num_query_tokens)
    _language_model(counter, model.llm, len(batch), batch.text_length, batch.num_target_tokens)
    return counter.flops


def _encoder(counter: Counter, vision: Any, images: int) -> None:
    """Its own count of the forward pass; adapters in it are too small to matter."""
    counter.trains = any(parameter.requires_grad for parameter in vision.parameters())
    weights = any(p.requires_grad and ".lora_" not in name for name, p in vision.named_parameters())
    counter.flops += images * vision.flops_per_image() * (1 + int(counter.trains) + int(weights))


def _qformer(counter: Counter, model: VisualChatModel, images: int) -> None:
    vision: Any = model.vision
    qformer, tokens = model.qformer, vision.num_tokens
    queries = images * qformer.num_query_tokens
    image = Counter(counter.trains or model.ln_vision.weight.requires_grad)
    counter.trains = qformer.query_tokens.tokens.requires_grad
    for layer in qformer.layers:
        parts: Any = layer
        own, cross = parts.self_attention, parts.cross_attention
        counter.linears(nn.ModuleList([own.query, own.key, own.value]), queries)
        counter.attention(queries, qformer.num_query_tokens, qformer.hidden_size)
        counter.linears(own.output, queries)
        if cross is not None:
            counter.linears(cross.query, queries)
            memory = Counter(image.trains)
            memory.linears(cross.image, images * tokens)
            counter.trains |= memory.trains
            counter.attention(queries, tokens, qformer.hidden_size)
            counter.linears(cross.output, queries)
            counter.flops += memory.flops
        counter.linears(parts.query_feed_forward, queries)


def _language_model(counter: Counter, llm: Any, rows: int, length: int, targets: int) -> None:
    """Heads together are as wide as the model, as in every family here."""
    for block in llm.layers:
        counter.linears(block, rows * length)
        counter.attention(rows * length, length, llm.width)
        if counter.trains and llm.recomputes(rows * length):
            counter.flops += _recomputed(block, rows * length) + 4 * rows * length * length * llm.width
    counter.linears(llm.network.get_submodule("lm_head"), targets)


def _recomputed(block: nn.Module, rows: float) -> float:
    """torch stops recomputing at the last tensor that the backward pass needs: a last map that is frozen and without
    an adapter is left out."""
    linears = _linears(block)
    kept = linears if linears[-1].weight.requires_grad else linears[:-1]
    return rows * sum(map(_cost, kept))


def _linears(module: nn.Module) -> list[nn.Linear]:
    """In 4 bits too; they know their sizes though their weights are packed."""
    return [found for found in module.modules() if isinstance(found, nn.Linear)]


def _cost(linear: nn.Linear) -> float:
    return 2.0 * linear.in_features * linear.out_features
