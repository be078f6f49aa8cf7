"""ChatGLM-6B's blocks from SwissArmyTransformer, without what SAT does beside building them.

SAT starts a process group, reseeds torch, numpy and random (to 1234) and sets cuDNN switches while it builds a model;
it initialises 6.7 billion weights on the CPU whatever device is asked for; and its linear maps are of its own class,
which neither peft nor bitsandbytes know.  All of it ends here: what comes out are ordinary modules on the device asked
for, and no trace elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.llm.chatglm_block import run_block


def build(
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    inner_size: int,
    vocab_size: int,
    layer_norm_eps: float = 1e-5,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    initial_std: float | None = 0.02,
) -> nn.Module:
    """SAT's `ChatGLMModel` with Hugging Face's names (`transformer.*`, `lm_head`).

    Args:
        initial_std: of random weights, drawn from torch's current random state; None leaves memory as it is found, for
            a checkpoint to fill.
    """
    if hidden_size % (4 * num_heads):
        raise ValueError(f"hidden_size {hidden_size} must be a multiple of 4 x num_heads {num_heads} (2-D rotary)")
    args = Namespace(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        inner_hidden_size=inner_size,
        vocab_size=vocab_size,
        layernorm_epsilon=layer_norm_eps,
        max_sequence_length=1,  # of a table of positions that ChatGLM deletes at once
        layernorm_order="post",
        model_parallel_size=1,
        skip_init=True,
        **dict.fromkeys(("bos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id"), 0),
    )
    with contained(), torch.device("meta"), _Everything("meta"):
        from sat.model.official.chatglm_model import ChatGLMModel

        network: Any = ChatGLMModel(args, params_dtype=dtype)
    network.to(dtype)
    network.lm_head = network.mixins["chatglm-final"].lm_head
    for name in ("chatglm-final", "chatglm-attn", "chatglm-layer"):
        network.del_mixin(name)
    _use_ordinary_modules(network)
    network.add_mixin("block", _block_mixin())
    network.transformer.hooks.update(network.hooks)
    if torch.device(device).type != "meta":
        network.to_empty(device=device)
        if initial_std is not None:
            initialise(network, initial_std)
    return network


@torch.no_grad()
def initialise(network: nn.Module, std: float) -> None:
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, std)
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            module.bias.zero_()


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Inside, SAT builds models without a process group; afterwards random states and switches are as before."""
    os.environ.setdefault("SAT_LOGLEVEL", "WARNING")  # SAT and DeepSpeed say hello; a command's output is not theirs
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no other
    with contextlib.redirect_stdout(sys.stderr):
        import sat.arguments
        import sat.model.transformer
        import sat.mpu.layers

    switches = {name: getattr(torch.backends.cudnn, name) for name in ("benchmark", "deterministic", "enabled")}
    tf32 = torch.backends.cuda.matmul.allow_tf32
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - SAT reseeds the global ones
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    alone = {"get_model_parallel_world_size": lambda: 1, "get_model_parallel_rank": lambda: 0}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(mock.patch.object(sat.arguments, "_simple_init", lambda **_: False))
        for module in (sat.model.transformer, sat.mpu.layers):
            for name, replacement in alone.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, replacement))
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            for name, value in switches.items():
                setattr(torch.backends.cudnn, name, value)
            torch.backends.cuda.matmul.allow_tf32 = tf32


class _Everything(TorchFunctionMode):
    """SAT names the CPU in so many words, which `torch.device("meta")` as a context does not overrule."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = self.device
        return func(*args, **kwargs)


def _use_ordinary_modules(network: Any) -> None:
    from sat.mpu.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            weight = getattr(child, "weight", None)
            if isinstance(child, ColumnParallelLinear | RowParallelLinear):
                assert isinstance(weight, Tensor)
                bias = child.bias is not None
                new = nn.Linear(child.input_size, child.output_size, bias=bias, device="meta", dtype=weight.dtype)
                setattr(parent, name, new)
            elif isinstance(child, VocabParallelEmbedding):
                assert isinstance(weight, Tensor)
                rows, width = weight.shape
                setattr(parent, name, nn.Embedding(rows, width, device="meta", dtype=weight.dtype))
    for layer in network.transformer.layers:
        layer.mlp.activation_func = partial(F.gelu, approximate="tanh")  # SAT spells it out: 8 tensors kept for one


def _block_mixin() -> Any:
    from sat.model.base_model import BaseMixin

    class Block(BaseMixin):
        def layer_forward(self, hidden_states: Tensor, mask: Tensor | None, **given: Any) -> Tensor:
            index, cache, layers = given["layer_id"], given["cache"], self.transformer.layers
            cached = None if cache is None else (*cache.key_values[index], cache.used)
            alpha = (2 * len(layers)) ** 0.5
            return run_block(layers[index], hidden_states, mask, given["cos_sin"], cached, alpha=alpha)

    return Block()
