"""The context of an audit: its inputs, checked before any expensive step."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import lightning.pytorch as L
import torch

from dori_lightning.attacks.budget import AttackSettings, evaluation_steps
from dori_lightning.attacks.embedding_attack import AttackContext, ControlPrompts
from dori_lightning.metrics.calibration import Measures, ReferenceImages
from dori_lightning.metrics.evidence import EvidenceSettings
from dori_lightning.metrics.utility import UtilitySettings
from dori_lightning.mitigations.base import Context, EditResult, Mitigation
from dori_lightning.models.generation import baseline_cache_key
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.protocol import Sampling
from dori_lightning.pairs.copies import alterations, altered_copies
from dori_lightning.pairs.corpus import ORDINARY_PROMPTS, Corpus
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.pairs.validation import image_tensor, square_image
from dori_lightning.runtime.logging import with_progress
from dori_lightning.types import Budget, InputError, Pair, Pairs

log = logging.getLogger(__name__)

PNG_BYTES_PER_PIXEL = 3
"""At most: noise does not compress."""

FILE_BYTES = 4096
"""Bytes of a file besides its content: a block that is not filled, its header."""

REPORT_BYTES = 5_000_000
"""Record, figures and page, which holds thumbnails of a limited number of pairs."""


@dataclass(frozen=True)
class AuditContext:
    """What the stages of an audit share.

    Attributes:
        folder: Run folder.
        cache: Folder shared by the jobs of a sweep: encodings, edits, unmitigated images.
        seed: Run seed.
        pairs: Pairs under audit, and ids of the list's rows that have no image.
        model: The checkpoint, without any edit.
        data: The pairs, encoded.
        references: The pairs' images, described.
        corpus: Ordinary prompts and images.
        sampling: How images are generated.
        attack: Attack settings.
        budget: The attack's budget, resolved.
        control_prompts: Initial points of the attack from ``control_prompt``.
        mitigation: What is done to the checkpoint.
        utility: How much of the mitigation's cost is measured.
        evidence: How sure the verdict has to be.
        make_trainer: Makes a Trainer from keyword arguments.
    """

    folder: Path
    cache: Path
    seed: int
    pairs: Pairs
    model: LatentDiffusion
    data: PairsDataModule
    references: ReferenceImages
    corpus: Corpus
    sampling: Sampling
    attack: AttackSettings
    budget: Budget
    control_prompts: ControlPrompts
    mitigation: Mitigation
    utility: UtilitySettings
    evidence: EvidenceSettings
    make_trainer: Callable[..., L.Trainer]

    @cached_property
    def trainer(self) -> L.Trainer:
        """Runs the attack; its processes share the pairs and their images.

        Made at its first use: other processes must be there by then.
        """
        return self.make_trainer(default_root_dir=self.folder)

    @property
    def suspected(self) -> tuple[Pair, ...]:
        """The pairs that a mitigation is to remove: all but the controls."""
        return tuple(pair for pair in self.pairs if pair.kind != "control")

    @property
    def unmitigated(self) -> Path:
        """Folder for the images that the checkpoint generates without an edit."""
        return self.cache / "unmitigated" / baseline_cache_key(self.model, self.sampling)

    @property
    def machine(self) -> str:
        """Device and precision: what the rounding of a result depends on."""
        precision = str(getattr(self.model, "autocast", None) or torch.float32)
        return f"{self.model.device.type}-{precision.removeprefix('torch.')}"

    @property
    def for_mitigations(self) -> Context:
        """The part of the context that mitigations see."""
        return Context(
            seed=self.seed,
            corpus=self.corpus,
            data=self.data,
            references=self.references,
            sampling=self.sampling,
            trainer=self.make_trainer,
            folder=self.cache / "edits",
        )

    def attack_context(self, edit: str, *, scale: float = 1.0) -> AttackContext:
        """What attacks share while the model carries the edit of this identity.

        Args:
            edit: The edit's identity.
            scale: Factor of random initial points and of the steps from them.
        """
        return AttackContext(
            model=self.model,
            data=self.data,
            settings=self.attack,
            budget=self.budget,
            controls=self.control_prompts,
            folder=self.folder / "attacks",
            seed=self.seed,
            edit=edit,
            scale=scale,
        )

    def find_edit(self) -> EditResult:
        """The mitigation's edit for the suspected pairs, out of the cache or made now."""
        return self.for_mitigations.find(self.mitigation, self.model, self.suspected)


def with_self_controls(pairs: Pairs, setting: str | Sequence[str], folder: Path) -> Pairs:
    """Add altered copies of the suspects as controls; see ``pairs.copies``.

    Args:
        pairs: The list of pairs, as it was read.
        setting: ``pairs.self_controls``.
        folder: Where the copies' images are kept.

    Raises:
        InputError: An unknown alteration, or a pair of a copy's name.
    """
    audited = [pair for pair in pairs if pair.role == "audit"]
    kinds = alterations(setting, controls=sum(pair.kind == "control" for pair in audited))
    return Pairs((*pairs, *altered_copies(audited, kinds, folder)), skipped=pairs.skipped)


def check_controls(pairs: Sequence[Pair], attack: AttackSettings) -> None:
    """Refuse a list without the control pairs that the attack starts from.

    Warns of controls with fewer reference images than suspected pairs have.

    Raises:
        InputError: Names the setting that needs them.
    """
    counts = {
        control: [len(pair.references) for pair in pairs if (pair.kind == "control") == control]
        for control in (False, True)
    }
    suspected, unseen = (sum(own) / len(own) if own else 1.0 for own in counts.values())
    if counts[True] and suspected > unseen:
        log.warning(
            "suspected pairs have %.1f reference images on average and controls %.1f: each is a "
            "chance to resemble one, so the controls' rate is too low; give controls as many",
            suspected,
            unseen,
        )
    controls = sum(pair.kind == "control" and pair.copy_of is None for pair in pairs)
    if "control_prompt" in attack.inits and controls < 2:
        raise InputError(
            f"attack.inits has control_prompt, but the list has {controls} control pairs\n"
            f"  where: attack.inits\n"
            f"  fix:   add pairs of kind control, or drop control_prompt from attack.inits"
        )


def control_prompts(pairs: Sequence[Pair], data: PairsDataModule) -> ControlPrompts:
    """Prompts of all listed control pairs, encoded: initial points of the attack."""
    controls = [pair for pair in pairs if pair.kind == "control" and pair.copy_of is None]
    return ControlPrompts(
        tuple(pair.id for pair in controls),
        data.batch(controls).embeddings if controls else None,
    )


def reference_images(
    pairs: Sequence[Pair], resolution: int, measures: Measures
) -> ReferenceImages:
    """Read the pairs' images at the model's resolution and describe them."""
    images = [
        image_tensor(square_image(pair.image), resolution)
        for pair in with_progress("read images", pairs)
    ]
    others = (
        image_tensor(square_image(own.image), resolution) for pair in pairs for own in pair.others
    )
    return ReferenceImages(pairs, torch.stack(images), measures, others=others)


def audit_bytes(context: AuditContext) -> int:
    """Bytes that an audit writes at most: images, embeddings, encodings and the report.

    Without edits: mitigations check the space for what they write themselves.
    """
    model, attack = context.model, context.attack
    tokens, width = model.embedding_shape
    channels, height, side = model.latent_shape
    snapshots = len(evaluation_steps(attack.stops, context.budget.steps))
    # of all pairs: controls are attacked from everywhere where the answer rests on it
    attacks = len(context.pairs) * len(attack.inits) * attack.restarts
    # with and without the edit, or in the run and in the cache
    prompts = 2 * len(context.pairs) + ORDINARY_PROMPTS
    images = (prompts + attacks * snapshots) * context.sampling.images_per_pair
    # an attack that can be continued also keeps its offset and Adam's two moments
    tensors = snapshots + (3 if attack.early_stop else 0)
    embedding, latent = 4 * tokens * width, 4 * channels * height * side
    return int(
        images * (model.resolution**2 * PNG_BYTES_PER_PIXEL + FILE_BYTES)
        + attacks * (tensors * embedding + FILE_BYTES)
        + len(context.pairs) * (embedding + latent + FILE_BYTES)
        + REPORT_BYTES
    )
