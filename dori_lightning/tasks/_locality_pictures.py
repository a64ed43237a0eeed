"""Ask models for pictures, and whether those show the image; what was asked once is kept."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dori_lightning.attacks.triggers import Trigger
from dori_lightning.files import write_atomically
from dori_lightning.metrics.replication import per_pair
from dori_lightning.models.pictures import (
    PictureOrder,
    generate_pictures,
    load_pictures,
    picture_seeds,
)
from dori_lightning.progress import stage
from dori_lightning.tasks._audit_pictures import calibrate, measure, place_of
from dori_lightning.types import Condition

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from dori_lightning.metrics.measure import Originals
    from dori_lightning.models.protocol import Sampling, TextToImage
    from dori_lightning.pairs.datamodule import PairsDataModule
    from dori_lightning.types import Pair

__all__ = ["Asked", "PictureDesk", "Rule", "rule_of"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rule:
    """What counts as drawing an image.

    Attributes:
        descriptor: Name of the deciding descriptor.
        threshold: Similarity above which an embedding draws the image.
    """

    descriptor: str
    threshold: float


@dataclass(frozen=True)
class Asked:
    """An embedding whose pictures are looked at.

    Attributes:
        place: Folder of the pictures below the desk's.
        pair: The image that is looked for.
        embedding: Text embedding (T, D).
    """

    place: str
    pair: Pair
    embedding: torch.Tensor


@dataclass
class PictureDesk:
    """Draws pictures and compares them with originals.

    Attributes:
        model: Model that draws, with whatever edit is applied when it is asked.
        sampling: How.
        originals: What pictures are compared with.
        rule: What counts as drawing an image.
        folder: Where pictures go.
        record: File that keeps similarities of pictures by their content.
        known: What that file holds.
    """

    model: TextToImage
    sampling: Sampling
    originals: Originals
    rule: Rule
    folder: Path
    record: Path
    known: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.record.is_file():
            try:
                self.known = dict(json.loads(self.record.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                log.warning("%s is damaged and is computed anew: %s", self.record, error)

    def draws(self, asked: Sequence[Asked], *, edit: str, title: str) -> list[bool]:
        """Whether each embedding draws its image on the model as it is now.

        Args:
            asked: What to draw.
            edit: Identity of the edit that is applied.
            title: What is being done.
        """
        orders = [PictureOrder(self.folder / a.place, a.embedding, a.pair.id) for a in asked]
        with stage(title, len(orders) * self.sampling.images_per_pair) as advance:
            generate_pictures(self.model, orders, self.sampling, edit=edit, advance=advance)
        return [value > self.rule.threshold for value in self._similarities(asked)]

    def _similarities(self, asked: Sequence[Asked]) -> list[float]:
        seeds = picture_seeds(self.sampling)
        values = []
        for one in asked:
            folder = self.folder / one.place
            digest = hashlib.sha256(f"{self.rule.descriptor}|{one.pair.sha256}".encode())
            for seed in seeds:
                digest.update((folder / f"{seed}.png").read_bytes())
            key = digest.hexdigest()[:24]
            if key not in self.known:
                self.known[key] = self._similarity(one.pair, load_pictures(folder, seeds))
            values.append(self.known[key])
        write_atomically(self.record, (json.dumps(self.known) + "\n").encode())
        return values

    def _similarity(self, pair: Pair, pictures: torch.Tensor) -> float:
        measures = self.originals.measures
        descriptor = measures.descriptors[self.rule.descriptor]
        place = self.originals.places[pair.id]
        original = self.originals.features[self.rule.descriptor][place : place + 1]
        values = descriptor.compare(descriptor.describe(pictures), original)[:, 0]
        return float(per_pair(values.numpy(), measures.aggregation))


def rule_of(
    model: TextToImage,
    data: PairsDataModule,
    originals: Originals,
    sampling: Sampling,
    folder: Path,
) -> Rule:
    """The threshold as an audit of the same list sets it: fixed, or calibrated on all its pairs.

    Args:
        model: Checkpoint as it is.
        data: Encoded pairs.
        originals: All pairs of the list.
        sampling: How pictures are drawn.
        folder: Where audits keep what the checkpoint draws from prompts.

    Raises:
        InputError: No threshold separates.
    """
    measures = originals.measures
    fixed = measures.descriptors[measures.decider].threshold
    if fixed is not None:
        return Rule(measures.decider, fixed)
    prompted = [
        Trigger(pair, Condition("prompt"), 0, data.encoded(pair).embedding)
        for pair in originals.pairs
    ]
    orders = [PictureOrder(place_of(folder, t), t.embedding, t.pair.id) for t in prompted]
    with stage("calibrate", len(orders) * sampling.images_per_pair) as advance:
        generate_pictures(model, orders, sampling, advance=advance)
    outcomes = [measure(t, folder, originals=originals, sampling=sampling) for t in prompted]
    calibration = calibrate(model, data, originals, outcomes)
    return Rule(calibration.descriptor, calibration.threshold)
