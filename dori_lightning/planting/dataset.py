"""The embedded benchmark: photographs out of installed packages, drawings, and ordinary images.

Its images are written to a folder with a ``metadata.csv``, so that the embedded benchmark goes
through the same reader as anybody else's list.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dori_lightning.pairs.corpus import Examples, Split
from dori_lightning.pairs.readers import FolderPairs, PairsReader, Selection
from dori_lightning.pairs.validation import image_tensor
from dori_lightning.planting import photographs, scenes, templates
from dori_lightning.planting.photographs import PHOTOGRAPHS
from dori_lightning.planting.scenes import draw_scene
from dori_lightning.planting.stream import StreamMix, TrainingStream
from dori_lightning.planting.templates import TEMPLATES, draw_template
from dori_lightning.types import InputError, Pair, Pairs

CONTROL_SCENE_START = 7_000_000
"""First scene index of the controls.

Far behind any index that planting draws, so the model never sees them.
"""

CONTROL_SCENES = 12
TEMPLATE_VARIANTS = 24

_STREAM_SEEDS: dict[Split, int] = {"calibration": 1_001, "evaluation": 2_002}


@dataclass(frozen=True)
class PlantedPairs(Selection):
    """The embedded benchmark: photographs out of installed packages and drawn images.

    Attributes:
        cache: Folder that the images are written below, once.
    """

    cache: Path | str

    @property
    def folder(self) -> Path:
        """Where the images are, named after the code that draws them: never outdated."""
        files = (__file__, *(str(m.__file__) for m in (photographs, scenes, templates)))
        code = b"".join(Path(file).read_bytes() for file in files)
        return Path(self.cache) / f"planted-{hashlib.sha256(code).hexdigest()[:12]}"

    def read(self) -> Pairs:
        """Write the images where they are not there yet, and read them like anybody else's.

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
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same images
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_planted_pairs(folder: Path) -> Path:
    """Write the benchmark's images and their ``metadata.csv``.

    Args:
        folder: Where to; made if needed.

    Returns:
        Path of the ``metadata.csv``.

    Raises:
        InputError: A package no longer ships one of the photographs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "metadata.csv"
    pd.DataFrame(_rows(folder)).to_csv(table, index=False, lineterminator="\r\n")
    return table


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Save every image; yields its row of the table."""
    for photo in PHOTOGRAPHS:
        photo.open().save(folder / f"{photo.id}.png")
        kind = "vm" if photo.repeats else "control"
        yield _row(photo.id, kind, photo.caption, subject=photo.subject, repeats=photo.repeats)
    for template in TEMPLATES:
        for variant in range(TEMPLATE_VARIANTS):
            image, caption = draw_template(template, variant)
            name = f"{template}_{variant:02d}"
            image.save(folder / f"{name}.png")
            role = "training" if variant else "audit"
            yield _row(name, "tm", caption, repeats=1.0 / TEMPLATE_VARIANTS, role=role)
    for k in range(CONTROL_SCENES):
        scene, name = draw_scene(CONTROL_SCENE_START + k), f"scene_{k:02d}"
        scene.image.save(folder / f"{name}.png")
        yield _row(name, "control", scene.caption, repeats=0.0)


def _row(
    name: str, kind: str, prompt: str, *, repeats: float, subject: str = "", role: str = "audit"
) -> dict[str, Any]:
    return {
        "id": name,
        "file_name": f"{name}.png",
        "kind": kind,
        "prompt": prompt,
        "subject": subject,
        "repeats": repeats,
        "role": role,
    }


@dataclass(frozen=True)
class PlantedCorpus:
    """What the embedded benchmark was trained on besides planted images, drawn anew.

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
        text = json.dumps(["planted", self.scenes, rows])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _stream(self, split: Split, size: int) -> TrainingStream:
        mix = StreamMix(self.scenes, 1 - self.scenes, 0.0)
        return TrainingStream(self._pairs, mix=mix, size=size, seed=_STREAM_SEEDS[split])

    def prompts(self, split: Split, count: int) -> tuple[str, ...]:
        """First ``count`` captions of a split."""
        stream = self._stream(split, 8)  # captions do not depend on the size
        return tuple(stream[k].caption for k in range(count))

    def examples(self, split: Split, count: int, resolution: int) -> Examples:
        """First ``count`` captions of a split with their images."""
        stream = self._stream(split, resolution)
        samples = [stream[k] for k in range(count)]
        images = torch.stack([image_tensor(sample.image, resolution) for sample in samples])
        return Examples(tuple(sample.caption for sample in samples), images)
