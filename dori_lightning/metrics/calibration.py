"""Say for each image what similarity makes a copy, on the checkpoint at hand.

A threshold tuned on one benchmark means nothing on another checkpoint, nor one image's on another
image: a blurry autoencoder lowers what a copy can reach, a plain image raises what anything
reaches. So each image has its own, midway between two things that can be measured anywhere: what
images of ordinary prompts reach against it (``null``), and what a perfect replica reaches after
the checkpoint's own autoencoder (``ceiling``). Neither depends on the rest of the list: an image
that the autoencoder cannot hold moves nobody's threshold but its own.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike

from dori_lightning.metrics.descriptors import Descriptor
from dori_lightning.metrics.perceptual import ClipAlignment, LPIPSDistance
from dori_lightning.metrics.replication import diversity, per_pair
from dori_lightning.metrics.statistics import roc_curve
from dori_lightning.runtime.logging import with_progress
from dori_lightning.types import (
    MARGIN,
    Calibration,
    InputError,
    Outcome,
    Pair,
    Reference,
    Scale,
)

log = logging.getLogger(__name__)


def _finite(values: ArrayLike, what: str) -> np.ndarray:
    """Drop failed (NaN) scores, loudly: (N,) float64."""
    array = np.asarray(values, np.float64).ravel()
    kept = array[np.isfinite(array)]
    if kept.size < array.size:
        log.warning(
            "%d of %d similarities of %s are not finite and left out",
            array.size - kept.size,
            array.size,
            what,
        )
    return kept


def calibrate(
    descriptor: str,
    *,
    nulls: Mapping[str, ArrayLike],
    ceilings: Mapping[str, float],
    vm_scores: ArrayLike = (),
    control_scores: ArrayLike = (),
    fixed: float | None = None,
    able: Sequence[str] = (),
) -> Calibration:
    """Put each image's threshold midway between what ordinary images and a perfect replica reach.

    Attacked controls are deliberately no part of this. If they were, the threshold would rise
    until they pass, and the false-positive rate of the attack, the one number that says whether
    "the attack brought it back" can be believed, would be low by construction. They stay a
    held-out test.

    Args:
        descriptor: Name of the deciding descriptor.
        nulls: Pair id to the similarities, with its original, of images of ordinary prompts; the
            highest counts.
        ceilings: Pair id to the similarity of its original's autoencoder reconstruction.
        vm_scores: Per-pair similarities of unattacked vm prompts; only for the ROC.
        control_scores: Per-pair similarities of unattacked control prompts; only for the ROC.
        fixed: One threshold for all images, taken as it is (rule ``fixed``); warned about where
            the ceilings or the nulls say that it cannot work here.
        able: Other descriptors that can audit images here, for the message where this one cannot.

    Returns:
        The calibration; it keeps the finite values of all nulls and ceilings.

    Raises:
        InputError: There is not one image whose copies the descriptor can tell from others.
        ValueError: ``fixed`` is outside [-1, 1].
    """
    others = {name: _finite(values, f"the null of {name}") for name, values in nulls.items()}
    scales = {
        name: Scale(float(others[name].max()) if others[name].size else math.nan, ceiling)
        for name, ceiling in ceilings.items()
    }
    everything = np.concatenate([*others.values(), np.empty(0)])
    best = _finite(list(ceilings.values()), "the ceiling")
    if fixed is None:
        thresholds = [scale.threshold for scale in scales.values() if scale.auditable]
        if not thresholds:
            raise InputError(_cannot_decide(descriptor, everything, best, able))
        threshold = float(np.median(thresholds))
    else:
        if not -1 <= fixed <= 1:
            raise ValueError(f"a fixed threshold must lie in [-1, 1], got {fixed}")
        threshold = float(fixed)
        _warn_about_fixed(descriptor, threshold, everything, best)
    roc = roc_curve(_finite(vm_scores, "vm prompts"), _finite(control_scores, "control prompts"))
    return Calibration(
        descriptor=descriptor,
        threshold=threshold,
        rule="calibrated" if fixed is None else "fixed",
        null=tuple(everything.tolist()),
        ceiling=tuple(best.tolist()),
        auc=roc.auc,
        roc=roc.points,
        scales=scales,
    )


def _cannot_decide(
    descriptor: str, null: np.ndarray, ceiling: np.ndarray, able: Sequence[str]
) -> str:
    fix = (
        f"or give {descriptor} a fixed threshold (metrics.descriptors.{descriptor}.threshold=...)"
    )
    if null.size == 0 or ceiling.size == 0:
        return (
            f"cannot calibrate the thresholds of {descriptor}: {null.size} similarities of "
            f"ordinary prompts' images and {ceiling.size} of autoencoder reconstructions are "
            f"finite; if images come out as NaN, run the checkpoint in float32 or bfloat16, {fix}"
        )
    others = f"descriptors that could: {', '.join(able)} (metrics.decider=...)"
    return (
        f"{descriptor} cannot decide on this checkpoint and list: for none of the {ceiling.size} "
        f"images does its own autoencoder reconstruction (median similarity "
        f"{np.median(ceiling):.3f}) clear what images of ordinary prompts reach against it (up "
        f"to {null.max():.3f}) by {MARGIN}; "
        f"{others if able else 'no other descriptor measured here can'}, {fix}"
    )


FEW = 0.05
"""Share of images on the wrong side of a fixed threshold that earns a warning."""


def _warn_about_fixed(
    descriptor: str, threshold: float, null: np.ndarray, ceiling: np.ndarray
) -> None:
    """A threshold above the ceiling makes every rate 0 and every mitigation perfect; say so."""
    lost = float((ceiling <= threshold).mean()) if ceiling.size else 0.0
    false = float((null > threshold).mean()) if null.size else 0.0
    if lost > FEW:
        log.warning(
            "fixed threshold %.3f of %s: %.0f %% of the references miss it even as plain "
            "autoencoder reconstructions, so low rates say little",
            threshold, descriptor, 100 * lost,
        )  # fmt: skip
    if false > FEW / 5:
        log.warning(
            "fixed threshold %.3f of %s: %.0f %% of the images that are no replicas pass it",
            threshold, descriptor, 100 * false,
        )  # fmt: skip


@dataclass(frozen=True)
class Measures:
    """What an audit measures.

    Attributes:
        descriptors: Descriptors by name; all are recorded.
        decider: Name of the one that decides what a copy is.
        lpips: LPIPS distance, where backbone weights are given.
        alignment: CLIP score, where a CLIP folder is given.
    """

    descriptors: Mapping[str, Descriptor]
    decider: str
    lpips: LPIPSDistance | None = None
    alignment: ClipAlignment | None = None

    def __post_init__(self) -> None:
        if self.decider not in self.descriptors:
            raise InputError(
                f"metrics.decider must be one of metrics.descriptors "
                f"({', '.join(self.descriptors)}), got {self.decider!r}"
            )


@dataclass(frozen=True)
class Measured:
    """What one set of K images measures.

    Attributes:
        similarity: Descriptor name to (K,) similarities with the closest of the pair's reference
            images; NaN where the attack failed.
        diversity: Mean pairwise similarity of the K images by the deciding descriptor.
        lpips: (K,) LPIPS distances to the reference that is closest by the configured decider, or
            None.
        alignment: (K,) CLIP scores with the prompt, or None.
        closest: Descriptor name to the closest reference of each of the K images; empty where the
            pair has one, or the attack failed.
    """

    similarity: dict[str, np.ndarray]
    diversity: float
    lpips: np.ndarray | None
    alignment: np.ndarray | None
    closest: dict[str, tuple[Reference, ...]] = field(default_factory=dict)


DESCRIBED_AT_ONCE = 64
"""Images that are described between two steps of progress."""


class ReferenceImages:
    """Originals, described once by every descriptor.

    A pair may have several. An image is as similar to the pair as to the closest of them.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        images: torch.Tensor,
        measures: Measures,
        *,
        others: Iterable[torch.Tensor] = (),
    ) -> None:
        """Describe references.

        Args:
            pairs: N pairs.
            images: The images that they aim at (N, 3, H, W) in [0, 1], at the model's resolution.
            measures: What describes and compares.
            others: Their further reference images (3, H, W), pair after pair; read one by one.
        """
        self.pairs, self.images, self.measures = tuple(pairs), images, measures
        self.places = {pair.id: k for k, pair in enumerate(pairs)}
        owners = [pair.id for pair in self.pairs for _ in pair.others]
        self._others: dict[str, list[torch.Tensor]] = {}
        features: dict[str, list[torch.Tensor]] = {name: [] for name in measures.descriptors}
        for part in with_progress("describe images", torch.split(images, DESCRIBED_AT_ONCE)):
            for name, descriptor in measures.descriptors.items():
                features[name].append(descriptor.describe(part))
        self.rows = {name: [place] for name, place in self.places.items()}
        for row, (owner, image) in enumerate(zip(owners, others, strict=True), start=len(images)):
            self.rows[owner].append(row)
            # eight bits are what the file has, and there may be thousands
            self._others.setdefault(owner, []).append((image * 255).round().to(torch.uint8))
            for name, descriptor in measures.descriptors.items():
                features[name].append(descriptor.describe(image[None]))
        self.features = {name: torch.cat(own) for name, own in features.items()}

    def others_of(self, pairs: Iterable[Pair]) -> list[torch.Tensor]:
        """Further reference images (3, H, W) of pairs, pair after pair."""
        return [image.float() / 255 for p in pairs for image in self._others.get(p.id, [])]

    def compare(self, name: str, described: torch.Tensor, pair: Pair) -> torch.Tensor:
        """Similarities (K, R) of described images with each of a pair's references, by one name.

        The order is that of ``pair.references``.
        """
        first, *others = self.rows[pair.id]
        own = self.features[name][first : first + 1]
        if others:
            own = torch.cat([own, self.features[name][others]])
        return self.measures.descriptors[name].compare(described, own)

    def measure(self, pair: Pair, images: torch.Tensor, *, failed: bool = False) -> Measured:
        """Compare images with a pair's original.

        Args:
            pair: The pair.
            images: Generated images (K, 3, H, W) in [0, 1].
            failed: Whether the attack failed; similarities are NaN then.
        """
        k, measures = self.places[pair.id], self.measures
        similarity, spread, nearest = {}, float("nan"), dict[str, np.ndarray]()
        for name, descriptor in measures.descriptors.items():
            features = descriptor.describe(images)
            each = self.compare(name, features, pair).numpy()
            values, nearest[name] = each.max(1), each.argmax(1)
            similarity[name] = np.full_like(values, np.nan) if failed else values
            if name == measures.decider:
                spread = diversity(descriptor.compare(features, features).numpy())
        originals = self.images[k : k + 1]
        if pair.others:
            own = torch.stack([self.images[k], *self.others_of([pair])])
            originals = own[torch.from_numpy(nearest[measures.decider])]
        distances = measures.lpips.distance(images, originals).numpy() if measures.lpips else None
        scores = (
            measures.alignment.alignment(images, [pair.prompt] * len(images)).numpy()
            if measures.alignment
            else None
        )
        closest = {
            name: tuple(pair.references[place] for place in places)
            for name, places in nearest.items()
            if pair.others and not failed
        }
        return Measured(similarity, spread, distances, scores, closest)

    def similarities(
        self, images: torch.Tensor, pairs: Sequence[Pair], *, name: str | None = None
    ) -> torch.Tensor:
        """Similarities (K, N) of images (K, 3, H, W) with N pairs; by the decider without name."""
        name = name or self.measures.decider
        descriptor = self.measures.descriptors[name]
        rows = [self.rows[pair.id] for pair in pairs]
        own = self.features[name][[row for of_pair in rows for row in of_pair]]
        each = descriptor.compare(descriptor.describe(images), own)
        if each.shape[1] == len(rows):
            return each
        parts = torch.split(each, [len(of_pair) for of_pair in rows], dim=1)
        return torch.stack([part.amax(1) for part in parts], dim=1)


def calibrate_measures(
    references: ReferenceImages,
    prompted: Sequence[Outcome],
    *,
    ordinary: Sequence[torch.Tensor],
    reconstructions: torch.Tensor,
) -> Calibration:
    """Set the deciding descriptor's thresholds for this checkpoint.

    The configured descriptor decides if it can audit at least one image; otherwise the one that
    can audit the most. An audit that ran for hours must not end without an answer because one
    descriptor is blind to one checkpoint; which one decided is named in every row of the answer.

    Args:
        references: All audited pairs, N.
        prompted: Outcomes of the unattacked prompts.
        ordinary: Images (K, 3, H, W) in [0, 1] of each of M ordinary prompts.
        reconstructions: The images that pairs aim at, through the autoencoder (N, 3, H, W) in
            [0, 1].

    Raises:
        InputError: No descriptor can audit any image; says what each lacks.
    """
    measures, names = references.measures, [pair.id for pair in references.pairs]
    nulls, ceilings, able = {}, {}, dict[str, int]()
    for name, descriptor in measures.descriptors.items():
        features = references.features[name]
        ceilings[name] = [
            float(descriptor.compare(descriptor.describe(image[None]), features[k : k + 1])[0, 0])
            for k, image in enumerate(with_progress(f"{name}: ceilings", [*reconstructions]))
        ]
        reached = [
            references.similarities(images, references.pairs, name=name).amax(0).numpy()
            for images in with_progress(f"{name}: ordinary images", ordinary)
        ]
        nulls[name] = np.stack(reached, -1) if reached else np.empty((len(names), 0))
        able[name] = sum(
            Scale(float(np.nanmax(row, initial=-np.inf)), ceiling).auditable
            for row, ceiling in zip(nulls[name], ceilings[name], strict=True)
        )
    decider = _decider(measures, able)
    scores = {
        kind: [
            float(per_pair(outcome.similarity[decider]))
            for outcome in prompted
            if outcome.pair.kind == kind
        ]
        for kind in ("vm", "control")
    }
    return calibrate(
        decider,
        nulls=dict(zip(names, nulls[decider], strict=True)),
        ceilings=dict(zip(names, ceilings[decider], strict=True)),
        vm_scores=scores["vm"],
        control_scores=scores["control"],
        fixed=measures.descriptors[decider].threshold,
        able=[name for name, count in able.items() if count and name != decider],
    )


def _decider(measures: Measures, able: Mapping[str, int]) -> str:
    """The configured decider, or the one that audits most images where it can audit none."""
    name = measures.decider
    most = max(able, key=lambda other: able[other])
    if measures.descriptors[name].threshold is not None or able[name] or not able[most]:
        return name
    log.warning(
        "%s cannot tell copies of any image from other images on this checkpoint; %s decides "
        "instead (metrics.decider=%s makes that the choice)",
        name,
        most,
        most,
    )
    return most
