"""Ordinary prompts with pictures, which a checkpoint is not suspected of having memorized.

Mitigations calibrate on them (activation statistics, the loss that keeps a model's abilities) and
the cost of a mitigation is measured on them; never on the same ones.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import torch

from dori_lightning.pairs.images import image_tensor, square_image
from dori_lightning.pairs.readers import FolderPairs
from dori_lightning.pairs.stream import StreamMix, TrainingStream
from dori_lightning.pairs.tables import read_csv, read_jsonl
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dori_lightning.pairs.readers import PairsReader
    from dori_lightning.types import Pair

__all__ = [
    "CaptionCorpus",
    "Corpus",
    "Examples",
    "FolderCorpus",
    "NoCorpus",
    "PlantedCorpus",
    "Split",
]

Split = Literal["calibration", "evaluation"]
_STREAMS: dict[Split, int] = {"calibration": 1_001, "evaluation": 2_002}
EVALUATION_SHARE = 0.25
_T = TypeVar("_T")


@dataclass(frozen=True)
class Examples:
    """Prompts with their pictures.

    Attributes:
        prompts: N captions.
        images: Their pictures (N, 3, H, W) in [0, 1].
    """

    prompts: tuple[str, ...]
    images: torch.Tensor


class Corpus(Protocol):
    """Where ordinary prompts and pictures come from; the two splits share nothing."""

    @property
    def identity(self) -> str:
        """Hash of what the corpus holds."""
        ...

    def prompts(self, split: Split, count: int) -> tuple[str, ...]:
        """First ``count`` captions of a split.

        Raises:
            InputError: It has fewer.
        """
        ...

    def examples(self, split: Split, count: int, resolution: int) -> Examples:
        """First ``count`` captions of a split with their pictures, square.

        Raises:
            InputError: It has fewer, or no pictures.
        """
        ...


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
class FolderCorpus:
    """A folder of pictures with a ``metadata.csv`` or ``metadata.jsonl``, as for pairs.

    A quarter of it, chosen by a hash of each id, is kept for evaluation.

    Attributes:
        path: The folder.
        delimiter: What separates a CSV's columns.
    """

    path: Path | str
    delimiter: str = ","

    @property
    def identity(self) -> str:
        """Hash of ids, captions and pictures."""
        rows = sorted((p.id, p.prompt, p.sha256) for p in self._pairs)
        return _hash(["folder", rows])

    @cached_property
    def _pairs(self) -> Sequence[Pair]:
        return FolderPairs(path=self.path, kind="control", delimiter=self.delimiter).read()

    def prompts(self, split: Split, count: int) -> tuple[str, ...]:
        """First ``count`` captions of a split."""
        rows = [p.prompt for p in self._pairs if _in_split(p.id, split)]
        return tuple(_enough(rows, count, split, self.path))

    def examples(self, split: Split, count: int, resolution: int) -> Examples:
        """First ``count`` captions of a split with their pictures."""
        rows = [p for p in self._pairs if _in_split(p.id, split)]
        rows = _enough(rows, count, split, self.path)
        images = [image_tensor(square_image(p.image), resolution) for p in rows]
        return Examples(tuple(p.prompt for p in rows), torch.stack(images))


@dataclass(frozen=True)
class CaptionCorpus:
    """Captions without pictures: enough for activation statistics and for utility by pictures.

    Attributes:
        path: A ``.csv`` or ``.jsonl`` with a column of captions, or a ``.txt`` with one a line.
        column: The column.
        delimiter: What separates a CSV's columns.
    """

    path: Path | str
    column: str = "caption"
    delimiter: str = ","

    @property
    def identity(self) -> str:
        """Hash of the captions."""
        return _hash(["captions", self._rows()])

    def _rows(self) -> list[str]:
        path = Path(self.path)
        if not path.is_file():
            raise InputError(f"no such file: {path}\n  where: corpus.path")
        if path.suffix == ".txt":
            text = path.read_text("utf-8").splitlines()
            return [line.strip() for line in text if line.strip()]
        needed = [[self.column]]
        if path.suffix == ".jsonl":
            _, lines = read_jsonl(path, required=needed)
        else:
            _, lines = read_csv(path, delimiter=self.delimiter, required=needed)
        broken = [problem for line in lines for problem in line.problems]
        if broken:
            raise InputError(f"{path}: {len(broken)} broken lines, the first: {broken[0]}")
        return [str(line.values.get(self.column, "")).strip() for line in lines]

    def prompts(self, split: Split, count: int) -> tuple[str, ...]:
        """First ``count`` captions of a split."""
        rows = [text for text in self._rows() if text and _in_split(text, split)]
        return tuple(_enough(rows, count, split, self.path))

    def examples(self, split: Split, count: int, resolution: int) -> Examples:
        """Refuse: there are no pictures.

        Raises:
            InputError: Always.
        """
        del split, count, resolution
        raise InputError(
            f"{self.path} has captions only, and this needs pictures with captions\n"
            f"  where: corpus\n"
            f"  mend:  corpus=folder corpus.path=FOLDER (pictures with a metadata.csv)"
        )


@dataclass(frozen=True)
class NoCorpus:
    """Nothing, for audits that need no ordinary prompts."""

    identity: str = "none"

    def prompts(self, split: Split, count: int) -> tuple[str, ...]:
        """Refuse.

        Raises:
            InputError: Says how to give a corpus.
        """
        raise InputError(
            f"this needs {count} ordinary prompts for {split}, and corpus is none\n"
            f"  where: corpus\n"
            f"  mend:  corpus=folder corpus.path=FOLDER (pictures with a metadata.csv), or "
            f"corpus=captions corpus.path=FILE where captions are enough"
        )

    def examples(self, split: Split, count: int, resolution: int) -> Examples:
        """Refuse.

        Raises:
            InputError: Says how to give a corpus.
        """
        del resolution
        self.prompts(split, count)
        raise AssertionError("unreachable")


def _in_split(name: str, split: Split) -> bool:
    """Whether an element belongs to a split; depends on its name alone, so lists may grow."""
    value = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") / 2**32
    return (value < EVALUATION_SHARE) == (split == "evaluation")


def _enough(rows: list[_T], count: int, split: Split, path: Path | str) -> list[_T]:
    if len(rows) < count:
        raise InputError(
            f"{path} has {len(rows)} elements for {split}, but {count} are needed\n"
            f"  where: corpus\n"
            f"  mend:  give a longer list, or ask for fewer"
        )
    return rows[:count]


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
