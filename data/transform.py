"""Raw sample -> (picture, caption): what is random here is keyed by the sample's place in the run.

Shape letters   C, H, W = image.  Pictures stay uint8: mean and deviation belong to the image encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.caption import clean_caption, draw_caption, is_empty, whole_characters
from data.decode import MAX_PIXELS, open_image, resize
from data.source import BadSample, RawSample

# (sample, language, generator) -> uint8 CHW and the cleaned caption; raises BadSample
Transform = Callable[[RawSample, str, np.random.Generator], tuple[Tensor, str]]


class PictureTransform(Protocol):
    """What dialogues ask of a transform: their words are left as they are."""

    @property
    def image_size(self) -> int: ...

    def picture(self, image: bytes | Image.Image | np.ndarray, rng: np.random.Generator) -> Tensor:
        """uint8 CHW.  Raises BadSample."""
        ...


class PairTransform(PictureTransform, Protocol):
    """What evaluators ask of a transform: picture and words, each by itself."""

    def caption(self, text: str, language: str) -> str:
        """Raises BadSample where nothing is left."""
        ...


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop and flip, as BLIP-2 trains (lavis/processors/blip_processors.py, blip2_image_train).

    Args:
        image_size: side of the square that comes out, in pixels.
        scale: share of the picture's area that a crop covers, drawn uniformly.
        ratio: width to height of a crop, drawn log-uniformly (torchvision's RandomResizedCrop).
        flip: mirrors every second picture; off where left and right matter.
        max_pixels: a larger picture is refused by its header.
        clean: whether captions are cleaned by language.
    """

    image_size: int = 224
    scale: Sequence[float] = (0.5, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip: bool = True
    max_pixels: int = MAX_PIXELS
    clean: bool = True

    def __post_init__(self) -> None:
        _check(self.image_size, self.max_pixels)
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"transform.scale is {list(self.scale)}; expected two shares of the area, 0 < low <= high <= 1"
            )
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"transform.ratio is {list(self.ratio)}; expected two of width to height, 0 < low <= high")

    def __call__(self, sample: RawSample, language: str, rng: np.random.Generator) -> tuple[Tensor, str]:
        # the text first: it costs nothing and may be bad already
        caption = self.caption(draw_caption(sample, language, rng), language)
        return self.picture(sample.image, rng), caption

    def caption(self, text: str, language: str) -> str:
        """As it is trained on.  Raises BadSample where nothing is left."""
        return _caption(text, language, self.clean)

    def picture(self, image: bytes | Image.Image | np.ndarray, rng: np.random.Generator) -> Tensor:
        """uint8 (3, image_size, image_size)"""
        opened = open_image(image, max_pixels=self.max_pixels)
        box = random_crop(opened.width, opened.height, self.scale, self.ratio, rng)
        flip = self.flip and rng.random() < 0.5
        picture = resize(opened, (self.image_size, self.image_size), box, draft=True)
        return to_tensor(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture)


@dataclass(frozen=True)
class EvalTransform:
    """The whole picture, squeezed into a square: what BLIP-2 and VisualGLM evaluate on.  The first caption."""

    image_size: int = 224
    max_pixels: int = MAX_PIXELS
    clean: bool = True

    def __post_init__(self) -> None:
        _check(self.image_size, self.max_pixels)

    def __call__(self, sample: RawSample, language: str, rng: np.random.Generator | None = None) -> tuple[Tensor, str]:
        return self.image(sample.image), self.caption(sample.captions[0], language)

    def caption(self, text: str, language: str) -> str:
        """As training has it.  Raises BadSample where nothing is left."""
        return _caption(text, language, self.clean)

    def picture(self, image: bytes | Image.Image | np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
        """The same as `image`: nothing is drawn."""
        return self.image(image)

    def image(self, image: bytes | Image.Image | np.ndarray) -> Tensor:
        """uint8 (3, image_size, image_size), bicubic, no draft: the same numbers as the original code."""
        opened = open_image(image, max_pixels=self.max_pixels)
        return to_tensor(resize(opened, (self.image_size, self.image_size)))


def random_crop(
    width: int, height: int, scale: Sequence[float], ratio: Sequence[float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A box (left, upper, right, lower) drawn as torchvision's RandomResizedCrop.get_params does.

    Ten tries; a picture too long for all of them gives its middle, as near to the ratio as it goes.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, upper, left + w, upper + h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> uint8 CHW."""
    return torch.from_numpy(np.array(picture, np.uint8).transpose(2, 0, 1).copy())


def _caption(caption: str, language: str, clean: bool) -> str:
    caption = clean_caption(caption, language) if clean else whole_characters(caption).strip()
    if is_empty(caption):
        raise BadSample("empty text", detail="nothing is left after cleaning")
    return caption


def _check(image_size: int, max_pixels: int) -> None:
    if image_size < 1:
        raise ValueError(f"transform.image_size is {image_size}; expected pixels, 1 or more")
    if not 0 < max_pixels <= (Image.MAX_IMAGE_PIXELS or max_pixels):
        raise ValueError(
            f"transform.max_pixels is {max_pixels}; expected 1 to {Image.MAX_IMAGE_PIXELS} (Pillow's own limit)"
        )
