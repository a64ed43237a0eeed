"""Set the replication threshold on the checkpoint and list at hand; choose the descriptor too.

A threshold tuned on one benchmark means nothing on another checkpoint: a blurry autoencoder lowers
every similarity, a list of look-alikes raises them. So it is placed between two things that can be
measured anywhere: what images that are no replicas reach (``null``), and what a perfect replica
reaches after the checkpoint's own autoencoder (``ceiling``).
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
from dori_lightning.metrics.replication import Aggregation, diversity, per_pair
from dori_lightning.metrics.statistics import roc_curve
from dori_lightning.types import Calibration, InputError, Outcome, Pair, Reference, require

log = logging.getLogger(__name__)

NULL_QUANTILE = 0.99
CEILING_QUANTILE = 0.05


@dataclass(frozen=True)
class Separation:
    """How well one descriptor tells replicas from other images on one checkpoint and list.

    Attributes:
        descriptor: Its name.
        auc: Area under the ROC of replicas against the null.
        margin: ``(positive_low - null_high) / pooled standard deviation``; above 0 a threshold
            fits in between.
        positive_low: 5 % quantile of the replicas.
        null_high: 99 % quantile of the null.
    """

    descriptor: str
    auc: float
    margin: float
    positive_low: float
    null_high: float

    @property
    def decides(self) -> bool:
        """Whether a threshold fits between the two."""
        return self.positive_low > self.null_high


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


def _high(null: np.ndarray) -> float:
    # "higher" and "lower" below: short lists answer with an observed value on the cautious side.
    return float(np.quantile(null, NULL_QUANTILE, method="higher"))


def _low(positives: np.ndarray) -> float:
    return float(np.quantile(positives, CEILING_QUANTILE, method="lower"))


def separation_table(samples: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> tuple[Separation, ...]:
    """Measure every descriptor on the same images, so that the deciding one is chosen by result.

    Args:
        samples: Descriptor name to (replicas, null): similarities of images known to be replicas
            (reconstructions of the references, or unattacked prompts of memorized pairs) and of
            images known not to be. Values that are not finite are left out with a warning.

    Returns:
        One row per descriptor, the widest margin first.

    Raises:
        ValueError: A descriptor lacks replicas or null.
    """
    rows = []
    for name, (replicas, others) in samples.items():
        positives = _finite(replicas, f"replicas by {name}")
        null = _finite(others, f"non-replicas by {name}")
        if positives.size == 0 or null.size == 0:
            raise ValueError(
                f"{name} needs replicas and non-replicas, got {positives.size} and {null.size}"
            )
        spread = math.sqrt((float(positives.var()) + float(null.var())) / 2)
        low, high = _low(positives), _high(null)
        rows.append(
            Separation(
                descriptor=name,
                auc=roc_curve(positives, null).auc,
                margin=(low - high) / max(spread, 1e-6),
                positive_low=low,
                null_high=high,
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.margin))


def calibrate(
    descriptor: str,
    *,
    null: ArrayLike,
    ceiling: ArrayLike,
    vm_scores: ArrayLike,
    control_scores: ArrayLike,
    fixed: float | None = None,
    offered: Sequence[Separation] = (),
) -> Calibration:
    """Put the threshold midway between the null's 99 % and the ceiling's 5 % quantile.

    Attacked controls are deliberately no part of this. If they were, the threshold would rise
    until they pass, and the false-positive rate of the attack, the one number that says whether
    "the attack brought it back" can be believed, would be low by construction. They stay a
    held-out test.

    With fewer than 100 values the 99 % quantile is the highest value seen, with fewer than 21 the
    5 % quantile is the lowest: the cautious side both times.

    Args:
        descriptor: Name of the deciding descriptor.
        null: Similarities of images that are no replicas: those of any prompt, unattacked,
            against references of control pairs, best of K each.
        ceiling: Similarity of each original with its own autoencoder reconstruction.
        vm_scores: Per-pair similarities of unattacked vm prompts; only for the ROC.
        control_scores: Per-pair similarities of unattacked control prompts; only for the ROC, but
            the calibrated rule wants at least one.
        fixed: Threshold that is taken as it is (rule ``fixed``); warned about where the ceiling or
            the null says that it cannot work here.
        offered: The descriptors measured on the same checkpoint and list, to name those that could
            decide.

    Returns:
        The calibration; it keeps the finite values of ``null`` and ``ceiling``.

    Raises:
        InputError: There are no controls, nothing to calibrate with, or null and ceiling overlap:
            the descriptor cannot decide on this checkpoint and list.
        ValueError: ``fixed`` is outside [-1, 1].
    """
    others, best = _finite(null, "the null"), _finite(ceiling, "the ceiling")
    memorized = _finite(vm_scores, "vm prompts")
    controls = _finite(control_scores, "control prompts")
    if fixed is None:
        threshold = _calibrated(descriptor, others, best, controls=controls, offered=offered)
    else:
        if not -1 <= fixed <= 1:
            raise ValueError(f"a fixed threshold must lie in [-1, 1], got {fixed}")
        threshold = float(fixed)
        _warn_about_fixed(descriptor, threshold, others, best)
    roc = roc_curve(memorized, controls)
    return Calibration(
        descriptor=descriptor,
        threshold=threshold,
        rule="calibrated" if fixed is None else "fixed",
        null=tuple(others.tolist()),
        ceiling=tuple(best.tolist()),
        auc=roc.auc,
        roc=roc.points,
    )


def _calibrated(
    descriptor: str,
    null: np.ndarray,
    ceiling: np.ndarray,
    *,
    controls: np.ndarray,
    offered: Sequence[Separation],
) -> float:
    fix = (
        f"or give {descriptor} a fixed threshold (metrics.descriptors.{descriptor}.threshold=...)"
    )
    if controls.size == 0:
        raise InputError(
            f"cannot calibrate the threshold of {descriptor}: there are no images of control "
            f"pairs; add pairs of kind control (prompts and images that the checkpoint has not "
            f"memorized) to the list, {fix}"
        )
    if null.size == 0 or ceiling.size == 0:
        raise InputError(
            f"cannot calibrate the threshold of {descriptor}: {null.size} similarities of "
            f"non-replicas and {ceiling.size} of autoencoder reconstructions are finite; if "
            f"images come out as NaN, run the checkpoint in float32 or bfloat16, {fix}"
        )
    high, low = _high(null), _low(ceiling)
    if low <= high:
        able = ", ".join(s.descriptor for s in offered if s.decides and s.descriptor != descriptor)
        others = f"descriptors that could: {able} (metrics.decider=...)"
        raise InputError(
            f"{descriptor} cannot decide on this checkpoint and list: images that are no replicas "
            f"reach {high:.3f} ({NULL_QUANTILE:.0%} quantile of {null.size}) while the "
            f"references' own autoencoder reconstructions fall to {low:.3f} "
            f"({CEILING_QUANTILE:.0%} quantile of {ceiling.size}); "
            f"{others if able else 'no other descriptor measured here can'}, {fix}"
        )
    return max((high + low) / 2, high)


def _warn_about_fixed(
    descriptor: str, threshold: float, null: np.ndarray, ceiling: np.ndarray
) -> None:
    """A threshold above the ceiling makes every rate 0 and every mitigation perfect; say so."""
    lost, false = float((ceiling <= threshold).mean()) if ceiling.size else 0.0, 0.0
    if null.size:
        false = float((null > threshold).mean())
    if lost > CEILING_QUANTILE:
        log.warning(
            "fixed threshold %.3f of %s: %.0f %% of the references miss it even as plain "
            "autoencoder reconstructions, so low rates say little",
            threshold, descriptor, 100 * lost,
        )  # fmt: skip
    if false > 1 - NULL_QUANTILE:
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
        aggregation: How the K images of a pair become one number.
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
        known = self.aggregation in ("max", "median")
        require(known, "metrics.aggregation must be max or median", repr(self.aggregation))


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
        features = {name: [d.describe(images)] for name, d in measures.descriptors.items()}
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


def null_similarities(
    references: ReferenceImages, name: str, images: Mapping[str, torch.Tensor]
) -> list[float]:
    """Best-of-K similarities of images that cannot be copies, by one descriptor.

    Images of every prompt against the references of *control* pairs, which the model cannot
    hold. Not against the others: a control prompt may well bring back somebody else's memorized
    image. A pair is never compared with another one that shares an image file with it.

    Args:
        references: All audited pairs.
        name: Descriptor.
        images: Pair id to its unattacked prompt's images (K, 3, H, W).
    """
    values: list[float] = []
    for pair in references.pairs:
        similarities = references.similarities(images[pair.id], references.pairs, name=name)
        for other, value in zip(references.pairs, similarities.amax(0).tolist(), strict=True):
            if other.kind == "control" and not (other.id != pair.id and _share(other, pair)):
                values.append(value)
    return values


def _share(one: Pair, other: Pair) -> bool:
    """Whether two pairs have an image file in common."""
    hashes = {own.sha256 for own in one.references if own.sha256}
    return any(own.sha256 in hashes for own in other.references)


def calibrate_measures(
    references: ReferenceImages,
    prompted: Sequence[Outcome],
    *,
    images: Mapping[str, torch.Tensor],
    reconstructions: torch.Tensor,
) -> Calibration:
    """Set the deciding descriptor's threshold for this checkpoint and list.

    Args:
        references: All audited pairs, N.
        prompted: Outcomes of the unattacked prompts.
        images: Pair id to its unattacked prompt's images (K, 3, H, W).
        reconstructions: The images that pairs aim at, through the autoencoder (N, 3, H, W) in
            [0, 1].

    Raises:
        InputError: No threshold separates; says which descriptor would.
    """
    measures, samples = references.measures, {}
    for name, descriptor in measures.descriptors.items():
        features = references.features[name]
        ceiling = [
            float(descriptor.compare(descriptor.describe(image[None]), features[k : k + 1])[0, 0])
            for k, image in enumerate(reconstructions)
        ]
        samples[name] = (ceiling, null_similarities(references, name, images))
    offered = separation_table({k: v for k, v in samples.items() if v[0] and v[1]})
    decider = _decider(measures, offered)
    ceiling, null = samples[decider]
    scores = {
        kind: [
            float(per_pair(outcome.similarity[decider], measures.aggregation))
            for outcome in prompted
            if outcome.pair.kind == kind
        ]
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
        "%s cannot tell copies from other images on this checkpoint and list; %s decides "
        "instead (metrics.decider=%s makes that the choice)",
        name,
        able[0],
        able[0],
    )
    return able[0]
