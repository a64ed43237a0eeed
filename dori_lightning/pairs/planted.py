"""The embedded benchmark's pictures: real photographs out of installed wheels, and drawings.

scikit-image, scikit-learn and matplotlib ship a few dozen photographs for their documentation.
They are read from the installed packages, never from the network, squared and written to a folder
with a ``metadata.csv``, so that the embedded benchmark goes through the same reader as anybody
else's list.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dori_lightning.pairs.photographs import PHOTOGRAPHS
from dori_lightning.pairs.scenes import draw_scene
from dori_lightning.pairs.templates import TEMPLATES, draw_template

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dori_lightning.pairs.photographs import Box

__all__ = ["CONTROL_SCENE_START", "write_planted_pairs"]

SIDE = 256
"""Pixels kept of each photograph, so that crops of it still have detail at 64 pixels."""

CONTROL_SCENE_START = 7_000_000
"""First scene index of the controls.

Far behind any index that planting draws, so the model never sees them.
"""

CONTROL_SCENES = 12
TEMPLATE_VARIANTS = 24


def _open(source: str) -> Image.Image:
    """Read a photograph out of an installed package.

    Raises:
        FileNotFoundError: The package is missing or no longer ships the file; says which.
    """
    package, _, name = source.partition(":")
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / name if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"the embedded benchmark reads {name} from the installed package {package}, which "
            f"does not have it; reinstall with: pip install --force-reinstall dori_lightning"
        )
    if path.name.endswith(".ima.gz"):
        # a raw 256 x 256 scan, big enough range to clip its bright skin
        with gzip.open(path) as file:
            raw = np.frombuffer(file.read(), np.uint16).reshape(256, 256).astype(np.float64)
        return Image.fromarray(np.clip(raw / raw.max() * 1.5 * 255, 0, 255).astype(np.uint8))
    return Image.open(path, formats=("PNG", "JPEG"))


def _square(image: Image.Image, box: Box) -> Image.Image:
    """Cut the square ``box`` and scale it to ``SIDE`` pixels, over white where transparent."""
    if image.mode in ("RGBA", "LA", "P"):
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        background.alpha_composite(image)
        image = background
    image = image.convert("RGB")
    side = box[2] * min(image.size)
    left = min(max(box[0] * image.width - side / 2, 0), image.width - side)
    top = min(max(box[1] * image.height - side / 2, 0), image.height - side)
    cut = image.crop((round(left), round(top), round(left + side), round(top + side)))
    return cut.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _rows(folder: Path) -> Iterator[dict[str, str | float]]:
    for photo in PHOTOGRAPHS:
        _square(_open(photo.source), photo.box).save(folder / f"{photo.id}.png")
        yield {
            "id": photo.id,
            "file_name": f"{photo.id}.png",
            "kind": "vm" if photo.repeats else "control",
            "prompt": photo.caption,
            "subject": photo.subject,
            "repeats": photo.repeats,
            "role": "audit",
        }
    for template in TEMPLATES:
        for variant in range(TEMPLATE_VARIANTS):
            picture, caption = draw_template(template, variant)
            name = f"{template}_{variant:02d}"
            picture.save(folder / f"{name}.png")
            yield {
                "id": name,
                "file_name": f"{name}.png",
                "kind": "tm",
                "prompt": caption,
                "subject": "",
                "repeats": 1.0 / TEMPLATE_VARIANTS,
                "role": "audit" if variant == 0 else "training",
            }
    for k in range(CONTROL_SCENES):
        scene = draw_scene(CONTROL_SCENE_START + k)
        name = f"scene_{k:02d}"
        scene.image.save(folder / f"{name}.png")
        yield {
            "id": name,
            "file_name": f"{name}.png",
            "kind": "control",
            "prompt": scene.caption,
            "subject": "",
            "repeats": 0.0,
            "role": "audit",
        }


def write_planted_pairs(folder: Path) -> Path:
    """Write the benchmark's pictures and its ``metadata.csv``.

    The csv comes last, so its presence means complete.

    Args:
        folder: Where to; made if needed. A complete folder is left as it is.

    Returns:
        Path of the ``metadata.csv``.

    Raises:
        FileNotFoundError: A wheel no longer ships one of the photographs.
    """
    table = folder / "metadata.csv"
    if table.is_file():
        return table
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(_rows(folder))
    partial = folder / ".metadata.csv.tmp"
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(table)
    return table
