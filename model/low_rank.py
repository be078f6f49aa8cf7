"""A LoRA layer's output and gradient in few steps: y = W x + b + s B A x on a frozen W.

peft's own forward casts a bf16 input to fp32 (which autocast undoes), and multiplies and adds whole outputs apart; with
four maps in each of 28 blocks that is a third of a step's kernels, and on a small batch a step is as long as its list
of kernels.  The layers stay peft's: they are saved, merged and switched off as ever.

Shape letters   N = rows   I, O = a map's inputs and outputs   R = rank
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.autocast import compute_dtype


class _LowRank(torch.autograd.Function):
    """With `weight_OI` the frozen map is part of it, and the gradient of x is made in one sum; without (it is kept in 4
    bits) `y_NO` is what the map made of `x_NI`."""

    @staticmethod
    def forward(ctx, x_NI, y_NO, weight_OI, bias_O, a_RI, b_OR, scale):  # type: ignore[no-untyped-def]
        low_RI, up_OR = a_RI.to(x_NI.dtype), b_OR.to(x_NI.dtype)
        if weight_OI is not None:
            y_NO = F.linear(x_NI, weight_OI, bias_O)
        seen_NR = torch.mm(x_NI, low_RI.t()).mul_(scale)
        ctx.save_for_backward(x_NI, weight_OI, seen_NR, low_RI, up_OR)
        ctx.scale, ctx.dtypes = scale, (a_RI.dtype, b_OR.dtype)
        return torch.addmm(y_NO, seen_NR, up_OR.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, g_NO):  # type: ignore[no-untyped-def]
        x_NI, weight_OI, seen_NR, low_RI, up_OR = ctx.saved_tensors
        wants_x, wants_y = ctx.needs_input_grad[:2]
        g_NR = torch.mm(g_NO, up_OR).mul_(ctx.scale)
        g_x = None
        if wants_x:
            g_x = torch.mm(g_NR, low_RI) if weight_OI is None else torch.addmm(g_NO @ weight_OI, g_NR, low_RI)
        g_a = torch.mm(g_NR.t(), x_NI).to(ctx.dtypes[0])
        g_b = torch.mm(g_NO.t(), seen_NR).to(ctx.dtypes[1])
        return g_x, g_NO if wants_y else None, None, None, g_a, g_b, None


def shorten(root: nn.Module, adapter: str) -> None:
    """All LoRA layers of peft's in `root` compute as above, wherever that is what they would compute."""
    from peft.tuners.lora import LoraLayer

    for module in root.modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear):
            module.only_adapter = adapter
            module.forward = types.MethodType(_forward, module)  # a method, so that a copy has its own


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or not _is_plain(layer):
        return type(layer).forward(layer, x, *args, **kwargs)
    name, base = layer.only_adapter, layer.base_layer
    a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    dtype = compute_dtype(x)
    x_NI = x.to(dtype).flatten(0, -2)
    if type(base) is nn.Linear and base.weight.dtype == dtype and not base.weight.requires_grad:
        out_NO = _LowRank.apply(x_NI, None, base.weight, base.bias, a, b, scale)
    else:
        out_NO = _LowRank.apply(x_NI, base(x_NI).to(dtype), None, None, a, b, scale)
    return out_NO.unflatten(0, x.shape[:-1])


def _is_plain(layer: Any) -> bool:
    """One adapter, on and not merged; no DoRA, no dropout now; and whole weights, which ZeRO-3 gathers for a module's
    own forward alone."""
    name = layer.only_adapter
    dropout = layer.lora_dropout[name]
    return (
        layer.active_adapters == [name]
        and not (layer.disable_adapters or layer.merged or layer.lora_variant)
        and not (dropout.training and getattr(dropout, "p", 0.0))
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
        and not hasattr(layer.lora_B[name].weight, "ds_id")
    )
