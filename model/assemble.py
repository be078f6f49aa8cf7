"""Stage two's model from the nodes of a config: for training and for talking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from model.build import build
from model.llm.base import LanguageModel
from model.rehearsal import rehearse
from model.vision.encoder import ImageEncoder
from model.visual_chat import VisualChatModel
from model.weights import stage_two
from model.weights.filling import Home, LoadReport, send_home

EVA = "model.vision.encoder.eva_vit"


def language_model(nodes: Mapping[str, Any], **changes: Any) -> LanguageModel | partial[Any]:
    """The language model of a config's `model`, or what warms one up (`_partial_`).

    Where a checkpoint brings its weights it is built without memory, and gets it as they arrive (`assemble`).

    Args:
        changes: of the node, where a checkpoint brings the weights.
    """
    node = nodes["llm"]
    if not node.get("_partial_") and any(nodes["weights"].get(key) for key in stage_two.LANGUAGE_MODEL):
        changes |= {"device": "meta", "initial_std": None}
        return build(node, **changes)
    return build(node)


def image_encoder(nodes: Mapping[str, Any]) -> ImageEncoder:
    """The image encoder of a config's `model`; without memory too, where it is frozen and a file has to bring it whole.

    One that an adapter is put on has memory: adapters are drawn in its precision, and that shall be float32.
    """
    node, adapted = nodes["vision"], nodes.get("adapter", {}).get("parts", ())
    brought = any(nodes["weights"].get(key) for key in stage_two.ENCODER)
    if brought and node.get("frozen", True) and "vision" not in adapted and node["_target_"] == EVA:
        encoder: ImageEncoder = build(node, device="meta")
        return encoder
    return build(node)


def assemble(
    nodes: Mapping[str, Any],
    llm: LanguageModel,
    *,
    device: torch.device,
    home: Home | None = None,
    check: Callable[[VisualChatModel], object] | None = None,
) -> tuple[VisualChatModel, LoadReport]:
    """Stage two's model around a language model: its starting weights, then what is put on it to learn.

    Args:
        nodes: a config's `model`: vision, qformer, visual_chat, weights and adapter.
        device: where linear maps are quantised, if any are.
        home: where weights live that were built without memory; None is `device`.
        check: called before any file of weights is read, with what the model will be (`rehearse`).
    Returns:
        The model, and what became of every tensor.
    """
    adapter = build(nodes["adapter"])
    adapter.check(llm)
    vision = image_encoder(nodes)
    # the Q-Former's text side is taken out, so its vocabulary may be anything
    qformer = build(nodes["qformer"], vocab_size=1, pad_id=0, image_width=vision.width)
    model: VisualChatModel = build(nodes["visual_chat"], vision=vision, qformer=qformer, llm=llm)
    if check is not None:
        check(rehearse(model, adapter))
    adapter.prepare(model, device=device)
    send_home(model, home or Home(device))
    report = build(nodes["weights"])(model)
    adapter.attach(model, device=device)
    return model, report
