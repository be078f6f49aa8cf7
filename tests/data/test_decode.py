"""Pictures of every kind become upright RGB, and broken or huge ones are refused by name."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.decode import check_whole, looks_whole, open_image, resize, to_rgb
from data.keyed import keyed_rng
from data.source import BadSample, RawSample
from data.transform import EvalTransform, TrainTransform, random_crop
from tests.data.shard_files import jpeg, picture


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header promises far more than it has."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("reason", "raw"),
    [
        ("truncated image", jpeg(1, (200, 150))[:1500]),
        ("truncated image", encoded(picture(1, (200, 150)), "PNG")[:1500]),
        ("unreadable image", b"<html>404</html>"),
        ("unreadable image", b""),
        ("truncated image", jpeg(1)[:20]),
        ("truncated image", encoded(picture(1), "PNG")[:20]),
        ("unreadable image", jpeg(1)[:20] + b"\xff\xd9"),
        ("too many pixels", huge_png(25_000, 20_000)),  # 500 megapixels, above Pillow's error
        ("too many pixels", huge_png(10_000, 9_500)),  # between Pillow's warning and its error
        ("too many pixels", huge_png(9_000, 9_000)),  # below Pillow's warning, above ours
        (
            "unreadable image",
            encoded(picture(1), "PPM"),
        ),  # Pillow reads it, and EPS, which starts Ghostscript; we do not
    ],
    ids=[
        "jpeg",
        "png",
        "page",
        "empty",
        "jpeg header",
        "png header",
        "broken header",
        "500 megapixels",
        "95 megapixels",
        "81 megapixels",
        "format",
    ],
)
@pytest.mark.parametrize("transform", [TrainTransform(16), EvalTransform(16)], ids=["train", "eval"])
def test_bad_pictures(reason: str, raw: bytes, transform) -> None:
    with pytest.raises(BadSample) as bad:
        transform(RawSample(raw, ("a",), "k"), "en", keyed_rng("t", 0))
    assert bad.value.reason == reason


def test_the_pixel_limit_holds_before_decompression(monkeypatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decompressed"))
    with pytest.raises(BadSample, match="200 x 150, the limit is 29999"):
        open_image(jpeg(1, (200, 150)), max_pixels=29_999)
    assert open_image(jpeg(1, (200, 150)), max_pixels=30_000).size == (200, 150)
    with pytest.raises(BadSample, match="^too many pixels: more than 178956970, the limit is 30000$"):  # Pillow refuses
        open_image(huge_png(25_000, 20_000), max_pixels=30_000)
    with pytest.raises(ValueError, match="Pillow's own limit"):
        TrainTransform(max_pixels=10**9)


@pytest.mark.parametrize("name", ["scale", "ratio"])
@pytest.mark.parametrize("value", [(0.5,), (0.0, 1.0), (0.9, 0.5), (0.5, float("nan")), (0.1, 0.2, 0.3)])
def test_an_impossible_crop_is_refused_at_once(name: str, value: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=f"transform.{name} is .*; expected two"):
        TrainTransform(16, **{name: value})


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_every_format_in_a_fresh_process(kind: str, tmp_path: Path) -> None:
    """Nothing has loaded Pillow's plugins there."""
    (tmp_path / "picture").write_bytes(encoded(picture(1, (64, 64)), kind))
    code = (
        "import sys; from data.decode import *; print(resize(open_image(open(sys.argv[1], 'rb').read()), (2, 2)).size)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "picture")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "(2, 2)\n", done.stderr


def test_every_mode_becomes_rgb() -> None:
    rgb = picture(1)
    grey = np.asarray(rgb.convert("L"))
    for mode in ("L", "CMYK", "YCbCr", "HSV"):
        assert np.abs(pixels(to_rgb(rgb.convert(mode))) - pixels(rgb.convert(mode).convert("RGB"))).max() == 0
    palette = rgb.quantize(64)
    assert np.array_equal(to_rgb(palette), palette.convert("RGB"))
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    assert sixteen.mode == "I;16"
    for image in (sixteen, Image.fromarray(grey.astype(np.int32) * 257), Image.fromarray(grey.astype(np.float32))):
        assert np.array_equal(to_rgb(image), Image.fromarray(grey).convert("RGB"))
    reread = open_image(encoded(sixteen, "PNG"))
    assert np.array_equal(to_rgb(reread), Image.fromarray(grey).convert("RGB"))


@pytest.mark.parametrize(("bits", "brightest"), [(8, 255), (10, 1023), (10, 300), (12, 4095), (12, 1100), (16, 4096)])
def test_x_rays_of_few_bits_in_sixteen_are_not_black(bits: int, brightest: int) -> None:
    grey = np.linspace(0, brightest, 64).astype(np.uint16).reshape(8, 8)
    expected = np.rint(grey / (2**bits - 1) * 255).astype(np.uint8)
    for image in (open_image(encoded(Image.fromarray(grey), "PNG")), Image.fromarray(grey.astype(np.int32))):
        assert np.array_equal(to_rgb(image), Image.fromarray(expected).convert("RGB"))


def test_transparency_lies_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    white = np.full((4, 4, 3), 255)
    assert np.array_equal(to_rgb(clear), white)
    assert np.array_equal(to_rgb(Image.new("LA", (4, 4), (0, 0))), white)
    assert np.abs(pixels(to_rgb(half)) - np.array([255, 127, 127])).max() <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    assert np.array_equal(to_rgb(palette), white)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(picture(2, (32, 32)), "PNG", exif=exif)
    expected = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[orientation](np.asarray(picture(2, (32, 32))))
    assert np.array_equal(resize(open_image(raw), (32, 32)), expected)


def test_broken_exif_does_not_cost_the_picture(recwarn, monkeypatch) -> None:
    cut_short = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0"
    raw = encoded(picture(2), "JPEG", quality=95, exif=cut_short)
    expected = np.asarray(Image.open(io.BytesIO(jpeg(2))))
    assert np.array_equal(resize(open_image(raw), (40, 30)), expected) and not recwarn.list

    def broken(self):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr("PIL.Image.Image.getexif", broken)
    assert np.array_equal(resize(open_image(raw), (40, 30)), expected)


def test_evaluation_squeezes_bicubically() -> None:
    """VisualGLM: image.resize((224, 224), BICUBIC) and nothing else before the mean and deviation."""
    raw = jpeg(3, (300, 170))
    expected = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
    for image in (raw, Image.open(io.BytesIO(raw)), np.asarray(Image.open(io.BytesIO(raw)))):
        tensor = EvalTransform(224).image(image)
        assert tensor.dtype == torch.uint8 and np.array_equal(tensor.permute(1, 2, 0).numpy(), expected)


def test_draft_gives_nearly_the_same_picture() -> None:
    raw, box = jpeg(4, (640, 480)), (50.0, 20.0, 610.0, 470.0)
    expected = pixels(resize(open_image(raw), (56, 56), box))
    image = open_image(raw)
    found = pixels(resize(image, (56, 56), box, draft=True))
    assert image.size == (80, 60)  # an eighth, as the box still has 70 x 56.25 pixels for 56 x 56
    assert np.abs(found - expected).mean() < 1.5
    image = open_image(raw)
    resize(image, (224, 224), (0, 0, 300, 225), draft=True)
    assert image.size == (640, 480)  # half of it would leave 150 pixels for 224


def test_crops_cover_the_share_asked_for() -> None:
    width, height = 640, 480
    for n in range(300):
        left, upper, right, lower = random_crop(width, height, (0.5, 1.0), (3 / 4, 4 / 3), keyed_rng("c", 0, n))
        assert 0 <= left < right <= width and 0 <= upper < lower <= height
        assert 0.495 <= (right - left) * (lower - upper) / (width * height) <= 1
        assert 0.74 <= (right - left) / (lower - upper) <= 1.35
    assert random_crop(1000, 10, (0.5, 1.0), (3 / 4, 4 / 3), keyed_rng("c", 0)) == (493, 0, 506, 10)
    assert random_crop(1, 1, (0.5, 1.0), (3 / 4, 4 / 3), keyed_rng("c", 0)) == (0, 0, 1, 1)


def test_training_is_a_crop_and_a_flip_by_key() -> None:
    sample = RawSample(picture(5, (64, 64)), ("A dog.",), "k")

    def image(key: int, **options) -> torch.Tensor:
        tensor, caption = TrainTransform(32, **options)(sample, "en", keyed_rng("t", 0, key))
        assert caption == "a dog" and tensor.shape == (3, 32, 32) and tensor.dtype == torch.uint8
        return tensor

    assert torch.equal(image(0), image(0)) and not torch.equal(image(0), image(1))
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    expected = EvalTransform(32).image(sample.image)
    assert all(torch.equal(image(key, **whole, flip=False), expected) for key in range(5))
    flipped = [torch.equal(image(key, **whole), expected.flip(2)) for key in range(40)]
    assert all(f or torch.equal(image(key, **whole), expected) for key, f in enumerate(flipped))
    assert 10 <= sum(flipped) <= 30


def test_real_photographs(shared_dir: Path) -> None:
    photos = sorted((shared_dir / "data" / "photos" / "images").glob("*.jpg"))
    if not photos:
        pytest.skip(f"no photographs in {shared_dir}")
    for n, photo in enumerate(photos[:20]):
        expected = EvalTransform(64).image(photo.read_bytes()).double()
        options = {"scale": (1.0, 1.0), "ratio": (0.01, 100.0), "flip": False}
        found, _ = TrainTransform(64, **options)(RawSample(photo.read_bytes(), ("a",), "k"), "en", keyed_rng("t", 0, n))
        assert found.shape == expected.shape and found.double().std() > 5
        with pytest.raises(BadSample):
            EvalTransform(64).image(photo.read_bytes()[: photo.stat().st_size // 2])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"])
def test_a_file_that_is_cut_is_found_by_its_ends(tmp_path: Path, kind: str) -> None:
    """Headers are whole in all of them; where something stands behind the picture, decoding it has the last word."""
    raw, file = encoded(picture(1, (200, 150)), kind), tmp_path / "a"
    for whole in (raw, raw + b"more" * 50):
        file.write_bytes(whole)
        assert looks_whole(file) or len(whole) > len(raw)
        check_whole(file)
    for cut in (raw[: len(raw) // 2], raw[:-100]):
        file.write_bytes(cut)
        with pytest.raises(BadSample):
            assert not looks_whole(file)
            check_whole(file)
