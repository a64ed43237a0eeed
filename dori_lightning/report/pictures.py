"""Thumbnails of references and generated pictures, with the choice of not showing what leaked."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Literal

from PIL import Image

from dori_lightning.pairs.validation import square_image
from dori_lightning.types import InputError

Disclosure = Literal["full", "blurred", "none"]

THUMBNAIL = 192
"""Longest side of an embedded picture in pixels."""

NOT_KEPT = Path()
"""Stands for a picture whose file is not where a run left it."""

_BLURRED = 10  # pixels a side that survive blurring: a colour scheme, no face and no text


def thumbnail(path: Path, disclosure: Disclosure, *, side: int = THUMBNAIL) -> Image.Image | None:
    """Read a picture as it may be shown.

    Blurring throws the pixels away rather than hiding them: nothing in the result can be sharpened
    back.

    Args:
        path: The picture's file, or ``NOT_KEPT``.
        disclosure: ``full``, ``blurred``, or ``none``.
        side: Pixels a side at most.

    Returns:
        A square picture, or None where pictures are not shown or this one is not kept.

    Raises:
        InputError: The file is gone or unreadable.
    """
    if disclosure == "none" or path == NOT_KEPT:
        return None
    try:
        picture = square_image(path)
    except OSError as error:
        raise InputError(
            f"cannot show {path}: {error}; restore the file, or render the report with images=none"
        ) from None
    if disclosure == "blurred":
        few = picture.resize((_BLURRED, _BLURRED), Image.Resampling.BOX)
        return few.resize((side // 2, side // 2), Image.Resampling.BICUBIC)
    if picture.width > side:
        return picture.resize((side, side), Image.Resampling.LANCZOS)
    return picture


def jpeg_uri(picture: Image.Image) -> str:
    """Encode a picture as a ``data:`` address, JPEG without chroma subsampling."""
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=85, subsampling=0, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(sink.getvalue()).decode()}"


def png_uri(data: bytes) -> str:
    """Put the bytes of a PNG file into a ``data:`` address."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
