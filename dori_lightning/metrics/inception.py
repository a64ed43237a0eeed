"""Inception features for KID and FID, from a local weight file.

The network is the one that FID was defined with (Inception V3 as TensorFlow released it on
2015-12-05). Its weights for torch are known as ``pt_inception-2015-12-05-6726825d.pth`` or
``weights-inception-2015-12-05-6726825d.pth``. torchvision's ImageNet weights are others and are
refused.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.inception import Inception3

from dori_lightning.metrics.descriptors import check_images
from dori_lightning.metrics.sscd import read_weights
from dori_lightning.types import InputError

__all__ = ["InceptionFeatures", "fid_inception"]

SIDE = 299
CLASSES = 1008
_PADDED = ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b")
"""Blocks of torchvision's network whose pooling branch averages over padding too."""


def _skip_padding(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Turn a 3 x 3 average that counted zeros outside the picture into one that did not."""
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
    """FID's Inception V3 without weights: pictures (N, 3, 299, 299) in [-1, 1] to (N, 1008).

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

    Pictures are scaled to 299 pixels by an antialiased bicubic filter on floating-point channels
    and clipped, which is clean-fid's protocol and that of the paper's group (Finding NeMo). FID
    scripts that keep TensorFlow's old bilinear scaling give other numbers. Even so numbers from
    here are no published FID: those compare with photographs (COCO), these with the unmitigated
    model's pictures.

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
            batch: Pictures per forward pass.

        Raises:
            InputError: Missing or wrong file, or ``batch`` below 1.
        """
        if batch < 1:
            raise InputError(f"Inception: batch must be >= 1, got {batch}")
        path = Path(weights)
        data = read_weights(path, sha256, what="Inception")
        try:
            if path.suffix == ".safetensors":
                state: dict[str, Any] = load_safetensors(data)
            else:
                state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(
                f"Inception: {path} is no safetensors or torch weight file"
            ) from error
        self.network, self.batch = fid_inception(), batch
        try:
            self.network.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InputError(
                f"Inception: {path} does not hold the weights of FID's Inception "
                f"({CLASSES} classes, no auxiliary branch); give "
                f"pt_inception-2015-12-05-6726825d.pth"
            ) from error
        self.network.fc = nn.Identity()

    @torch.no_grad()
    def describe(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1] to features (N, 2048), float64 on the CPU.

        Raises:
            ValueError: Wrong shape, type or range.
        """
        check_images(images)
        self.network.to(images.device)
        rows = []
        for chunk in torch.split(images, self.batch):
            # Filled up, because kernels (hence rounding) may be chosen by batch size.
            filled = F.pad(chunk, (0, 0) * 3 + (0, self.batch - len(chunk)))
            rows.append(self.network(_prepare(filled))[: len(chunk)].double().cpu())
        return torch.cat(rows)


def _prepare(images: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] to (N, 3, 299, 299) as the network wants them."""
    values = F.interpolate(
        images.float() * 255, (SIDE, SIDE), mode="bicubic", antialias=True
    ).clamp(0, 255)
    return (values - 128) / 128
