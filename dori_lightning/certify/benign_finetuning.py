"""Benign fine-tuning: the model is trained on ordinary images, and what was removed comes back.

Whoever goes on training a mitigated checkpoint, for whatever purpose, may undo the mitigation
without meaning to. Reference: *Unstable Unlearning: The Hidden Risk of Concept Resurgence in
Diffusion Models* (2410.08074).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dori_lightning.certify.base import Afterwards, AttackBase, Attempt, Holds, Plan, Subject
from dori_lightning.certify.embeddings import search_from_prompt
from dori_lightning.certify.prompts import Prompts
from dori_lightning.mitigations.base import Context
from dori_lightning.mitigations.finetuning import FinetuneSettings
from dori_lightning.mitigations.image_finetuning import (
    ImageFinetuning,
    TrainingImages,
    train_over,
)
from dori_lightning.models.protocol import TextToImage
from dori_lightning.runtime import distributed
from dori_lightning.types import InputError, Pair


@dataclass(frozen=True)
class OrdinaryFinetuning(ImageFinetuning):
    """Fine-tuning on ordinary images under their captions, whatever the pairs are.

    Images are those of the split that no mitigation trains on: on others a mitigation may have
    made sure that nothing is left to learn. Under an edit that differs by pair, each image sees
    the weights of one of the pairs.

    Attributes:
        count: Images that take turns.
    """

    count: int = 64

    def images(
        self, model: TextToImage, pairs: Sequence[Pair], context: Context
    ) -> TrainingImages:
        """The first ordinary images.

        Raises:
            InputError: The corpus has fewer, or no images.
        """
        del pairs
        encoded = context.ordinary(model, "evaluation", self.count).rows(range(self.count))
        names = tuple(f"ordinary{place}" for place in range(self.count))
        return TrainingImages(names, encoded.latents, encoded.embeddings)


@dataclass(frozen=True)
class BenignFinetuning(AttackBase):
    """Fine-tune all weights on ordinary images, draw from the prompts, and search from them.

    All images share one training, whose weights are kept beside the edits. Each is charged all of
    it: who wants one image has to train as long.

    Attributes:
        steps: Steps after which the prompts are drawn from, rising.
        lr: AdamW's learning rate.
        samples: Noise samples of a step.
        images: Ordinary images, which take turns.
        search: Steps of a search from the prompt after the last step; 0 for none.
    """

    name: str = "benign_finetuning"
    steps: tuple[int, ...] = (50, 150)
    lr: float = 1e-4
    samples: int = 8
    images: int = 64
    search: int = 25
    holds: Holds = field(default="weights", init=False)
    together: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        where = f"certify.attacks.{self.name}"
        if not self.steps or list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 1:
            raise InputError(
                f"steps of {self.name} must rise from 1 on, got {list(self.steps)}",
                where=f"{where}.steps",
                fix="such as [50,150]",
            )
        if min(self.samples, self.images) < 1 or self.search < 0 or not self.lr > 0:
            raise InputError(
                f"{self.name} needs samples and images >= 1, search >= 0 and lr > 0, got "
                f"{self.samples}, {self.images}, {self.search} and {self.lr}",
                where=where,
            )

    def rows(self, plan: Plan) -> int:
        """All of the training, K images after each of its parts, and the search."""
        searched = search_from_prompt(self.search).rows(plan) if self.search else 0
        return self.samples * self.steps[-1] + len(self.steps) * plan.drawing + searched

    def run(self, subject: Subject, pairs: Sequence[Pair], attempt: Attempt) -> None:
        """Train while any pair is left, draw, and search at the end.

        Raises:
            InputError: The corpus has too few images.
        """
        done = 0
        for steps in self.steps:
            after = Afterwards(
                attempt, f"{steps} ordinary steps", rows=self.samples * (steps - done)
            )
            left = after.left(Prompts.LEVEL)
            if not distributed.all_gather_dict({pair.id: True for pair in left}):
                return
            made = train_over(
                subject.edit,
                self._training(steps),
                subject.model,
                subject.context.pairs,
                subject.context.for_mitigations,
            )
            trained, done = subject.with_edit(made.edit), steps
            Prompts().run(trained, pairs, after)
            if self.search and steps == self.steps[-1]:
                search_from_prompt(self.search).run(trained, pairs, after)

    def _training(self, steps: int) -> OrdinaryFinetuning:
        """The training, up to some steps."""
        return OrdinaryFinetuning(
            name=self.name,
            draws="benign fine-tuning",
            rows=self.samples,
            steps=steps,
            until=self.steps[-1],
            finetune=FinetuneSettings(lr=self.lr, weight_decay=0.0),
            count=self.images,
        )
