"""Encoded pictures to the pixels that the network was trained on: light on dark, greyscale, the model's size."""

from __future__ import annotations

import contextlib
import enum
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from serving.errors import InvalidArgument

Pixels = npt.NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
FLAT = 8  # a photograph whose lightest and darkest parts differ by less, of 255, shows nothing but background


class Polarity(enum.Enum):
    """How bright the drawing is against its background; `AUTO` judges from the border."""

    AUTO = 0
    LIGHT_ON_DARK = 1
    DARK_ON_LIGHT = 2


def decode(data: bytes, height: int, width: int, polarity: Polarity, max_pixels: int) -> tuple[Pixels, int]:
    """Decode one picture.

    A greyscale picture of exactly the model's size keeps its pixels, but for the polarity. Any other is taken for a
    photograph: it is resized with antialiasing in its own proportions, its background is levelled to 0 and its drawing
    stretched to 255, and what is missing to the model's size is padded with background.

    Args:
        data: a file's bytes in one of `FORMATS`.
        height: of the result, pixels.
        width: of the result, pixels.
        polarity: of the picture.
        max_pixels: the largest width x height accepted; judged from the header, before anything is decoded.

    Returns:
        uint8 [1, height, width], light on dark, and how many pixels the picture had.

    Raises:
        InvalidArgument: not a picture, damaged, or too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            size = picture.width * picture.height
            if size > max_pixels:
                raise InvalidArgument(
                    f"picture of {picture.width} x {picture.height} pixels, want at most {max_pixels} in all "
                    "(--max-image-pixels)"
                )
            picture.draft("L", (4 * width, 4 * height))  # a large JPEG is decoded at a smaller scale, 8 times faster
            picture.load()
            grey = _greyscale(_reduced(picture, height, width))
    except InvalidArgument:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, judged from the header too
        raise InvalidArgument(f"a picture too large: {error}") from error
    except UnidentifiedImageError as error:
        raise InvalidArgument(f"{len(data)} bytes that are not a picture; want one of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise errors of all kinds for damaged files
        raise InvalidArgument(f"a damaged picture: {error}") from error
    photograph = size != width * height or grey.size != (width, height)
    if photograph:
        grey = _shrink(grey, height, width)
    pixels = np.asarray(grey)
    if _is_dark_on_light(pixels, polarity):
        pixels = 255 - pixels
    if photograph:
        pixels = _pad(_level(pixels), height, width)
    return pixels[np.newaxis], size


def _reduced(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Upright, and a large picture by a whole factor smaller, so that what follows needs little memory."""
    # Damaged EXIF data raises errors of all kinds: the picture is then taken as it lies.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(picture, in_place=True)
    factor = min(picture.width // (4 * width), picture.height // (4 * height))
    if factor <= 1:
        return picture
    # The mean of neighbours, which palette entries and single bits do not have.
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    elif picture.mode == "1" or picture.mode.startswith("I;"):
        picture = picture.convert("L" if picture.mode == "1" else "I")
    return picture.reduce(factor)


def _greyscale(picture: Image.Image) -> Image.Image:
    """Mode L, transparency on white paper."""
    if picture.mode.startswith(("I", "F")):  # 16 or 32 bits: Pillow's conversion would clip at 255
        deep = np.asarray(picture, dtype=np.float32)
        scale = 255 / max(deep.max(), 255)
        return Image.fromarray((deep.clip(0) * scale).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture)
    return picture.convert("L")


def _border(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])


def _is_dark_on_light(pixels: Pixels, polarity: Polarity) -> bool:
    """As told, or: the border, which is mostly background, is lighter than the middle of the picture's range."""
    if polarity is not Polarity.AUTO:
        return polarity is Polarity.DARK_ON_LIGHT
    middle = (int(pixels.min()) + int(pixels.max())) / 2
    return bool(np.median(_border(pixels)) > middle)


def _level(pixels: Pixels) -> Pixels:
    """Subtract the background, paper in uneven light, and stretch the rest to 255.

    The background is the plane that fits the border's pixels best.
    """
    height, width = pixels.shape
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    terms = np.stack([np.ones_like(rows), rows, columns])  # [3, height, width]
    on_border = np.stack([_border(term) for term in terms], axis=1)  # [border pixels, 3]
    plane, *_ = np.linalg.lstsq(on_border, _border(pixels).astype(np.float64), rcond=None)
    above = (pixels - np.tensordot(plane, terms, axes=1)).clip(0)
    peak = above.max()
    if peak < FLAT:
        return np.zeros_like(pixels)
    return np.asarray((above * (255 / peak)).round(), np.uint8)


def _shrink(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Resize with antialiasing to fit into height x width in the picture's own proportions."""
    scale = min(width / picture.width, height / picture.height)
    size = (max(1, round(scale * picture.width)), max(1, round(scale * picture.height)))
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _pad(pixels: Pixels, height: int, width: int) -> Pixels:
    """Centre on a background of 0 of height x width."""
    down, right = height - pixels.shape[0], width - pixels.shape[1]
    return np.pad(pixels, ((down // 2, down - down // 2), (right // 2, right - right // 2)))
