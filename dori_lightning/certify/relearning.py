"""Relearning: how many steps of fine-tuning on an image it takes until the model draws it.

Who holds an image can always teach it to a model. The question is how much sooner a model learns
it that once held it than one that never did: steps until a copy, as a ratio to never-seen images
(``relearning_ratio``). One that is learned no sooner has nothing left to remember.

References: *Unstable Unlearning* (2410.08074); the relearning attack of *Erased or Dormant*
(2505.16174).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from dori_lightning.certify.base import AttackBase, Attempt, Holds, Plan, Subject
from dori_lightning.certify.cascade import AttackFindings, group_of
from dori_lightning.certify.survival import median, restricted_mean
from dori_lightning.mitigations.base import Context, EditResult
from dori_lightning.mitigations.finetuning import FinetuneSettings
from dori_lightning.mitigations.image_finetuning import (
    ImageFinetuning,
    TrainingImages,
    forget,
    train_over,
)
from dori_lightning.models.protocol import TextToImage
from dori_lightning.runtime import distributed
from dori_lightning.types import InputError, Number, Pair


@dataclass(frozen=True)
class PromptedFinetuning(ImageFinetuning):
    """Fine-tuning on images, under their own prompts or each under the next one's.

    Attributes:
        exchanged: Whether prompts are exchanged.
    """

    exchanged: bool = False

    def images(
        self, model: TextToImage, pairs: Sequence[Pair], context: Context
    ) -> TrainingImages:
        """The pairs' images and the prompts that they are trained under."""
        own = super().images(model, pairs, context)
        return own._replace(prompts=own.prompts.roll(-1, 0)) if self.exchanged else own


@dataclass(frozen=True)
class Relearning(AttackBase):
    """Fine-tune all weights on a few images together, and look after some steps.

    One training, whose weights at each level are kept until the images are through, so that an
    interrupted run goes on from the last of them. How long images take is asked of suspects too
    where controls come back as soon (``timed``).

    Attributes:
        steps: Steps after which images are drawn, rising.
        lr: AdamW's learning rate.
        samples: Noise samples of an image in a step.
        company: Images that are trained together; ``certify.group`` should be the same. Where
            fewer are left, controls fill up, since images in small company are learned sooner.
        prompts: Train and draw each image under its ``own`` prompt, or ``exchanged``, under that
            of the next image: what comes back then is held by the image, not by its prompt.
    """

    name: str = "relearning"
    steps: tuple[int, ...] = (10, 20, 30, 40, 60, 80)
    lr: float = 2e-4
    samples: int = 4
    company: int = 8
    prompts: Literal["own", "exchanged"] = "own"
    timed: ClassVar[bool] = True
    holds: Holds = field(default="weights", init=False)
    together: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        where = f"certify.attacks.{self.name}"
        if not self.steps or list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 1:
            raise InputError(
                f"steps of {self.name} must rise from 1 on, got {list(self.steps)}",
                where=f"{where}.steps",
                fix="such as [20,40,80]",
            )
        if self.prompts not in ("own", "exchanged"):
            raise InputError(
                f"prompts of {self.name} are own or exchanged, got {self.prompts!r}",
                where=f"{where}.prompts",
            )
        if self.samples < 1 or self.company < 1 or not self.lr > 0:
            raise InputError(
                f"{self.name} needs samples >= 1, company >= 1 and lr > 0, got {self.samples}, "
                f"{self.company} and {self.lr}",
                where=where,
            )
        if self.prompts == "exchanged" and self.company < 2:
            raise InputError(
                f"{self.name} exchanges the prompts of images that are trained together, and "
                f"company=1 trains each alone",
                where=f"{where}.prompts",
                fix="company of 2 or more, or prompts=own",
            )

    def rows(self, plan: Plan) -> int:
        """The rows of one image in all steps, and its images at each level."""
        return self.samples * self.steps[-1] + len(self.steps) * plan.drawing

    def run(self, subject: Subject, pairs: Sequence[Pair], attempt: Attempt) -> None:
        """Train on all pairs together while any of them is left, and draw from time to time.

        Raises:
            InputError: Prompts are to be exchanged, and there is but one image.
        """
        company, context = self._company(subject, pairs), subject.context.for_mitigations
        if self.prompts == "exchanged" and len(company) < 2:
            raise InputError(
                f"{self.name} exchanges prompts, and there is but one image, without controls",
                where=f"certify.attacks.{self.name}.prompts",
                fix="add control pairs, or prompts=own",
            )
        kept, done = list[EditResult](), 0
        method = self._training(len(company))
        for steps in self.steps:
            left = attempt.left(level_of(steps))
            if not distributed.all_gather_dict({pair.id: True for pair in left}):
                break
            method = replace(method, steps=steps)
            made = train_over(subject.edit, method, subject.model, company, context)
            kept.append(made)
            if left:
                trained = method.images(subject.model, company, context)
                prompts = dict(zip(trained.ids, trained.prompts, strict=True))
                with made.edit.applied(subject.model):
                    images = subject.draw({pair.id: prompts[pair.id] for pair in left})
                rows = self.samples * (steps - done) + subject.drawing
                attempt.add(level_of(steps), images, rows=rows)
            done = steps
        forget(kept, subject.edit, method, subject.model, company, context)

    def _company(self, subject: Subject, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs and, where they are few, controls that are trained on with them."""
        names = {pair.id for pair in pairs}
        others = [
            pair
            for pair in subject.context.pairs
            if pair.kind == "control" and pair.copy_of is None and pair.id not in names
        ]
        return [*pairs, *others[: max(0, self.company - len(pairs))]]

    def _training(self, images: int) -> PromptedFinetuning:
        """The training on some images, all of it."""
        return PromptedFinetuning(
            name=self.name,
            draws="relearning",
            rows=self.samples * images,
            steps=self.steps[-1],
            until=self.steps[-1],
            finetune=FinetuneSettings(lr=self.lr, weight_decay=0.0),
            exchanged=self.prompts == "exchanged",
        )


def level_of(steps: int) -> str:
    """What a report calls the images after some steps."""
    return f"after {steps} steps"


def _steps_of(level: str) -> int:
    """The steps in a name of ``level_of``."""
    return int(level.split()[1])


@dataclass(frozen=True)
class RelearningRatio:
    """How soon suspects are learned, against images that the model cannot hold.

    Attributes:
        ratio: Steps of the suspects over those of the others: 1 where nothing is left of them,
            below it where the model remembers; NaN where either group is empty.
        suspects: Steps that suspects take.
        others: Steps that the others take.
        measure: ``median`` of the Kaplan-Meier estimates, or, where one of them does not fall to
            one half, the ``restricted mean``: steps until a copy, on average, where each image
            counts with ``horizon`` at most. Where it does, the ratio is nearer to 1 than the
            truth.
        horizon: Steps up to which both groups are known.
    """

    ratio: Number
    suspects: Number
    others: Number
    measure: Literal["median", "restricted mean"]
    horizon: int


def relearning_ratio(
    findings: AttackFindings, other: Literal["controls", "reference"]
) -> RelearningRatio:
    """Compare the steps until a copy; images that never were one are censored at their last level.

    Steps are those of the level that showed the copy; suspects that an earlier attack brought
    back were not tried.

    Args:
        findings: Of `Relearning`.
        other: What suspects are compared with: controls on the same model, or the suspects' own
            images on the model that never saw them.
    """
    steps: dict[str, list[tuple[int, bool]]] = {"suspects": [], other: []}
    for one in findings.tried:
        if group_of(one) in steps and one.levels:
            last = one.levels[-1 if one.back_at is None else one.back_at]
            steps[group_of(one)].append((_steps_of(last), one.back_at is not None))
    own, others = steps["suspects"], steps[other]
    if not own or not others:
        return RelearningRatio(math.nan, math.nan, math.nan, "median", 0)
    horizon = _horizon(own, others)
    medians = [median(group) for group in (own, others)]
    if all(math.isfinite(value) for value in medians):
        return RelearningRatio(medians[0] / medians[1], medians[0], medians[1], "median", horizon)
    means = [restricted_mean(group, horizon) for group in (own, others)]
    return RelearningRatio(means[0] / means[1], means[0], means[1], "restricted mean", horizon)


def _horizon(*groups: Sequence[tuple[int, bool]]) -> int:
    """Steps up to which all groups are known: all of them where every image came back."""
    known = [
        max(count for count, _ in group) for group in groups if not all(back for _, back in group)
    ]
    return min(known, default=max(count for group in groups for count, _ in group))
