"""Set the replication threshold on the checkpoint and list at hand; choose the descriptor too.

A threshold tuned on one benchmark means nothing on another checkpoint: a blurry autoencoder lowers
every similarity, a list of look-alikes raises them. So it is placed between two things that can be
measured anywhere: what pictures that are no replicas reach (``null``), and what a perfect replica
reaches after the checkpoint's own autoencoder (``ceiling``).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dori_lightning.metrics.statistics import roc_curve
from dori_lightning.types import Calibration, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike

__all__ = ["CEILING_QUANTILE", "NULL_QUANTILE", "Separation", "calibrate", "separation_table"]

log = logging.getLogger(__name__)

NULL_QUANTILE = 0.99
CEILING_QUANTILE = 0.05


@dataclass(frozen=True)
class Separation:
    """How well one descriptor tells replicas from other pictures on one checkpoint and list.

    Attributes:
        descriptor: Its name.
        auc: Area under the ROC of replicas against the null.
        margin: ``(positive_low - null_high) / pooled standard deviation``; above 0 a threshold
            fits in between.
        positive_low: 5 % quantile of the replicas.
        null_high: 99 % quantile of the null.
        n_positive: Replicas.
        n_null: Pictures that are no replicas.
    """

    descriptor: str
    auc: float
    margin: float
    positive_low: float
    null_high: float
    n_positive: int
    n_null: int

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
    """Measure every descriptor on the same pictures, so that the deciding one is chosen by result.

    Args:
        samples: Descriptor name to (replicas, null): similarities of pictures known to be replicas
            (reconstructions of the originals, or unattacked prompts of memorized pairs) and of
            pictures known not to be. Values that are not finite are left out with a warning.

    Returns:
        One row per descriptor, the widest margin first.

    Raises:
        ValueError: A descriptor lacks replicas or null.
    """
    rows = []
    for name, (replicas, others) in samples.items():
        positives, null = (
            _finite(replicas, f"replicas by {name}"),
            _finite(others, f"non-replicas by {name}"),
        )
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
                n_positive=int(positives.size),
                n_null=int(null.size),
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
        null: Similarities of pictures that are no replicas: those of any prompt, unattacked,
            against originals of control pairs, best of K each.
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
            f"cannot calibrate the threshold of {descriptor}: no control pair was generated "
            f"for; add "
            f"pairs of kind control (prompts and pictures that the checkpoint has not "
            f"memorized) to "
            f"the list, {fix}"
        )
    if null.size == 0 or ceiling.size == 0:
        raise InputError(
            f"cannot calibrate the threshold of {descriptor}: {null.size} similarities of "
            f"non-replicas "
            f"and {ceiling.size} of autoencoder reconstructions are finite; if pictures "
            f"come out as "
            f"NaN, run the checkpoint in float32 or bfloat16, {fix}"
        )
    high, low = _high(null), _low(ceiling)
    if low <= high:
        able = ", ".join(s.descriptor for s in offered if s.decides and s.descriptor != descriptor)
        raise InputError(
            f"{descriptor} cannot decide on this checkpoint and list: pictures that are no "
            f"replicas "
            f"reach {high:.3f} ({NULL_QUANTILE:.0%} quantile of {null.size}) while the "
            f"originals' own "
            f"autoencoder reconstructions fall to {low:.3f} ("
            f"{CEILING_QUANTILE:.0%} quantile of {ceiling.size}); "
            + (
                f"descriptors that could: {able} (metrics.decider=...)"
                if able
                else "no other descriptor measured here can"
            )
            + f", {fix}"
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
            "fixed threshold %.3f of %s: %.0f %% of the originals miss it even as plain "
            "autoencoder reconstructions, so low rates say little",
            threshold, descriptor, 100 * lost,
        )  # fmt: skip
    if false > 1 - NULL_QUANTILE:
        log.warning(
            "fixed threshold %.3f of %s: %.0f %% of the pictures that are no replicas pass it",
            threshold, descriptor, 100 * false,
        )  # fmt: skip
