"""Losses and gradients of data unlearning: what SISS and the baselines of its paper differ in.

Reference: Data Unlearning in Diffusion Models (Alberti et al., ICLR 2025),
https://openreview.net/forum?id=SuHScQv5gP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dori_lightning.models.protocol import TextToImage

__all__ = ["VARIANTS", "Draws", "Variant", "combined", "importance_weights", "length", "losses"]

Variant = Literal["siss", "no_importance", "erase_diff", "neg_grad"]
VARIANTS: tuple[Variant, ...] = ("siss", "no_importance", "erase_diff", "neg_grad")


@dataclass(frozen=True)
class Draws:
    """What one step is trained on.

    Attributes:
        kept: Latents to keep (N, C, h, w).
        forgotten: Latents to forget (N, C, h, w).
        prompts: Text embeddings (N, T, D).
        noise: Standard normal noise (N, C, h, w).
        uniform: Noise (N, C, h, w), uniform in [0, 1).
        timesteps: Timesteps (N,).
        forgets: Which elements of the mixture are of those to forget (N,).
    """

    kept: torch.Tensor
    forgotten: torch.Tensor
    prompts: torch.Tensor
    noise: torch.Tensor
    uniform: torch.Tensor
    timesteps: torch.Tensor
    forgets: torch.Tensor

    def __len__(self) -> int:
        return len(self.kept)

    def to(self, device: torch.device) -> Draws:
        """Move all tensors."""
        return Draws(**{item.name: getattr(self, item.name).to(device) for item in fields(self)})

    def split(self, size: int) -> Iterator[Draws]:
        """Parts of at most ``size`` elements."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def take(self, rows: slice) -> Draws:
        """Some of the elements."""
        return Draws(**{item.name: getattr(self, item.name)[rows] for item in fields(self)})


def importance_weights(excess: torch.Tensor, mixture: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Densities of a noised latent under keep and forget, over that under their mixture.

    w_x = 1 / ((1 - l) + l exp(d)) and w_a = 1 / ((1 - l) exp(-d) + l), as sigmoids, which do not
    overflow where the noise is small.

    Args:
        excess: d = d_x - d_a (N,), by how much the latent is further from the picture to keep
            than from that to forget, in half squared standard deviations of the noise.
        mixture: l, the share of pictures to forget, in (0, 1).

    Returns:
        w_x (N,) in [0, 1 / (1 - l)] and w_a (N,) in [0, 1 / l].
    """
    odds = excess + math.log(mixture / (1 - mixture))
    return torch.sigmoid(-odds) / (1 - mixture), torch.sigmoid(odds) / mixture


def losses(
    model: TextToImage,
    draws: Draws,
    *,
    variant: Literal["naive"] | Variant,
    mixture: float = 0.5,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Keep and forget loss, summed over elements and pixels; None where a variant has none.

    Args:
        model: Predicts noise.
        draws: N elements.
        variant: One of ``VARIANTS``, or ``naive``: the ordinary loss of what is kept.
        mixture: Share of pictures to forget, for ``siss``.
    """
    alpha = model.alphas_cumprod[draws.timesteps][:, None, None, None]
    if variant == "siss":
        scale, spread = alpha.sqrt(), (1 - alpha).sqrt()
        latents = torch.where(draws.forgets[:, None, None, None], draws.forgotten, draws.kept)
        noised = model.noised(latents, draws.noise, draws.timesteps)
        to_kept = (noised - scale * draws.kept) / spread
        to_forgotten = (noised - scale * draws.forgotten) / spread
        # the difference of squares, factored: both alone are as large as the picture
        excess = ((to_kept - to_forgotten) * (to_kept + to_forgotten)).flatten(1).sum(1) / 2
        weights = importance_weights(excess, mixture)
        predicted = model.predict_noise(noised, draws.timesteps, draws.prompts)
        return (
            (weights[0] * _squares(predicted, to_kept)).sum(),
            (weights[1] * _squares(predicted, to_forgotten)).sum(),
        )
    keep = forget = None
    if variant != "neg_grad":
        noised = model.noised(draws.kept, draws.noise, draws.timesteps)
        predicted = model.predict_noise(noised, draws.timesteps, draws.prompts)
        keep = _squares(predicted, draws.noise).sum()
    if variant != "naive":
        noised = model.noised(draws.forgotten, draws.noise, draws.timesteps)
        predicted = model.predict_noise(noised, draws.timesteps, draws.prompts)
        wanted = draws.uniform if variant == "erase_diff" else draws.noise
        forget = _squares(predicted, wanted).sum()
    return keep, forget


def _squares(predicted: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared error (N,), summed over pixels."""
    return ((predicted - wanted) ** 2).flatten(1).sum(1)


def length(gradient: Sequence[torch.Tensor]) -> torch.Tensor:
    """Euclidean length of a gradient over all weights."""
    return torch.nn.utils.get_total_norm(gradient)


def combined(
    keep: Sequence[torch.Tensor],
    forget: Sequence[torch.Tensor],
    *,
    variant: Variant,
    scaling_norm: float = 0.0,
    eta: float = 0.0,
) -> list[torch.Tensor]:
    """Gradient to descend along.

    Args:
        keep: Gradient of the keep loss, one tensor for each weight.
        forget: Gradient of the forget loss.
        variant: How they are combined: ``siss`` and ``no_importance`` subtract the forget
            gradient at length ``scaling_norm`` (and nothing where it is zero: the importance
            weights of a whole batch may vanish); ``erase_diff`` adds it, at least ``eta`` times
            and as often as it takes to descend; ``neg_grad`` climbs it.
        scaling_norm: Length.
        eta: Factor.
    """
    if variant == "neg_grad":
        return [-g for g in forget]
    size = length(forget)
    if float(size) == 0.0:
        return list(keep)
    if variant == "erase_diff":
        product = torch.stack([(x * a).sum() for x, a in zip(keep, forget, strict=True)]).sum()
        factor = (eta - product / size**2).clamp_min(0)
    else:
        factor = -scaling_norm / size
    return [x + factor * a for x, a in zip(keep, forget, strict=True)]
