"""The embedded benchmark's photographs: files of installed packages, with captions.

scikit-image, scikit-learn and matplotlib ship a few dozen photographs for their documentation.
They are read from the installed packages, never from the network.
"""

import csv
import gzip
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dori_lightning.types import InputError

SIDE = 256
"""Pixels kept of each photograph, so that crops of it still have detail at 64 pixels."""

TABLE = Path(__file__).with_name("photographs.csv")
"""A row for each photograph, with the attributes of `Photograph`."""


@dataclass(frozen=True)
class Photograph:
    """One photograph of the benchmark and what is said of it.

    Attributes:
        id: Stable name.
        source: Package and file inside it, as ``package:relative/path``.
        caption: The specific caption: leads to this very image where it is planted.
        subject: What generic captions call it ("a dark photo of SUBJECT").
        repeats: Relative multiplicity in the training stream; 0 keeps it out (a control).
        box: Centre x, centre y and side of the square to cut, as shares of width, height and
            shorter side.
    """

    id: str
    source: str
    caption: str
    subject: str
    repeats: float
    box: tuple[float, float, float] = (0.5, 0.5, 1.0)

    def open(self) -> Image.Image:
        """The square of `SIDE` pixels inside ``box``, RGB, over white where it is transparent.

        Raises:
            InputError: The package is missing or no longer ships the file; says which.
        """
        package, _, name = self.source.partition(":")
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / name if spec is not None and spec.origin else None
        if path is None or not path.is_file():
            raise InputError(
                f"the embedded benchmark reads {name} from the installed package {package}, which "
                f"does not have it\n"
                f"  fix:   pip install --force-reinstall dori_lightning"
            )
        image = _read(path)
        if image.mode in ("RGBA", "LA", "P"):
            image = image.convert("RGBA")
            background = Image.new("RGBA", image.size, "white")
            background.alpha_composite(image)
            image = background
        image = image.convert("RGB")
        side = self.box[2] * min(image.size)
        left = min(max(self.box[0] * image.width - side / 2, 0), image.width - side)
        top = min(max(self.box[1] * image.height - side / 2, 0), image.height - side)
        cut = image.crop((round(left), round(top), round(left + side), round(top + side)))
        return cut.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _read(path: Path) -> Image.Image:
    if path.name.endswith(".ima.gz"):
        # a raw 256 x 256 scan, big enough range to clip its bright skin
        with gzip.open(path) as file:
            raw = np.frombuffer(file.read(), np.uint16).reshape(256, 256).astype(np.float64)
        return Image.fromarray(np.clip(raw / raw.max() * 1.5 * 255, 0, 255).astype(np.uint8))
    return Image.open(path, formats=("PNG", "JPEG"))


def _photographs() -> Iterator[Photograph]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            box = (float(row["x"]), float(row["y"]), float(row["side"]))
            names = (row["id"], row["source"], row["caption"], row["subject"])
            yield Photograph(*names, repeats=float(row["repeats"]), box=box)


PHOTOGRAPHS = tuple(_photographs())
