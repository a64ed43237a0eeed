"""The way from noise to image: guidance, sampler, fresh noise, more noise than usual.

An image that one sampler does not reach may lie on another's way. Whoever can call the model with
the training prompt can choose all of these; nothing is searched, and no gradient is needed.

Reference: *When Are Concepts Erased?* (2505.17013), section on noise-scaled trajectories; guided
intervals: Kynkäänniemi et al., *Applying guidance in a limited interval* (2404.07724).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf

import torch

from dori_lightning.certify.base import (
    AttackBase,
    Attempt,
    Holds,
    Plan,
    Subject,
    deterministic,
)
from dori_lightning.models.loading import FAMILIES
from dori_lightning.models.protocol import Sampler, Sampling
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import InputError, Pair, require, require_at_least_one


@dataclass(frozen=True)
class Way:
    """How a level draws.

    Attributes:
        level: What a report calls it.
        sampling: Sampler, steps and guidance, by the model's own sampler.
        guidance: Guidance of each step; None for the sampler's.
        scale: Factor of the starting noise.
        fresh: Factor of fresh noise at each step; None for none. It is of unit size at 1.
    """

    level: str
    sampling: Sampling
    guidance: tuple[float, ...] | None = None
    scale: float = 1.0
    fresh: float | None = None

    @property
    def rows(self) -> int:
        """Rows through the denoiser that an image takes."""
        sampling = self.sampling
        each = self.guidance or (sampling.guidance,) * sampling.steps
        return sum(1 if scale == 1 else 2 for scale in each)


@dataclass(frozen=True)
class Trajectory(AttackBase):
    """Draw from each image's own prompt in other ways than the usual one.

    Models that were distilled from a guided one are told their usual guidance by their samplers,
    and none (that of losses) where guidance or noise differs from step to step.

    Attributes:
        guidance: Guidance scales, >= 0; 1 is without guidance.
        samplers: Whether the family's other samplers are tried, with as many steps.
        fresh: Factors, > 0, of fresh noise at each step (stochastic sampling, DDIM with eta = 1);
            above 1 more noise is added than the schedule says.
        intervals: Guidance scales that hold in the noisy half of the steps, then in the clean
            half, while the other half is without guidance.
        scales: Factors of the starting noise, > 0.
        images: Images for each level.
    """

    name: str = "trajectory"
    guidance: tuple[float, ...] = (1.0, 4.0, 7.5, 15.0)
    samplers: bool = True
    fresh: tuple[float, ...] = (1.0, 1.05)
    intervals: tuple[float, ...] = (7.5,)
    scales: tuple[float, ...] = (1.1, 1.2)
    images: int = 4
    gradient_free: bool = field(default=True, init=False)
    holds: Holds = field(default="prompt", init=False)

    def __post_init__(self) -> None:
        place = f"certify.attacks.{self.name}."
        for name in ("guidance", "fresh", "intervals", "scales"):
            values = tuple(float(value) for value in getattr(self, name))
            object.__setattr__(self, name, values)
            least = 0.0 if name in ("guidance", "intervals") else 1e-6
            good = all(least <= value < inf for value in values)
            rule = "numbers >= 0" if least == 0 else "positive numbers"
            require(good, f"{place}{name} must be {rule}", list(values))
            once = len(set(values)) == len(values)
            require(once, f"{place}{name} must not repeat a number", list(values))
        require_at_least_one(self, "images", within=place)

    def check(self, plan: Plan) -> None:
        """Refuse to draw in no way at all."""
        if not list(self._ways(plan.sampling, _samplers(plan.family))):
            raise InputError(
                f"attack {self.name} has no level",
                where=f"certify.attacks.{self.name}",
                fix=f"such as certify.attacks.{self.name}.guidance=[4,15], or leave {self.name} "
                f"out of certify.paths",
            )

    def rows(self, plan: Plan) -> int:
        """K images in each way."""
        ways = self._ways(plan.sampling, _samplers(plan.family))
        return self.images * sum(way.rows for way in ways)

    def _ways(self, usual: Sampling, samplers: Sequence[Sampler]) -> Iterator[Way]:
        """Every level, from what a model is made for to what it is not."""
        own, steps = usual.guidance, usual.steps
        for scale in self.guidance:
            yield Way(f"guidance {scale:g}", replace(usual, guidance=scale))
        for sampler in samplers if self.samplers else ():
            if sampler != usual.sampler:
                yield Way(f"sampler {sampler}", replace(usual, sampler=sampler))
        for factor in self.fresh:
            more = "" if factor == 1 else f" times {factor:g}"
            yield Way(f"fresh noise{more} at each step", usual, (own,) * steps, fresh=factor)
        noisy = (steps + 1) // 2
        for scale in self.intervals:
            first = (scale,) * noisy + (1.0,) * (steps - noisy)
            second = (1.0,) * noisy + (scale,) * (steps - noisy)
            yield Way(f"guidance {scale:g} in the noisy half alone", usual, first)
            yield Way(f"guidance {scale:g} in the clean half alone", usual, second)
        for factor in self.scales:
            yield Way(f"starting noise times {factor:g}", usual, scale=factor)

    def run(self, subject: Subject, pairs: Sequence[Pair], attempt: Attempt) -> None:
        """Draw K images of each pair in every way."""
        del pairs
        for way in self._ways(subject.sampling, subject.model.samplers):
            left = attempt.left(way.level)
            if left:
                with subject.carried():
                    images = self._draw(subject, left, way)
                attempt.add(way.level, images, rows=self.images * way.rows)

    def _draw(self, subject: Subject, pairs: Sequence[Pair], way: Way) -> dict[str, torch.Tensor]:
        """Images (K, 3, H, W) of pairs; their noise is each level's and pair's own."""
        model, seed = subject.model, subject.context.seed
        noise = subject.noise_of(pairs, self.images, "trajectory", way.level)
        noise = {name: way.scale * starts for name, starts in noise.items()}
        where = subject.prompts(pairs)
        if way.guidance is None:
            return subject.draw(where, noise=noise, sampling=way.sampling)
        times, guidance = model.sampling_timesteps(way.sampling), way.guidance

        def sample(
            embeddings: torch.Tensor, starts: torch.Tensor, ids: list[str], places: list[int]
        ) -> torch.Tensor:
            def fresh(step: int) -> torch.Tensor:
                drawn = [
                    torch.randn(
                        model.latent_shape,
                        generator=keyed_generator("trajectory", way.level, seed, name, k, step),
                    )
                    for name, k in zip(ids, places, strict=True)
                ]
                return (way.fresh or 1.0) * torch.stack(drawn).to(starts.device)

            return deterministic(
                model,
                starts,
                times,
                embeddings,
                guidance=guidance,
                pair_ids=ids,
                fresh=None if way.fresh is None else fresh,
            )

        return subject.draw(where, noise=noise, sampling=way.sampling, sample=sample)


def _samplers(family: str) -> Sequence[Sampler]:
    """Samplers of a family's checkpoints; loading refuses a family that there is not."""
    kind = FAMILIES.get(family)
    return () if kind is None else tuple(kind.family.samplers)
