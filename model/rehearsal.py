"""What a model will be once its adapters are on, by names and sizes alone: mistakes show before weights are read."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model.adapter import Adapter, Lora
from model.visual_chat import VisualChatModel


def rehearse(model: VisualChatModel, adapter: Adapter) -> VisualChatModel:
    """A copy without memory, with the adapter on; the model, and torch's generator, stay as they are."""
    if isinstance(adapter, Lora):
        adapter = replace(adapter, dora=False)  # its magnitudes are worked out from weights, which are not there
    outline = _outline(model)
    with torch.random.fork_rng(devices=[]):
        adapter.put_on(outline)
    return outline


def _outline(model: VisualChatModel) -> VisualChatModel:
    """deepcopy takes for copied what its memo names."""
    memo: dict[int, Any] = {id(model.llm.codec): model.llm.codec}
    memo |= {id(parameter): _empty(parameter) for parameter in model.parameters()}
    memo |= {id(buffer): buffer.detach().to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    tensor: Tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)
