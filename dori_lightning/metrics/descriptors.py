"""Image descriptors: turn images into features and compare them.

All of them answer in [-1, 1], higher is closer, so that thresholds, tables and calibration need
not know which one is at work. Features live on the CPU: there the order of a sum never depends on
how many images came along, so a pair's similarity is the same in any batch, on any rank.

The structural descriptors of this file compare pixels: nothing to download, nothing learned. They
see a copy at the same place and scale, which is what a memorizing diffusion model draws; they do
not see crops, flips or rotations. Which of them decides is a matter of measurement on the
checkpoint and list at hand, see ``calibration.separation_table``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import product
from typing import Literal

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from dori_lightning.runtime.batching import fixed_batches

CHUNK_IMAGES = 8
"""Images that are scaled down at once."""

CHUNK_VALUES = 4_000_000
"""Products that exist at once while all pairs are compared: 32 MB of float64."""

FLAT = 1e-3
"""Standard deviation, a quarter of a grey level, under which nothing is left to correlate."""

FAINT = 0.2
"""Detail, in units of its noise floor, that a whole image needs to resemble anything fully."""

CHUNK_PAIRS = 16
"""Pairs whose SSIM maps exist at once; more fall out of the processor's cache."""

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Descriptor(ABC):
    """Says how much two images resemble each other, whoever else is in the batch.

    Attributes:
        name: Key of its similarities in an ``Outcome``.
        threshold: Similarity above which an image counts as a replica: published, or fixed by the
            user; None where it must be calibrated on the list of pairs (see
            ``calibration.calibrate``).
    """

    name: str

    def __init__(self, *, threshold: float | None = None) -> None:
        """Take a fixed threshold in [-1, 1]; None calibrates it."""
        self.threshold = threshold

    @abstractmethod
    def describe(self, images: Tensor) -> Tensor:
        """Turn images into features; references are described once for all conditions.

        Args:
            images: Images, (N, 3, H, W), floating, in [0, 1]. An image with NaN gets features
                of NaN.

        Returns:
            Features, (N, F) fp32 on the CPU; unit rows where ``compare`` is the dot product.

        Raises:
            ValueError: Wrong shape, type or range.
        """

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare all features of generated images with all of references.

        Args:
            a: Features of generated images, (N, F), by ``describe``.
            b: Features of references, (M, F), by ``describe``.

        Returns:
            (N, M) fp32 in [-1, 1], on the CPU.
        """
        return all_pairs_dot(a, b)

    def similarity(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare all generated images with all references.

        Args:
            a: Generated images, (N, 3, H, W), in [0, 1].
            b: Originals, (M, 3, H, W), in [0, 1].

        Returns:
            (N, M) fp32 in [-1, 1], on the CPU.

        Raises:
            ValueError: Wrong shape, type or range.
        """
        return self.compare(self.describe(a), self.describe(b))


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of images; NaN passes and spoils its own row only.

    Raises:
        ValueError: Not (N, 3, H, W), not floating, or values outside [0, 1]; says what was found.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating (N, 3, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    if bool(((images < -1e-3) | (images > 1 + 1e-3)).any()):
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"images must lie in [0, 1], got values from {low:.3g} to {high:.3g}")


def _box_average(images: Tensor, size: int, axis: int) -> Tensor:
    """Average along an axis over ``size`` equal boxes, pixels that two boxes share being split.

    Whole-pixel boxes would sample a ramp unevenly, in the same way for all images: a likeness.
    """
    length = images.shape[axis]
    edges = torch.arange(size + 1, dtype=images.dtype) * length / size
    pixel = edges.long().clamp_max(length - 1)
    share = (edges - pixel).reshape(
        [-1 if k == axis % images.ndim else 1 for k in range(images.ndim)]
    )
    before = images.cumsum(axis).index_select(axis, pixel) - images.index_select(axis, pixel)
    integral = before + share * images.index_select(axis, pixel)
    return integral.diff(dim=axis) * (size / length)


@torch.no_grad()
def thumbnails(images: Tensor, size: int) -> Tensor:
    """Average images down to squares of luminance.

    Args:
        images: Images, (N, 3, H, W), in [0, 1], on any device.
        size: Side of the squares in pixels; aspect ratios are not kept.

    Returns:
        (N, 1, size, size) float64 on the CPU, in [0, 1].

    Raises:
        ValueError: Wrong shape, type or range.
    """
    check_images(images)
    small = []
    for chunk in torch.split(images, CHUNK_IMAGES):
        red, green, blue = chunk.cpu().double().unbind(1)
        grey = (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).unsqueeze(1)
        small.append(_box_average(_box_average(grey, size, -1), size, -2))
    return torch.cat(small)


def gaussian_taps(window: int, sigma: float) -> Tensor:
    """Weights of a Gaussian with ``sigma`` pixels, (window,) float64, summing to 1."""
    offsets = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def blur(
    images: Tensor, taps: Tensor, *, border: Literal["mirror", "continue"] = "mirror"
) -> Tensor:
    """Smooth images with separable taps.

    Written as shifted sums: a convolution may pick another algorithm for another batch size.

    Args:
        images: (N, C, H, W).
        taps: Weights, an odd number of them, less than twice H and W.
        border: What lies outside: ``mirror`` stays in the image's range; ``continue`` mirrors
            around the border pixel's value too, so that a ramp goes on as a ramp.

    Returns:
        (N, C, H, W).
    """
    reach = len(taps) // 2
    for axis in (-1, -2):
        size = images.shape[axis]
        before = images.narrow(axis, 1, reach).flip(axis)
        after = images.narrow(axis, size - 1 - reach, reach).flip(axis)
        if border == "continue":
            before = 2 * images.narrow(axis, 0, 1) - before
            after = 2 * images.narrow(axis, size - 1, 1) - after
        padded = torch.cat([before, images, after], axis)
        smooth = torch.zeros_like(images)
        for k, tap in enumerate(taps.tolist()):
            smooth = smooth + tap * padded.narrow(axis, k, size)
        images = smooth
    return images


def unit_rows(fields: Tensor, *, centred: bool, floor: float = FLAT) -> Tensor:
    """Flatten to rows of length 1, so that a dot product is a correlation (centred) or a cosine.

    Rows whose root mean square is below ``floor`` shrink towards 0 instead of blowing up their
    noise: a flat image resembles nothing, itself included.

    Args:
        fields: (N, ...), float64.
        centred: Subtract each row's mean first.
        floor: Root mean square, in units of the fields, that counts as nothing.

    Returns:
        (N, F) fp32.
    """
    rows = fields.flatten(1)
    if centred:
        rows = rows - rows.mean(1, keepdim=True)
    norm = rows.square().sum(1, keepdim=True).sqrt()
    return (rows / norm.clamp_min(floor * math.sqrt(rows.shape[1]))).float()


@torch.no_grad()
def in_fixed_batches(network: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """Rows of a network's output, on the CPU each the same in any company.

    On some CPUs the position in a batch counts (convolutions of large strides), so images go one
    by one there; a batch would gain little. On an accelerator all batches have one shape, by which
    kernels are chosen, and a row may still differ by rounding from place to place.

    Args:
        network: Takes (B, ...) inputs, returns one row for each.
        images: N inputs (N, ...), N >= 1.
        size: Images in a batch on an accelerator.

    Returns:
        (N, ...) on the CPU.
    """
    size = 1 if images.device.type == "cpu" else size
    return torch.cat(
        [
            network(torch.stack(batch))[:valid].cpu()
            for batch, valid in fixed_batches(list(images), size)
        ]
    )


@torch.no_grad()
def all_pairs_dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of all rows of (N, F) with all rows of (M, F): (N, M) fp32, clamped to [-1, 1].

    Not a matrix product: its summation order changes with N and M.
    """
    a, b = a.cpu().double(), b.cpu().double()
    step = max(1, CHUNK_VALUES // max(1, b.numel()))
    rows = [(chunk[:, None] * b[None]).sum(-1) for chunk in torch.split(a, step)]
    return torch.cat(rows).float().clamp(-1, 1)


class NormalizedCorrelation(Descriptor):
    """Correlate whole thumbnails: blind to brightness, contrast and blur.

    Two images of low frequency (a sky over a ground) also correlate, copies or not.

    Reference: zero-normalised cross-correlation, e.g. Lewis, "Fast normalized cross-correlation",
        1995.
    """

    name = "normalized_correlation"
    size = 32
    """Side of the thumbnail in pixels."""

    def describe(self, images: Tensor) -> Tensor:
        """Centred, unit thumbnails, (N, size**2); see ``Descriptor.describe``."""
        return unit_rows(thumbnails(images, self.size), centred=True)


class LocalCorrelation(Descriptor):
    """Correlate luminance without local mean and contrast: smooth gradients no longer look alike.

    Each pixel becomes ``(x - mean) / sqrt(variance + noise**2)`` over a Gaussian window. The noise
    floor keeps flat areas flat: without it their noise would be blown up to the height of real
    structure.

    Reference: local contrast normalisation, Jarrett et al., "What is the best multi-stage
        architecture for object recognition?", ICCV 2009.
    """

    name = "local_correlation"
    size = 20
    """Side of the thumbnail in pixels."""

    window = 7
    """Width of the window in thumbnail pixels; the Gaussian's sigma is a quarter of it."""

    noise = 0.03
    """Contrast, as a share of the range [0, 1], that counts as noise."""

    def describe(self, images: Tensor) -> Tensor:
        """Locally normalised unit thumbnails, (N, size**2); see ``Descriptor.describe``."""
        grey = thumbnails(images, self.size)
        taps = gaussian_taps(self.window, self.window / 4)
        # Mirrored borders would give every ramp the same two edges, and thus all ramps a likeness.
        detail = grey - blur(grey, taps, border="continue")
        contrast = (blur(detail.square(), taps) + self.noise**2).sqrt()
        return unit_rows(detail / contrast, centred=True, floor=FAINT)


class TiledCorrelation(Descriptor):
    """Correlate tile by tile, so that one strong edge cannot carry the whole score.

    Rule for near-flat tiles: a tile weighs ``max(0, 1 - (noise / s)**2)`` with ``s`` its standard
    deviation *in the original*; a tile no stronger than the noise does not count, whatever was
    generated there. The similarity is thus asymmetric in (generated, original), and 0 where the
    original has no tile that counts.
    """

    name = "tiled_correlation"
    size = 32
    """Side of the thumbnail in pixels."""

    tiles = 4
    """Tiles along each side."""

    noise = 0.02
    """Standard deviation, as a share of the range [0, 1], below which a tile does not count."""

    def describe(self, images: Tensor) -> Tensor:
        """Unit tiles, then their standard deviations; see ``Descriptor.describe``.

        Returns:
            (N, size**2 + tiles**2) fp32.
        """
        grey = thumbnails(images, self.size)
        count, side = self.tiles, self.size // self.tiles
        tiles = (
            grey.reshape(-1, count, side, count, side)
            .transpose(2, 3)
            .reshape(-1, count**2, side**2)
        )
        tiles = tiles - tiles.mean(-1, keepdim=True)
        spread = tiles.square().mean(-1).sqrt()
        unit = tiles / (spread.clamp_min(self.noise) * side).unsqueeze(-1)
        return torch.cat([unit.flatten(1), spread], 1).float()

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Weighted mean of the tiles' correlations, (N, M), weighted by ``b``."""
        count, pixels = self.tiles**2, self.size**2
        pairs = zip(a[:, :pixels].chunk(count, 1), b[:, :pixels].chunk(count, 1), strict=True)
        per_tile = torch.stack([all_pairs_dot(x, y) for x, y in pairs], -1).double()
        weight = (1 - (self.noise / b[:, pixels:].double().clamp_min(self.noise)) ** 2).expand_as(
            per_tile
        )
        value = (per_tile * weight).sum(-1) / weight.sum(-1).clamp_min(1e-9)
        # A NaN image is NaN in every tile, also where the weights would hide it.
        return torch.where(per_tile.isnan().any(-1), torch.nan, value).float().clamp(-1, 1)


class StructuralSimilarity(Descriptor):
    """SSIM of thumbnails, all pairs; strict about contrast, lenient about flat areas.

    Reference: Wang et al., "Image quality assessment: from error visibility to structural
        similarity", 2004; torchmetrics' implementation with its 11-pixel Gaussian window.
    """

    name = "ssim"
    size = 64
    """Side of the thumbnail in pixels."""

    def describe(self, images: Tensor) -> Tensor:
        """Pixels, (N, size**2), in [0, 1], *not* unit rows; see ``Descriptor.describe``."""
        return thumbnails(images, self.size).flatten(1).float()

    @torch.no_grad()
    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """SSIM of every generated image with every original, (N, M) fp32 in [-1, 1]."""
        first, second = (rows.cpu().reshape(-1, 1, self.size, self.size) for rows in (a, b))
        places = list(product(range(len(a)), range(len(b))))
        values = []
        for batch, valid in fixed_batches(places, CHUNK_PAIRS):
            i, j = torch.tensor(batch).unbind(1)
            value = structural_similarity_index_measure(
                first[i], second[j], data_range=1.0, reduction="none"
            )
            values.append(torch.as_tensor(value)[:valid])
        return torch.cat(values).reshape(len(a), len(b)).clamp(-1, 1)


class GradientOrientation(Descriptor):
    """Cosine of the gradient fields of slightly blurred luminance: compares edges, not areas.

    Each gradient ``g`` becomes ``g / sqrt(|g|**2 + noise**2)``: direction counts where there is an
    edge, and little where there is only noise.

    Reference: gradient correlation as in Argyriou and Vlachos, "Estimation of sub-pixel motion
        using gradient cross-correlation", 2003; the noise floor is ours.
    """

    name = "gradient_orientation"
    size = 32
    """Side of the thumbnail in pixels."""

    noise = 0.03
    """Gradient, in range [0, 1] per pixel, that counts as noise."""

    def describe(self, images: Tensor) -> Tensor:
        """Stacked dx and dy, unit rows, (N, 2 * (size - 2)**2); see ``Descriptor.describe``."""
        grey = blur(thumbnails(images, self.size), gaussian_taps(5, 1.0))
        dx = (grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]) / 2
        dy = (grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]) / 2
        strength = (dx.square() + dy.square() + self.noise**2).sqrt()
        return unit_rows(torch.cat([dx / strength, dy / strength], 1), centred=False)
