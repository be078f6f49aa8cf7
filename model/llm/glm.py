"""ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B through transformers' own `GlmForCausalLM`: no remote code.

The three compute alike and differ in sizes, tokenizer and prompt: `chatglm2.py`, `chatglm3.py`, `glm4.py`.  Adapters
have the names of transformers' GLM layout (`q_proj`, ..., `gate_up_proj`), not those of the original folders
(`query_key_value`, `dense_h_to_4h`); `model/weights/glm.py` converts weights between the two.

Shape letters   B = rows   L = length   D = width   E = size of a head   T = any positions   V = vocabulary
                S = keys seen, cached ones included   R = pairs of dimensions that turn (E / 4)
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.llm.base import LanguageModel
from model.llm.glm_codec import GlmCodec

ROTATED = 0.5  # the share of every head that turns with its position


@dataclass
class Cache:
    """Keys and values of everything seen."""

    key_values: Any  # transformers' own
    seen_BS: Tensor  # bool: real tokens
    position_B: Tensor  # of the next token
    padded: bool  # some row has padding between its prompt and what comes


class Glm(LanguageModel):
    """See the module's docstring and `model.llm.base.LanguageModel`.

    The mask is causal and padding is on the right, so no real token sees any: attention needs no mask until padded rows
    are added to, and runs through the causal fused kernel.
    """

    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")

    def __init__(
        self,
        network: nn.Module,
        *,
        codec: GlmCodec | None = None,
        checkpoint_activations: bool = False,
        checkpoint_above: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.codec = network, codec
        self.vocab_size, self.width = self.config.vocab_size, self.config.hidden_size
        self.checkpoint_activations, self.checkpoint_above = checkpoint_activations, checkpoint_above

    @property
    def config(self) -> Any:
        """transformers' `GlmConfig`"""
        return self.network.config

    @property
    def layers(self) -> nn.ModuleList:
        found = self.network.get_submodule("model.layers")
        assert isinstance(found, nn.ModuleList)
        return found

    def embed(self, ids_BL: Tensor) -> Tensor:
        return self.network.get_submodule("model.embed_tokens")(ids_BL)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        return self.network.get_submodule("lm_head")(hidden_TD)

    def hidden(self, embedded_BLD: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        return self._run(embedded_BLD, _from_zero(ids_BL), None, None)

    def prefill(self, embedded_BLD: Tensor, ids_BL: Tensor, mask_BL: Tensor, *, room: int) -> tuple[Tensor, Cache]:
        from transformers import DynamicCache

        num_real_B = mask_BL.sum(dim=1)
        cache = Cache(DynamicCache(config=self.config), mask_BL, num_real_B, padded=not bool(mask_BL.all()))
        hidden_BLD = self._run(embedded_BLD, _from_zero(ids_BL), None, cache.key_values)
        return hidden_BLD[torch.arange(len(ids_BL), device=ids_BL.device), num_real_B - 1], cache

    def extend(self, ids_B: Tensor, cache: Cache) -> Tensor:
        cache.seen_BS = F.pad(cache.seen_BS, (0, 1), value=True)
        mask = cache.seen_BS[:, None, None, :] if cache.padded else None
        hidden_B1D = self._run(self.embed(ids_B[:, None]), cache.position_B[:, None], mask, cache.key_values)
        cache.position_B = cache.position_B + 1
        return hidden_B1D[:, 0]

    def select(self, cache: Cache, row_S: Tensor) -> None:
        for layer in cache.key_values.layers:
            layer.batch_select_indices(row_S.to(layer.keys.device))
        cache.seen_BS, cache.position_B = cache.seen_BS[row_S], cache.position_B[row_S]

    def _run(self, hidden_BLD: Tensor, position_BL: Tensor, mask: Tensor | None, key_values: Any) -> Tensor:
        """What `GlmModel.forward` does, with our own angles and our own choice of what to recompute."""
        on = hidden_BLD.device.type
        autocast = on != "meta" and torch.is_autocast_enabled(on)
        cos, sin = rotation(position_BL, self.config, torch.get_autocast_dtype(on) if autocast else hidden_BLD.dtype)
        # whatever the mode: a frozen model is in eval mode, and the gradient still passes through it; and with adapters
        # on frozen embeddings, what comes in needs no gradient
        recompute = torch.is_grad_enabled() and self.recomputes(hidden_BLD.shape[:2].numel())
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": recompute and self.draws}
        for index, layer in enumerate(self.layers):
            hidden_BLD, cos, sin, mask = self.on_layer_device(index, hidden_BLD, cos, sin, mask)
            rest = {"attention_mask": mask, "position_embeddings": (cos, sin), "past_key_values": key_values}
            if recompute:
                hidden_BLD = checkpoint(layer, hidden_BLD, **options, **rest)
            else:
                hidden_BLD = layer(hidden_BLD, **rest)
        return self.network.get_submodule("model.norm")(self.at_home(hidden_BLD))


def rotation(position_BL: Tensor, config: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """-> cos_BL(2R), sin_BL(2R) as transformers' GLM layers take them: R angles, twice.

    Computed from the configuration each time: the network's own frequencies are a buffer, which `.to(bfloat16)` rounds
    and `to_empty` loses.
    """
    rope = config.rope_parameters
    size = int(config.head_dim * rope["partial_rotary_factor"])
    exponent_R = torch.arange(0, size, 2, device=position_BL.device).float() / size
    frequency_R = 1.0 / (rope["rope_theta"] ** exponent_R * rope.get("factor", 1.0))
    angle_BLR = position_BL[..., None].float() * frequency_R
    angle = torch.cat([angle_BLR, angle_BLR], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def glm_config(
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    inner_size: int,
    vocab_size: int,
    norm_eps: float,
    qkv_bias: bool = True,
    rope_base: float = 10000.0,
    rope_interpolation: float = 1.0,
    tied_head: bool = False,
    initial_std: float = 0.02,
) -> Any:
    """transformers' `GlmConfig` for these sizes.

    Args:
        rope_base: 10000 times the rope_ratio of ChatGLM3's and GLM-4's config.json.
        rope_interpolation: what positions are divided by, the rope_ratio of ChatGLM2's long variant.
    Raises:
        ValueError: sizes that cannot be.
    """
    from transformers import GlmConfig

    if num_heads % num_kv_heads or head_size % 4:
        raise ValueError(
            f"model.llm.num_kv_heads={num_kv_heads} has to divide num_heads={num_heads}, and head_size={head_size} has "
            f"to be a multiple of 4: half of it turns, in pairs"
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": rope_base, "partial_rotary_factor": ROTATED}
    if rope_interpolation != 1.0:
        rope |= {"rope_type": "linear", "factor": rope_interpolation}
    return GlmConfig(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_size,
        intermediate_size=inner_size,
        vocab_size=vocab_size,
        rms_norm_eps=norm_eps,
        attention_bias=qkv_bias,
        rope_parameters=rope,
        tie_word_embeddings=tied_head,
        initializer_range=initial_std,
        pad_token_id=None,  # with one, torch would keep the gradient from that row of the embedding
        eos_token_id=[],  # the codec's business
        use_cache=False,
    )


def glm(
    make_codec: Callable[..., GlmCodec],
    *,
    rope_base: float = 10000.0,
    rope_interpolation: float = 1.0,
    hidden_size: int = 4096,
    num_layers: int = 28,
    num_heads: int = 32,
    num_kv_heads: int = 2,
    head_size: int = 128,
    inner_size: int = 13696,
    vocab_size: int = 65024,
    norm_eps: float = 1e-5,
    qkv_bias: bool = True,
    tied_head: bool = False,
    tokenizer: str | None = None,
    num_image_tokens: int = 32,
    frozen: bool = True,
    dtype: str = "float32",
    device: str = "cpu",
    initial_std: float | None = 0.02,
    checkpoint_activations: bool = False,
    checkpoint_above: int = 0,
) -> Glm:
    """A model of any of the families; each family's file says what its `rope_ratio` means.

    Args:
        make_codec: the family's codec, from `tokenizer` and `num_image_tokens`.
        rope_base, rope_interpolation: see `glm_config`.
        tokenizer: its file or folder; without one there is a network, and nobody to talk to.
        num_image_tokens: positions of one picture.
        initial_std: of random weights, drawn from torch's generator; None leaves memory as it is, where a checkpoint
            follows.
    Raises:
        ValueError: a tokenizer with more ids than the network has; sizes that cannot be.
    """
    codec = None if tokenizer is None else make_codec(tokenizer, num_image_tokens=num_image_tokens)
    if codec is not None and codec.num_ids > vocab_size:
        raise ValueError(f"the tokenizer has ids up to {codec.num_ids - 1}, model.llm.vocab_size is {vocab_size}")
    config = glm_config(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        inner_size=inner_size,
        vocab_size=vocab_size,
        norm_eps=norm_eps,
        qkv_bias=qkv_bias,
        rope_base=rope_base,
        rope_interpolation=rope_interpolation,
        tied_head=tied_head,
        initial_std=initial_std or 0.0,
    )
    network = _network(config, dtype=dtype, device=device, random=initial_std is not None)
    return Glm(
        network.requires_grad_(not frozen).eval(),
        codec=codec,
        checkpoint_activations=checkpoint_activations,
        checkpoint_above=checkpoint_above,
    )


def _network(config: Any, *, dtype: str, device: str, random: bool) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device(device), nullcontext() if random else no_init_weights():
        network = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    tie(network)  # transformers does so while it draws weights, which may be left out
    rotary = network.model.rotary_emb
    with torch.device("cpu"):  # no checkpoint brings its frequencies: on the meta device they would stay there
        network.model.rotary_emb = type(rotary)(config)
    return network


def family(**defaults: Any) -> Callable[[Callable[..., Glm]], Callable[..., Glm]]:
    """For a family's function: gives it the parameters of `glm` that it passes on as `**rest`, with these defaults.

    The parameters of `glm` become a part of the signature, since configs are checked against signatures; the `rope_`
    ones do not: each family says in words of its own how its positions turn.
    """

    def decorate(own: Callable[..., Glm]) -> Callable[..., Glm]:
        own_parameters, own_hints = inspect.signature(own).parameters, typing.get_type_hints(own)
        shared_parameters, shared_hints = inspect.signature(glm).parameters, typing.get_type_hints(glm)
        shared = {
            name: parameter.replace(default=defaults.get(name, parameter.default))
            for name, parameter in shared_parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and not name.startswith("rope_")
        }
        assert defaults.keys() <= shared.keys(), defaults
        kept = [parameter for parameter in own_parameters.values() if parameter.kind is parameter.KEYWORD_ONLY]
        signature = inspect.Signature([*kept, *shared.values()])

        @functools.wraps(own)
        def build(**given: Any) -> Glm:
            signature.bind(**given)  # TypeError for what is no parameter
            return own(**{**defaults, **given})

        build.__signature__ = signature  # type: ignore[attr-defined]
        build.__annotations__ = {**own_hints, **{name: shared_hints[name] for name in shared}}
        return build

    return decorate


def tie(network: Any) -> None:
    """Makes the output head the words' embedding, where the configuration says so."""
    if network.config.tie_word_embeddings:
        network.lm_head.weight = network.model.embed_tokens.weight


def _from_zero(ids_BL: Tensor) -> Tensor:
    """-> position_1L, the same for all rows"""
    return torch.arange(ids_BL.shape[1], device=ids_BL.device)[None]
