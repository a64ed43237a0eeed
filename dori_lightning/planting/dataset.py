"""The embedded benchmark's pictures: real photographs out of installed wheels, and drawings.

scikit-image, scikit-learn and matplotlib ship a few dozen photographs for their documentation.
They are read from the installed packages, never from the network, squared and written to a folder
with a ``metadata.csv``, so that the embedded benchmark goes through the same reader as anybody
else's list.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from dori_lightning.pairs.corpus import Examples, Split, _hash
from dori_lightning.pairs.readers import FolderPairs, Selection
from dori_lightning.pairs.validation import image_tensor
from dori_lightning.planting import photographs, scenes, templates
from dori_lightning.planting.photographs import PHOTOGRAPHS, Box
from dori_lightning.planting.scenes import draw_scene
from dori_lightning.planting.stream import StreamMix, TrainingStream
from dori_lightning.planting.templates import TEMPLATES, draw_template
from dori_lightning.types import InputError, Pair

if TYPE_CHECKING:
    from dori_lightning.pairs.readers import PairsReader


_STREAMS: dict[Split, int] = {"calibration": 1_001, "evaluation": 2_002}


@dataclass(frozen=True)
class PlantedCorpus:
    """What the embedded benchmark was trained on besides planted pictures, drawn anew.

    Half procedural scenes and half generic crops of the planted photographs, from streams of
    their own, so that no element is one the checkpoint was trained on.

    Attributes:
        pairs: The planted list, whose photographs are cropped.
        scenes: Share of scenes.
    """

    pairs: PairsReader
    scenes: float = 0.5

    @cached_property
    def _pairs(self) -> Sequence[Pair]:
        return self.pairs.read()

    @property
    def identity(self) -> str:
        """Hash of the list and the mix."""
        rows = sorted((pair.id, pair.sha256) for pair in self._pairs)
        return _hash(["planted", self.scenes, rows])

    def _stream(self, split: Split, size: int) -> TrainingStream:
        mix = StreamMix(self.scenes, 1 - self.scenes, 0.0)
        return TrainingStream(self._pairs, mix=mix, size=size, seed=_STREAMS[split])

    def prompts(self, split: Split, count: int) -> tuple[str, ...]:
        """First ``count`` captions of a split."""
        stream = self._stream(split, 8)  # captions do not depend on the size
        return tuple(stream[k].caption for k in range(count))

    def examples(self, split: Split, count: int, resolution: int) -> Examples:
        """First ``count`` captions of a split with their pictures."""
        stream = self._stream(split, resolution)
        samples = [stream[k] for k in range(count)]
        images = torch.stack([image_tensor(sample.image, resolution) for sample in samples])
        return Examples(tuple(sample.caption for sample in samples), images)


@dataclass(frozen=True)
class PlantedPairs(Selection):
    """The embedded benchmark: photographs out of installed packages and drawn pictures.

    Attributes:
        cache: Folder that the pictures are written below, once.
    """

    cache: Path | str

    @property
    def folder(self) -> Path:
        """Where the pictures are, named after the code that draws them: never outdated."""
        files = (__file__, *(str(m.__file__) for m in (photographs, scenes, templates)))
        code = b"".join(Path(file).read_bytes() for file in files)
        return Path(self.cache) / f"planted-{hashlib.sha256(code).hexdigest()[:12]}"

    def read(self) -> tuple[Pair, ...]:
        """Write the pictures where they are not there yet, and read them like anybody else's.

        Raises:
            InputError: A package lacks a photograph, or the written folder was damaged since.
        """
        self.check_options()
        folder = self.folder
        if not folder.is_dir():
            self._write(folder)
        try:
            return FolderPairs(folder, kinds=self.kinds, limit=self.limit).read()
        except InputError as error:
            raise InputError(f"{error}\nDelete {folder} to have it drawn again") from error

    def _write(self, folder: Path) -> None:
        """Write to a folder of this process, then rename it: no other process sees half of it."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".planted-", dir=folder.parent))
        try:
            write_planted_pairs(partial)
            partial.rename(folder)
        except FileNotFoundError as error:
            raise InputError(str(error)) from error
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same pictures
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


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
