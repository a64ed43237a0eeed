"""The record of a locality run: ``locality.json``, the contract with other tools."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dori_lightning.files import write_atomically
from dori_lightning.redaction import redact
from dori_lightning.report.document import plain_values
from dori_lightning.report.stored import stored_json
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from dori_lightning.locality.activations import ActivationFindings
    from dori_lightning.locality.embeddings import EmbeddingFindings
    from dori_lightning.locality.large import AtLarge
    from dori_lightning.locality.weights import WeightFindings
    from dori_lightning.report.record import Provenance
    from dori_lightning.types import Budget, Init, Kind

__all__ = [
    "LOCALITY_SCHEMA_VERSION",
    "LocalityReport",
    "StudiedImage",
    "read_locality_record",
    "write_locality",
]

LOCALITY_SCHEMA_VERSION = 1

_TOP_KEYS = (
    "schema_version", "checkpoint", "mitigation", "start", "restarts", "budget", "images",
    "embeddings", "activations", "weights", "at_large", "provenance",
    "figures", "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class StudiedImage:
    """One image that was attacked.

    Attributes:
        id: Pair id.
        kind: Kind of pair; ``control`` for controls.
        prompt: Its prompt.
        attacked: Start to attacks that stayed finite.
        working: Start to those whose end draws the image.
    """

    id: str
    kind: Kind
    prompt: str
    attacked: dict[Init, int]
    working: dict[Init, int]


@dataclass(frozen=True)
class LocalityReport:
    """Everything that a locality run found.

    Attributes:
        checkpoint: Name of the checkpoint.
        mitigation: Whose model the triggers were searched on; ``none`` for the checkpoint.
        start: Whose triggers are traced through layers, weights, budgets and lines.
        restarts: Attacks per image and start.
        budget: What each of them may spend.
        descriptor: What judges pictures.
        threshold: Similarity above which an embedding draws the image.
        pictures_each: Pictures per embedding, of which the closest counts, or the median.
        images: Images under study, and controls.
        memorized_prompts: Ids of the other memorized images whose prompts are compared with.
        control_prompts: Ids of the controls whose prompts are compared with.
        embeddings: Where triggers lie; None where it was not asked.
        activations: What they activate.
        weights: Which weights methods select with them.
        at_large: How often they draw the image.
        provenance: Where the numbers come from.
        schema_version: Version of the layout of ``locality.json``.
    """

    checkpoint: str
    mitigation: str
    start: Init
    restarts: int
    budget: Budget
    descriptor: str
    threshold: float
    pictures_each: int
    images: tuple[StudiedImage, ...]
    memorized_prompts: tuple[str, ...]
    control_prompts: tuple[str, ...]
    embeddings: EmbeddingFindings | None
    activations: ActivationFindings | None
    weights: WeightFindings | None
    at_large: AtLarge | None
    provenance: Provenance
    schema_version: int = LOCALITY_SCHEMA_VERSION

    @property
    def studied(self) -> tuple[StudiedImage, ...]:
        """Memorized images."""
        return tuple(image for image in self.images if image.kind != "control")

    @property
    def controls(self) -> tuple[StudiedImage, ...]:
        """Control images that were attacked."""
        return tuple(image for image in self.images if image.kind == "control")


def write_locality(
    report: LocalityReport,
    folder: Path,
    *,
    figures: Sequence[Mapping[str, str]] = (),
    verdict: str = "",
) -> Path:
    """Write ``locality.json`` in one step and return its path.

    Args:
        report: What to write.
        folder: The run folder.
        figures: Of each figure: its ``file`` below the folder, ``title`` and ``caption``.
        verdict: The answer in a few sentences.

    Raises:
        TypeError: The report holds something that JSON cannot.
    """
    provenance = {**asdict(report.provenance), "config": redact(report.provenance.config)}
    document = plain_values(
        {**asdict(report), "provenance": provenance, "figures": figures, "verdict": verdict}
    )
    text = json.dumps(document, sort_keys=True, indent=1, allow_nan=False)
    return write_atomically(folder / "locality.json", (text + "\n").encode())


def read_locality_record(folder: Path) -> dict[str, Any]:
    """Read a run folder's ``locality.json`` back.

    Raises:
        InputError: It is missing, is not JSON, is of another schema version, or lacks a promised
            key.
    """
    path = folder / "locality.json"
    document = stored_json(
        path,
        mend=": run the task again to rewrite it",
        missing="the run has not finished, or this is no run of task=locality",
    )
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != LOCALITY_SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema_version {version!r}, this version reads "
            f"{LOCALITY_SCHEMA_VERSION}: run the task again"
        )
    missing = [key for key in _TOP_KEYS if key not in document]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}: run the task again to rewrite it")
    return dict(document)
