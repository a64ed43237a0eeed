"""Positive controls: could this attack have found an image in this very model?

"Nothing came back" may mean that nothing is there, or that the attack is blind here: a step size
and a start fit one scale of conditioning, and a mitigation may break the search rather than remove
the image. So images that the model cannot hold are planted into a copy of it, mitigation included,
by fine-tuning until their prompts reproduce them. The attack then has the same budget and starts
from random embeddings. The share that it finds is its power.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from dori_lightning.attacks.embedding_attack import ControlPrompts
from dori_lightning.audit.context import AuditContext, reference_images
from dori_lightning.audit.evaluation import (
    attack_and_generate,
    calibrate,
    copies_among,
    measure_all,
    prompt_conditionings,
)
from dori_lightning.metrics.descriptors import LocalCorrelation
from dori_lightning.metrics.evidence import Power, attacked_scores
from dori_lightning.metrics.replication import pair_results
from dori_lightning.metrics.statistics import wilson_interval
from dori_lightning.mitigations.edits import Edit
from dori_lightning.mitigations.finetuning import FinetuneSettings
from dori_lightning.mitigations.image_finetuning import ImageFinetuning, train_over
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.pairs.validation import image_tensor, square_image
from dori_lightning.types import Calibration, InputError, Pair, Pairs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PowerSettings:
    """Whether and how the attack's power is measured.

    Attributes:
        when: ``nothing_found`` where no suspect is answered yes, ``always``, or ``never``.
        images: Folder of never-seen images with a ``metadata.csv``; None draws some.
        count: How many images are planted.
        steps: Optimizer steps of a round; prompts are tried after each.
        rounds: Most rounds.
        rows: Noise samples of a step, over all images.
        lr: AdamW's learning rate.
    """

    when: Literal["nothing_found", "always", "never"] = "nothing_found"
    images: str | None = None
    count: int = 4
    steps: int = 100
    rounds: int = 4
    rows: int = 32
    lr: float = 3e-4

    def __post_init__(self) -> None:
        if self.when not in ("nothing_found", "always", "never"):
            raise InputError(
                f"power.when must be nothing_found, always or never, got {self.when!r}"
            )
        for name in ("count", "steps", "rounds", "rows"):
            if getattr(self, name) < 1:
                raise InputError(f"power.{name} must be >= 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise InputError(f"power.lr must be positive, got {self.lr}")


SIDE = 64
"""Pixels a side at which images are compared."""

SAME_IMAGE = 0.6
"""Local correlation above which two images are one, saved or scaled anew.

Images of the embedded benchmark reach 0.88 and more as JPEGs of quality 40 at three quarters of
their size, other images 0.34 at most against its suspects. One that was cut differently escapes.
"""


def check_never_seen(planted: Sequence[Pair], listed: Sequence[Pair]) -> None:
    """Refuse positive controls that are among the suspects, before a model is loaded.

    Images are compared, not files: a suspect that was scaled or saved anew is one all the same.

    Args:
        planted: Images that the model cannot hold.
        listed: The list of pairs; its controls may be planted too.

    Raises:
        InputError: One of them is a suspect's image, or nearly.
    """
    suspects = [
        (pair.id, own.image)
        for pair in listed
        if pair.kind != "control" and planted
        for own in pair.references
    ]
    if not suspects:
        return

    def thumbnails(images: Iterable[Path]) -> torch.Tensor:
        return torch.stack([image_tensor(square_image(image), SIDE) for image in images])

    own = thumbnails(pair.image for pair in planted)
    others = thumbnails(image for _, image in suspects)
    alike = LocalCorrelation().similarity(own, others)
    # a flat image correlates with nothing, but may be the same one
    alike[(own[:, None] == others[None]).flatten(2).all(-1)] = 1.0
    for row, pair in zip(alike, planted, strict=True):
        if row.max() > SAME_IMAGE:
            raise InputError(
                f"{pair.image.name} of the positive controls is the image of "
                f"{suspects[int(row.argmax())][0]}, or nearly (correlation {row.max():.2f})",
                where="power.images",
                fix="give images that the model cannot hold, or power.images=null",
            )


@dataclass(frozen=True)
class Planted:
    """A copy of a model into which images were planted.

    Attributes:
        context: The audit of the planted images: random starts, no controls.
        edit: The mitigation, and the planted weights over it.
        calibration: When an image is a copy.
        drawn: Ids of the images that their prompts draw now.
        steps: Optimizer steps that it took.
    """

    context: AuditContext
    edit: Edit
    calibration: Calibration
    drawn: frozenset[str]
    steps: int


def plant(
    context: AuditContext, edit: Edit, planted: Sequence[Pair], settings: PowerSettings
) -> Planted:
    """Fine-tune on never-seen images until their prompts draw them, or the rounds are over.

    Args:
        context: The audit; its model carries no edit, and ``generate_ordinary`` was called.
        edit: The mitigation's.
        planted: Images that the model cannot hold, with prompts.
        settings: How they are planted.
    """
    there = _context_of(context, planted)
    calibration = calibrate(there, ())
    carried, steps, drawn = edit, 0, frozenset[str]()
    method = ImageFinetuning(
        rows=settings.rows,
        steps=settings.steps,
        finetune=FinetuneSettings(lr=settings.lr, weight_decay=0.0),
    )
    for _ in range(settings.rounds):
        made = train_over(carried, method, there.model, there.pairs, there.for_mitigations)
        carried = made.edit
        steps += settings.steps
        with carried.applied(there.model):
            drawn = copies_among(
                there,
                calibration,
                prompt_conditionings(there),
                there.folder / "pictures",
                edit=carried.identity,
                title="look",
            )
        log.info(
            "positive controls: %d of %d planted after %d steps", len(drawn), len(planted), steps
        )
        if len(drawn) == len(planted):
            break
    return Planted(there, carried, calibration, drawn, steps)


def measure_power(
    context: AuditContext, edit: Edit, planted: Sequence[Pair], settings: PowerSettings
) -> Power:
    """Plant never-seen images into the mitigated model and look how many the attack finds.

    Args:
        context: The audit; its model carries no edit.
        edit: The mitigation's.
        planted: Images that the model cannot hold, with prompts.
        settings: How they are planted.
    """
    copy = plant(context, edit, planted, settings)
    there, calibration, drawn = copy.context, copy.calibration, copy.drawn
    generated = attack_and_generate(there, copy.edit)
    pictures = there.folder / "pictures"
    outcomes = measure_all(there, generated.conditionings, pictures, title="score planted")
    results = pair_results(outcomes, calibration)
    searched = [r for r in results if r.condition.attack != "prompt" and r.pair.id in drawn]
    hits = len({r.pair.id for r in searched if r.reproduced})
    scored = attacked_scores(searched, calibration, {r.condition for r in searched})
    return Power(
        planted=len(drawn),
        tried=len(planted),
        found=hits,
        interval=wilson_interval(hits, len(drawn)),
        steps=copy.steps,
        scores={name: score for name, (score, _) in scored.items()},
    )


def _context_of(context: AuditContext, planted: Sequence[Pair]) -> AuditContext:
    """The audit of the planted images: random starts, no controls, no evidence by loss."""
    data = PairsDataModule(planted, context.model, cache=context.cache / "encoded")
    data.prepare()
    attack = replace(
        context.attack,
        inits=("random",),
        other_inits=None,
        snapshots=(),
        early_stop=False,
        looks=(),
        one_image=False,
        futility=None,
    )
    return replace(
        context,
        folder=context.folder / "power",
        pairs=Pairs(planted),
        data=data,
        references=reference_images(
            planted, context.model.resolution, context.references.measures
        ),
        attack=attack,
        control_prompts=ControlPrompts((), None),
        evidence=replace(context.evidence, losses=False),
    )
