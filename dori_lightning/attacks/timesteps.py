"""Which timesteps the noise samples of an attack's steps look at.

A step's loss is a mean over a few noise samples, each at a timestep of its own. The published
attack draws them uniformly. Two other ways estimate the same loss from as many samples:

- stratified: one sample from each of equal strata of the schedule, so that no step sees one end
  of it alone (Cochran, Sampling Techniques, 1977, chapter 5);
- importance: a sample from each of strata of equal probability under a density that is high where
  the text matters, with the loss weighted by the inverse of that density, so that its mean is the
  same. Proportional to the root mean square of the gradient by the text, that density gives the
  gradient the least variance (Katharopoulos & Fleuret, 2018, https://arxiv.org/abs/1803.00942).

A range ``[low, high]`` of the schedule is another loss: what lies outside is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

from dori_lightning.types import require

Choice = Literal["uniform", "stratified", "importance"]
Timesteps: TypeAlias = Choice | tuple[float, float]
"""A name, or the lowest and highest share of the schedule, from clean (0) to noise (1)."""

BINS = 20
"""Equal stretches of the schedule, in each of which a density is constant."""

FLOOR = 0.2
"""Share of a density that is uniform: no sample weighs more than its inverse."""


def require_timesteps(chosen: object) -> None:
    """Refuse what is no choice of timesteps.

    Raises:
        InputError: Names the setting and what it may be.
    """
    rule = (
        "attack.timesteps must be "
        + ", ".join(get_args(Choice))
        + (", or two rising shares of the schedule such as [0.2,0.6]")
    )
    if isinstance(chosen, tuple):
        numbers = [share for share in chosen if isinstance(share, int | float)]
        good = len(numbers) == len(chosen) == 2 and 0 <= numbers[0] < numbers[1] <= 1
        require(good, rule, list(chosen))
    else:
        require(chosen in get_args(Choice), rule, repr(chosen))


@dataclass(frozen=True)
class TimestepDraws:
    """Draws timesteps of a schedule, or of a stretch of it.

    Attributes:
        first: The first timestep.
        last: The one after the last.
        chosen: How they are drawn.
        density: Probability of each of `BINS` equal stretches (BINS,), float64; for ``importance``
            (``model_check.text_density``).
    """

    first: int
    last: int
    chosen: Timesteps = "uniform"
    density: torch.Tensor | None = None

    def draw(
        self, samples: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Timesteps (B,) of B noise samples, and the weights (B,) of their losses.

        Weights are fp32 and average to one over many draws; None where each is one.
        """
        if self.chosen == "uniform":
            return torch.randint(self.first, self.last, (samples,), generator=generator), None
        uniform = torch.rand(samples, generator=generator, dtype=torch.float64)
        if isinstance(self.chosen, tuple):
            low, high = self.chosen
            return self._timesteps(low + (high - low) * uniform), None
        strata = (torch.arange(samples) + uniform) / samples
        if self.chosen == "stratified":
            return self._timesteps(strata), None
        if self.density is None:
            raise ValueError("importance needs a density")
        ends = self.density.cumsum(0)
        stretch = torch.searchsorted(ends, strata, right=True).clamp(max=BINS - 1)
        likely = self.density[stretch]
        within = ((strata - (ends[stretch] - likely)) / likely).clamp(0, 1)
        return self._timesteps((stretch + within) / BINS), (1 / (BINS * likely)).float()

    def _timesteps(self, shares: torch.Tensor) -> torch.Tensor:
        count = self.last - self.first
        return self.first + (shares * count).long().clamp(max=count - 1)
