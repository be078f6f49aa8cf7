"""Stage two's model from the nodes of a config: for training and for talking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from model.build import build
from model.llm.base import LanguageModel
from model.visual_chat import VisualChatModel
from model.weights.filling import LoadReport


def assemble(
    nodes: Mapping[str, Any], llm: LanguageModel, *, device: torch.device
) -> tuple[VisualChatModel, LoadReport]:
    """Stage two's model around a language model: its starting weights, then what is put on it to learn.

    Args:
        nodes: a config's `model`: vision, qformer, visual_chat, weights and adapter.
        device: where linear maps are quantised, if any are.
    Returns:
        The model, and what became of every tensor.
    """
    vision = build(nodes["vision"])
    # the Q-Former's text side is taken out, so its vocabulary may be anything
    qformer = build(nodes["qformer"], vocab_size=1, pad_id=0, image_width=vision.width)
    model: VisualChatModel = build(nodes["visual_chat"], vision=vision, qformer=qformer, llm=llm)
    adapter = build(nodes["adapter"])
    adapter.prepare(model, device=device)
    report = build(nodes["weights"])(model)
    adapter.attach(model, device=device)
    return model, report
