"""Which neurons NeMo suspects: those far out of the ordinary, and the most active ones.

Reference: Finding NeMo (Hintersdorf et al., 2024), algorithm 2, https://arxiv.org/abs/2406.02366.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dori_lightning.mitigations.nemo_stages import Level

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dori_lightning.mitigations.activations import ActivationStatistics

__all__ = ["Schedule", "levels_of"]


@dataclass(frozen=True)
class Schedule:
    """How selection grows from level to level.

    Attributes:
        start_z: Neurons beyond this many standard deviations are selected first.
        z_step: How much lower the next level is.
        min_z: Levels are above it.
        start_k: How many of the most active neurons of every layer are selected first.
        k_step: How many more the next level has.
        two_sided: Whether activations below the mean count too.
    """

    start_z: float
    z_step: float
    min_z: float
    start_k: int
    k_step: int
    two_sided: bool

    def steps(self, widest: int) -> list[tuple[float, int]]:
        """The levels' (z, k).

        As released: a level is tried while z is above its floor and k below the widest layer's
        number of neurons; the first one always is.

        Args:
            widest: Neurons of the widest layer.
        """
        found = [(self.start_z, self.start_k)]
        while True:
            step = len(found)
            # not by repeated subtraction, which would drift off the floor
            z, k = self.start_z - step * self.z_step, self.start_k + step * self.k_step
            if z <= self.min_z + 1e-9 or k >= widest:
                return found
            found.append((z, k))


def levels_of(
    activations: Mapping[str, torch.Tensor],
    statistics: ActivationStatistics,
    schedule: Schedule,
) -> list[Level]:
    """A prompt's levels of selection.

    Within a layer, refinement's order is that of the released code with its duplicates left out:
    neurons beyond z by their number, then those among the k most active, most active first.

    Args:
        activations: Layer name to the prompt's activations (C,), in execution order.
        statistics: Of ordinary prompts.
        schedule: How selection grows.
    """
    scores = {
        name: statistics.z_scores(name, value, two_sided=schedule.two_sided)
        for name, value in activations.items()
    }
    # stable, so that equal activations keep their order on every machine
    ranks = {
        name: torch.sort(value, descending=True, stable=True).indices.tolist()
        for name, value in activations.items()
    }
    neurons = sum(len(value) for value in activations.values())
    found = []
    for z, k in schedule.steps(max(len(value) for value in activations.values())):
        layers, first = [], 0
        for name, score in scores.items():
            chosen = (score > z).nonzero().flatten().tolist()
            # a dict keeps the order and drops what is there already
            ordered = dict.fromkeys([*chosen, *ranks[name][:k]])
            layers.append(tuple(first + place for place in ordered))
            first += len(score)
        found.append(Level(z, k, tuple(layers), neurons))
    return found
