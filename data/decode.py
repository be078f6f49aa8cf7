"""Encoded image -> RGB picture, as little of it as is needed, refusing what is broken or far too large."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import AvifImagePlugin, Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

from data.source import BadSample

# Below Pillow's own limit of 89 megapixels, above which it warns and then refuses.
MAX_PIXELS = 80_000_000
# Pillow would try every format it knows, among them some that start other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_REGISTERED = (AvifImagePlugin, TiffImagePlugin, WebPImagePlugin)  # importing is what makes Pillow know them
TAIL = 64  # bytes
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_TIFF_STRIPS = ((273, 279), (324, 325))  # tags of offsets and byte counts: of strips, of tiles
_ORIENTATION = 0x0112
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(
    image: bytes | Image.Image | np.ndarray, *, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS
) -> Image.Image:
    """Opens a picture, of bytes one in these formats, and looks at its header only; nothing is decompressed yet.

    Raises BadSample "truncated image", "unreadable image" or "too many pixels".
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    if isinstance(image, bytes):
        raw = image
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of large pictures, which we refuse, and of broken EXIF
                image = Image.open(io.BytesIO(raw), formats=formats)
        except Image.DecompressionBombError as error:  # refuses twice its limit, and says so in words of its own
            pillows = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise BadSample("too many pixels", detail=f"more than {pillows}, the limit is {max_pixels}") from error
        except UnidentifiedImageError as error:
            raise BadSample(_why_unreadable(raw), detail=f"none of {', '.join(formats)}") from error
        except Exception as error:  # Pillow's parsers raise SyntaxError, struct.error, KeyError ... on damaged headers
            raise BadSample(_why_unreadable(raw), detail=f"{type(error).__name__}: {error}") from error
    if image.width * image.height > max_pixels:
        raise BadSample("too many pixels", detail=f"{image.width} x {image.height}, the limit is {max_pixels}")
    return image


def looks_whole(file: Path) -> bool:
    """Whether it begins as a picture does and reaches as far as its format says, by its first and its last bytes.

    False is no verdict, since phones write more behind the end of a picture; `check_whole` decodes it.
    Raises BadSample as `open_image` does.
    """
    try:
        with file.open("rb") as opened, Image.open(opened, formats=FORMATS) as image:
            return _reaches_its_end(image, opened)
    except Exception:  # of many kinds; the whole of it tells why
        open_image(file.read_bytes())
        return False


def _reaches_its_end(image: Image.Image, file: BinaryIO) -> bool:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - TAIL))
    tail = file.read(TAIL)
    if image.format in _ENDS:
        return _ENDS[image.format] in tail
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        strips = [zip(image.tag_v2.get(at, ()), image.tag_v2.get(long, ()), strict=False) for at, long in _TIFF_STRIPS]
        return all(start + length <= size for pairs in strips for start, length in pairs)
    if image.format == "GIF":
        return tail.rstrip(b"\0").endswith(b";")
    if image.format == "BMP":
        file.seek(2)
        return int.from_bytes(file.read(4), "little") <= size  # its length, which some writers leave at 0
    end = 0
    while image.format == "AVIF" and end < size:  # boxes, each with its length first, one after the other
        file.seek(end)
        length = int.from_bytes(file.read(4), "big")
        if length < 8:  # 0 is to the end, 1 has the length elsewhere
            break
        end += length
    return end <= size  # WebP that is cut does not open at all


def check_whole(file: Path) -> None:
    """Raises BadSample as training would; the whole file is read and decoded."""
    resize(open_image(file.read_bytes()), (1, 1), draft=True)


def _why_unreadable(raw: bytes) -> str:
    """A file that was cut within its header looks to Pillow like any other, and so does one of a hospital's archive."""
    if raw[128:132] == b"DICM":
        return "DICOM file (export it as PNG)"
    starts = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG"}
    cut = any(raw.startswith(start) and _ENDS[kind] not in raw[-TAIL:] for start, kind in starts.items())
    return "truncated image" if cut else "unreadable image"


def resize(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
    *,
    draft: bool = False,
) -> Image.Image:
    """Decodes and resizes the part `box` (left, upper, right, lower; pixels as stored) to `size` (width, height), RGB.

    Bicubic with antialiasing, upright by the EXIF orientation.  With `draft`, JPEG is decoded at the smallest of its
    scales 1/8, 1/4, 1/2, 1 that still has a pixel for every pixel of the result: several times faster, and not exactly
    the same numbers.  Raises BadSample "truncated image" or "unreadable image".
    """
    width, height = image.size
    left, upper, right, lower = box or (0.0, 0.0, float(width), float(height))
    turn = _turn(image)
    try:
        if draft:
            # what the whole picture measures when the box has the size asked for
            wanted = (int(np.ceil(size[0] * width / (right - left))), int(np.ceil(size[1] * height / (lower - upper))))
            image.draft("RGB", wanted)
        image.load()
    except Exception as error:
        # Pillow has no exception of its own for a stream that ends early, and many kinds for one that is damaged
        reason = "truncated image" if "truncated" in str(error) or "Truncated" in str(error) else "unreadable image"
        raise BadSample(reason, detail=f"{type(error).__name__}: {error}") from error
    across, down = image.width / width, image.height / height
    picture = to_rgb(image).resize(
        size, Image.Resampling.BICUBIC, box=(left * across, upper * down, right * across, lower * down)
    )
    return picture if turn is None else picture.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _TURN.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF is common on the web and says nothing about the pixels
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: transparency on white, 16-bit grey scaled to 8, CMYK and palettes converted.

    16-bit grey whose brightest pixel is one of 12, 10 or 8 bits is taken to have so many: X-rays are stored so, and
    scaled as 16 bits they would be black.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image)
        # "F" holds 0..1 or 0..255 by custom; whole numbers are scaled (Pillow would clip them)
        brightest = grey.max(initial=0)
        if grey.dtype.kind in "iu":
            bits = next((bits for bits in (8, 10, 12) if brightest < 2**bits), 16)
            scaled = grey * (255.0 / (2**bits - 1))
        else:
            scaled = grey * (255.0 if brightest <= 1.0 else 1.0)
        return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in {"RGBA", "LA", "PA", "RGBa", "La"}:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """The whole picture in RGB, turned as its EXIF orientation says; for storing or showing it."""
    turn = _turn(image)
    return to_rgb(image) if turn is None else to_rgb(image).transpose(turn)
