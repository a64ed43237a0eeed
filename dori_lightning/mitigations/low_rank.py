"""Low-rank updates of linear layers (LoRA), as parametrizations that are merged at the end.

Reference: Hu et al. (2022), https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from dori_lightning.attacks.draws import keyed_generator

__all__ = ["LowRank"]


class _Update(nn.Module):
    """Weight (O, I) plus ``up @ down``; ``up`` starts at zero, so nothing changes at first."""

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(torch.zeros(rows, rank).to(weight))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


class LowRank:
    """Low-rank updates of every linear layer of a module.

    The scale alpha / r of the paper is 1; the learning rate does what it would do.
    """

    def __init__(self, module: nn.Module, rank: int, *, seed: int = 0) -> None:
        """Parametrize the linear layers of ``module`` in place.

        Args:
            module: What gets updates.
            rank: Their rank; smaller layers get a smaller one.
            seed: Of the random factor.
        """
        self._layers = [
            (name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)
        ]
        for name, layer in self._layers:
            parametrize.register_parametrization(
                layer,
                "weight",
                _Update(
                    layer.weight,
                    min(rank, *layer.weight.shape),
                    keyed_generator("low_rank", seed, name),
                ),
            )

    @staticmethod
    def count(module: nn.Module, rank: int) -> int:
        """Weights that updates of ``module`` would have."""
        shapes = [m.weight.shape for m in module.modules() if isinstance(m, nn.Linear)]
        return sum(min(rank, *shape) * sum(shape) for shape in shapes)

    @staticmethod
    def trains(name: str) -> bool:
        """Whether the parameter of a name belongs to an update."""
        return name.endswith(("parametrizations.weight.0.up", "parametrizations.weight.0.down"))

    def merge(self) -> None:
        """Add the updates to the weights and leave plain linear layers; may be called again."""
        for _, layer in self._layers:
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
