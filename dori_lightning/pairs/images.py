"""Read pictures the one way that attack targets and copy-detection references share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FORMATS", "conversions", "image_tensor", "open_image", "square_image"]

FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats whose parsers may run; the file's content decides, not its name."""


_ORIENTATION = 0x0112
"""EXIF tag; 1 is upright."""


def _is_deep(mode: str) -> bool:
    return mode.startswith("I;16") or mode in ("I", "F")


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def conversions(path: Path) -> tuple[str, ...]:
    """Name what happens to a picture before it is attacked and compared; reads its header only.

    Raises:
        OSError: Unreadable, or none of ``FORMATS``.
    """
    with Image.open(path, formats=FORMATS) as file:
        applied = {
            "turned upright (EXIF)": file.getexif().get(_ORIENTATION, 1) != 1,
            "scaled from 16 bits to 8": _is_deep(file.mode),
            "laid over white (transparency)": _is_transparent(file),
            "greyscale to RGB": file.mode in ("1", "L", "LA"),
            "CMYK to RGB": file.mode == "CMYK",
            "cut to the centred square": file.width != file.height,
        }
    return tuple(words for words, happens in applied.items() if happens)


def open_image(path: Path) -> Image.Image:
    """Decode a picture completely: EXIF orientation applied, transparency over white, RGB.

    Pixels are all that is kept of the file.

    Raises:
        OSError: Unreadable, truncated, or none of ``FORMATS``.
        PIL.Image.DecompressionBombError: More pixels than Pillow's limit allows.
    """
    with Image.open(path, formats=FORMATS) as file:
        image = ImageOps.exif_transpose(file)
        if _is_deep(image.mode):
            values = np.asarray(image, np.float64)
            span = values.max() - values.min()
            image = Image.fromarray(np.uint8(255 * (values - values.min()) / (span or 1.0)))
        if _is_transparent(image):
            image = image.convert("RGBA")
            background = Image.new("RGBA", image.size, "white")
            background.alpha_composite(image)
            image = background
        image = image.convert("RGB")
        # comments and profiles would go into every file that is made of the picture
        image.info = {}
        return image


def square_image(path: Path) -> Image.Image:
    """Decode and cut the largest centred square."""
    image = open_image(path)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def image_tensor(image: Image.Image, size: int | None = None) -> torch.Tensor:
    """Turn a picture into a (3, H, W) float tensor in [0, 1].

    Args:
        image: RGB picture.
        size: Side in pixels to scale to with Lanczos; None keeps the picture's own size.
    """
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1).float().div_(255)
