"""One picture out of many: rows of labelled tiles, small enough for a logger's page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Tile", "mosaic"]

_GAP = 6
_LINE = 15
_FONT = 11
_FRAME = 3
_PAPER, _INK, _PALE, _ALARM = "#ffffff", "#222222", "#dddddd", "#c0202f"


@dataclass(frozen=True)
class Tile:
    """One picture of a mosaic.

    Attributes:
        picture: The picture; None leaves its place empty.
        text: A line below it.
        marked: Whether to frame it.
    """

    picture: Image.Image | None
    text: str = ""
    marked: bool = False


def mosaic(
    rows: Sequence[Sequence[Tile]], *, headings: Sequence[str], side: int = 128
) -> Image.Image | None:
    """Put tiles into a grid below its headings.

    Args:
        rows: Tiles, as many in each row as there are headings.
        headings: One for each column.
        side: Pixels a side of a tile.

    Returns:
        The grid; None where no tile has a picture.
    """
    if not any(tile.picture for row in rows for tile in row):
        return None
    font = ImageFont.load_default(_FONT)
    wide, high = side + _GAP, side + _LINE + _GAP
    sheet = Image.new(
        "RGB", (wide * len(headings) + _GAP, high * len(rows) + _LINE + _GAP), _PAPER
    )
    pen = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        pen.text((_GAP + wide * column, _GAP // 2), _fitted(heading, side, font), _INK, font)
    for line, row in enumerate(rows):
        for column, tile in enumerate(row):
            left, top = _GAP + wide * column, _LINE + _GAP + high * line
            frame = (left, top, left + side - 1, top + side - 1)
            if tile.picture is not None:
                sheet.paste(tile.picture.convert("RGB").resize((side, side)), (left, top))
            if tile.marked or tile.picture is None:
                pen.rectangle(
                    frame,
                    outline=_ALARM if tile.marked else _PALE,
                    width=_FRAME if tile.marked else 1,
                )
            text = _fitted(tile.text, side, font)
            pen.text((left, top + side + 1), text, _ALARM if tile.marked else _INK, font)
    return sheet


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a text as fits."""
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
