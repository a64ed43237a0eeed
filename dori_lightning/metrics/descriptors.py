"""What every image descriptor offers, and the picture arithmetic the structural ones share.

A descriptor turns pictures into features and compares them. All of them answer in [-1, 1], higher
is closer, so that thresholds, tables and calibration need not know which one is at work. Features
live on the CPU: there the order of a sum never depends on how many pictures came along, so a
pair's similarity is the same in any batch, on any rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

__all__ = [
    "Channels",
    "Descriptor",
    "all_pairs_dot",
    "blur",
    "check_images",
    "gaussian_taps",
    "thumbnails",
    "unit_rows",
]

Channels = Literal["luminance", "rgb"]

CHUNK_IMAGES = 8
"""Pictures that are scaled down at once."""

CHUNK_VALUES = 4_000_000
"""Products that exist at once while all pairs are compared: 32 MB of float64."""

FLAT = 1e-3
"""Standard deviation, a quarter of a grey level, under which nothing is left to correlate."""

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Descriptor(ABC):
    """Says how much two pictures resemble each other, whoever else is in the batch.

    Attributes:
        name: Key of its similarities in an ``Outcome``.
        threshold: Similarity above which a picture counts as a replica: published, or fixed by the
            user; None where it must be calibrated on the list of pairs (see
            ``calibration.calibrate``).
        higher_is_better: Higher similarity is closer, for every descriptor.
    """

    name: str
    threshold: float | None
    higher_is_better: ClassVar[bool] = True

    @abstractmethod
    def describe(self, images: Tensor) -> Tensor:
        """Turn pictures into features; originals are described once for all conditions.

        Args:
            images: Pictures, (N, 3, H, W), floating, in [0, 1]. A picture with NaN gets features
                of NaN.

        Returns:
            Features, (N, F) fp32 on the CPU; unit rows where ``compare`` is the dot product.

        Raises:
            ValueError: Wrong shape, type or range.
        """

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare all features of generated pictures with all of originals.

        Args:
            a: Features of generated pictures, (N, F), by ``describe``.
            b: Features of originals, (M, F), by ``describe``.

        Returns:
            (N, M) fp32 in [-1, 1], on the CPU.
        """
        return all_pairs_dot(a, b)

    def similarity(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare all generated pictures with all originals.

        Args:
            a: Generated pictures, (N, 3, H, W), in [0, 1].
            b: Originals, (M, 3, H, W), in [0, 1].

        Returns:
            (N, M) fp32 in [-1, 1], on the CPU.

        Raises:
            ValueError: Wrong shape, type or range.
        """
        return self.compare(self.describe(a), self.describe(b))


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of pictures; NaN passes and spoils its own row only.

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

    Whole-pixel boxes would sample a ramp unevenly, in the same way for all pictures: a likeness.
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
def thumbnails(images: Tensor, size: int, channels: Channels) -> Tensor:
    """Average pictures down to squares.

    Args:
        images: Pictures, (N, 3, H, W), in [0, 1], on any device.
        size: Side of the squares in pixels; aspect ratios are not kept.
        channels: ``luminance`` (BT.601 weights) or ``rgb``.

    Returns:
        (N, 1 or 3, size, size) float64 on the CPU, in [0, 1].

    Raises:
        ValueError: Wrong shape, type, range or channels.
    """
    check_images(images)
    if channels not in ("luminance", "rgb"):
        raise ValueError(f"channels must be luminance or rgb, got {channels!r}")
    small = []
    for chunk in torch.split(images, CHUNK_IMAGES):
        pixels = chunk.cpu().double()
        if channels == "luminance":
            red, green, blue = pixels.unbind(1)
            pixels = (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).unsqueeze(1)
        small.append(_box_average(_box_average(pixels, size, -1), size, -2))
    return torch.cat(small)


def gaussian_taps(window: int, sigma: float) -> Tensor:
    """Weights of a Gaussian with ``sigma`` pixels, (window,) float64, summing to 1."""
    offsets = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def blur(
    images: Tensor, taps: Tensor, *, border: Literal["mirror", "continue"] = "mirror"
) -> Tensor:
    """Smooth pictures with separable taps.

    Written as shifted sums: a convolution may pick another algorithm for another batch size.

    Args:
        images: (N, C, H, W).
        taps: Weights, an odd number of them, less than twice H and W.
        border: What lies outside: ``mirror`` stays in the picture's range; ``continue`` mirrors
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
    noise: a flat picture resembles nothing, itself included.

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
def all_pairs_dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of all rows of (N, F) with all rows of (M, F): (N, M) fp32, clamped to [-1, 1].

    Not a matrix product: its summation order changes with N and M.
    """
    a, b = a.cpu().double(), b.cpu().double()
    step = max(1, CHUNK_VALUES // max(1, b.numel()))
    rows = [(chunk[:, None] * b[None]).sum(-1) for chunk in torch.split(a, step)]
    return torch.cat(rows).float().clamp(-1, 1)
