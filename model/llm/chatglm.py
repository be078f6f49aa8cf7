"""ChatGLM-6B, the language model of VisualGLM-6B: 2-D positions, a prefix mask, [gMASK] and <sop> before the answer.

The blocks are SwissArmyTransformer's (`sat/model/official/chatglm_model.py`); `model/llm/sat_network.py` builds them
and keeps SAT's side effects in.  What a block computes is in `model/llm/chatglm_block.py`; here are masks and
positions, the cache, and the codec.

`query_key_value` has Hugging Face's rows, head by head (q1, k1, v1, q2, ...), as in the folders of ChatGLM-6B and in
every adapter trained on them: so peft saves and loads what it finds.  Only `model/weights/sat.py` permutes rows.

Shape letters   B = rows   L = length   D = width   A = heads   E = D / A   T = any positions   V = vocabulary
                S = keys seen, cached ones included
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.batch import IGNORED, Dialogue, EncodedDialogue, Turn
from model.attention_mask import as_bias
from model.autocast import compute_dtype
from model.llm.base import LanguageModel
from model.llm.chatglm_block import rotation
from model.llm.dialogue import fit, said
from model.llm.pieces import Pieces

CHUNK = 256  # positions that a cache grows by: room for the longest answer would be mostly empty


# ------------------------------------------------------------------------------------- prompt, special ids, labels

TEMPLATES = {
    "zh": ("问：{}\n答：", "{}\n"),
    "en": ("Q:{}\nA:", "{}\n"),
}  # VisualGLM was trained on both; others get "en"
SPECIAL = {"mask": "[MASK]", "gmask": "[gMASK]", "bos": "<sop>", "eos": "<eop>", "pad": "<pad>"}


class ChatGLMCodec:
    """`<img>` image tokens `</img>问：question\\n答：` [gMASK] <sop> answer <eop>   (`finetune_visualglm.py:116`)

    The pictures of a turn stand before its words; earlier turns stand before the question, answers included, and carry
    no labels: the prefix mask lets the model see them whole, so one sample trains one answer.

    Args:
        path: `ice_text.model`, or the folder that holds it.
        num_image_tokens: positions of one picture.
        ids: special ids (bos, eos, mask, gmask, pad) where sentencepiece does not know them; where both do, they must
            agree.
        offset: `num_image_tokens` of tokenizer_config.json (20000 in the first release of ChatGLM-6B).
        train_sop: <sop> is a label too, as in ChatGLM-6B's and VisualGLM's own training.
    Raises:
        ValueError: no such file, a special id that neither gives, or two that differ.
    """

    trains_every_turn = False

    def __init__(
        self,
        path: str | Path,
        *,
        num_image_tokens: int,
        ids: Mapping[str, int] | None = None,
        offset: int = 0,
        train_sop: bool = True,
    ) -> None:
        file = Path(path).expanduser()
        file = file / "ice_text.model" if file.is_dir() else file
        self.pieces = Pieces(file, special=SPECIAL.values(), offset=offset)
        self.num_image_tokens, self.train_sop = num_image_tokens, train_sop
        self.ids = {role: self._special_id(role, (ids or {}).get(role)) for role in SPECIAL}
        self.pad_id = self.ids["pad"]
        self.stop_ids: tuple[int, ...] = (self.ids["eos"],)

    def encode(
        self, dialogue: Dialogue, *, max_tokens: int | None = None, max_answer_tokens: int | None = None
    ) -> EncodedDialogue:
        """See `data.batch.DialogueCodec`."""
        ask, reply = TEMPLATES.get(dialogue.language, TEMPLATES["en"])
        return fit(
            dialogue,
            lambda turns: self._lay_out(turns, ask, reply),
            max_tokens=max_tokens,
            max_answer_tokens=max_answer_tokens,
        )

    def decode(self, ids: Any) -> str:
        return self.pieces.decode(said(ids, stop_ids=self.stop_ids, special={*self.ids.values()})).strip()

    def _lay_out(self, turns: tuple[Turn, ...], ask: str, reply: str) -> EncodedDialogue:
        ids: list[int] = []
        starts: list[int] = []
        text = ""
        for number, turn in enumerate(turns, start=1):
            for _ in range(turn.num_images):
                ids += self.pieces.encode(text + "<img>")
                starts.append(len(ids))
                ids += [self.pad_id] * self.num_image_tokens
                text = "</img>"
            text += ask.format(turn.question) + (reply.format(turn.answer) if number < len(turns) else "")
        ids += [*self.pieces.encode(text), self.ids["gmask"]]
        labels = [IGNORED] * len(ids) + [self.ids["bos"] if self.train_sop and turns[-1].answer else IGNORED]
        ids.append(self.ids["bos"])
        if turns[-1].answer:
            answer = [*self.pieces.encode(turns[-1].answer), self.ids["eos"]]
            ids, labels = ids + answer, labels + answer
        return EncodedDialogue(tuple(ids), tuple(labels), tuple(starts))

    def _special_id(self, role: str, told: int | None) -> int:
        found = self.pieces.id_of(SPECIAL[role])
        if found is None and told is None:
            raise ValueError(
                f"{self.pieces.path} has no piece {SPECIAL[role]}: name its id, model.llm.ids.{role} (config.json of "
                f"the model's folder has it as {role}_token_id)"
            )
        if found is not None and told is not None and found != told:
            raise ValueError(
                f"{SPECIAL[role]} is {found} in {self.pieces.path}, {told} in the configuration: this tokenizer "
                f"belongs to another model"
            )
        return told if found is None else found  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------- masks and positions


def first_index(is_there_BL: Tensor) -> Tensor:
    """-> index_B of each row's first True; 0 where there is none"""
    return is_there_BL.int().argmax(dim=1)


def prefix_mask(context_B: Tensor, mask_BL: Tensor) -> Tensor:
    """Position i sees j where j <= i, or j stands in the prefix (before <sop>); never padding.  -> (B, 1, L, L) bool"""
    position_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    causal_LL = position_L[None, :] <= position_L[:, None]
    prefix_BL = position_L < context_B[:, None]
    return ((causal_LL | prefix_BL[:, None, :]) & mask_BL[:, None, :])[:, None]


def positions(context_B: Tensor, mask_token_B: Tensor, length: int) -> Tensor:
    """-> (B, 2, L): the place in the prefix, from <sop> on [gMASK]'s; the place in the answer, 1 at <sop>, 0 before."""
    position_L = torch.arange(length, device=context_B.device)
    block_BL = (position_L - context_B[:, None] + 1).clamp(min=0)
    place_BL = position_L.where(block_BL == 0, mask_token_B[:, None])
    return torch.stack([place_BL, block_BL], dim=1)


@dataclass
class Cache:
    """Keys and values of everything seen, with room for what comes."""

    key_values: list[tuple[Tensor, Tensor]]  # (B, A, L + room, E) each, a pair for every block
    seen_BS: Tensor  # bool: real tokens, room not filled yet excluded
    used: int  # positions filled, padding included
    mask_token_B: Tensor
    block_B: Tensor  # place in the answer of the next token
    padded: bool  # some row has padding among its prompt

    def grow(self) -> None:
        for index, (key, value) in enumerate(self.key_values):
            self.key_values[index] = F.pad(key, (0, 0, 0, CHUNK)), F.pad(value, (0, 0, 0, CHUNK))
        self.seen_BS = F.pad(self.seen_BS, (0, CHUNK))


# ------------------------------------------------------------------------------------------------------ the network


class ChatGLM(LanguageModel):
    """See the module's docstring and `model.llm.base.LanguageModel`.

    Args:
        network: from `sat_network.build`, or anything with its modules.
        bos_id, gmask_id, mask_id: <sop>, and the marks before it ([MASK] where a row has no [gMASK]).
        rotary_dtype: float16 as ChatGLM-6B was trained; float32 is SAT's in fp32.
    """

    lora_targets = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

    def __init__(
        self,
        network: nn.Module,
        *,
        num_heads: int,
        bos_id: int,
        gmask_id: int,
        mask_id: int,
        codec: ChatGLMCodec | None = None,
        rotary_dtype: str = "float16",
        checkpoint_activations: bool = False,
        checkpoint_above: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.codec, self.num_heads = network, codec, num_heads
        self.bos_id, self.gmask_id, self.mask_id = bos_id, gmask_id, mask_id
        words: Any = network.get_submodule("transformer.word_embeddings")
        self.vocab_size, self.width = words.weight.shape
        if rotary_dtype not in ("float16", "float32"):
            raise ValueError(f"model.llm.rotary_dtype is {rotary_dtype!r}; it can be float16 or float32")
        self.rotary_dtype = getattr(torch, rotary_dtype)
        self.checkpoint_activations, self.checkpoint_above = checkpoint_activations, checkpoint_above

    @property
    def layers(self) -> nn.ModuleList:
        found = self.network.get_submodule("transformer.layers")
        assert isinstance(found, nn.ModuleList)
        return found

    def embed(self, ids_BL: Tensor) -> Tensor:
        return self.network.get_submodule("transformer.word_embeddings")(ids_BL)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        return self.network.get_submodule("lm_head")(hidden_TD)

    def hidden(self, embedded_BLD: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        context_B, mask_token_B = self._marks(ids_BL)
        position_B2L = positions(context_B, mask_token_B, ids_BL.shape[1])
        return self._run(embedded_BLD, position_B2L, prefix_mask(context_B, mask_BL), None)

    def prefill(self, embedded_BLD: Tensor, ids_BL: Tensor, mask_BL: Tensor, *, room: int) -> tuple[Tensor, Cache]:
        batch_size, length = ids_BL.shape
        context_B, mask_token_B = self._marks(ids_BL)
        room = min(room, CHUNK)
        shape = (batch_size, self.num_heads, length + room, self.width // self.num_heads)
        places = self.layer_devices or [embedded_BLD.device] * len(self.layers)
        cache = Cache(
            [(embedded_BLD.new_empty(shape, device=on), embedded_BLD.new_empty(shape, device=on)) for on in places],
            seen_BS=F.pad(mask_BL, (0, room)),
            used=0,
            mask_token_B=mask_token_B,
            block_B=mask_BL.sum(dim=1) - context_B + 1,
            padded=not bool(mask_BL.all()),
        )
        position_B2L = positions(context_B, mask_token_B, length)
        hidden_BLD = self._run(embedded_BLD, position_B2L, prefix_mask(context_B, mask_BL), cache)
        cache.used = length
        row_B = torch.arange(batch_size, device=ids_BL.device)
        return hidden_BLD[row_B, mask_BL.sum(dim=1) - 1], cache

    def extend(self, ids_B: Tensor, cache: Cache) -> Tensor:
        if cache.used == cache.seen_BS.shape[1]:
            cache.grow()
        cache.seen_BS[:, cache.used] = True
        position_B2L = torch.stack([cache.mask_token_B, cache.block_B], dim=1)[:, :, None]
        mask = cache.seen_BS[:, None, None, : cache.used + 1] if cache.padded else None
        hidden_B1D = self._run(self.embed(ids_B[:, None]), position_B2L, mask, cache)
        cache.used += 1
        cache.block_B = cache.block_B + 1
        return hidden_B1D[:, 0]

    def select(self, cache: Cache, row_S: Tensor) -> None:
        for index, (key, value) in enumerate(cache.key_values):  # one after the other: two of each would be a lot
            row = row_S.to(key.device)
            cache.key_values[index] = key[row], value[row]
        for name in ("seen_BS", "mask_token_B", "block_B"):
            setattr(cache, name, getattr(cache, name)[row_S])

    # ---------------------------------------------------------------------------------------------------- the pieces

    def _marks(self, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """-> where <sop> stands, and the mask token before it"""
        is_gmask_BL = ids_BL == self.gmask_id
        is_mask_BL = is_gmask_BL | ((ids_BL == self.mask_id) & ~is_gmask_BL.any(dim=1, keepdim=True))
        return first_index(ids_BL == self.bos_id), first_index(is_mask_BL)

    def _run(self, hidden_BLD: Tensor, position_B2L: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        dtype = compute_dtype(hidden_BLD)
        cos_sin = rotation(position_B2L, self.width // self.num_heads, self.rotary_dtype, dtype)
        mask = None if mask is None else as_bias(mask, dtype)
        # whatever the mode: a frozen model is in eval mode, and the gradient still passes through it
        recompute = torch.is_grad_enabled() and self.recomputes(hidden_BLD.shape[:2].numel())
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": recompute and self.draws}
        for index in range(len(self.layers)):
            hidden_BLD, cos_sin, mask = self.on_layer_device(index, hidden_BLD, cos_sin, mask)
            if recompute:
                hidden_BLD = checkpoint(self._layer, hidden_BLD, index, cos_sin, mask, cache, **options)
            else:
                hidden_BLD = self._layer(hidden_BLD, index, cos_sin, mask, cache)
        return self.network.get_submodule("transformer.final_layernorm")(self.at_home(hidden_BLD))

    def _layer(
        self, hidden_BLD: Tensor, index: int, cos_sin: Tensor, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """SAT's block; it finds `run_block` by its hooks."""
        block: Any = self.network
        return block.hooks["layer_forward"](hidden_BLD, mask, layer_id=index, cos_sin=cos_sin, cache=cache)


def chatglm(
    *,
    hidden_size: int = 4096,
    num_layers: int = 28,
    num_heads: int = 32,
    inner_size: int = 16384,
    vocab_size: int = 130528,
    layer_norm_eps: float = 1e-5,
    tokenizer: str | None = None,
    ids: Mapping[str, int] | None = None,
    offset: int = 0,
    num_image_tokens: int = 32,
    train_sop: bool = True,
    rotary_dtype: str = "float16",
    frozen: bool = True,
    dtype: str = "float32",
    device: str = "cpu",
    initial_std: float | None = 0.02,
    checkpoint_activations: bool = False,
    checkpoint_above: int = 0,
) -> ChatGLM:
    """ChatGLM-6B, or a smaller one of its kind (`configs/model/llm/`).

    Args:
        tokenizer: `ice_text.model` or its folder; without one `ids` has to give bos, gmask and mask.
        initial_std: see `sat_network.build`; None where a checkpoint follows.
    """
    from model.llm import sat_network

    codec: ChatGLMCodec | None = None
    if tokenizer is not None:
        codec = ChatGLMCodec(tokenizer, num_image_tokens=num_image_tokens, ids=ids, offset=offset, train_sop=train_sop)
        highest = max(codec.pieces.vocab_size, *(i + 1 for i in codec.ids.values()))
        if highest > vocab_size:
            raise ValueError(f"{tokenizer} has ids up to {highest - 1}, model.llm.vocab_size is {vocab_size}")
    known = codec.ids if codec is not None else dict(ids or {})
    if not {"bos", "gmask", "mask"} <= known.keys():
        raise ValueError(f"model.llm needs a tokenizer, or ids for bos, gmask and mask; it has {sorted(known)}")
    network = sat_network.build(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        inner_size=inner_size,
        vocab_size=vocab_size,
        layer_norm_eps=layer_norm_eps,
        device=device,
        dtype=getattr(torch, dtype),
        initial_std=initial_std,
    )
    return ChatGLM(
        network.requires_grad_(not frozen),
        num_heads=num_heads,
        bos_id=known["bos"],
        gmask_id=known["gmask"],
        mask_id=known["mask"],
        codec=codec,
        rotary_dtype=rotary_dtype,
        checkpoint_activations=checkpoint_activations,
        checkpoint_above=checkpoint_above,
    )
