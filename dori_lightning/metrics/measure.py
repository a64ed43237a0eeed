"""Measure generated pictures against originals, and calibrate what counts as a copy.

The threshold is calibrated on pictures that are known not to be copies.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dori_lightning.metrics.calibration import calibrate, separation_table
from dori_lightning.metrics.replication import diversity, pair_scores
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dori_lightning.metrics.calibration import Separation
    from dori_lightning.metrics.descriptors import Descriptor
    from dori_lightning.metrics.perceptual import ClipAlignment, LPIPSDistance
    from dori_lightning.metrics.replication import Aggregation
    from dori_lightning.types import Calibration, Outcome, Pair

log = logging.getLogger(__name__)

__all__ = ["Measured", "Measures", "Originals", "calibrate_measures", "null_similarities"]


@dataclass(frozen=True)
class Measures:
    """What an audit measures.

    Attributes:
        descriptors: Descriptors by name; all are recorded.
        decider: Name of the one that decides what a copy is.
        aggregation: How the K pictures of a pair become one number.
        lpips: LPIPS distance, where backbone weights are given.
        alignment: CLIP score, where a CLIP folder is given.
    """

    descriptors: Mapping[str, Descriptor]
    decider: str
    aggregation: Aggregation = "max"
    lpips: LPIPSDistance | None = None
    alignment: ClipAlignment | None = None

    def __post_init__(self) -> None:
        if self.decider not in self.descriptors:
            raise InputError(
                f"metrics.decider must be one of metrics.descriptors "
                f"({', '.join(self.descriptors)}), got {self.decider!r}"
            )
        if self.aggregation not in ("max", "median"):
            raise InputError(
                f"metrics.aggregation must be max or median, got {self.aggregation!r}"
            )


@dataclass(frozen=True)
class Measured:
    """What one set of K pictures measures.

    Attributes:
        similarity: Descriptor name to (K,) similarities with the original; NaN where the attack
            failed.
        diversity: Mean pairwise similarity of the K pictures by the deciding descriptor.
        lpips: (K,) LPIPS distances, or None.
        alignment: (K,) CLIP scores with the prompt, or None.
    """

    similarity: dict[str, np.ndarray]
    diversity: float
    lpips: np.ndarray | None
    alignment: np.ndarray | None


class Originals:
    """Originals, described once by every descriptor."""

    def __init__(self, pairs: Sequence[Pair], images: torch.Tensor, measures: Measures) -> None:
        """Describe originals.

        Args:
            pairs: N pairs.
            images: Their pictures (N, 3, H, W) in [0, 1], at the model's resolution.
            measures: What describes and compares.
        """
        self.pairs, self.images, self.measures = tuple(pairs), images, measures
        self.places = {pair.id: k for k, pair in enumerate(pairs)}
        self.features = {name: d.describe(images) for name, d in measures.descriptors.items()}

    def measure(self, pair: Pair, pictures: torch.Tensor, *, failed: bool = False) -> Measured:
        """Compare pictures with a pair's original.

        Args:
            pair: The pair.
            pictures: Generated pictures (K, 3, H, W) in [0, 1].
            failed: Whether the attack failed; similarities are NaN then.
        """
        k, measures = self.places[pair.id], self.measures
        similarity, spread = {}, float("nan")
        for name, descriptor in measures.descriptors.items():
            features = descriptor.describe(pictures)
            values = descriptor.compare(features, self.features[name][k : k + 1])[:, 0].numpy()
            similarity[name] = np.full_like(values, np.nan) if failed else values
            if name == measures.decider:
                spread = diversity(descriptor.compare(features, features).numpy())
        distances = (
            measures.lpips.distance(pictures, self.images[k : k + 1]).numpy()
            if measures.lpips
            else None
        )
        scores = (
            measures.alignment.alignment(pictures, [pair.prompt] * len(pictures)).numpy()
            if measures.alignment
            else None
        )
        return Measured(similarity, spread, distances, scores)

    def best(self, name: str, pictures: torch.Tensor) -> torch.Tensor:
        """Best similarity (N,) that any of the pictures has with each original.

        Args:
            name: Descriptor.
            pictures: Pictures (K, 3, H, W) in [0, 1].
        """
        descriptor = self.measures.descriptors[name]
        return descriptor.compare(descriptor.describe(pictures), self.features[name]).amax(0)

    def similarities(self, pictures: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
        """Similarities (K, N) of pictures (K, 3, H, W) with N pairs by the deciding descriptor."""
        name = self.measures.decider
        descriptor = self.measures.descriptors[name]
        own = self.features[name][[self.places[pair.id] for pair in pairs]]
        return descriptor.compare(descriptor.describe(pictures), own)


def null_similarities(
    originals: Originals, name: str, pictures: Mapping[str, torch.Tensor]
) -> list[float]:
    """Best-of-K similarities of pictures that cannot be copies, by one descriptor.

    Pictures of every prompt against the originals of *control* pairs, which the model cannot
    hold. Not against the others: a control prompt may well bring back somebody else's memorized
    picture. A pair is never compared with a picture file that is the same as its own.

    Args:
        originals: All audited pairs.
        name: Descriptor.
        pictures: Pair id to its unattacked prompt's pictures (K, 3, H, W).
    """
    values: list[float] = []
    for pair in originals.pairs:
        best = originals.best(name, pictures[pair.id]).tolist()
        for other, value in zip(originals.pairs, best, strict=True):
            copy = other.id != pair.id and other.sha256 != "" and other.sha256 == pair.sha256
            if other.kind == "control" and not copy:
                values.append(value)
    return values


def calibrate_measures(
    originals: Originals,
    prompted: Sequence[Outcome],
    *,
    pictures: Mapping[str, torch.Tensor],
    reconstructions: torch.Tensor,
) -> Calibration:
    """Set the deciding descriptor's threshold for this checkpoint and list.

    Args:
        originals: All audited pairs, N.
        prompted: Outcomes of the unattacked prompts.
        pictures: Pair id to its unattacked prompt's pictures (K, 3, H, W).
        reconstructions: Originals through the autoencoder (N, 3, H, W) in [0, 1].

    Raises:
        InputError: No threshold separates; says which descriptor would.
    """
    measures, samples = originals.measures, {}
    for name, descriptor in measures.descriptors.items():
        features = originals.features[name]
        ceiling = [
            float(
                descriptor.compare(descriptor.describe(picture[None]), features[k : k + 1])[0, 0]
            )
            for k, picture in enumerate(reconstructions)
        ]
        samples[name] = (ceiling, null_similarities(originals, name, pictures))
    offered = separation_table({k: v for k, v in samples.items() if v[0] and v[1]})
    decider = _decider(measures, offered)
    ceiling, null = samples[decider]
    scores = {
        kind: list(
            pair_scores(
                [o for o in prompted if o.pair.kind == kind],
                decider,
                aggregation=measures.aggregation,
            ).values()
        )
        for kind in ("vm", "control")
    }
    return calibrate(
        decider,
        null=null,
        ceiling=ceiling,
        vm_scores=scores["vm"],
        control_scores=scores["control"],
        fixed=measures.descriptors[decider].threshold,
        offered=offered,
    )


def _decider(measures: Measures, offered: Sequence[Separation]) -> str:
    """The configured decider, or the one that separates most where it cannot decide here.

    An audit that ran for hours must not end without an answer because one descriptor is blind to
    one checkpoint; the descriptor that decided is named in every row of the answer.
    """
    name = measures.decider
    if measures.descriptors[name].threshold is not None:
        return name
    able = [row.descriptor for row in offered if row.decides]
    if not able or name in able:
        return name
    log.warning(
        "%s cannot tell copies from other pictures on this checkpoint and list; %s decides "
        "instead (metrics.decider=%s makes that the choice)",
        name,
        able[0],
        able[0],
    )
    return able[0]
