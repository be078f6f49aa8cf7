"""Pictures of what an evaluator found: example images with the captions that were retrieved or generated.

Chinese text needs a font that has it.  A font of the system is used where matplotlib finds one; else a subset of Noto
Sans SC that lies beside this file and holds what the captions of the synthetic scenes need; characters that neither has
are drawn as boxes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

BUNDLED_FONT = Path(__file__).parent / "fonts" / "queqiao_scenes.otf"
CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "Noto Sans CJK JP",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Microsoft YaHei",
    "SimHei",
    "Droid Sans Fallback",
)
INK, MUTED, RIGHT, WRONG, PAPER = (36, 36, 40), (120, 120, 128), (22, 128, 60), (196, 44, 44), (255, 255, 255)
TILE, LINE, MARGIN, TEXT_SIZE = 112, 24, 12, 16


@functools.cache
def chinese_font_path() -> Path:
    """A font with Chinese characters: the system's, else the bundled subset."""
    from matplotlib import font_manager

    known = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    return next((Path(known[name]) for name in CHINESE_FONTS if name in known), BUNDLED_FONT)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(chinese_font_path()), size)


def caption_examples(
    pictures: Mapping[int, Tensor],
    captions: Sequence[str],
    right: Sequence[bool | None],
    references: Sequence[Sequence[str]],
) -> Image.Image:
    """Some images, each with the caption generated for it, and below one that is not known to be right a right one."""
    rows = []
    for image, picture_CHW in sorted(pictures.items()):
        lines: list[tuple[str, bool | None]] = [(captions[image], right[image])]
        if not right[image]:
            lines.append((references[image][0], None))
        rows.append((picture_CHW, lines))
    return text_beside_images(rows, columns=1)


def spread(total: int, number: int) -> list[int]:
    """`number` of 0 .. total-1, evenly spread: the same at every evaluation, so that one sees them change."""
    number = min(total, number)
    return [index * total // number for index in range(number)]


def text_beside_images(
    rows: Sequence[tuple[Tensor, Sequence[tuple[str, bool | None]]]], *, columns: int, tile: int = TILE
) -> Image.Image:
    """Each image with its lines of text to the right; (text, right?) is green, red, or grey for None."""
    text_font = font(TEXT_SIZE)
    width = max((text_font.getlength(_drawable(text)) for _, lines in rows for text, _ in lines), default=0)
    cell_width = tile + 3 * MARGIN + int(width)
    cell_height = max(tile, max((len(lines) for _, lines in rows), default=1) * LINE) + MARGIN
    down = -(-len(rows) // columns)
    canvas = Image.new("RGB", (columns * cell_width + MARGIN, down * cell_height + MARGIN), PAPER)
    pen = ImageDraw.Draw(canvas)
    for place, (image_CHW, lines) in enumerate(rows):
        left = MARGIN + (place // down) * cell_width
        top = MARGIN + (place % down) * cell_height
        canvas.paste(to_picture(image_CHW, tile), (left, top))
        first = top + (tile - len(lines) * LINE) // 2
        for number, (text, is_right) in enumerate(lines):
            ink = MUTED if is_right is None else RIGHT if is_right else WRONG
            pen.text((left + tile + MARGIN, first + number * LINE), _drawable(text), font=text_font, fill=ink)
    return canvas


def to_picture(image_CHW: Tensor, size: int) -> Image.Image:
    """uint8 pixels -> a square picture"""
    return Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy()).resize(
        (size, size), Image.Resampling.BICUBIC
    )


def _drawable(text: str) -> str:
    """One line, not endless."""
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:119] + "…"
