"""What the stages of an audit work with, checked before any expensive step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as L

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.attacks.embedding_attack import ControlPrompts
from dori_lightning.metrics.calibration import Measures, ReferenceImages
from dori_lightning.metrics.utility import UtilitySettings
from dori_lightning.mitigations.base import Context, Mitigation
from dori_lightning.models.generation import baseline_cache_key
from dori_lightning.models.protocol import Sampling
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.types import Budget, InputError, Pair, Pairs


@dataclass(frozen=True)
class Bench:
    """What the stages of an audit share.

    Attributes:
        folder: Run folder.
        cache: What the jobs of a sweep share.
        seed: Run seed.
        pairs: Pairs under audit, and rows of the list that have no picture.
        model: The checkpoint, without any edit.
        data: The pairs, encoded.
        references: Their pictures, described.
        settings: Attack settings.
        budget: The attack's budget, resolved.
        controls: Where the attack from ``control_prompt`` begins.
        sampling: How pictures are generated.
        mitigation: What is done to the checkpoint.
        context: What mitigations work with.
        utility: How much is measured of its cost.
        trainer: Runs the attack; its processes share the pairs and their pictures.
    """

    folder: Path
    cache: Path
    seed: int
    pairs: Pairs
    model: StableDiffusion
    data: PairsDataModule
    references: ReferenceImages
    settings: AttackSettings
    budget: Budget
    controls: ControlPrompts
    sampling: Sampling
    mitigation: Mitigation
    context: Context
    utility: UtilitySettings
    trainer: L.Trainer

    @property
    def suspected(self) -> tuple[Pair, ...]:
        """The pairs that a mitigation is to forget."""
        return tuple(pair for pair in self.pairs if pair.kind != "control")

    @property
    def unmitigated(self) -> Path:
        """Folder for the pictures that the checkpoint draws as it is."""
        return self.cache / "unmitigated" / baseline_cache_key(self.model, self.sampling)


def check_controls(pairs: Sequence[Pair], settings: AttackSettings, measures: Measures) -> None:
    """Refuse early what would fail for want of control pairs after hours of work.

    Raises:
        InputError: Says what needs them.
    """
    controls = sum(pair.kind == "control" for pair in pairs)
    if not controls and measures.descriptors[measures.decider].threshold is None:
        raise InputError(
            f"{measures.decider} has no threshold of its own, it is calibrated on control pairs, "
            f"and the list has none\n"
            f"  fix:   add pairs of kind control (pictures the checkpoint cannot hold, with their "
            f"prompts), or fix it with metrics.descriptors.{measures.decider}.threshold=NUMBER"
        )
    if "control_prompt" in settings.inits and controls < 2:
        raise InputError(
            f"attack.inits has control_prompt, but the list has {controls} control pairs\n"
            f"  fix:   add pairs of kind control, or drop control_prompt from attack.inits"
        )


def control_prompts(pairs: Sequence[Pair], data: PairsDataModule) -> ControlPrompts:
    """Where attacks from ``control_prompt`` begin: the prompts of all control pairs."""
    controls = [pair for pair in pairs if pair.kind == "control"]
    return ControlPrompts(
        tuple(pair.id for pair in controls),
        data.batch(controls).embeddings if controls else None,
    )
