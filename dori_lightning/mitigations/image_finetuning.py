"""Fine-tune on images under prompts, on top of an edit: the opposite of a mitigation.

Positive controls are planted with it, and attacks on the weights train with it, on the image that
they want back or on ordinary ones.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from dori_lightning.mitigations.base import Context, EditResult, edit_key
from dori_lightning.mitigations.edits import Edit, LayeredEdit, WeightEdit
from dori_lightning.mitigations.finetuning import FinetunedMitigation, FinetuneSettings, Finetuning
from dori_lightning.models.protocol import TextToImage
from dori_lightning.runtime import distributed
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Pair


class TrainingImages(NamedTuple):
    """N images that are trained on.

    Attributes:
        ids: Whose rows they are, for edits that differ by pair.
        latents: Scaled latents (N, C, h, w).
        prompts: Embeddings (N, T, D) that they are trained under.
    """

    ids: tuple[str, ...]
    latents: torch.Tensor
    prompts: torch.Tensor


@dataclass(frozen=True)
class ImageFinetuning(FinetunedMitigation):
    """Lower the denoising loss of pairs' images under their prompts.

    Attributes:
        rows: Noise samples of a step, in which the images take turns.
        steps: Optimizer steps.
        finetune: Optimizer settings.
        draws: Names the keyed draws, so that those of several methods differ.
        base: Identity of the edit that the model carries meanwhile; see `train_over`.
        until: Steps of the longest of several trainings that go on from each other; 0 for one
            alone. Each is the beginning of all longer ones, and is not taken again for them.
    """

    rows: int
    steps: int
    finetune: FinetuneSettings
    draws: str = "positive controls"
    base: str = "none"
    until: int = 0
    name: str = field(default="planting", kw_only=True)

    def images(
        self, model: TextToImage, pairs: Sequence[Pair], context: Context
    ) -> TrainingImages:
        """What is trained on: the pairs' images under their own prompts."""
        del model
        batch = context.data.batch(pairs)
        return TrainingImages(tuple(p.id for p in pairs), batch.latents, batch.embeddings)

    def fit_key(
        self, model: TextToImage, pairs: Sequence[Pair], context: Context
    ) -> tuple[str, bool]:
        """The same for trainings that go on from each other; the last one's needs not stay."""
        if not self.until:
            return super().fit_key(model, pairs, context)
        key = edit_key(replace(self, steps=self.until), model, pairs, context)
        return key, self.steps < self.until

    def training(
        self, model: TextToImage, pairs: Sequence[Pair], context: Context
    ) -> Callable[[], Finetuning]:
        """Train on the images."""
        images = self.images(model, pairs, context)
        return lambda: _ImageTraining(model, self, images, seed=context.seed)


class _ImageTraining(Finetuning):
    """Lower the denoising loss of some images under their prompts."""

    def __init__(
        self, model: TextToImage, method: ImageFinetuning, images: TrainingImages, *, seed: int
    ) -> None:
        every = method.finetune.checkpoint_every
        if method.until:
            every = math.gcd(every, method.steps)  # one at the end, to go on from
        super().__init__(model, replace(method.finetune, checkpoint_every=every))
        self.method, self.images, self.seed = method, images, seed

    def training_step(self, *_: Any) -> torch.Tensor:
        """Mean denoising loss of a batch in which the images take turns."""
        model, method, images = self.model, self.method, self.images
        generator = keyed_generator(method.draws, self.seed, self.global_step)
        places = (self.global_step * method.rows + torch.arange(method.rows)) % len(images.ids)
        latents = images.latents[places].to(model.device)
        noise = torch.randn(latents.shape, generator=generator).to(model.device)
        timesteps = torch.randint(
            model.num_train_timesteps, (method.rows,), generator=generator
        ).to(model.device)
        loss = model.denoising_loss(
            latents,
            noise,
            timesteps,
            images.prompts[places].to(model.device),
            pair_ids=[images.ids[place] for place in places.tolist()],
        ).mean()
        self.log("finetune/denoising_loss", loss)
        return loss


def train_over(
    carried: Edit,
    method: ImageFinetuning,
    model: TextToImage,
    pairs: Sequence[Pair],
    context: Context,
) -> EditResult:
    """Train on top of what a model carries, or read what was trained before.

    Args:
        carried: What it carries meanwhile; the model itself has no edit.
        method: The training.
        model: The model.
        pairs: Whose images are trained on.
        context: What mitigations work with.

    Returns:
        Both edits as one, in the file of the weights alone.
    """
    method = replace(method, base=carried.identity)
    with carried.applied(model):
        made = context.find(method, model, pairs)
    if not isinstance(made.edit, WeightEdit):
        raise TypeError(f"{method.name} gives weights, not {type(made.edit).__name__}")
    return replace(made, edit=LayeredEdit.over(carried, made.edit))


def forget(
    made: Sequence[EditResult],
    carried: Edit,
    method: ImageFinetuning,
    model: TextToImage,
    pairs: Sequence[Pair],
    context: Context,
) -> None:
    """Remove what several trainings that go on from each other have left on the disk.

    Args:
        made: Their edits.
        carried: What the model carried; this and the others as in `train_over`.
        method: Any of them.
        model: The model.
        pairs: Whose images were trained on.
        context: What mitigations work with.
    """
    key, _ = replace(method, base=carried.identity).fit_key(model, pairs, context)
    distributed.barrier()
    if distributed.is_first():
        # before the edits: whoever misses one of these trains anew
        shutil.rmtree(context.scratch(key), ignore_errors=True)
    for one in made:
        context.discard(one)
