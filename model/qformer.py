"""The Q-Former of BLIP-2 (arXiv:2301.12597, section 3.1): learned queries that read an image and talk with its text.

A post-norm BERT whose self-attention is shared by queries and text, whose feed-forward is not, and whose queries look
at the image in every second layer.  Four named passes: `see` (queries, image), `read` (text alone), `match` (queries,
image and text together) and `caption` (text after queries); all but `match` in one for training, `see_read_caption`.
The arithmetic is LAVIS's (`blip2_models/Qformer.py`); what differs changes no number: fused attention, maps of one
input are one product, an image's cross-attention keys and values are projected once by `look` and handed to every pass
(LAVIS projects them four times a step), and the last layer computes only what is used.

Shape letters   B = images   P = image-text pairs   Q = query tokens   L = caption length   T = any tokens
                H = hidden size   W = image width   M = image tokens   A = heads   D = H / A   V = vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn

from model import attention_mask
from model.autocast import compute_dtype
from model.image_memory import ImageMemory, KeyValue, split_heads
from model.joint_linear import joint_linear

Count = Annotated[int, Ge(1)]  # a config is held to it before anything is loaded
INITIAL_STD = 0.02  # BERT's, for every weight that no checkpoint brings


class AttentionOutput(nn.Module):
    """Post-norm residual of BERT: LN(dropout(dense(x)) + residual)."""

    def __init__(self, input_size: int, hidden_size: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.dropout(self.dense(x)) + residual)


class SelfAttention(nn.Module):
    """Shared by queries and text."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.num_heads, self.attention_dropout = num_heads, dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.output = AttentionOutput(hidden_size, hidden_size, dropout, eps)

    def forward(
        self, x_PTH: Tensor, mask: Tensor | None, past: KeyValue | None = None, keep: int | None = None
    ) -> tuple[Tensor, KeyValue]:
        """`past` (the queries' keys and values, when text continues after them) goes before this pass's own.

        The output has the first `keep` tokens only; all are seen.
        """
        inner_PTH = x_PTH.to(compute_dtype(x_PTH))
        if keep is None:
            projected = joint_linear(inner_PTH, [self.query, self.key, self.value]).chunk(3, dim=-1)
        else:
            key_value = joint_linear(inner_PTH, [self.key, self.value])
            projected = self.query(inner_PTH[:, :keep]), *key_value.chunk(2, dim=-1)
        query, key, value = (split_heads(each, self.num_heads) for each in projected)
        own = (key, value)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        dropout = self.attention_dropout if self.training else 0.0
        mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, : query.shape[2]]
        context_PATD = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.output(context_PATD.transpose(1, 2).flatten(2), x_PTH[:, :keep]), own


class ImageProjection(nn.Module):
    """Image features -> keys and values of one cross-attention; `QFormer.look` asks those of all layers at once."""

    def __init__(self, image_width: int, hidden_size: int) -> None:
        super().__init__()
        self.key = nn.Linear(image_width, hidden_size)
        self.value = nn.Linear(image_width, hidden_size)


class CrossAttention(nn.Module):
    """Queries look at the image."""

    def __init__(self, hidden_size: int, image_width: int, num_heads: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.num_heads, self.attention_dropout = num_heads, dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.image = ImageProjection(image_width, hidden_size)
        self.output = AttentionOutput(hidden_size, hidden_size, dropout, eps)

    def forward(self, query_PQH: Tensor, memories: Sequence[tuple[KeyValue, int]]) -> Tensor:
        """Pairs are ordered memory by memory; those that share an image become one longer row of queries."""
        num_queries = query_PQH.shape[1]
        dropout = self.attention_dropout if self.training else 0.0
        parts = self.query(query_PQH).split([uses * len(key_BAMD) for (key_BAMD, _), uses in memories])
        contexts = []
        for rows, ((key_BAMD, value_BAMD), uses) in zip(parts, memories, strict=True):
            # (uses * B, Q, H) -> (B, A, uses * Q, D), and back
            heads = rows.unflatten(0, (uses, -1)).unflatten(-1, (self.num_heads, -1))
            asked = heads.permute(1, 3, 0, 2, 4).flatten(2, 3)
            context = F.scaled_dot_product_attention(asked, key_BAMD, value_BAMD, dropout_p=dropout)
            context = context.unflatten(2, (uses, num_queries)).permute(2, 0, 3, 1, 4)
            contexts.append(context.flatten(0, 1).flatten(2))
        context_PQH = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
        return self.output(context_PQH, query_PQH)


class FeedForward(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, intermediate_size)
        self.output = AttentionOutput(intermediate_size, hidden_size, dropout, eps)

    def forward(self, x_PTH: Tensor) -> Tensor:
        return self.output(F.gelu(self.dense(x_PTH)), x_PTH)


class Layer(nn.Module):
    """Self-attention over all tokens; then the queries look and think, the text thinks."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        image_width: int | None,
        dropout: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.self_attention = SelfAttention(hidden_size, num_heads, dropout, eps)
        self.cross_attention = (
            None if image_width is None else CrossAttention(hidden_size, image_width, num_heads, dropout, eps)
        )
        self.query_feed_forward = FeedForward(hidden_size, intermediate_size, dropout, eps)
        self.text_feed_forward = FeedForward(hidden_size, intermediate_size, dropout, eps)

    def forward(
        self,
        x_PTH: Tensor,
        *,
        num_query_tokens: int,
        mask: Tensor | None = None,
        past: KeyValue | None = None,
        memories: Sequence[tuple[KeyValue, int]] = (),
        keep: int | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """The first `num_query_tokens` of T are queries, the rest is text; either may be none."""
        x_PTH, own = self.self_attention(x_PTH, mask, past, keep)
        num_text = x_PTH.shape[1] - num_query_tokens
        if not num_query_tokens:
            return self.text_feed_forward(x_PTH), own
        query_PQH, *text = x_PTH.split([num_query_tokens, num_text], dim=1) if num_text else [x_PTH]
        if self.cross_attention is not None:
            query_PQH = self.cross_attention(query_PQH, memories)
        query_PQH = self.query_feed_forward(query_PQH)
        return (torch.cat([query_PQH, *map(self.text_feed_forward, text)], dim=1) if text else query_PQH), own


class TextEmbedding(nn.Module):
    """Words and positions; no token types, as in LAVIS.  Queries take only the norm and the dropout."""

    def __init__(self, vocab_size: int, hidden_size: int, max_positions: int, pad_id: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, hidden_size, padding_idx=pad_id)
        self.position = nn.Embedding(max_positions, hidden_size)

    def forward(self, text_ids_PL: Tensor, first: int = 0) -> Tensor:
        """`first`: the position of the first token."""
        end = first + text_ids_PL.shape[1]
        if end > self.position.num_embeddings:
            raise ValueError(
                f"a text of {end} tokens does not fit the Q-Former's {self.position.num_embeddings} positions: "
                "lower data.loader.max_text_tokens or raise model.qformer.max_positions"
            )
        return self.word(text_ids_PL) + self.position(torch.arange(first, end, device=text_ids_PL.device))


class QueryTokens(nn.Module):
    """The learned queries, in a module of their own, so that ZeRO-3 gathers them when they are asked for."""

    def __init__(self, num_query_tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(1, num_query_tokens, hidden_size))

    def forward(self, num_rows: int) -> Tensor:
        """-> query_PQH, the same for each of `num_rows` pairs"""
        return self.tokens.expand(num_rows, -1, -1)


class LanguageHead(nn.Module):
    """BERT's: dense, GELU, norm, then the word embeddings once more, and a bias."""

    def __init__(self, word: nn.Embedding, eps: float) -> None:
        super().__init__()
        vocab_size, hidden_size = word.weight.shape
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.decoder = nn.Linear(hidden_size, vocab_size)
        self.decoder.weight = word.weight

    def forward(self, x_TH: Tensor) -> Tensor:
        """-> logits_TV"""
        return self.decoder(self.norm(F.gelu(self.dense(x_TH))))


class QFormer(nn.Module):
    """See the module's docstring.

    Args:
        vocab_size: of the tokenizer, its generation tokens included.
        image_width: W, the width of the image encoder.
        max_positions: the longest text, in tokens.
        cross_attention_frequency: layers 0, f, 2f, ... look at the image.
        dropout: hidden and attention dropout.
        initial_std: of the weights that no checkpoint brings; BERT's 0.02 suits its width of 768, and from scratch a
            narrow Q-Former hardly starts to learn below hidden_size ** -0.5.
    """

    def __init__(
        self,
        *,
        vocab_size: Count,
        image_width: Count,
        hidden_size: Count = 768,
        num_layers: Count = 12,
        num_heads: Count = 12,
        intermediate_size: Count = 3072,
        max_positions: Count = 512,
        num_query_tokens: Count = 32,
        cross_attention_frequency: Count = 2,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.1,
        layer_norm_eps: float = 1e-12,
        pad_id: int = 0,
        initial_std: float = INITIAL_STD,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} cannot be divided among num_heads {num_heads}")
        self.hidden_size, self.num_query_tokens, self.num_heads = hidden_size, num_query_tokens, num_heads
        self.intermediate_size, self.vocab_size, self.image_width = intermediate_size, vocab_size, image_width
        self.query_tokens = QueryTokens(num_query_tokens, hidden_size)
        self.embedding = TextEmbedding(vocab_size, hidden_size, max_positions, pad_id)
        self.embedding_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.embedding_dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            Layer(
                hidden_size,
                num_heads,
                intermediate_size,
                image_width if index % cross_attention_frequency == 0 else None,
                dropout,
                layer_norm_eps,
            )
            for index in range(num_layers)
        )
        self.language_head = LanguageHead(self.embedding.word, layer_norm_eps)
        self.apply(partial(initialise, std=initial_std))

    # ------------------------------------------------------------------------------------------------- the passes

    def look(self, image_BMW: Tensor) -> ImageMemory:
        """What the queries will see of each image: every layer's cross-attention keys and values, projected once."""
        maps = [each for attention in self.looking() for each in (attention.image.key, attention.image.value)]
        return ImageMemory(joint_linear(image_BMW, maps), self.hidden_size, self.num_heads)

    def see(self, memory: ImageMemory) -> tuple[Tensor, list[KeyValue]]:
        """Queries and image.  -> query_PQH, and each layer's self-attention keys and values, for `caption`."""
        x_PQH = self._queries(len(memory) * memory.uses)
        return self._run(x_PQH, num_query_tokens=self.num_query_tokens, memories=[memory])

    def read(self, text_ids_PL: Tensor, text_mask_PL: Tensor, *, keep: int | None = None) -> Tensor:
        """Text alone, both directions.  -> text_PLH, of the first `keep` tokens if not of all"""
        mask = attention_mask.text_alone(text_mask_PL)
        return self._run(self._embed(text_ids_PL), num_query_tokens=0, mask=mask, keep=keep)[0]

    def match(self, memories: Sequence[ImageMemory], text_ids_PL: Tensor, text_mask_PL: Tensor) -> Tensor:
        """Queries, image and text together, both directions.  -> query_PQH

        The pairs' images stand in `memories` one memory after the other, each as often as its `uses`.
        """
        num_pairs = sum(len(memory) * memory.uses for memory in memories)
        assert num_pairs == len(text_ids_PL), f"{num_pairs} images for {len(text_ids_PL)} texts"
        x_PTH = torch.cat([self._queries(num_pairs), self._embed(text_ids_PL)], dim=1)
        mask = attention_mask.query_with_text(text_mask_PL, self.num_query_tokens)
        num_queries = self.num_query_tokens
        return self._run(x_PTH, num_query_tokens=num_queries, mask=mask, memories=memories, keep=num_queries)[0]

    def caption(self, past: Sequence[KeyValue], text_ids_PL: Tensor, text_mask_PL: Tensor) -> Tensor:
        """Text after the queries of `see`, each token seeing those before it.  -> text_PLH, for `language_head`

        Text takes its positions from 0 and looks at no image: it knows it through the queries alone.
        """
        mask = attention_mask.text_after_query(text_mask_PL, self.num_query_tokens)
        return self._run(self._embed(text_ids_PL), num_query_tokens=0, mask=mask, past=past)[0]

    def see_read_caption(
        self, memory: ImageMemory, text_ids_PL: Tensor, text_mask_PL: Tensor, caption_ids_PL: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`see`, `read` and `caption` as one pass, whose mask keeps them apart: half the kernels of a training step.

        -> query_PQH, text_PH of the first token alone, caption_PLH (of no tokens where no captions are given)
        """
        num_queries, length = self.num_query_tokens, text_ids_PL.shape[1]
        ids = [text_ids_PL] if caption_ids_PL is None else [caption_ids_PL, text_ids_PL]
        words = self.embedding(torch.cat(ids)).chunk(len(ids))
        x_PTH = torch.cat([self.query_tokens(len(text_ids_PL)), *words], dim=1)
        x_PTH = self.embedding_dropout(self.embedding_norm(x_PTH))
        mask = attention_mask.apart(text_mask_PL, num_queries, caption=len(ids) == 2)
        kept = [num_queries, length * (len(ids) - 1), 1]
        x_PTH, _ = self._run(x_PTH, num_query_tokens=num_queries, mask=mask, memories=[memory], keep=sum(kept))
        query_PQH, caption_PLH, first_P1H = x_PTH.split(kept, dim=1)
        return query_PQH, first_P1H[:, 0], caption_PLH

    def next_word(self, past: Sequence[KeyValue], text_id_P: Tensor, position: int) -> tuple[Tensor, list[KeyValue]]:
        """`caption` word by word.  -> text_PH, and `past` with this word's keys and values in it"""
        x_P1H, own = self._run(self._embed(text_id_P[:, None], position), num_query_tokens=0, past=past)
        both = zip(past, own, strict=True)
        grown = [(torch.cat([old[0], new[0]], dim=2), torch.cat([old[1], new[1]], dim=2)) for old, new in both]
        return x_P1H[:, 0], grown

    # -------------------------------------------------------------------------------------------------- the pieces

    def looking(self) -> list[CrossAttention]:
        """The cross-attentions, first layer first."""
        return [module for module in self.modules() if isinstance(module, CrossAttention)]

    def _queries(self, num_rows: int) -> Tensor:
        return self.embedding_dropout(self.embedding_norm(self.query_tokens(num_rows)))

    def _embed(self, text_ids_PL: Tensor, first: int = 0) -> Tensor:
        return self.embedding_dropout(self.embedding_norm(self.embedding(text_ids_PL, first)))

    def _run(
        self,
        x_PTH: Tensor,
        *,
        num_query_tokens: int,
        mask: Tensor | None = None,
        past: Sequence[KeyValue] | None = None,
        memories: Sequence[ImageMemory] = (),
        keep: int | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """`keep`: tokens whose outcome is wanted; the last layer computes no others (LAVIS computes and drops them)."""
        mask = None if mask is None else attention_mask.as_bias(mask, compute_dtype(x_PTH))
        key_values, num_looked = [], 0
        looked_at = [(memory.layers(), memory.uses) for memory in memories]
        for index, layer in enumerate(self.layers):
            seen: list[tuple[KeyValue, int]] = []
            if layer.cross_attention is not None:
                seen = [(layers[num_looked], uses) for layers, uses in looked_at]
                num_looked += 1
            x_PTH, own = layer(
                x_PTH,
                num_query_tokens=num_query_tokens,
                mask=mask,
                past=None if past is None else past[index],
                memories=seen,
                keep=keep if index == len(self.layers) - 1 else None,
            )
            key_values.append(own)
        return x_PTH, key_values


@torch.no_grad()
def initialise(module: nn.Module, std: float = INITIAL_STD) -> None:
    """BERT's initial weights, for whatever no checkpoint brings."""
    if isinstance(module, nn.Linear | nn.Embedding):
        module.weight.normal_(0.0, std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, QueryTokens):
        module.tokens.normal_(0.0, std)
