"""Stage two's model: image encoder + Q-Former (its query branch) + projection + language model.

A picture becomes Q projected query outputs, which replace the embeddings of Q positions of its row; the language model
does the rest.  As VisualGLM (`model/visualglm.py:20-28`), but any number of pictures at any place of each row, and
logits only where something is to be predicted.

Shape letters   B = rows   L = length   G = pictures   M = image tokens of the encoder   Q = query tokens
                H = the Q-Former's width   D = the language model's   T = positions to predict   V = vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.batch import IGNORED, DialogueBatch
from model import flops
from model.generation import Decoding, Generation, generate
from model.image_text import VisionEncoder, check_widths
from model.llm.base import LanguageModel
from model.passes import Pass
from model.qformer import QFormer


@dataclass(frozen=True)
class Prediction:
    """What the model says of each token that carries a label."""

    logits_TV: Tensor
    label_T: Tensor
    row_T: Tensor


class VisualChatModel(nn.Module):
    """See the module's docstring.

    Args:
        qformer: as built for stage one; its text branch is taken out.
        train_qformer: the queries, the Q-Former and `ln_vision` learn (stage two); else they stay as they are.
        train_projection: the same for the projection.
    Raises:
        ValueError: parts whose sizes do not belong together.
    """

    def __init__(
        self,
        vision: VisionEncoder,
        qformer: QFormer,
        llm: LanguageModel,
        *,
        train_qformer: bool = True,
        train_projection: bool = True,
    ) -> None:
        super().__init__()
        check_widths(vision, qformer)
        if llm.codec is not None and llm.codec.num_image_tokens != qformer.num_query_tokens:
            raise ValueError(
                f"the language model's layout has {llm.codec.num_image_tokens} positions for a picture, the Q-Former "
                f"{qformer.num_query_tokens} query tokens: make model.llm.num_image_tokens equal to them"
            )
        self.vision, self.llm = vision, llm
        self.qformer = query_branch(qformer)
        self.ln_vision = nn.LayerNorm(vision.width, eps=vision.ln_eps)
        self.projection = nn.Linear(qformer.hidden_size, llm.width)
        self.qformer.requires_grad_(train_qformer)
        self.ln_vision.requires_grad_(train_qformer)
        self.projection.requires_grad_(train_projection)

    # ------------------------------------------------------------------------------------------------------- passes

    def look(self, image_GCHW: Tensor) -> Tensor:
        """Pixels (uint8, or normalised floating point) -> query_GQH, what the Q-Former saw"""
        query_GQH, _ = self.qformer.see(self.qformer.look(self.ln_vision(self.vision(image_GCHW))))
        return query_GQH

    def embed(self, batch: DialogueBatch) -> Tensor:
        """Words and pictures at their places.  -> embedded_BLD

        The vision path runs whatever the batch holds: a rank that left it out would leave the others waiting, under
        ZeRO for its share of the weights, elsewhere for its gradients.
        """
        words_BLD = self.llm.embed(batch.ids_BL)
        num_images = len(batch.image_row_G)
        image_GCHW = batch.image_GCHW if num_images else batch.image_GCHW.new_zeros(1, *batch.image_GCHW.shape[1:])
        projected_GQD = self.projection(self.look(image_GCHW)).to(words_BLD.dtype)
        if not num_images:
            return words_BLD + 0.0 * projected_GQD.sum()
        position_GQ = batch.image_start_G[:, None] + torch.arange(projected_GQD.shape[1], device=words_BLD.device)
        return words_BLD.index_put((batch.image_row_G[:, None], position_GQ), projected_GQD)

    def hidden(self, batch: DialogueBatch) -> Tensor:
        """-> hidden_BLD of the language model"""
        return self.llm.hidden(self.embed(batch), batch.ids_BL, batch.mask_BL)

    def predict(self, batch: DialogueBatch) -> Prediction:
        """Logits for the labels alone: over a whole vocabulary they are the largest tensor of a step."""
        hidden_BLD = self.hidden(batch)
        label_S = batch.labels_BL[:, 1:].flatten()
        # their number is known on the host, so nothing waits for the GPU
        target_T = (label_S == IGNORED).to(torch.uint8).argsort(stable=True)[: batch.num_target_tokens]
        logits_TV = self.llm.logits(hidden_BLD[:, :-1].flatten(0, 1)[target_T])
        return Prediction(logits_TV, label_S[target_T], target_T // (batch.text_length - 1))

    def recordable(self) -> list[Pass]:
        """See `model.passes`."""

        def draws_again(embedded_BLD: Tensor, *_: Tensor) -> bool:
            """Blocks that drew random numbers are recomputed with them, and only the host can remember those."""
            return self.llm.recomputes(embedded_BLD.shape[:2].numel()) and self.llm.draws

        return [
            Pass(self, "look", (self.vision, self.ln_vision, self.qformer)),
            Pass(self.llm, "hidden", (self.llm,), unless=draws_again),
        ]

    def train_flops_per_sample(self, batch: DialogueBatch) -> float:
        """Of the arithmetic that training on such a batch does, recomputed blocks included (`model/flops.py`)."""
        return flops.stage_two(self, batch) / len(batch)

    # ------------------------------------------------------------------------------------------------------- talking

    @torch.no_grad()
    def begin(self, batch: DialogueBatch, decoding: Decoding | Sequence[Decoding]) -> Generation:
        """Answers to dialogues in the chat layout, a token at a time; see `model.generation.Generation`."""
        return Generation(self.llm, self.embed(batch), batch.ids_BL, batch.mask_BL, decoding)

    @torch.no_grad()
    def generate(
        self, batch: DialogueBatch, decoding: Decoding | Sequence[Decoding], *, never_early: bool = False
    ) -> Tensor:
        """The same, whole.  -> ids_BN; see `model.generation.generate`."""
        embedded_BLD = self.embed(batch)
        return generate(self.llm, embedded_BLD, batch.ids_BL, batch.mask_BL, decoding, never_early=never_early)


def query_branch(qformer: QFormer) -> QFormer:
    """Takes out what only texts pass: word and position embeddings, the text's feed-forward, the language head.

    What never runs would have no gradient, which ZeRO refuses; and VisualGLM's Q-Former has none of it.
    """
    for name in ("embedding", "language_head"):
        if hasattr(qformer, name):
            delattr(qformer, name)
    for layer in qformer.layers:
        if hasattr(layer, "text_feed_forward"):
            del layer.text_feed_forward
    return qformer
