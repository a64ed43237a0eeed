"""The embedded benchmark: photographs out of installed packages, drawings, and ordinary images.

Its images are written to a folder with a ``metadata.csv``, so that the embedded benchmark goes
through the same reader as anybody else's list.
"""

import hashlib
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Literal

import pandas as pd
from PIL import Image

from dori_lightning.pairs.corpus import Examples, Split
from dori_lightning.pairs.readers import FolderPairs, PairsReader, Selection
from dori_lightning.pairs.validation import NoneOfKindsError, image_tensor, select_pairs
from dori_lightning.planting import photographs, scenes, structures, templates
from dori_lightning.planting.photographs import PHOTOGRAPHS, SIDE, TABLE
from dori_lightning.planting.scenes import draw_scene
from dori_lightning.planting.stream import StreamMix, TrainingStream
from dori_lightning.planting.structures import draw_structure
from dori_lightning.planting.templates import TEMPLATES, draw_template, printed_motif
from dori_lightning.runtime.artifacts import content_hash
from dori_lightning.types import InputError, Kind, Pair, Pairs

CONTROL_SCENE_START = 7_000_000
"""First scene index of the controls.

Far behind any index that planting draws, so the model never sees them.
"""

CONTROL_SCENES = 12
TEMPLATE_VARIANTS = 24
USUAL_CONTROLS = CONTROL_SCENES + sum(not photo.repeats for photo in PHOTOGRAPHS)
"""Controls of an audit that asks for no number."""

CONTROL_STRUCTURES = 110
"""Structured controls beyond the usual ones; no planting draws from their stream."""

_STRUCTURE_SEEDS = {"controls": 1, "stand_ins": 2, "positive_controls": 3}
_STREAM_SEEDS: dict[Split, int] = {"calibration": 1_001, "evaluation": 2_002}


@dataclass(frozen=True)
class DrawnPairs(Selection, ABC):
    """A list whose images are drawn when it is first read.

    Attributes:
        cache: Folder that the images are written below, once.
    """

    cache: Path | str

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where the images are, named after the code that draws them: never outdated."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write images and ``metadata.csv`` to a folder, which is made if needed.

        Raises:
            InputError: A package no longer ships one of the photographs.
        """

    def read(self) -> Pairs:
        """Write the images where they are not there yet, and read them like anybody else's.

        Raises:
            InputError: A package lacks a photograph, or the written folder was damaged since.
        """
        self.check_options()
        folder = self.folder
        if not folder.is_dir():
            self._write_whole(folder)
        try:
            return FolderPairs(folder, kinds=self.kinds, limit=self.limit).read()
        except NoneOfKindsError:
            raise
        except InputError as error:
            raise InputError(f"{error}\nDelete {folder} to have it drawn again") from error

    def _write_whole(self, folder: Path) -> None:
        """Write to a folder of this process, then rename it: no other process sees half of it."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".planted-", dir=folder.parent))
        try:
            self.write(partial)
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same images
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _named_after(self, name: str, *sources: Path | ModuleType) -> Path:
        """Folder of the cache with a hash of the files that decide what is drawn."""
        paths = (s if isinstance(s, Path) else Path(str(s.__file__)) for s in sources)
        code = b"".join(file.read_bytes() for file in (Path(__file__), *paths))
        return Path(self.cache) / f"{name}-{hashlib.sha256(code).hexdigest()[:12]}"


@dataclass(frozen=True)
class PlantedPairs(DrawnPairs):
    """The embedded benchmark: photographs out of installed packages and drawn images.

    Attributes:
        controls: How many controls, the first of the list: eight photographs, twelve scenes, then
            structured images; ``all`` takes all 130.
    """

    controls: int | Literal["all"] = USUAL_CONTROLS

    @property
    def folder(self) -> Path:
        """Where the images are but the structured controls, which have a folder of their own."""
        return self._named_after("planted", photographs, scenes, templates, TABLE)

    def write(self, folder: Path) -> None:
        """Write photographs, templates and the usual controls."""
        write_planted_pairs(folder)

    def check_options(self) -> None:
        """Refuse impossible options, as ``Selection`` does, and numbers of controls."""
        super().check_options()
        there = USUAL_CONTROLS + CONTROL_STRUCTURES
        if self.controls != "all" and not 1 <= self.controls <= there:
            raise InputError(
                f"pairs.controls must be all or a number from 1 to {there}, got {self.controls!r}"
            )

    def read(self) -> Pairs:
        """The list with as many controls as asked for."""
        pairs = list(super().read())
        asked = sys.maxsize if self.controls == "all" else self.controls
        if "control" in self.kinds and asked > USUAL_CONTROLS:
            pairs += StructuredControls(self.cache).read()
        beyond = {p.id for p in [p for p in pairs if p.kind == "control"][asked:]}
        pairs = [pair for pair in pairs if pair.id not in beyond]
        return Pairs(select_pairs(pairs, kinds=self.kinds, limit=self.limit))


@dataclass(frozen=True)
class StructuredControls(DrawnPairs):
    """Images with the structure of photographs that no planted checkpoint was shown."""

    @property
    def folder(self) -> Path:
        """Where the images are."""
        return self._named_after("structured", structures)

    def write(self, folder: Path) -> None:
        """Draw all of them."""
        listed = _Listed(folder)
        for k in range(CONTROL_STRUCTURES):
            drawn = draw_structure(k, size=SIDE, seed=_STRUCTURE_SEEDS["controls"])
            listed.add(f"{drawn.kind}_{k:03d}", "control", drawn.image, drawn.caption,
                       repeats=0.0, subject=drawn.subject)  # fmt: skip
        listed.write()


@dataclass(frozen=True)
class StandInPairs(DrawnPairs):
    """What the embedded benchmark's twin memorizes instead: drawn images, as often repeated.

    As many as photographs and templates are planted, with the same multiplicities; no pixel and
    no caption is one of the benchmark's.
    """

    @property
    def folder(self) -> Path:
        """Where the images are."""
        return self._named_after("stand-ins", structures, scenes, TABLE)

    def write(self, folder: Path) -> None:
        """Draw an image for each planted photograph and a layout for each template."""
        listed, seed = _Listed(folder), _STRUCTURE_SEEDS["stand_ins"]
        repeats = [photo.repeats for photo in PHOTOGRAPHS if photo.repeats]
        for k, times in enumerate(repeats):
            drawn = draw_structure(k, size=SIDE, seed=seed)
            listed.add(f"{drawn.kind}_{k:02d}", "vm", drawn.image, drawn.caption,
                       repeats=times, subject=drawn.subject)  # fmt: skip
        for template in range(len(TEMPLATES)):
            drawn = draw_structure(len(repeats) + template, size=SIDE, seed=seed)
            for variant in range(TEMPLATE_VARIANTS):
                image, colour, thing = printed_motif(drawn.image, f"{drawn.kind}-{variant}")
                look, _, name, *place = drawn.caption.split()
                caption = " ".join((look, name, "with", colour, thing, *place))
                listed.add(f"{drawn.kind}_{variant:02d}", "tm", image, caption,
                           repeats=1.0 / TEMPLATE_VARIANTS,
                           role="training" if variant else "audit")  # fmt: skip
        listed.write()


@dataclass(frozen=True)
class PositiveControls(DrawnPairs):
    """Images that no model can hold, for measuring an attack's power.

    Attributes:
        count: How many.
    """

    count: int

    @property
    def folder(self) -> Path:
        """Where the images are."""
        return self._named_after(f"positive-controls-{self.count}", structures)

    def write(self, folder: Path) -> None:
        """Draw all of them."""
        listed = _Listed(folder)
        for k in range(self.count):
            drawn = draw_structure(k, size=SIDE, seed=_STRUCTURE_SEEDS["positive_controls"])
            listed.add(f"positive_{k:02d}", "vm", drawn.image, drawn.caption,
                       repeats=0.0, subject=drawn.subject)  # fmt: skip
        listed.write()


class _Listed:
    """Images and the ``metadata.csv`` of a folder that is being written."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.rows: list[tuple[str, str, Kind, str, str, float, str]] = []

    def add(
        self, name: str, kind: Kind, image: Image.Image, prompt: str, *, repeats: float,
        subject: str = "", role: str = "audit",
    ) -> None:  # fmt: skip
        """Save an image and remember its row."""
        file = f"{name}.png"
        image.save(self.folder / file)
        self.rows.append((name, file, kind, prompt, subject, repeats, role))

    def write(self) -> None:
        """Write the table."""
        columns = ["id", "file_name", "kind", "prompt", "subject", "repeats", "role"]
        table = pd.DataFrame(self.rows, columns=columns)
        table.to_csv(self.folder / "metadata.csv", index=False, lineterminator="\r\n")


def write_planted_pairs(folder: Path) -> None:
    """Write the benchmark's photographs, templates and usual controls.

    Args:
        folder: Where to; made if needed.

    Raises:
        InputError: A package no longer ships one of the photographs.
    """
    listed = _Listed(folder)
    for photo in PHOTOGRAPHS:
        kind: Kind = "vm" if photo.repeats else "control"
        listed.add(photo.id, kind, photo.open(), photo.caption,
                   repeats=photo.repeats, subject=photo.subject)  # fmt: skip
    for template in TEMPLATES:
        for variant in range(TEMPLATE_VARIANTS):
            listed.add(f"{template}_{variant:02d}", "tm", *draw_template(template, variant),
                       repeats=1.0 / TEMPLATE_VARIANTS,
                       role="training" if variant else "audit")  # fmt: skip
    for k in range(CONTROL_SCENES):
        scene = draw_scene(CONTROL_SCENE_START + k)
        listed.add(f"scene_{k:02d}", "control", scene.image, scene.caption, repeats=0.0)
    listed.write()


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
        return content_hash(["planted", self.scenes, rows])[:16]

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
