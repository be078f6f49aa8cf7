"""Linear maps in 4 bits (NF4, arXiv 2305.14314), through bitsandbytes, on CUDA and on a CPU.

Shape letters   N = any number of positions   I, O = a linear map's inputs and outputs
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64  # weights that share a scale


def shape_like_quantised(
    network: nn.Module, targets: Sequence[str], *, device: torch.device, double_quantisation: bool = True
) -> None:
    """Maps on the meta device become 4-bit ones that quantise their weights as they arrive (`receive`)."""
    for parent, name, linear in _linears(network, targets):
        if linear.weight.is_meta:
            setattr(parent, name, nf4_class()(linear, device=device, double_quantisation=double_quantisation))


def quantise_linears(
    network: nn.Module, targets: Sequence[str], *, device: torch.device, double_quantisation: bool = True
) -> None:
    """Maps that hold their weights already are quantised one after the other, each on `device`."""
    for parent, name, linear in _linears(network, targets):
        if not linear.weight.is_meta:
            quantised = nf4_class()(linear, device=device, double_quantisation=double_quantisation)
            setattr(parent, name, quantised)
            for kind, parameter in linear.named_parameters():
                quantised.receive(kind, parameter.data)
    network.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft asks for it


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
            tensor = tensor.detach().to(self.source_dtype)
            if kind == "bias":
                self.bias = nn.Parameter(tensor.to(self.home), requires_grad=False)
                return
            whole = Params4bit(
                tensor.contiguous(),
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
