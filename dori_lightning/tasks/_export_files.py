"""The files of an export: complete and read back, or not there."""

from __future__ import annotations

import logging
import os
import re
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dori_lightning.models.writing import (
    check_written,
    write_configs,
    write_folder,
    write_single,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from dori_lightning.models.writing import Parts, Weights

__all__ = ["export_folder", "export_single", "file_name"]

log = logging.getLogger(__name__)


def export_folder(place: Path, parts: Parts, weights: Weights, card: bytes) -> None:
    """Write a diffusers folder with its card, unless it is there."""
    if place.is_dir():
        log.info("%s is there already", place)
        return
    with _partial(place) as partial:
        write_folder(partial, parts, weights)
        (partial / "README.md").write_bytes(card)
        check_written(partial, weights)


def export_single(place: Path, parts: Parts, weights: Weights, notes: Mapping[str, str]) -> None:
    """Write a single file with ``notes`` in its header, unless it is there."""
    if place.is_file():
        log.info("%s is there already", place)
        return
    with _partial(place) as partial:
        config = partial.with_name(f"{partial.name}.config")
        _remove(config)
        try:
            write_configs(config, parts)
            write_single(partial, parts, weights, notes)
            check_written(partial, weights, config=config)
        finally:
            shutil.rmtree(config, ignore_errors=True)


@contextmanager
def _partial(place: Path) -> Iterator[Path]:
    """A private place to write to, which becomes ``place`` in one step once it is complete.

    Whoever uses it holds the folder's lock, so what is there already was left by a killed run.
    """
    partial = place.with_name(f".partial-{place.name}")
    _remove(partial)
    try:
        yield partial
        _flush(sorted(partial.rglob("*")) if partial.is_dir() else [partial])
        partial.rename(place)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _flush(paths: Sequence[Path]) -> None:
    """Bring files to the disk before their name says that they are complete."""
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def file_name(text: str) -> str:
    """Text as the name of a file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-") or "checkpoint"
