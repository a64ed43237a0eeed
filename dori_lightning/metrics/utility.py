"""What a mitigation costs: the record of comparing the mitigated model with the unmitigated one.

Everything is paired: both models see the same images under the same noise, and draw the same
prompts from the same seeds. Differences are therefore small where the mitigation is harmless.
Intervals come from resampling whole prompts, or all that belongs to one pair, never single images:
those of one prompt are not independent.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dori_lightning.metrics.image_distances import (
    InceptionFeatures,
    KernelDistance,
    frechet_distance,
    kernel_distance,
)
from dori_lightning.metrics.statistics import cluster_bootstrap, median_mad, wilson_interval
from dori_lightning.types import InputError, Number, require

PromptKind = Literal["ordinary", "neighbour"]
Interval = tuple[Number, Number]


@dataclass(frozen=True)
class UtilitySettings:
    """How much is spent on measuring what a mitigation costs; 0 leaves a measure out.

    Attributes:
        examples: Ordinary images whose denoising loss is measured.
        draws: Draws of noise and timestep for each of them.
        prompts: Ordinary prompts that both models draw.
        pictures: Images of each of them by each model.
        neighbours: Prompts near each suspected pair's that both models draw.
        neighbour_pictures: Images of each of them by each model.
        inception: Features for KID and FID, None for those of the checkpoint's own autoencoder.
    """

    examples: int = 128
    draws: int = 2
    prompts: int = 48
    pictures: int = 1
    neighbours: int = 2
    neighbour_pictures: int = 1
    inception: InceptionFeatures | None = None

    def __post_init__(self) -> None:
        enough = min(self.examples, self.prompts, self.neighbours) >= 0
        got = f"{self.examples}, {self.prompts} and {self.neighbours}"
        require(enough, "utility needs examples, prompts and neighbours >= 0", got)
        if min(self.draws, self.pictures, self.neighbour_pictures) < 1:
            raise InputError(
                f"utility needs draws, images and neighbour_pictures >= 1, got {self.draws}, "
                f"{self.pictures} and {self.neighbour_pictures}\n"
                f"  fix:   leave a measure out with examples=0, prompts=0 or neighbours=0"
            )

    @property
    def asked(self) -> bool:
        """Whether anything is to be measured."""
        return max(self.examples, self.prompts, self.neighbours) > 0


@dataclass(frozen=True)
class LossRow:
    """Denoising loss of one ordinary image under one draw of noise, by both models.

    Attributes:
        id: Name of the example, ``corpus_0007``; decides whose mask it sees under a per-pair edit.
        prompt: Its caption.
        draw: Which draw, from 0.
        timestep: Timestep of the noise.
        unmitigated: Mean squared error of the unmitigated model.
        mitigated: That of the mitigated one, same noise.
    """

    id: str
    prompt: str
    draw: int
    timestep: int
    unmitigated: float
    mitigated: float


@dataclass(frozen=True)
class PictureRow:
    """One prompt and seed, drawn by both models.

    Attributes:
        kind: ``ordinary`` prompts are of the corpus, ``neighbour`` ones lie near a pair's.
        id: Name of the prompt, ``corpus_0007`` or ``PAIR_near1``.
        group: Rows of one group depend on each other: the prompt, or the pair it lies near.
        prompt: The prompt.
        seed: Generation seed.
        similarity: Of the two images, by the deciding descriptor.
        original_unmitigated: Similarity of the unmitigated model's image with the original of
            the pair that the prompt lies near; None for ordinary prompts.
        original_mitigated: The mitigated model's.
        alignment_unmitigated: CLIP score of the unmitigated model's image with the prompt, None
            where no CLIP is given.
        alignment_mitigated: The mitigated model's.
        unmitigated: The unmitigated model's image.
        mitigated: The mitigated model's.
    """

    kind: PromptKind
    id: str
    group: str
    prompt: str
    seed: int
    similarity: float
    original_unmitigated: float | None
    original_mitigated: float | None
    alignment_unmitigated: float | None
    alignment_mitigated: float | None
    unmitigated: Path
    mitigated: Path


@dataclass(frozen=True)
class DenoisingLoss:
    """Mean denoising loss of both models on ordinary images.

    Attributes:
        unmitigated: Mean over examples and draws.
        mitigated: The mitigated model's; NaN where it is not finite.
        ratio: Mitigated over unmitigated; 1 costs nothing. NaN where it is not finite.
        ratio_ci95: Paired bootstrap over examples.
        examples: Examples.
        draws: Draws of noise and timestep for each.
    """

    unmitigated: Number
    mitigated: Number
    ratio: Number
    ratio_ci95: Interval
    examples: int
    draws: int


@dataclass(frozen=True)
class Alignment:
    """CLIP score of images with their prompts, median over prompts of the median over seeds.

    Attributes:
        unmitigated: Of the unmitigated model's images.
        mitigated: Of the mitigated model's.
        change: Mean over prompts of the difference; negative where the mitigation costs.
        change_ci95: Bootstrap over groups of prompts.
    """

    unmitigated: Number
    mitigated: Number
    change: Number
    change_ci95: Interval


@dataclass(frozen=True)
class Comparison:
    """Two models' images of the same prompts from the same seeds.

    Attributes:
        prompts: Prompts.
        pictures_each: Images of each prompt by each model.
        kid: Kernel distance of the two sets, None where there are too few groups.
        fid: Fréchet distance, None where there are too few images.
        features: What KID and FID rest on, in words.
        similarity: Median over prompts of the median similarity of the two models' images of
            one seed (SSCD_Gen of Finding NeMo, by the deciding descriptor). Mitigations that
            merely lead to another image lower it too.
        similarity_mad: Its median absolute deviation over prompts.
        similarity_ci95: Bootstrap over groups of prompts.
        alignment: Prompt alignment, None where no CLIP is given.
    """

    prompts: int
    pictures_each: int
    kid: KernelDistance | None
    fid: float | None
    features: str
    similarity: Number
    similarity_mad: Number
    similarity_ci95: Interval
    alignment: Alignment | None


@dataclass(frozen=True)
class Replicas:
    """Neighbour prompts whose images replicate the original of the pair they lie near.

    Attributes:
        prompts: Neighbour prompts.
        unmitigated: How many replicate it by the unmitigated model.
        unmitigated_ci95: Wilson interval of the rate.
        mitigated: How many by the mitigated model.
        mitigated_ci95: Wilson interval of the rate.
    """

    prompts: int
    unmitigated: int
    unmitigated_ci95: Interval
    mitigated: int
    mitigated_ci95: Interval


@dataclass(frozen=True)
class Utility:
    """What a mitigation costs.

    Attributes:
        descriptor: Name of the descriptor of similarities.
        denoising_loss: On ordinary images; None where left out.
        ordinary: Images of ordinary prompts; None where left out.
        neighbours: Images of prompts near the suspected ones, but for those that brought the
            original back without the mitigation, since these have to change; None where left out.
        replicas: Which of all prompts near the suspected ones bring the original back; None where
            left out.
        left_out: What was not measured: name to reason.
        loss_rows: Behind ``denoising_loss``.
        picture_rows: Behind the others.
    """

    descriptor: str
    denoising_loss: DenoisingLoss | None
    ordinary: Comparison | None
    neighbours: Comparison | None
    replicas: Replicas | None
    left_out: Mapping[str, str]
    loss_rows: tuple[LossRow, ...] = ()
    picture_rows: tuple[PictureRow, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``utility.json`` and ``report.json``, without the rows."""
        near = _plain(self.neighbours)
        near["replicating"] = asdict(self.replicas) if self.replicas else None
        return {
            "denoising_loss": asdict(self.denoising_loss) if self.denoising_loss else None,
            **_plain(self.ordinary),
            "neighbours": near if self.neighbours or self.replicas else None,
            "descriptor": self.descriptor,
            "left_out": dict(self.left_out),
        }


def _plain(sets: Comparison | None) -> dict[str, Any]:
    names = ("prompts", "pictures_each", "kid", "fid", "similarity_to_unmitigated", "alignment")
    if sets is None:
        return dict.fromkeys(names)
    return {
        "prompts": sets.prompts,
        "pictures_each": sets.pictures_each,
        "kid": {**asdict(sets.kid), "features": sets.features} if sets.kid else None,
        "fid": sets.fid,
        "features": sets.features,
        "similarity_to_unmitigated": sets.similarity,
        "similarity_to_unmitigated_mad": sets.similarity_mad,
        "similarity_to_unmitigated_ci95": sets.similarity_ci95,
        "alignment": asdict(sets.alignment) if sets.alignment else None,
    }


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
    """Compare two models' images, paired by prompt and seed.

    Args:
        rows: N, at least one, all of one kind.
        unmitigated: Features (N, F) of the unmitigated model's images, in the order of rows.
        mitigated: Features (N, F) of the mitigated model's.
        features: What they are, in words.
        seed: Of the bootstrap and of KID's subsets.
    """
    groups = {row.id: row.group for row in rows}
    medians = {
        name: float(np.median(own))
        for name, own in _grouped(rows, lambda row: row.id, lambda row: row.similarity).items()
    }
    similarity, deviation = median_mad(list(medians.values()))
    return Comparison(
        prompts=len(groups),
        pictures_each=len(rows) // len(groups),
        kid=kernel_distance(unmitigated, mitigated, [row.group for row in rows], seed=seed),
        fid=frechet_distance(unmitigated, mitigated),
        features=features,
        similarity=similarity,
        similarity_mad=deviation,
        similarity_ci95=cluster_bootstrap(
            _clusters(medians, groups), statistic=lambda v: float(np.median(v)), seed=seed
        ),
        alignment=_alignment(rows, groups, seed=seed),
    )


def count_replicas(
    rows: Sequence[PictureRow], *, threshold_of: Callable[[str], float]
) -> Replicas:
    """Count neighbour prompts that bring their pair's original back, by either model.

    Args:
        rows: Of neighbour prompts, at least one.
        threshold_of: Pair id to the similarity above which an image is a replica of its original.
    """
    scores = _best_with_original(rows)
    near = {row.id: row.group for row in rows}
    over = np.array([best > threshold_of(near[name]) for name, best in scores.items()])
    before, after = (int(count) for count in over.sum(0))
    return Replicas(
        prompts=len(scores),
        unmitigated=before,
        unmitigated_ci95=wilson_interval(before, len(scores)),
        mitigated=after,
        mitigated_ci95=wilson_interval(after, len(scores)),
    )


def replicated_before(
    rows: Sequence[PictureRow], *, threshold_of: Callable[[str], float]
) -> set[str]:
    """Name the neighbour prompts that brought their pair's original back without the mitigation.

    Their images have to change, so a change of them is no cost.

    Args:
        rows: Of neighbour prompts.
        threshold_of: Pair id to the similarity above which an image is a replica of its original.
    """
    scores = _best_with_original(rows)
    near = {row.id: row.group for row in rows}
    return {name for name, (before, _) in scores.items() if before > threshold_of(near[name])}


def _best_with_original(rows: Sequence[PictureRow]) -> dict[str, np.ndarray]:
    """Similarity (2,) of each prompt's closest images, without and with the edit."""
    references = _grouped(
        rows, lambda row: row.id, lambda row: (row.original_unmitigated, row.original_mitigated)
    )
    return {name: np.max(np.array(own, np.float64), axis=0) for name, own in references.items()}


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
