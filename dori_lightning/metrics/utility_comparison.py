"""Compare two models' losses and pictures, paired, with the prompt or the pair as the unit.

Intervals come from resampling whole prompts, or all that belongs to one pair, never single
pictures: those of one prompt are no independent evidence.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from dori_lightning.metrics.feature_distance import frechet_distance, kernel_distance
from dori_lightning.metrics.statistics import cluster_bootstrap, median_mad, wilson_interval
from dori_lightning.metrics.utility import Alignment, Comparison, DenoisingLoss, Replicas

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from dori_lightning.metrics.replication import Aggregation
    from dori_lightning.metrics.utility import LossRow, PictureRow

__all__ = ["compare_losses", "compare_pictures", "count_replicas", "replicated_before"]


def _ratio(values: np.ndarray) -> float:
    """Ratio of the sums of (unmitigated, mitigated) couples that lie one after another."""
    unmitigated, mitigated = values.reshape(-1, 2).sum(0)
    return float(mitigated / unmitigated)


def compare_losses(rows: Sequence[LossRow], *, seed: int = 0) -> DenoisingLoss:
    """Compare mean denoising losses, paired by example and draw.

    A mitigated loss that is not finite makes mean, ratio and interval NaN: the model is broken,
    and the mean of the rest would hide it.

    Args:
        rows: At least one; all draws of an example have its id.
        seed: Of the bootstrap.
    """
    couples = _grouped(rows, lambda row: row.id, lambda row: (row.unmitigated, row.mitigated))
    means = np.array([np.mean(own, axis=0) for own in couples.values()])
    unmitigated, mitigated = (float(value) for value in means.mean(0))
    finite = bool(np.isfinite(means).all())
    return DenoisingLoss(
        unmitigated=unmitigated,
        mitigated=mitigated if math.isfinite(mitigated) else math.nan,
        ratio=_ratio(means.ravel()) if finite else math.nan,
        ratio_ci95=cluster_bootstrap(list(means), statistic=_ratio, seed=seed)
        if finite
        else (math.nan, math.nan),
        examples=len(couples),
        draws=len(rows) // len(couples),
    )


def compare_pictures(
    rows: Sequence[PictureRow],
    unmitigated: torch.Tensor,
    mitigated: torch.Tensor,
    *,
    features: str,
    seed: int = 0,
) -> Comparison:
    """Compare two models' pictures, paired by prompt and seed.

    Args:
        rows: N, at least one, all of one kind.
        unmitigated: Features (N, F) of the unmitigated model's pictures, in the order of rows.
        mitigated: Features (N, F) of the mitigated model's.
        features: What they are, in words.
        seed: Of the bootstrap and of KID's subsets.
    """
    groups = {row.id: row.group for row in rows}
    medians = {
        name: float(np.median(own))
        for name, own in _grouped(rows, lambda row: row.id, lambda row: row.similarity).items()
    }
    spread = median_mad(list(medians.values()))
    return Comparison(
        prompts=len(groups),
        pictures_each=len(rows) // len(groups),
        kid=kernel_distance(unmitigated, mitigated, [row.group for row in rows], seed=seed),
        fid=frechet_distance(unmitigated, mitigated),
        features=features,
        similarity=spread.median,
        similarity_mad=spread.mad,
        similarity_ci95=cluster_bootstrap(
            _clusters(medians, groups), statistic=lambda v: float(np.median(v)), seed=seed
        ),
        alignment=_alignment(rows, groups, seed=seed),
    )


def count_replicas(
    rows: Sequence[PictureRow], *, threshold: float, aggregation: Aggregation
) -> Replicas:
    """Count neighbour prompts that bring their pair's original back, by either model.

    Args:
        rows: Of neighbour prompts, at least one.
        threshold: Similarity above which a picture counts as a replica.
        aggregation: How a prompt's pictures become one number.
    """
    scores = _best_with_original(rows, aggregation)
    over = np.array(list(scores.values())) > threshold
    before, after = (int(count) for count in over.sum(0))
    return Replicas(
        prompts=len(scores),
        unmitigated=before,
        unmitigated_ci95=wilson_interval(before, len(scores)),
        mitigated=after,
        mitigated_ci95=wilson_interval(after, len(scores)),
    )


def replicated_before(
    rows: Sequence[PictureRow], *, threshold: float, aggregation: Aggregation
) -> set[str]:
    """Name the neighbour prompts that brought their pair's original back without the mitigation.

    Their pictures have to change, so a change of them is no cost.

    Args:
        rows: Of neighbour prompts.
        threshold: Similarity above which a picture counts as a replica.
        aggregation: How a prompt's pictures become one number.
    """
    scores = _best_with_original(rows, aggregation)
    return {name for name, (before, _) in scores.items() if before > threshold}


def _best_with_original(
    rows: Sequence[PictureRow], aggregation: Aggregation
) -> dict[str, np.ndarray]:
    """Similarity (2,) of each prompt's pictures with the original, without and with the edit."""
    best = np.max if aggregation == "max" else np.median
    originals = _grouped(
        rows, lambda row: row.id, lambda row: (row.original_unmitigated, row.original_mitigated)
    )
    return {name: best(np.array(own, np.float64), axis=0) for name, own in originals.items()}


def _alignment(
    rows: Sequence[PictureRow], groups: Mapping[str, str], *, seed: int
) -> Alignment | None:
    if any(row.alignment_unmitigated is None or row.alignment_mitigated is None for row in rows):
        return None
    scores = {
        name: np.median(np.array(own, np.float64), axis=0)
        for name, own in _grouped(
            rows,
            lambda row: row.id,
            lambda row: (row.alignment_unmitigated, row.alignment_mitigated),
        ).items()
    }
    before, after = np.median(np.array(list(scores.values())), axis=0)
    changes = {name: float(own[1] - own[0]) for name, own in scores.items()}
    return Alignment(
        unmitigated=float(before),
        mitigated=float(after),
        change=float(np.mean(list(changes.values()))),
        change_ci95=cluster_bootstrap(_clusters(changes, groups), seed=seed),
    )


def _grouped(
    rows: Sequence[Any], key: Callable[[Any], str], value: Callable[[Any], Any]
) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(value(row))
    return found


def _clusters(values: Mapping[str, float], groups: Mapping[str, str]) -> list[list[float]]:
    """Values of prompts, those of one group together."""
    return list(
        _grouped(list(values.items()), lambda item: groups[item[0]], lambda item: item[1]).values()
    )
