"""Zero the feed-forward weights that a memorized prompt uses more than an ordinary one.

Reference: Chavhan et al., Memorized images in diffusion models share a subspace that can be
located and deleted (2024); the scores are Wanda's (Sun et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dori_lightning.mitigations.base import check_calibrated
from dori_lightning.mitigations.edits import MaskEdit, Origin, PairMaskEdit
from dori_lightning.mitigations.wanda_masks import wanda_masks
from dori_lightning.mitigations.wanda_norms import Tracing

# types of settings are looked up when a configuration is checked
from dori_lightning.models.protocol import Sampling, Stage
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from dori_lightning.mitigations.base import Workshop
    from dori_lightning.models.protocol import TextToImage
    from dori_lightning.types import Pair

__all__ = ["Wanda"]

STAGES: tuple[Stage, ...] = ("down", "mid", "up")


@dataclass(frozen=True)
class Wanda:
    """Wanda scores against a base prompt, row by row, over the first denoising steps.

    What the paper on attacks does not say is a field: its sparsity (only 10 % is named), whether
    masks are per pair, and the base prompt. Defaults are those of the published scripts, with
    masks per pair.

    Masks of single weights take a byte per weight and pair: about 50 MB a pair for Stable
    Diffusion, in memory and on the device where the edit is applied. The file keeps places only.

    Attributes:
        name: How reports call it.
        fraction: r, share of each output row that may be pruned, in (0, 1).
        steps: tau_max, first steps of the sampler that are looked at.
        select_ratio: A weight is pruned where it is chosen in more than this share of the steps;
            0 is the union over steps.
        scope: ``pair``: each pair has its own mask. ``union``: one mask, everything that any
            pair's mask has. ``shared``: one mask from norms that are pooled over all pairs, the
            published way.
        base: What scores are compared with: ``empty``, the empty prompt (the reference's "null"),
            or ``corpus``, ordinary prompts of the corpus' calibration split.
        base_prompts: How many of those; not used with ``empty``.
        stages: Which feed-forward layers; all in the reference.
        sampling: Sampler whose steps are looked at; None for the run's own.
        seed: First seed of the starting noise.
        seeds: Starting noises per prompt.
    """

    name: str = "wanda"
    fraction: float = 0.01
    steps: int = 10
    select_ratio: float = 0.0
    scope: Literal["pair", "union", "shared"] = "pair"
    base: Literal["empty", "corpus"] = "empty"
    base_prompts: int = 32
    stages: tuple[Stage, ...] = STAGES
    sampling: Sampling | None = None
    seed: int = 0
    seeds: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not 0 < self.fraction < 1:
            raise InputError(f"mitigation.fraction must be in (0, 1), got {self.fraction}")
        if not 0 <= self.select_ratio < 1:
            raise InputError(f"mitigation.select_ratio must be in [0, 1), got {self.select_ratio}")
        for name in ("steps", "seeds", "base_prompts"):
            if getattr(self, name) < 1:
                raise InputError(f"mitigation.{name} must be at least 1, got {self}")
        for name, allowed in (
            ("scope", ("pair", "union", "shared")),
            ("base", ("empty", "corpus")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"mitigation.{name} must be one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)!r}"
                )
        if not self.stages or not set(self.stages) <= set(STAGES):
            raise InputError(
                f"mitigation.stages must be some of {', '.join(STAGES)}, got {self.stages}"
            )

    def tracing(self, sampling: Sampling) -> Tracing:
        """Which passes are looked at, in a run with a sampler."""
        return Tracing(
            self.sampling or sampling,
            steps=self.steps,
            seed=self.seed,
            seeds=self.seeds,
            stages=self.stages,
        )

    def apply(
        self, model: TextToImage, pairs: Sequence[Pair], workshop: Workshop
    ) -> MaskEdit | PairMaskEdit:
        """Choose weights by the pairs' prompts.

        Args:
            model: Checkpoint; left as it was.
            pairs: Pairs to forget; only their prompts are read.
            workshop: Gives embeddings, the sampler and, for base ``corpus``, ordinary prompts.

        Raises:
            InputError: There is no pair, the sampler takes fewer steps, or ``fraction`` of a row
                is less than one weight.
        """
        check_calibrated(pairs, self.name)
        masks = self.find(
            model,
            workshop.data.batch(pairs).embeddings,
            workshop,
            pool=self.scope == "shared",
        )
        if self.scope == "pair":
            own = {pair.id: mask for pair, mask in zip(pairs, masks, strict=True)}
            origin = Origin(model.fingerprint, notes=_notes(list(own.values()), ids=list(own)))
            return PairMaskEdit(origin, own)
        merged = next(masks)
        for mask in masks:
            merged = {name: value | mask[name] for name, value in merged.items()}
        return MaskEdit(Origin(model.fingerprint, notes=_notes([merged])), merged)

    def find(
        self,
        model: TextToImage,
        embeddings: torch.Tensor,
        workshop: Workshop,
        *,
        pool: bool = False,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Choose weights by embeddings, whether they are those of prompts or not.

        Args:
            model: Checkpoint; left as it was.
            embeddings: Text embeddings (N, T, D).
            workshop: Gives the sampler and, for base ``corpus``, ordinary prompts.
            pool: One mask for all embeddings rather than one for each.

        Returns:
            Masks in turn, see ``wanda_masks``.
        """
        if self.base == "empty":
            base = model.empty_embedding()
        else:
            base = workshop.prompts(model, "calibration", self.base_prompts)
        return wanda_masks(
            model,
            embeddings,
            base,
            tracing=self.tracing(workshop.sampling),
            fraction=self.fraction,
            select_ratio=self.select_ratio,
            pool=pool,
        )


def _notes(
    masks: Sequence[Mapping[str, torch.Tensor]], ids: Sequence[str] | None = None
) -> dict[str, Any]:
    """Share of weights pruned, in all and by layer, on average over masks; pairs without any."""
    counts = [{name: int(mask.sum()) for name, mask in own.items()} for own in masks]
    sizes = {name: mask.numel() for name, mask in masks[0].items()}
    total = sum(sizes.values()) * len(masks)
    notes: dict[str, Any] = {
        "share_pruned": sum(sum(own.values()) for own in counts) / total,
        "share_pruned_by_layer": {
            name: sum(own[name] for own in counts) / (size * len(masks))
            for name, size in sizes.items()
        },
    }
    if ids is not None:
        notes["share_pruned_by_pair"] = {
            pair: sum(own.values()) * len(masks) / total
            for pair, own in zip(ids, counts, strict=True)
        }
        notes["pairs_without_mask"] = [
            pair for pair, own in zip(ids, counts, strict=True) if not sum(own.values())
        ]
    return notes
