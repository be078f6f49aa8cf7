"""A run of stage one -> its model as it was trained, and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model.adapter import refuse_empty
from model.assemble import image_encoder
from model.build import build
from model.image_text import ImageTextModel
from model.load import moved
from model.weights import ours
from model.weights.checkpoint import open_file
from model.weights.filling import Home, LoadReport, send_home


def assemble_image_text(
    nodes: Mapping[str, Any],
    codec: Any,
    home: Home | None = None,
    check: Callable[[ImageTextModel], object] | None = None,
) -> tuple[ImageTextModel, LoadReport]:
    """Stage one's model with its starting weights, and what became of every tensor.

    Args:
        home: where a frozen encoder lives whose weights come from a file; None is the CPU.
        check: called with the model before any file of weights is read.
    """
    vision = image_encoder(nodes)
    qformer = build(nodes["qformer"], vocab_size=codec.vocab_size, pad_id=codec.pad_id, image_width=vision.width)
    model: ImageTextModel = build(nodes["image_text"], vision=vision, qformer=qformer)
    if check is not None:
        check(model)
    send_home(model, home or Home())
    report = build(nodes["weights"])(model)
    refuse_empty(model)
    return model, report


def load(config: Mapping[str, Any], run: Path, checkpoint: str) -> tuple[ImageTextModel, Any, Path | None]:
    """
    Args:
        config: the run's, resolved.
        run: its folder; or the config's file, for starting weights alone.
        checkpoint: "newest", "best", a name like "step_300", or "none" for the weights that a run begins with.
    Returns:
        model, tokenizer, and the file of the checkpoint's weights
    Raises:
        ValueError: no such checkpoint, frozen weights that are not those it was trained with, a lost tokenizer.
    """
    file = None if checkpoint == "none" else ours.find(run, checkpoint)
    home = run.parent if run.is_file() else run
    nodes = moved(config["model"], config["run"]["dir"], home)
    codec = build(nodes["tokenizer"])
    if isinstance(codec, partial):  # one that the run trained on its own captions
        codec = codec(texts=None, folder=home / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["run"]["seed"])  # what no file has was drawn so when the run began
        model, _ = assemble_image_text(nodes, codec)
    if file is not None:
        ours.check_frozen(model, file.parent)
        ours.load_trained(model, open_file(file).without_prefix("model."))
    return model, codec, file
