"""Linear maps in 4 bits (NF4, arXiv 2305.14314) or 8 (LLM.int8(), arXiv 2208.07339), through bitsandbytes, on CUDA and
on a CPU.

Shape letters   N = any number of positions   I, O = a linear map's inputs and outputs
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64  # weights that share a scale
OUTLIER = 6.0  # inputs beyond it are not computed in 8 bits (arXiv 2208.07339 section 3.2)


def shape_like_quantised(
    network: nn.Module, targets: Sequence[str], *, device: torch.device, double_quantisation: bool = True, bits: int = 4
) -> None:
    """Maps on the meta device become ones of few bits that quantise their weights as they arrive (`receive`)."""
    for parent, name, linear in _linears(network, targets):
        if linear.weight.is_meta:
            setattr(parent, name, _quantised(linear, bits, device, double_quantisation))


def quantise_linears(
    network: nn.Module, targets: Sequence[str], *, device: torch.device, double_quantisation: bool = True, bits: int = 4
) -> None:
    """Maps that hold their weights already are quantised one after the other, each on `device`."""
    for parent, name, linear in _linears(network, targets):
        if not linear.weight.is_meta:
            quantised = _quantised(linear, bits, device, double_quantisation)
            setattr(parent, name, quantised)
            for kind, parameter in linear.named_parameters():
                quantised.receive(kind, parameter.data)
    setattr(network, f"is_loaded_in_{bits}bit", True)  # peft asks for it


def _quantised(linear: nn.Linear, bits: int, device: torch.device, double_quantisation: bool) -> Any:
    if bits == 8:
        return int8_class()(linear, device=device)
    return nf4_class()(linear, device=device, double_quantisation=double_quantisation)


def _linears(network: nn.Module, targets: Sequence[str]) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The maps to quantise that are not yet."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if name in targets and type(child) is nn.Linear:
                yield parent, name, child


@cache
def nf4_class() -> Any:
    """The class, made when bitsandbytes is asked for: it takes a second to import."""
    import bitsandbytes
    from bitsandbytes.nn import Linear4bit, Params4bit

    class NF4Linear(Linear4bit):
        """bitsandbytes' 4-bit linear map, but filled tensor by tensor, and computing as autocast says.

        bitsandbytes' own forward returns the dtype of its input (fp32 behind a norm under autocast, twice the memory),
        and on some CPUs repacks the weights at the first evaluation, after which nothing trains.
        """

        def __init__(self, like: nn.Linear, *, device: torch.device, double_quantisation: bool) -> None:
            if device.type == "cpu" and like.in_features % BLOCK:
                raise ValueError(
                    f"a linear map of {like.in_features} inputs cannot be kept in 4 bits on a CPU, where bitsandbytes "
                    f"reads blocks of {BLOCK} wrongly unless they end with a row: make the widths multiples of {BLOCK}"
                )
            super().__init__(
                like.in_features,
                like.out_features,
                bias=like.bias is not None,
                compress_statistics=double_quantisation,
                quant_type="nf4",
                device="meta",
            )
            self.home, self.double_quantisation, self.source_dtype = device, double_quantisation, like.weight.dtype
            self.requires_grad_(False)
            self.train(like.training)

        def receive(self, kind: str, tensor: Tensor) -> None:
            """`weight` (O, I) or `bias` (O,), in the dtype that the network was built in."""
            tensor = tensor.detach()
            if kind == "bias":  # copied: a view of a file would keep the whole of it
                self.bias = nn.Parameter(tensor.to(self.home, self.source_dtype, copy=True), requires_grad=False)
                return
            whole = Params4bit(
                tensor.to(self.source_dtype).contiguous(),
                requires_grad=False,
                compress_statistics=self.double_quantisation,
                quant_type="nf4",
                module=self,
            )
            self.weight = whole.to(self.home)  # this is what quantises

        def forward(self, x_NI: Tensor) -> Tensor:
            device = x_NI.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_NI.dtype
            bias = None if self.bias is None else self.bias.to(dtype)
            with torch.autocast(device, enabled=False):
                return bitsandbytes.matmul_4bit(
                    x_NI.to(dtype), self.weight, bias=bias, quant_state=self.weight.quant_state
                )

        def whole_weight(self) -> Tensor:
            """(O, I), as it computes."""
            return bitsandbytes.functional.dequantize_4bit(self.weight.data, self.weight.quant_state)

    return NF4Linear


@cache
def int8_class() -> Any:
    """As `nf4_class`; rows of weights and positions have a scale each, and what is far out of a position's range is
    computed in 16 bits."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    class Int8Linear(Linear8bitLt):
        def __init__(self, like: nn.Linear, *, device: torch.device) -> None:
            super().__init__(
                like.in_features,
                like.out_features,
                bias=like.bias is not None,
                has_fp16_weights=False,
                threshold=OUTLIER,
                device="meta",
            )
            self.home, self.source_dtype = device, like.weight.dtype
            self.requires_grad_(False)
            self.train(like.training)

        def receive(self, kind: str, tensor: Tensor) -> None:
            """`weight` (O, I) or `bias` (O,)"""
            tensor = tensor.detach()
            if kind == "bias":
                self.bias = nn.Parameter(tensor.to(self.home, self.source_dtype, copy=True), requires_grad=False)
                return
            whole = Int8Params(tensor.cpu().contiguous(), requires_grad=False, has_fp16_weights=False)
            self.weight = whole.to(self.home)  # this is what quantises, on the way from the CPU

        def forward(self, x_NI: Tensor) -> Tensor:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
                return super().forward(x_NI)

    return Int8Linear
