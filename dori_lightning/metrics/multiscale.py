"""Compare predicted noises at several scales: how NeMo sees that a prompt is memorized.

Where a prompt is memorized, the first noises that the model predicts carry one structure whatever
the latent they began from; where it is not, they differ.

Reference: Finding NeMo (Hintersdorf et al., 2024), section 3.1, https://arxiv.org/abs/2406.02366.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from dori_lightning.types import InputError

__all__ = ["MultiScaleSimilarity", "fitting", "noise_difference", "pairwise_similarity"]

BETA = 0.33
PUBLISHED_SCALES = 3
PUBLISHED_WINDOW = 11
COARSEST = 16
"""Side of the coarsest scale of a published latent: 64 halved twice."""


@dataclass(frozen=True)
class MultiScaleSimilarity:
    """MS-SSIM as NeMo's published numbers were computed.

    That is what torchmetrics before 1.5 returned: the border that windows reach over is left out
    at *every* scale. Since 1.5 the library keeps it at the last scale, which shifts all values and
    with them the published threshold of 0.428; here it is left out again.

    Attributes:
        scales: Scales; each halves the side of the one before.
        window: Side of the Gaussian window, odd; its standard deviation is 1.5 x window / 11.
    """

    scales: int = PUBLISHED_SCALES
    window: int = PUBLISHED_WINDOW

    def __post_init__(self) -> None:
        if self.scales < 1 or self.window < 3 or self.window % 2 == 0:
            raise InputError(
                f"the similarity of noises needs scales >= 1 and an odd window >= 3, got {self}"
            )

    def check(self, side: int) -> None:
        """Refuse maps that the coarsest window does not fit into.

        Args:
            side: Shorter side of the maps, in latent pixels.

        Raises:
            InputError: Says what would fit.
        """
        if side // 2 ** (self.scales - 1) < self.window:
            fits = fitting(side)
            raise InputError(
                f"{self.scales} scales with a window of {self.window} do not fit into a latent of "
                f"{side} pixels\n"
                f"  mend:  scales={fits.scales} window={fits.window}, or null to let them adapt"
            )

    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Similarity (N,) of maps with maps, in [0, 1], 1 where they are equal.

        The constants that steady the quotients follow from the range of values of the whole call,
        taken anew at every scale, as published. So what one row gives depends on the others: ask
        for what belongs together, and for nothing else, in one call.

        Args:
            first: Maps (N, C, h, w).
            second: Maps (N, C, h, w).
        """
        sigma, border = 1.5 * self.window / PUBLISHED_WINDOW, self.window // 2
        terms = []
        for scale in range(self.scales):
            last = scale == self.scales - 1
            _, term = structural_similarity_index_measure(
                first,
                second,
                sigma=sigma,
                kernel_size=self.window,
                reduction="none",
                return_full_image=last,
                return_contrast_sensitivity=not last,
            )
            if last:  # the contrast terms come without their border already
                term = term[..., border:-border, border:-border].flatten(1).mean(1)
            terms.append(torch.relu(term) ** BETA)
            if not last:
                first, second = F.avg_pool2d(first, 2), F.avg_pool2d(second, 2)
        return torch.stack(terms).prod(0)


def fitting(side: int) -> MultiScaleSimilarity:
    """As published for latents of 64 pixels and more; what fits into smaller ones.

    Scales are dropped until the coarsest side is that of the published one, 16 pixels, and the
    window is at most half of the coarsest side: 2 scales at 32 pixels, 1 at 16, both with a window
    of 7, and 3 at 8 pixels. The published window would fit into 16 pixels too, but without its
    border a latent of that size would be judged by its central 6 x 6 pixels alone.

    Args:
        side: Shorter side of the latents, in latent pixels.
    """
    if side >= COARSEST * 2 ** (PUBLISHED_SCALES - 1):
        return MultiScaleSimilarity()
    scales = 2 if side >= 2 * COARSEST else 1
    half = side // 2**scales
    return MultiScaleSimilarity(
        scales, max(3, min(PUBLISHED_WINDOW, half if half % 2 else half - 1))
    )


def noise_difference(noise: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """What the model changes in a latent, each sample and channel scaled to [0, 1].

    A channel in which nothing differs becomes zero.

    Args:
        noise: Predicted noise (N, C, h, w).
        latents: The latents it was predicted from (N, C, h, w).
    """
    difference = noise - latents
    low = difference.amin(dim=(-2, -1), keepdim=True)
    width = difference.amax(dim=(-2, -1), keepdim=True) - low
    return (difference - low) / torch.where(width > 0, width, torch.ones_like(width))


def pairwise_similarity(
    differences: torch.Tensor, similarity: MultiScaleSimilarity
) -> torch.Tensor:
    """Similarity of every sample with every other one, (N, N); the diagonal is zero.

    Args:
        differences: Noise differences (N, C, h, w) of one prompt.
        similarity: How two of them are compared; all pairs share one range of values.
    """
    count = len(differences)
    first, second = torch.triu_indices(count, count, offset=1).unbind(0)
    matrix = differences.new_zeros(count, count)
    if count > 1:
        matrix[first, second] = similarity(differences[first], differences[second])
    return matrix + matrix.T
