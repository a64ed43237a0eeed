"""Distance between two models' images as sets: KID and FID over features of their images.

The two models draw the same prompts from the same seeds, so the sets are paired; what is used
here takes that into account.
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_kernel
from torchvision.models.inception import Inception3

from dori_lightning.metrics.descriptors import check_images, in_fixed_batches
from dori_lightning.metrics.sscd import parse_weights, read_weights
from dori_lightning.runtime.logging import with_progress
from dori_lightning.types import InputError, Number

SUBSETS = 100
"""Random halves that a kernel distance is averaged over, as many as torchmetrics takes."""

FEWEST_GROUPS = 4
"""Groups under which a half has no two to compare."""

SIDE = 299
CLASSES = 1008
_PADDED = ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b")
"""Blocks of torchvision's network whose pooling branch averages over padding too."""


class Features(Protocol):
    """What turns images into the numbers that are compared."""

    @property
    def name(self) -> str:
        """How reports call it."""
        ...

    @property
    def identity(self) -> str:
        """What tells them from other features of one checkpoint's images."""
        ...

    @property
    def dimension(self) -> int:
        """Features of an image, F."""
        ...

    def describe(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] to features (N, F), float64 on the CPU."""
        ...


class LatentFeatures:
    """What the checkpoint's own image autoencoder says of an image: nothing to download.

    Mean and standard deviation of every latent channel over the whole image and over its four
    quarters: 10 features per channel (40 for Stable Diffusion). They see colours, contrast, rough
    layout and the amount of detail. They do not see what is shown: a cat that became a dog in the
    same place and colours is the same to them. Numbers by these features compare mitigations of
    one checkpoint with each other; they are not comparable with published ones, which use
    Inception, nor between checkpoints with different autoencoders.
    """

    name = identity = "autoencoder"

    def __init__(self, encode: Callable[[Tensor], Tensor], channels: int) -> None:
        """Take an encoder.

        Args:
            encode: Images (N, 3, H, W) in [0, 1] to latents (N, C, h, w) of about unit scale.
            channels: C.
        """
        self.encode, self.dimension = encode, 10 * channels

    def describe(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] to features (N, 10 C), float64 on the CPU."""
        latents = self.encode(images).detach().cpu().double()
        halves = torch.tensor_split(latents, 2, dim=2)
        quarters = [part for half in halves for part in torch.tensor_split(half, 2, dim=3)]
        parts: list[Tensor] = []
        for cell in (latents, *quarters):
            parts += [cell.mean((2, 3)), cell.std((2, 3), correction=0)]
        return torch.cat(parts, 1)


@dataclass(frozen=True)
class KernelDistance:
    """Kernel distance (KID) of two paired sets.

    Attributes:
        mean: Mean over random halves of the groups; 0 where the sets are the same, and for the
            same distribution in expectation, so small values may be negative.
        std: Standard deviation over them: about the standard error of the mean, since a half
            drawn without replacement scatters around the whole as the whole around the truth.
        pictures: Images in each set.
        groups: Groups of images that do not depend on each other.
        subset: Groups in a half.
    """

    mean: Number
    std: Number
    pictures: int
    groups: int
    subset: int


@torch.no_grad()
def kernel_distance(
    unmitigated: Tensor, mitigated: Tensor, groups: Sequence[str], *, seed: int = 0
) -> KernelDistance | None:
    """Squared maximum mean discrepancy with KID's cubic kernel, for paired and grouped images.

    torchmetrics' ``KernelInceptionDistance`` takes the two sets as independent: its cross term
    counts image i of one set against image i of the other. Same prompt, same seed: these are
    close to each other by design, and for the few images of an audit they would pull the value
    below zero, the more so the milder the mitigation. So only images of different groups are
    compared here, within sets and across, which keeps the estimate unbiased for dependent sets
    (a U-statistic over groups) and gives exactly 0 for equal ones. On independent sets it
    estimates what torchmetrics does.

    Args:
        unmitigated: Features (N, F) of the unmitigated model's images.
        mitigated: Features (N, F) of the mitigated model's, in the same order.
        groups: Which images belong together (N): those of one prompt, or of one pair.
        seed: Of the random halves.

    Returns:
        The distance, or None for fewer than four groups.

    References: Binkowski et al., "Demystifying MMD GANs", ICLR 2018,
        https://arxiv.org/abs/1801.01401 (KID); Gretton et al., "A Kernel Two-Sample Test", JMLR
        2012, section 3 (the statistic over pairs).
    """
    names = list(dict.fromkeys(groups))
    if len(names) < FEWEST_GROUPS:
        return None
    x, y = unmitigated.double(), mitigated.double()
    terms = poly_kernel(x, x) + poly_kernel(y, y) - 2 * poly_kernel(x, y)
    member = torch.zeros(len(names), len(groups), dtype=torch.float64)
    member[[names.index(name) for name in groups], range(len(groups))] = 1
    sums, sizes = member @ terms @ member.T, member.sum(1)
    counts = sizes[:, None] * sizes[None]
    sums.fill_diagonal_(0)
    counts.fill_diagonal_(0)
    rng, subset = np.random.default_rng(seed), len(names) // 2
    values = []
    for _ in with_progress("utility, kernel distance", range(SUBSETS)):
        chosen = torch.from_numpy(rng.permutation(len(names))[:subset])
        block = chosen[:, None], chosen[None]
        values.append(float(sums[block].sum() / counts[block].sum()))
    return KernelDistance(
        mean=float(np.mean(values)),
        std=float(np.std(values)),
        pictures=len(groups),
        groups=len(names),
        subset=subset,
    )


def frechet_images(dimension: int) -> int:
    """Images that a Fréchet distance over so many features needs here: twice as many.

    With fewer, the covariances are barely of full rank and the distance is mostly the bias of too
    small a sample.
    """
    return 2 * dimension


@torch.no_grad()
def frechet_distance(unmitigated: Tensor, mitigated: Tensor) -> float | None:
    """Fréchet distance (FID) of two sets of features, by torchmetrics, in float64.

    It grows as sets get smaller, so compare only numbers from equally many images.

    Args:
        unmitigated: Features (N, F).
        mitigated: Features (N, F).

    Returns:
        The distance, or None for fewer than ``frechet_images`` images.

    Reference: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017,
        https://arxiv.org/abs/1706.08500.
    """
    dimension = unmitigated.shape[1]
    if min(len(unmitigated), len(mitigated)) < frechet_images(dimension):
        return None
    as_they_are = nn.Identity()
    as_they_are.num_features = dimension  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchmetrics")
        metric = FrechetInceptionDistance(feature=as_they_are)
    metric.update(unmitigated.double(), real=True)
    metric.update(mitigated.double(), real=False)
    return float(metric.compute())


def _skip_padding(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Turn a 3 x 3 average that counted zeros outside the image into one that did not."""
    (x,) = args
    inside = x.new_ones(1, 1, *x.shape[-2:])
    return (x / F.avg_pool2d(inside, kernel_size=3, stride=1, padding=1),)


class _MaximumBranch:
    """Give a block's pooling branch the maximum of the block's input instead of the average."""

    def __init__(self, block: nn.Module) -> None:
        self.seen: Tensor | None = None
        block.register_forward_pre_hook(self.look)
        branch = block.get_submodule("branch_pool")
        branch.register_forward_pre_hook(self.replace)

    def look(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        (self.seen,) = args

    def replace(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        del args
        assert self.seen is not None
        pooled, self.seen = F.max_pool2d(self.seen, kernel_size=3, stride=1, padding=1), None
        return (pooled,)


def fid_inception() -> Inception3:
    """FID's Inception V3 without weights: images (N, 3, 299, 299) in [-1, 1] to (N, 1008).

    It is the network that FID was defined with (as TensorFlow released it on 2015-12-05), whose
    weights for torch are known as ``pt_inception-2015-12-05-6726825d.pth``. torchvision's ImageNet
    weights are others and are refused.

    It differs from torchvision's in the pooling branches of nine blocks: eight averages leave the
    padding out, and the last block takes a maximum.
    """
    network = Inception3(num_classes=CLASSES, aux_logits=False, init_weights=False)
    for name in _PADDED:
        block = network.get_submodule(f"Mixed_{name}")
        block.get_submodule("branch_pool").register_forward_pre_hook(_skip_padding)
    _MaximumBranch(network.get_submodule("Mixed_7c"))
    return network.eval().requires_grad_(False)


class InceptionFeatures:
    """The 2048 pooled features of FID's Inception, prepared as clean-fid prepares them.

    Images are scaled to 299 pixels by an antialiased bicubic filter on floating-point channels
    and clipped, which is clean-fid's protocol and that of the paper's group (Finding NeMo). FID
    scripts that keep TensorFlow's old bilinear scaling give other numbers. Even so numbers from
    here are no published FID: those compare with photographs (COCO), these with the unmitigated
    model's images.

    Reference: Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation",
        CVPR 2022, https://arxiv.org/abs/2104.11222.
    """

    name = "inception"
    dimension = 2048

    def __init__(self, weights: str | Path, *, sha256: str | None = None, batch: int = 8) -> None:
        """Load the network, before anything expensive starts.

        Args:
            weights: Local ``.pth`` (read without running anything in it) or ``.safetensors``.
            sha256: Expected hash of the file.
            batch: Images per forward pass.

        Raises:
            InputError: Missing or wrong file, or ``batch`` below 1.
        """
        if batch < 1:
            raise InputError(f"Inception: batch must be >= 1, got {batch}")
        path = Path(weights)
        data = read_weights(path, sha256, what="Inception")
        state = parse_weights(data, path, what="Inception")
        self.identity = f"inception-{hashlib.sha256(data).hexdigest()[:16]}"
        self.network, self.batch = fid_inception(), batch
        try:
            self.network.load_state_dict(state)
        except (RuntimeError, AttributeError) as error:
            raise InputError(
                f"Inception: {path} does not hold the weights of FID's Inception "
                f"({CLASSES} classes, no auxiliary branch); give "
                f"pt_inception-2015-12-05-6726825d.pth"
            ) from error
        self.network.fc = nn.Identity()

    @torch.no_grad()
    def describe(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] to features (N, 2048), float64 on the CPU.

        Raises:
            ValueError: Wrong shape, type or range.
        """
        check_images(images)
        self.network.to(images.device)
        return in_fixed_batches(
            lambda batch: self.network(_prepare(batch)).double(), images, self.batch
        )


def _prepare(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] to (N, 3, 299, 299) as the network wants them."""
    values = F.interpolate(
        images.float() * 255, (SIDE, SIDE), mode="bicubic", antialias=True
    ).clamp(0, 255)
    return (values - 128) / 128
