"""Initial noise: the starting noise from which the fixed prompt leads to the image.

Any image has some noise from which a deterministic sampler draws it: noise has as many numbers as
the image's latent and can carry the image by itself. So the noise has to stay what a sampler would
draw. It moves within a ball around a drawn start, in each band of spatial frequencies alike, and
keeps the start's energy in each: its norm and its power spectrum stay those of white noise, and
slow waves, which become an image's outlines, take no more of the movement than others. Images are
then drawn from small perturbations of the noise that was found, not from itself. What can be
painted all the same, controls tell.

References: *Adjusting initial noise to mitigate memorization* (2510.08625) and SAIL (Jeon et al.,
ICML 2025), which choose the noise against memorization; IVO (2602.00175), which revives content by
it, through the noise predictions of the original model, where this looks at the image.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from dori_lightning.attacks.solver import LOSS_SCALE, RowAdam
from dori_lightning.certify.base import (
    AttackBase,
    Attempt,
    Holds,
    Plan,
    Subject,
    deterministic,
)
from dori_lightning.models.memory import pairs_at_once
from dori_lightning.runtime import distributed
from dori_lightning.runtime.batching import OomBackoff, map_batches
from dori_lightning.types import Pair, require, require_at_least_one

_MEMORY = OomBackoff(
    "initial noise",
    "pair",
    "checkpoint.precision=bf16, checkpoint.gradient_checkpointing=true, "
    "certify.attacks.initial_noise.through=1, or a device with more memory",
)


@dataclass(frozen=True)
class InitialNoise(AttackBase):
    """Search the starting noise near a drawn one; the prompt stays the image's own.

    The loss is the distance of the image's latent to the clean latent that the model predicts in
    the last of the sampler's first steps, through all of which it is differentiated.

    Attributes:
        radii: Distances to the start, relative to its norm, rising, in (0, 2); each goes on from
            where the last one ended.
        steps: Adam's steps for each radius.
        lr: Adam's learning rate, in standard deviations of the noise.
        through: Sampling steps that the loss goes through.
        perturbation: Relative size of the noise that is added to what was found, before images are
            drawn from it; >= 0.
        images: Images for each level.
    """

    name: str = "initial_noise"
    radii: tuple[float, ...] = (0.1, 0.2, 0.3)
    steps: int = 20
    lr: float = 0.05
    through: int = 2
    perturbation: float = 0.1
    images: int = 4
    holds: Holds = field(default="noise", init=False)

    def __post_init__(self) -> None:
        place = f"certify.attacks.{self.name}."
        radii = tuple(float(radius) for radius in self.radii)
        object.__setattr__(self, "radii", radii)
        rising = sorted({radius for radius in radii if 0 < radius < 2})
        good = bool(radii) and list(radii) == rising
        require(good, f"{place}radii must rise within (0, 2)", list(radii))
        require_at_least_one(self, "steps", "through", "images", within=place)
        require(0 < self.lr < math.inf, f"{place}lr must be a positive number", self.lr)
        small = 0 <= self.perturbation < 1
        require(small, f"{place}perturbation must lie in [0, 1)", self.perturbation)

    def rows(self, plan: Plan) -> int:
        """For each radius its steps, and the images."""
        sampling = plan.sampling
        return len(self.radii) * self._rows(sampling.steps, sampling.rows_per_step)

    def _rows(self, steps: int, each: int) -> int:
        """Rows of one level, given the sampler's steps and its rows in each."""
        return (self.steps * min(self.through, steps) + self.images * steps) * each

    def run(self, subject: Subject, pairs: Sequence[Pair], attempt: Attempt) -> None:
        """Search in growing balls, and draw from the surroundings of what was found."""
        del pairs
        search: _Search | None = None
        for place, radius in enumerate(self.radii, 1):
            level = f"{place * self.steps} steps within {radius:g} of drawn noise"
            left = attempt.left(level)
            if not left:
                return
            search = search or _Search(self, subject, left)
            around = subject.noise_of(left, self.images, "initial_noise", "around", level)
            with subject.carried():
                found = search.advance(left, radius)
                noise = {
                    name: torch.stack(
                        [
                            search.perturbed(name, found[name], self.perturbation * drawn)
                            for drawn in own
                        ]
                    )
                    for name, own in around.items()
                }
                images = subject.draw(subject.prompts(left), noise=noise)
            sampling = subject.sampling
            rows = self._rows(sampling.steps, sampling.rows_per_step)
            attempt.add(level, images, rows=rows)


class _Search:
    """Searches of several pairs, which share passes and nothing else."""

    def __init__(self, method: InitialNoise, subject: Subject, pairs: Sequence[Pair]) -> None:
        """Begin at drawn noise.

        Args:
            method: Settings.
            subject: The model.
            pairs: Pairs, of which later calls may leave some out.
        """
        self.method, self.subject = method, subject
        model, sampling = subject.model, subject.sampling
        drawn = subject.noise_of(pairs, 1, "initial_noise")
        self.starts = {name: on_sphere(noise[0]) for name, noise in drawn.items()}
        self.places = {name: place for place, name in enumerate(drawn)}
        self.x = torch.stack(list(self.starts.values())).to(model.device)
        self.optimizer = RowAdam(self.x, lr=method.lr)
        self.targets = subject.latents(pairs).to(model.device)
        prompts = subject.prompts(pairs)
        self.prompts = torch.stack([prompts[pair.id] for pair in pairs]).to(model.device)
        self.times = model.sampling_timesteps(sampling)[: method.through]
        self.bands = frequency_bands(model.latent_shape[-2:])

    def advance(self, pairs: Sequence[Pair], radius: float) -> dict[str, torch.Tensor]:
        """Go on with some pairs, in a ball around each one's start; the model carries its edit.

        Returns:
            Pair id to noise (C, h, w), on the CPU.
        """
        names, model = [pair.id for pair in pairs], self.subject.model
        rows = [self.places[name] for name in names]
        active = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)
        active[rows] = True
        for _ in range(self.method.steps):
            distributed.check()
            gradient = torch.zeros_like(self.x)
            with model.frozen():
                found = map_batches(
                    self._gradients,
                    list(zip(rows, names, strict=True)),
                    at_once=pairs_at_once(model),
                    model=model,
                    backoff=_MEMORY,
                )
            # where it is not finite, the noise stays where it is
            gradient[rows] = torch.stack(found).nan_to_num(0.0, 0.0, 0.0)
            moved = self.optimizer.step(self.x, gradient, active).cpu()
            for name, row in zip(names, rows, strict=True):
                near = project(moved[row], self.starts[name], radius, self.bands)
                self.x[row] = near.to(self.x)
        return {name: self.x[row].cpu() for name, row in zip(names, rows, strict=True)}

    def perturbed(self, name: str, found: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """Noise (C, h, w) with some added, of the energy in each band that its start has."""
        return project(found + added, self.starts[name], 2.0, self.bands)

    def _gradients(self, batch: list[tuple[int, str]]) -> Iterable[torch.Tensor]:
        """Gradients (C, h, w) of the distance to each image; rows with their pair ids."""
        model, rows = self.subject.model, [row for row, _ in batch]
        x = self.x[rows].detach().requires_grad_(True)
        with torch.enable_grad():
            clean = deterministic(
                model,
                x,
                self.times,
                self.prompts[rows],
                guidance=self.subject.sampling.guidance,
                pair_ids=[name for _, name in batch],
            )
            loss = (clean - self.targets[rows]).square().flatten(1).mean(1)
            (gradient,) = torch.autograd.grad(LOSS_SCALE * loss.sum(), x)
        return list(gradient / LOSS_SCALE)


def on_sphere(noise: torch.Tensor) -> torch.Tensor:
    """Noise (C, h, w) scaled to the norm that white noise has on average, sqrt(C h w)."""
    found: torch.Tensor = noise * (math.sqrt(noise.numel()) / noise.norm())
    return found


def frequency_bands(sides: Sequence[int]) -> torch.Tensor:
    """Octaves of spatial frequency, (B, h, w) bool in the order of ``torch.fft.fft2``.

    The slowest waves, of up to two periods over the shorter side, are a band; the last one begins
    at a quarter of a period a cell. Every cell lies in one band.

    Args:
        sides: h and w.
    """
    rows, columns = (torch.fft.fftfreq(side) for side in sides)
    frequency = torch.hypot(rows[:, None], columns[None, :])
    edges, edge = [math.inf], 0.25
    while edge >= 2 / min(sides):
        edges.append(edge)
        edge /= 2
    edges = [*reversed(edges)]
    lower = [-1.0, *edges[:-1]]
    return torch.stack(
        [(frequency > low) & (frequency <= high) for low, high in zip(lower, edges, strict=True)]
    )


def project(
    noise: torch.Tensor, start: torch.Tensor, radius: float, bands: torch.Tensor
) -> torch.Tensor:
    """Noise with the start's energy in each band, within a distance of it there.

    In each band what is left is the nearest point of a sphere's cap: ``|x| = |start|`` and
    ``|x - start| <= radius |start|``. The same then holds for the whole.

    Args:
        noise: Noise (C, h, w).
        start: White noise (C, h, w).
        radius: Relative distance, in (0, 2]; 2 is the whole sphere.
        bands: As ``frequency_bands`` gives them.
    """
    moved, own = torch.fft.fft2(noise, norm="ortho"), torch.fft.fft2(start, norm="ortho")
    widest, result = 2 * math.asin(radius / 2), torch.zeros_like(own)
    for band in bands:
        size = (own * band).norm().clamp_min(torch.finfo(noise.dtype).tiny)
        axis = own * band / size
        along = torch.vdot(axis.flatten(), (moved * band).flatten()).real
        across = moved * band - along * axis
        length = across.norm()
        angle = torch.atan2(length, along).clamp_max(widest)
        aside = across / length.clamp_min(torch.finfo(noise.dtype).tiny)
        result += size * (angle.cos() * axis + angle.sin() * aside)
    found: torch.Tensor = torch.fft.ifft2(result, norm="ortho").real
    return found
