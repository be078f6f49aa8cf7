"""Where the query tokens of a run's newest checkpoint look, drawn over pictures of its evaluators.

Shape letters   Q = query tokens   R = rows and columns of patches   S = pixels of a side   C, H, W = image
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from model.attention_map import cross_attention_weights, on_patches
from train.evaluator.picture import spread
from train.report.records import RunRecord
from train.report.samples import Samples

TILE = 144  # pixels of a drawn map
CLEAR = 4.0


@dataclass(frozen=True)
class Look:
    """One picture.

    layers    all queries together, layer by layer
    queries   each query in the last layer that looks
    elsewhere the share of the last layer's weight that lies on tokens which are no patch (class token, registers)
    """

    name: str
    picture: Image.Image
    layers: tuple[Image.Image, ...]
    queries: tuple[Image.Image, ...]
    elsewhere: float


@dataclass(frozen=True)
class Looks:
    checkpoint: str
    pictures: tuple[Look, ...]
    num_heads: int
    problem: str = ""  # why there are none


def look(run: RunRecord, samples: Callable[[str], Samples], *, number: int, device: str, large: bool) -> Looks:
    """`number` pictures, evenly from the first evaluator that has some.

    Args:
        large: also where the run stands on published weights of a language model, which fill a computer's memory.
    """
    weights = run.setting("model.weights", {}) or {}
    published = [str(weights[key]) for key in ("llm", "visualglm") if weights.get(key)]
    if published and not large:
        return Looks("", (), 0, f"left out, since {published[0]} would have to be loaded: --attention yes asks for it")
    chosen = _pictures(run, samples, number)
    if not chosen:
        return Looks("", (), 0, "no evaluator of this run has pictures that can be read here")
    try:
        model, checkpoint = _load(run, device)
    except (ValueError, OSError, KeyError, ImportError) as error:
        return Looks("", (), 0, f"no checkpoint can be loaded: {error}")
    image_BCHW = torch.stack([image for _, _, image in chosen]).to(next(model.parameters()).device)
    with torch.no_grad():
        memory = model.qformer.look(model.ln_vision(model.vision(image_BCHW)))
        found = [on_patches(weight_BAQM) for weight_BAQM in cross_attention_weights(model.qformer, memory)]
    made = []
    for place, (name, picture, image_CHW) in enumerate(chosen):
        layers = tuple(overlay(image_CHW, map_BQRR[place].mean(dim=0)) for map_BQRR, _ in found)
        map_BQRR, other_BQ = found[-1]
        queries = tuple(overlay(image_CHW, map_RR) for map_RR in map_BQRR[place])
        made.append(Look(name, picture, layers, queries, float(other_BQ[place].mean())))
    return Looks(checkpoint, tuple(made), int(model.qformer.num_heads))


def overlay(image_CHW: Tensor, map_RR: Tensor, side: int = TILE) -> Image.Image:
    """A map over its picture in grey: dark is 0, bright the map's maximum, or CLEAR times its mean where that is more:
    a query that looks everywhere alike looks dim, and not as if it had chosen everything."""
    from matplotlib import colormaps

    values_RR = (map_RR / torch.maximum(map_RR.max(), CLEAR * map_RR.mean()).clamp_min(1e-12)).float().cpu().numpy()
    resized = Image.fromarray(values_RR, mode="F").resize((side, side), Image.Resampling.BICUBIC)
    value_SS = np.clip(np.asarray(resized), 0.0, 1.0)
    heat_SS3 = colormaps["inferno"](value_SS)[..., :3]
    picture = Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy()).resize((side, side))
    grey_SS1 = np.asarray(ImageOps.autocontrast(picture.convert("L"), cutoff=0.5), np.float32)[..., None] / 255.0
    share = 0.62
    mixed_SS3 = share * heat_SS3 + (1.0 - share) * grey_SS1
    return Image.fromarray(np.rint(255.0 * mixed_SS3).astype(np.uint8))


def sheet(look: Look) -> Image.Image:
    """One picture with its layers above and its queries below, for wandb and for papers."""
    from train.evaluator.picture import INK, PAPER, font

    gap, text = 8, 20
    columns = max(len(look.layers) + 1, min(8, len(look.queries)))
    rows = -(-len(look.queries) // columns)
    size = (columns * (TILE + gap) + gap, (1 + rows) * (TILE + gap + text) + gap)
    canvas = Image.new("RGB", size, PAPER)
    from PIL import ImageDraw

    pen = ImageDraw.Draw(canvas)
    top_row = [("picture", ImageOps.fit(look.picture, (TILE, TILE)))]
    top_row += [(f"all, layer {number}", tile) for number, tile in enumerate(look.layers, start=1)]
    tiles = [(place, 0, *named) for place, named in enumerate(top_row)]
    tiles += [(q % columns, 1 + q // columns, f"query {q + 1}", tile) for q, tile in enumerate(look.queries)]
    for column, row, name, tile in tiles:
        left, top = gap + column * (TILE + gap), gap + row * (TILE + gap + text)
        canvas.paste(tile, (left, top))
        pen.text((left, top + TILE + 2), name, font=font(13), fill=INK)
    return canvas


def _load(run: RunRecord, device: str) -> tuple[Any, str]:
    """-> model with vision, ln_vision and qformer, and the checkpoint's name"""
    from model.weights import ours

    if "image_text" in (run.setting("model", {}) or {}):
        from model.load_image_text import load as load_stage_one

        model, _, file = load_stage_one(run.config, run.folder, "newest")
        return model.to(device).eval(), file.parent.name if file is not None else ""
    from model.load import load as load_stage_two

    name = ours.find(run.folder, "newest").parent.name
    return load_stage_two(run.folder, device=device), name


def _pictures(run: RunRecord, samples: Callable[[str], Samples], number: int) -> list[tuple[str, Image.Image, Tensor]]:
    names: Sequence[str] = [*(run.setting("train.evaluator", {}) or {})]
    for made in run.predictions:
        names = [*names, *made.nodes]
    for name in dict.fromkeys(names):
        source = samples(name)
        for language in source.languages:
            found = []
            size = source.num_samples(language)
            for index in spread(size, 4 * number):  # some dialogues have no picture
                read = source.pixels(language, index)
                if read is not None:
                    found.append((f"{name}, {language}, sample {index}", *read))
            if found:
                return [found[place] for place in spread(len(found), number)]
    return []
