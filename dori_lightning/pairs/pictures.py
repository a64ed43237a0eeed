"""Refuse picture files that are missing, out of bounds, damaged, dangerous or useless."""

from __future__ import annotations

import hashlib
import struct
import warnings
import zlib
from pathlib import Path

from PIL import Image

from dori_lightning.pairs.images import FORMATS, open_image
from dori_lightning.pairs.problems import quote

__all__ = [
    "PARSER_ERRORS",
    "SMALLEST_SIDE",
    "PictureError",
    "check_picture",
    "resolve_inside",
    "sniff",
]

SMALLEST_SIDE = 16
"""Pixels below which a picture is a thumbnail or a tracking pixel, not a memorized image."""

SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"PK\x03\x04", "a zip archive"),
    (b"version https://git-lfs", "a Git LFS pointer"),
)

PARSER_ERRORS = (
    ArithmeticError,
    EOFError,
    LookupError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""Everything Pillow's parsers are known to raise on crafted files."""


class PictureError(Exception):
    """One picture cannot be used.

    Attributes:
        what: What is wrong.
        mend: How to mend it.
        missing: There is no such file.
    """

    def __init__(self, what: str, mend: str, *, missing: bool = False) -> None:
        """Keep what is wrong and how to mend it."""
        super().__init__(what)
        self.what, self.mend, self.missing = what, mend, missing


def sniff(head: bytes) -> str:
    """Name a file's format by its first bytes (at least 32 where the file has them), or ``""``."""
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<script")):
        return "HTML"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return "AVIF, HEIC or a video"
    return next((name for start, name in SIGNATURES if head.startswith(start)), "")


def resolve_inside(root: Path, name: str) -> Path:
    """Follow a row's relative path and require that it ends at a regular file inside ``root``.

    Args:
        root: Folder that the list may use pictures of.
        name: Path as the row has it.

    Raises:
        PictureError: Absolute, leads outside (``..`` or a symbolic link), or not a file.
    """
    base = root.resolve()
    if Path(name).is_absolute() or name.startswith("~"):
        raise PictureError(f"absolute path {quote(name)} refused", f"write it relative to {base}")
    try:
        path = (base / name).resolve()
        inside = path.is_relative_to(base)
        found = inside and path.is_file()
        special = inside and path.exists() and not found
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a NUL
        raise PictureError(
            f"{quote(name)} is no usable path ({error})", "correct the path"
        ) from error
    if not inside:
        raise PictureError(
            f"{quote(name)} leads outside {base}, to {path}: refused",
            "copy the picture (not a link to it) into the folder",
        )
    if special:
        raise PictureError(f"{path} is not a regular file", "name a picture file")
    if not found:
        raise PictureError(
            f"no such file: {path}",
            "correct the path, add the file, or drop such rows: pairs.on_missing=skip",
            missing=True,
        )
    return path


def _explain(error: Exception, head: bytes) -> PictureError:
    """Say what a file that did not decode really is."""
    name, start = sniff(head), f"starts with {head[:16]!r}"
    if not head:
        return PictureError("the file is empty", "download or copy it again")
    if name == "HTML":
        return PictureError(
            f"a web page saved as a picture ({start})",
            "download the picture again; the link may be dead or ask for a login",
        )
    if name in FORMATS:
        return PictureError(
            f"damaged or truncated {name} ({error}; {start})", "download or copy it again"
        )
    return PictureError(
        f"not a picture of a known format: {name or 'unknown content'} ({start})",
        f"convert it to {', '.join(FORMATS[:-1])} or {FORMATS[-1]}",
    )


def check_picture(path: Path) -> str:
    """Decode a picture completely and hash its file.

    Args:
        path: A regular file.

    Returns:
        SHA-256 of the file, in hexadecimal.

    Raises:
        PictureError: Unreadable, not a known format, damaged, too many pixels, or too small.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PictureError(f"unreadable: {error}", "make the file readable") from error
    try:
        with warnings.catch_warnings():
            # Pillow refuses from twice its limit on, but only warns before.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            size = open_image(path).size
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = Image.MAX_IMAGE_PIXELS or 0
        raise PictureError(
            f"more than {limit:,} pixels, perhaps a decompression bomb ({error})",
            f"scale the picture down to at most {limit:,} pixels",
        ) from error
    except PARSER_ERRORS as error:
        raise _explain(error, head) from error
    if min(size) < SMALLEST_SIDE:
        raise PictureError(
            f"{size[0]} x {size[1]} pixels, but both sides need {SMALLEST_SIDE}",
            "use the full picture, not a thumbnail",
        )
    return digest
