"""What a mitigation costs: the record of comparing the mitigated model with the unmitigated one.

Everything is paired: both models see the same pictures under the same noise, and draw the same
prompts from the same seeds. Differences are therefore small where the mitigation is harmless.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

# not only for type checkers: configurations are checked against the settings' types
from dori_lightning.metrics.inception import InceptionFeatures
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dori_lightning.metrics.feature_distance import KernelDistance

__all__ = [
    "Alignment",
    "Comparison",
    "DenoisingLoss",
    "LossRow",
    "PictureRow",
    "Replicas",
    "Utility",
    "UtilitySettings",
]

PromptKind = Literal["ordinary", "neighbour"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class UtilitySettings:
    """How much is spent on measuring what a mitigation costs; 0 leaves a measure out.

    Attributes:
        examples: Ordinary pictures whose denoising loss is measured.
        draws: Draws of noise and timestep for each of them.
        prompts: Ordinary prompts that both models draw.
        pictures: Pictures of each of them by each model.
        neighbours: Prompts near each suspected pair's that both models draw.
        neighbour_pictures: Pictures of each of them by each model.
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
        if min(self.examples, self.prompts, self.neighbours) < 0:
            raise InputError(
                f"utility needs examples, prompts and neighbours >= 0, got {self.examples}, "
                f"{self.prompts} and {self.neighbours}"
            )
        if min(self.draws, self.pictures, self.neighbour_pictures) < 1:
            raise InputError(
                f"utility needs draws, pictures and neighbour_pictures >= 1, got {self.draws}, "
                f"{self.pictures} and {self.neighbour_pictures}\n"
                f"  mend:  leave a measure out with examples=0, prompts=0 or neighbours=0"
            )

    @property
    def asked(self) -> bool:
        """Whether anything is to be measured."""
        return max(self.examples, self.prompts, self.neighbours) > 0


@dataclass(frozen=True)
class LossRow:
    """Denoising loss of one ordinary picture under one draw of noise, by both models.

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
        similarity: Of the two pictures, by the deciding descriptor.
        original_unmitigated: Similarity of the unmitigated model's picture with the original of
            the pair that the prompt lies near; None for ordinary prompts.
        original_mitigated: The mitigated model's.
        alignment_unmitigated: CLIP score of the unmitigated model's picture with the prompt, None
            where no CLIP is given.
        alignment_mitigated: The mitigated model's.
        unmitigated: The unmitigated model's picture.
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
    """Mean denoising loss of both models on ordinary pictures.

    Attributes:
        unmitigated: Mean over examples and draws.
        mitigated: The mitigated model's; NaN where it is not finite.
        ratio: Mitigated over unmitigated; 1 costs nothing. NaN where it is not finite.
        ratio_ci95: Paired bootstrap over examples.
        examples: Examples.
        draws: Draws of noise and timestep for each.
    """

    unmitigated: float
    mitigated: float
    ratio: float
    ratio_ci95: Interval
    examples: int
    draws: int


@dataclass(frozen=True)
class Alignment:
    """CLIP score of pictures with their prompts, median over prompts of the median over seeds.

    Attributes:
        unmitigated: Of the unmitigated model's pictures.
        mitigated: Of the mitigated model's.
        change: Mean over prompts of the difference; negative where the mitigation costs.
        change_ci95: Bootstrap over groups of prompts.
    """

    unmitigated: float
    mitigated: float
    change: float
    change_ci95: Interval


@dataclass(frozen=True)
class Comparison:
    """Two models' pictures of the same prompts from the same seeds.

    Attributes:
        prompts: Prompts.
        pictures_each: Pictures of each prompt by each model.
        kid: Kernel distance of the two sets, None where there are too few groups.
        fid: Fréchet distance, None where there are too few pictures.
        features: What KID and FID rest on, in words.
        similarity: Median over prompts of the median similarity of the two models' pictures of
            one seed (SSCD_Gen of Finding NeMo, by the deciding descriptor). Mitigations that
            merely lead to another picture lower it too.
        similarity_mad: Its median absolute deviation over prompts.
        similarity_ci95: Bootstrap over groups of prompts.
        alignment: Prompt alignment, None where no CLIP is given.
    """

    prompts: int
    pictures_each: int
    kid: KernelDistance | None
    fid: float | None
    features: str
    similarity: float
    similarity_mad: float
    similarity_ci95: Interval
    alignment: Alignment | None


@dataclass(frozen=True)
class Replicas:
    """Neighbour prompts whose pictures replicate the original of the pair they lie near.

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
        denoising_loss: On ordinary pictures; None where left out.
        ordinary: Pictures of ordinary prompts; None where left out.
        neighbours: Pictures of prompts near the suspected ones, but for those that brought the
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
