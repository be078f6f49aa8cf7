"""Stage one's model: an image encoder, the Q-Former, and the heads of ITC and ITM (ITG's is in the Q-Former).

Shape letters   B = images   P = image-text pairs   Q = query tokens   L = caption length   M = image tokens
                W = image width   H = hidden size   E = shared embedding   V = vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn

from data.batch import ImageTextBatch
from model.image_memory import ImageMemory, KeyValue
from model.passes import Pass
from model.qformer import Count, QFormer


class VisionEncoder(Protocol):
    """What stage one asks of an image encoder (`model.vision.encoder.ImageEncoder`)."""

    width: int
    frozen: bool
    ln_eps: float

    def __call__(self, image_BCHW: Tensor) -> Tensor: ...


def check_widths(vision: VisionEncoder, qformer: QFormer) -> None:
    """Raises ValueError."""
    if vision.width != qformer.image_width:
        raise ValueError(f"the encoder is {vision.width} wide, the Q-Former looks at images {qformer.image_width} wide")


@dataclass(frozen=True)
class ImageFeatures:
    """Everything later passes need of some images, computed once."""

    encoded_BMW: Tensor  # the encoder's output, before ln_vision: what travels between ranks
    memory: ImageMemory  # cross-attention keys and values
    query_BQH: Tensor  # the queries after `see`
    query_BQE: Tensor  # the same, projected and normalised
    past: Sequence[KeyValue]  # the queries' self-attention keys and values, where captions go on

    def __len__(self) -> int:
        return len(self.query_BQE)

    def select(self, index_P: Tensor) -> ImageFeatures:
        return ImageFeatures(
            self.encoded_BMW[index_P],
            self.memory.select(index_P),
            self.query_BQH[index_P],
            self.query_BQE[index_P],
            [(key[index_P], value[index_P]) for key, value in self.past],
        )


@dataclass(frozen=True)
class Seen:
    """What the objectives of stage one share; see `ImageFeatures`."""

    encoded_BMW: Tensor
    memory: ImageMemory
    query_BQH: Tensor
    query_BQE: Tensor
    text_BE: Tensor
    caption_BLH: Tensor  # after a generation token, for `vocabulary_logits`; of no tokens where it was not asked for


class _ClampInward(torch.autograd.Function):
    """clamp, whose gradient vanishes only where a descent step would lead further out: a bound is no trap."""

    @staticmethod
    def forward(ctx, value: Tensor, low: float, high: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(value)
        ctx.low, ctx.high = low, high
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (value,) = ctx.saved_tensors
        outward = ((value <= ctx.low) & (gradient > 0)) | ((value >= ctx.high) & (gradient < 0))
        return gradient.masked_fill(outward, 0.0), None, None


class Temperature(nn.Module):
    """The learned temperature that similarities are divided by.  One element of shape (1,): a 0-dim parameter crashes
    `deepspeed.initialize`.  LAVIS never clamps; ALBEF and BLIP clamp to [0.001, 0.5] (`albef_pretrain.py:139`)."""

    def __init__(self, initial: float, low: float | None, high: float | None) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([float(initial)]))
        self.low, self.high = -float("inf") if low is None else low, float("inf") if high is None else high

    def forward(self) -> Tensor:
        """-> (1,), fp32"""
        return _ClampInward.apply(self.value, self.low, self.high)


class ImageTextModel(nn.Module):
    """See the module's docstring.

    Args:
        vision: the image encoder; where it is frozen no gradient reaches it.
        embed_dim: E, the width that queries and texts are compared in.
        temperature: initial value (LAVIS: 0.07).
        temperature_min, temperature_max: its bounds; None for none, as LAVIS.
    """

    def __init__(
        self,
        vision: VisionEncoder,
        qformer: QFormer,
        *,
        embed_dim: Count = 256,
        temperature: Annotated[float, Gt(0)] = 0.07,
        temperature_min: float | None = 0.001,
        temperature_max: float | None = 0.5,
    ) -> None:
        super().__init__()
        check_widths(vision, qformer)
        self.vision, self.qformer, self.embed_dim = vision, qformer, embed_dim
        self.ln_vision = nn.LayerNorm(vision.width, eps=vision.ln_eps)
        self.vision_proj = nn.Linear(qformer.hidden_size, embed_dim)
        self.text_proj = nn.Linear(qformer.hidden_size, embed_dim)
        self.itm_head = nn.Linear(qformer.hidden_size, 2)
        self.temperature = Temperature(temperature, temperature_min, temperature_max)

    def recordable(self) -> list[Pass]:
        """See `model.passes`."""
        return [Pass(self.vision, "forward", (self.vision,))] if self.vision.frozen else []

    # ---------------------------------------------------------------------------------- what the losses are made of

    def look(self, batch: ImageTextBatch, *, caption: bool = True) -> Seen:
        """Queries with image, text alone and, if asked for, the caption: all that the objectives share, in one pass."""
        ids_BL, mask_BL = batch.text_ids_BL, batch.text_mask_BL
        encoded_BMW = self.vision(batch.image_BCHW)
        memory = self.remember(encoded_BMW)
        caption_ids_BL = torch.cat([batch.bos_id_B[:, None], ids_BL[:, 1:]], dim=1) if caption else None
        query_BQH, first_BH, caption_BLH = self.qformer.see_read_caption(memory, ids_BL, mask_BL, caption_ids_BL)
        query_BQE, text_BE = self._embed(self.vision_proj, query_BQH), self._embed(self.text_proj, first_BH)
        return Seen(encoded_BMW, memory, query_BQH, query_BQE, text_BE, caption_BLH)

    def encode_image(self, image_BCHW: Tensor) -> ImageFeatures:
        """Pixels (uint8, or normalised floating point) -> all that later passes need of the images."""
        encoded_BMW = self.vision(image_BCHW)
        memory = self.remember(encoded_BMW)
        query_BQH, past = self.qformer.see(memory)
        return ImageFeatures(encoded_BMW, memory, query_BQH, self._embed(self.vision_proj, query_BQH), past)

    def remember(self, encoded_BMW: Tensor) -> ImageMemory:
        """The encoder's output -> cross-attention keys and values.  `ln_vision` trains though the encoder does not."""
        return self.qformer.look(self.ln_vision(encoded_BMW))

    def encode_text(self, text_ids_PL: Tensor, text_mask_PL: Tensor) -> Tensor:
        """-> text_PE, of length one: the text's first token, projected."""
        first_PH = self.qformer.read(text_ids_PL, text_mask_PL, keep=1)[:, 0]
        return self._embed(self.text_proj, first_PH)

    def match_memories(self, memories: Sequence[ImageMemory], text_ids_PL: Tensor, text_mask_PL: Tensor) -> Tensor:
        """-> match_logits_P2, the mean over the queries; column 1 says "they belong together"."""
        query_PQH = self.qformer.match(memories, text_ids_PL, text_mask_PL)
        return self.itm_head(query_PQH).mean(dim=1)

    def match(self, image: ImageFeatures, text_ids_PL: Tensor, text_mask_PL: Tensor) -> Tensor:
        """Pair p is image p with text p.  -> match_logits_P2"""
        return self.match_memories([image.memory], text_ids_PL, text_mask_PL)

    def caption(self, image: ImageFeatures, text_ids_PL: Tensor, text_mask_PL: Tensor) -> Tensor:
        """`text_ids_PL` begins with a generation token.  -> text_PLH, which `vocabulary_logits` turns into words"""
        return self.qformer.caption(image.past, text_ids_PL, text_mask_PL)

    def vocabulary_logits(self, text_TH: Tensor) -> Tensor:
        """-> logits_TV"""
        return self.qformer.language_head(text_TH)

    # ------------------------------------------------------------------------------------------------------ talking

    @torch.no_grad()
    def generate(
        self, image: ImageFeatures, bos_id_B: Tensor, *, eos_id: int, pad_id: int, max_new_tokens: int
    ) -> Tensor:
        """Greedy captions.  -> ids_BL: no generation token; `eos_id`, where it came, is kept and `pad_id` follows."""
        said: list[Tensor] = []
        past, word_B = image.past, bos_id_B
        running_B = torch.ones_like(bos_id_B, dtype=torch.bool)
        for position in range(max_new_tokens):
            last_BH, past = self.qformer.next_word(past, word_B, position)
            word_B = self.vocabulary_logits(last_BH).argmax(dim=-1).masked_fill(~running_B, pad_id)
            said.append(word_B)
            running_B = running_B & (word_B != eos_id)
            if not running_B.any():
                break
        return torch.stack(said, dim=1)

    # -------------------------------------------------------------------------------------------------- the measures

    def train_flops_per_sample(self, *, num_image_tokens: int, text_length: int) -> float:
        """Q-Former FLOPs of one training sample, forward and backward, multiply-add counted as 2 (`blip2.md` 6.1).

        The arithmetic that is done, not LAVIS's: keys and values are projected once or twice (own image, negative), and
        no gradient flows into a frozen encoder.
        """
        qformer = self.qformer
        hidden, inner = qformer.hidden_size, qformer.intermediate_size
        num_layers, num_looking = len(qformer.layers), len(qformer.looking())

        def passing(tokens: int, seen: int, kept: int) -> float:
            """All layers, of which the last works out only the tokens whose outcome is used."""
            of_all = tokens * 4 * hidden * hidden  # keys and values
            of_each = 4 * hidden * hidden + 4 * seen * hidden + 4 * hidden * inner
            return num_layers * of_all + ((num_layers - 1) * tokens + kept) * of_each

        def cross_attention(tokens: int) -> float:
            return tokens * 4 * hidden * hidden + 4 * tokens * num_image_tokens * hidden

        queries = qformer.num_query_tokens
        together = queries + text_length
        all_tokens = queries + 2 * text_length
        see_read_caption = passing(all_tokens, all_tokens, kept=together + 1)
        match = 3 * passing(together, together, kept=queries)
        words = text_length * 2 * hidden * (hidden + qformer.vocab_size)
        looks = 4 * num_looking * cross_attention(queries)
        memory = num_looking * num_image_tokens * 4 * qformer.image_width * hidden
        return 3 * (see_read_caption + match + words + looks + memory)

    def _embed(self, projection: nn.Linear, x: Tensor) -> Tensor:
        # fp32 under autocast too: divided by a temperature of 0.07, bf16 similarities come in steps of 0.045.
        return F.normalize(projection(x).float(), dim=-1)
