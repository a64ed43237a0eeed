"""Does the model still denoise, and how strongly, and when, does it answer to its text?

A search finds nothing in a model that no longer works, and nothing where its numbers do not fit
the model. A standard normal start and a step of 0.1 fit models that were trained on CLIP's
embeddings: where weights behind the text are larger or smaller by an order of magnitude, such a
start drowns the image or does not reach it. So the answer to text is measured, and random starts
and the steps from them are scaled until it is as usual.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dori_lightning.attacks.solver import LOSS_SCALE
from dori_lightning.attacks.timesteps import BINS, FLOOR
from dori_lightning.models.protocol import TextToImage
from dori_lightning.runtime.batching import OomBackoff, map_batches
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.runtime.seeding import keyed_generator

RESPONSE = 0.06
"""Root mean square by which the predicted noise, itself of about 1, differs between two standard
normal embeddings on a model as trained; measured on ``dori_tiny``."""

TOLERANCE = 4.0
"""Models within this factor of it are searched in the embedding's own numbers, as published."""

SCALES = tuple(2.0**k for k in range(-8, 9))

LEVELS = (0.1, 0.25, 0.4, 0.55)
"""Noise levels as shares of the schedule; above them an image does not show."""

IMAGES = 16

_MEMORY = OomBackoff(
    "check of the model", "sample", "checkpoint.precision=bf16, or a device with more memory"
)


@dataclass(frozen=True)
class ModelCheck:
    """What a search has to work with.

    Attributes:
        response: Root mean square difference of the predicted noise, itself of about 1, between
            two standard normal embeddings; 0 where the text does nothing.
        scale: Factor of random starts and of the steps from them that brings the response to the
            usual one; 1 where it is about that already.
        gradient: Length of the denoising loss's gradient by the embedding at scaled random
            starts, times the scale: mean over images.
        denoising: Squared error of the predicted noise under the empty prompt, times that of the
            best linear filter, which knows nothing of images but their variance; about a quarter
            on a model as trained.
    """

    response: float
    scale: float
    gradient: float
    denoising: float


def check_model(
    model: TextToImage, latents: torch.Tensor, seed: int, pair_ids: Sequence[str] | None = None
) -> ModelCheck:
    """Measure what a search has to work with, in at most 350 evaluations.

    Args:
        model: The model, with the edit applied.
        latents: Latents (N, C, h, w) of images that it should not hold; 16 are enough.
        seed: Run seed.
        pair_ids: Whose images these are (N), for edits that differ between pairs.
    """
    rows = len(latents)
    generator = keyed_generator("model check", seed)
    noise = torch.randn(latents.shape, generator=generator)
    first, second = torch.randn((2, rows, *model.embedding_shape), generator=generator)
    levels = [LEVELS[k % len(LEVELS)] for k in range(rows)]
    timesteps = torch.tensor([round(level * model.num_train_timesteps) for level in levels])

    def owners(part: list[int]) -> list[str] | None:
        return None if pair_ids is None else [pair_ids[row] for row in part]

    def predicted(embeddings: torch.Tensor) -> torch.Tensor:
        def predict(part: list[int]) -> list[torch.Tensor]:
            at = timesteps[part].to(model.device)
            noised = model.noised(latents[part].to(model.device), noise[part].to(model.device), at)
            text = embeddings[part].to(model.device)
            found = model.predict_noise(noised, at, text, pair_ids=owners(part))
            return [*found.float().cpu()]

        found = map_batches(
            predict, range(rows), at_once=rows, model=model, backoff=_MEMORY, advance=advance
        )
        return torch.stack(found)

    def response(scale: float) -> float:
        starts = (model.random_start(each, scale=scale) for each in (first, second))
        difference = predicted(next(starts)) - predicted(next(starts))
        return float(difference.square().mean().sqrt())

    def slope(part: list[int]) -> list[float]:
        start = model.random_start(first[part], scale=scale)
        text = start.to(model.device).requires_grad_(True)
        images, added, at = (t[part].to(model.device) for t in (latents, noise, timesteps))
        with torch.enable_grad():
            losses = model.denoising_loss(images, added, at, text, pair_ids=owners(part))
            (found,) = torch.autograd.grad(LOSS_SCALE * losses.sum(), text)
        lengths: list[float] = (found / LOSS_SCALE).flatten(1).norm(dim=1).tolist()
        return lengths

    # units that were measured on the model itself need no other
    published = model.spread().absolute
    with (
        model.frozen(),
        torch.no_grad(),
        progress_bar("check of the model", rows * (4 + 2 * len(SCALES))) as advance,
    ):
        usual = response(1.0)
        scale, searched = 1.0, list[float]()
        if published and usual > 0 and not 1 / TOLERANCE <= usual / RESPONSE <= TOLERANCE:
            searched = [s for s in SCALES if (s > 1) == (usual < RESPONSE)]
            answers = {s: response(s) for s in searched}
            answers = {s: answer for s, answer in answers.items() if answer > 0}
            scale = min(answers, key=lambda s: abs(math.log(answers[s] / RESPONSE)), default=1.0)
        advance(2 * rows * (len(SCALES) - len(searched)))
        empty = model.empty_embedding().cpu().expand(rows, -1, -1)
        error = float((predicted(empty) - noise).square().mean())
        slopes = map_batches(
            slope, range(rows), at_once=rows, model=model, backoff=_MEMORY, advance=advance
        )
    kept, added = (table.cpu() for table in model.variances(timesteps.to(model.device)))
    signal = kept * latents.square().flatten(1).mean(1)
    linear = signal / (signal + added)
    return ModelCheck(
        usual, scale, scale * sum(slopes) / rows, error / float(linear.double().mean())
    )


def text_density(
    model: TextToImage,
    latents: torch.Tensor,
    seed: int,
    pair_ids: Sequence[str] | None = None,
    *,
    scale: float = 1.0,
    parts: Sequence[str] | None = None,
) -> torch.Tensor:
    """Where the text matters: the density (BINS,) that ``importance`` draws by, float64.

    Proportional to the root mean square, over images and noises, of the denoising loss's gradient
    by a random embedding, in the units of the search; `FLOOR` of it is uniform. It takes `BINS`
    evaluations with gradient for each image. Which density is chosen decides no answer: losses are
    weighted, so that it changes their noise alone.

    Args:
        model: The model, with the edit applied.
        latents: Latents (N, C, h, w) of some images.
        seed: Run seed.
        pair_ids: Whose images these are (N), for edits that differ between pairs.
        scale: Factor of the random embeddings.
        parts: Names of the parts that are searched; None for every free one.
    """
    rows = len(latents)
    generator = keyed_generator("density of timesteps", seed)
    noise = torch.randn((BINS, *latents.shape), generator=generator)
    normal = torch.randn((rows, *model.embedding_shape), generator=generator)
    starts = model.random_start(normal, scale=scale, parts=parts)
    places = torch.arange(BINS)[:, None] + torch.rand((BINS, rows), generator=generator)
    timesteps = (places / BINS * model.num_train_timesteps).long()
    timesteps = timesteps.clamp(max=model.num_train_timesteps - 1)
    unit = (model.spread().std * model.free(parts)).to(model.device)

    def lengths(part: list[tuple[int, int]]) -> torch.Tensor:
        stretches, images = (torch.tensor(list(column)) for column in zip(*part, strict=True))
        text = starts[images].to(model.device).requires_grad_(True)
        with torch.enable_grad():
            losses = model.denoising_loss(
                latents[images].to(model.device),
                noise[stretches, images].to(model.device),
                timesteps[stretches, images].to(model.device),
                text,
                pair_ids=None if pair_ids is None else [pair_ids[k] for _, k in part],
            )
            (gradient,) = torch.autograd.grad(LOSS_SCALE * losses.sum(), text)
        length: torch.Tensor = (unit * gradient / LOSS_SCALE).flatten(1).norm(dim=1)
        return length.double().cpu()

    asked = [(stretch, image) for stretch in range(BINS) for image in range(rows)]
    with model.frozen(), progress_bar("density of timesteps", len(asked)) as advance:
        found = map_batches(
            lengths, asked, at_once=rows, model=model, backoff=_MEMORY, advance=advance
        )
    slopes = torch.stack(found).view(BINS, rows).square().mean(1).sqrt()
    if not bool(slopes.isfinite().all()) or not float(slopes.sum()):
        slopes = torch.ones_like(slopes)  # such a search is marked by the solver
    return FLOOR / BINS + (1 - FLOOR) * slopes / slopes.sum()
