"""The page's section on locality: the figures that ``task=locality`` left in a run folder."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from dori_lightning.pairs.pictures import PARSER_ERRORS, PictureError, resolve_inside
from dori_lightning.report.pictures import png_uri
from dori_lightning.report.stored import stored_json
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from dori_lightning.report.pictures import Disclosure

__all__ = ["LOCALITY_FILE", "LocalityFigure", "LocalitySection", "is_locality", "read_locality"]

LOCALITY_FILE = "locality.json"
_WIDEST = 1600
"""Pixels; wider figures are made smaller, for the page's weight."""


@dataclass(frozen=True)
class LocalityFigure:
    """One figure.

    Attributes:
        title: Heading.
        caption: What it shows and how to read it.
        uri: ``data:`` address.
        width: Pixels.
        height: Pixels.
        pictures: Whether it holds pictures, whose colours a dark page must leave alone.
    """

    title: str
    caption: str
    uri: str
    width: int
    height: int
    pictures: bool = False


@dataclass(frozen=True)
class LocalitySection:
    """What one locality run shows.

    Attributes:
        name: Its run folder's name.
        lead: Its answer in words, a paragraph a line; empty where it gives none.
        figures: Its figures, in its own order.
        withheld: How many figures hold pictures that may not be shown.
    """

    name: str
    lead: str
    figures: tuple[LocalityFigure, ...]
    withheld: int = 0


def is_locality(folder: Path) -> bool:
    """Whether a run folder holds the result of ``task=locality``."""
    return (folder / LOCALITY_FILE).is_file()


def read_locality(folder: Path, *, disclosure: Disclosure) -> LocalitySection | None:
    """Read the section out of a run folder.

    Figures are ``figures/locality_*.png``; ``locality.json`` lists their titles and captions under
    ``figures`` and may give an answer under ``verdict``. A figure that it does not list is shown
    under its file's name.

    Args:
        folder: The run folder.
        disclosure: Figures that hold pictures (``shows_pictures``) need ``full``.

    Returns:
        The section, None where the folder holds no locality result.

    Raises:
        InputError: A file is damaged, or a listed figure is missing.
    """
    path = folder / LOCALITY_FILE
    if not path.is_file():
        return None
    document = stored_json(path, mend="\n  mend:  run task=locality again in this folder")
    listed = {str(entry.get("file")): entry for entry in _listed(document)}
    for file in sorted(folder.glob("figures/locality_*.png")):
        listed.setdefault(f"figures/{file.name}", {"title": _title(file.stem)})
    shown = {
        name: entry
        for name, entry in listed.items()
        if disclosure == "full" or not entry.get("shows_pictures")
    }
    return LocalitySection(
        name=folder.name,
        lead=str(document.get("verdict") or "") if isinstance(document, dict) else "",
        figures=tuple(_figure(folder, name, entry) for name, entry in shown.items()),
        withheld=len(listed) - len(shown),
    )


def _listed(document: Any) -> Iterator[Mapping[str, Any]]:
    held = document.get("figures") if isinstance(document, dict) else None
    for entry in held if isinstance(held, list) else []:
        if isinstance(entry, dict) and entry.get("file"):
            yield entry


def _title(stem: str) -> str:
    return stem.removeprefix("locality_").replace("_", " ").capitalize()


def _figure(folder: Path, name: str, entry: Mapping[str, Any]) -> LocalityFigure:
    """One figure; the list may be somebody else's, so it may name pictures of its folder only."""
    try:
        path = resolve_inside(folder, name)
        with Image.open(path, formats=("PNG",)) as opened:
            picture = opened.convert("RGB")
    except (*PARSER_ERRORS, Image.DecompressionBombError, PictureError) as error:
        raise InputError(
            f"cannot show {folder / name}: {error}\n"
            f"  mend:  run task=locality again in this folder"
        ) from None
    if picture.width > _WIDEST:
        height = round(picture.height * _WIDEST / picture.width)
        picture = picture.resize((_WIDEST, height), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    picture.save(sink, "PNG", optimize=True)
    return LocalityFigure(
        title=str(entry.get("title") or _title(path.stem)),
        caption=str(entry.get("caption") or ""),
        uri=png_uri(sink.getvalue()),
        width=picture.width,
        height=picture.height,
        pictures=bool(entry.get("shows_pictures")),
    )
