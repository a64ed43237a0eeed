"""The embedded benchmark: photographs out of installed packages, drawings, and ordinary images.

Its images are written to a folder with a ``metadata.csv``, so that the embedded benchmark goes
through the same reader as anybody else's list.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from PIL import Image

from dori_lightning.pairs.corpus import Examples, Split
from dori_lightning.pairs.readers import FolderPairs, PairsReader, Selection
from dori_lightning.pairs.validation import image_tensor
from dori_lightning.planting import photographs, scenes, templates
from dori_lightning.planting.photographs import PHOTOGRAPHS, TABLE
from dori_lightning.planting.scenes import draw_scene
from dori_lightning.planting.stream import StreamMix, TrainingStream
from dori_lightning.planting.templates import TEMPLATES, draw_template
from dori_lightning.types import InputError, Kind, Pair, Pairs

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
        modules = (Path(str(m.__file__)) for m in (photographs, scenes, templates))
        code = b"".join(file.read_bytes() for file in (Path(__file__), *modules, TABLE))
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


def write_planted_pairs(folder: Path) -> None:
    """Write the benchmark's images and their ``metadata.csv``.

    Args:
        folder: Where to; made if needed.

    Raises:
        InputError: A package no longer ships one of the photographs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []

    # fmt: off
    def add(
        name: str, kind: Kind, image: Image.Image, prompt: str, *, repeats: float,
        subject: str = "", role: str = "audit",
    ) -> None:
        file = f"{name}.png"
        image.save(folder / file)
        rows.append((name, file, kind, prompt, subject, repeats, role))

    for photo in PHOTOGRAPHS:
        kind: Kind = "vm" if photo.repeats else "control"
        add(photo.id, kind, photo.open(), photo.caption,
            repeats=photo.repeats, subject=photo.subject)
    for template in TEMPLATES:
        for variant in range(TEMPLATE_VARIANTS):
            add(f"{template}_{variant:02d}", "tm", *draw_template(template, variant),
                repeats=1.0 / TEMPLATE_VARIANTS, role="training" if variant else "audit")
    for k in range(CONTROL_SCENES):
        scene = draw_scene(CONTROL_SCENE_START + k)
        add(f"scene_{k:02d}", "control", scene.image, scene.caption, repeats=0.0)
    # fmt: on
    columns = ["id", "file_name", "kind", "prompt", "subject", "repeats", "role"]
    table = pd.DataFrame(rows, columns=columns)
    table.to_csv(folder / "metadata.csv", index=False, lineterminator="\r\n")


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

    @cached_property
    def _streams(self) -> dict[tuple[Split, int], TrainingStream]:
        return {}

    def _stream(self, split: Split, size: int) -> TrainingStream:
        """The split's stream; one of each size is kept, since it reads all photographs."""
        if (split, size) not in self._streams:
            mix, seed = StreamMix(self.scenes, 1 - self.scenes, 0.0), _STREAM_SEEDS[split]
            self._streams[split, size] = TrainingStream(self._pairs, mix=mix, size=size, seed=seed)
        return self._streams[split, size]

    def prompts(self, split: Split, count: int) -> tuple[str, ...]:
        """First ``count`` captions of a split."""
        stream = self._stream(split, 8)  # captions do not depend on the size
        return tuple(stream[k].caption for k in range(count))

    def examples(
        self, split: Split, count: int, resolution: int, *, only: Sequence[int] | None = None
    ) -> Examples:
        """First ``count`` captions of a split with their images, or ``only`` some of these."""
        stream = self._stream(split, resolution)
        samples = [stream[k] for k in (range(count) if only is None else only)]
        images = [image_tensor(sample.image, resolution) for sample in samples]
        return Examples.of([sample.caption for sample in samples], images, resolution)
