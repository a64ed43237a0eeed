"""SSCD, the copy-detection descriptor of the paper, from a local file.

Reference: Pizzi et al., "A Self-Supervised Descriptor for Image Copy Detection", CVPR 2022,
https://arxiv.org/abs/2202.10261.
"""

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50

from dori_lightning.metrics.descriptors import Descriptor, check_images, in_fixed_batches
from dori_lightning.types import InputError

BATCH = 8
"""Images per forward pass on an accelerator."""

SIDE = 320
"""Pixels that images are scaled to, as Finding NeMo does (most likely this paper too): squares,
with ImageNet's mean and standard deviation. Others (Wen et al., MemBench) get other scores."""

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class GeneralizedMean(nn.Module):
    """Pool by the power mean: between average (power 1) and maximum pooling.

    Reference: Radenovic et al., "Fine-tuning CNN image retrieval with no human annotation", 2018.
    """

    def __init__(self, power: float = 3.0) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        """Pool (N, C, H, W) to (N, C, 1, 1)."""
        return x.clamp_min(1e-6).pow(self.power).mean((2, 3), keepdim=True).pow(1 / self.power)


class SSCDNet(nn.Module):
    """ResNet-50, generalized-mean pooling and a linear embedding of 512, on unit length.

    Keys are those of the published ``*.torchvision.pt`` files: ``backbone.<torchvision resnet50
    key>`` with the embedding as ``backbone.fc.weight`` (512, 2048) and ``backbone.fc.bias``
    (512,); pooling has no parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = resnet50(weights=None, num_classes=512)
        self.backbone.avgpool = GeneralizedMean()

    def forward(self, images: Tensor) -> Tensor:
        """Describe preprocessed images (N, 3, H, W): (N, 512) unit rows."""
        return F.normalize(self.backbone(images), dim=1)


def read_weights(path: Path, sha256: str | None, *, what: str) -> bytes:
    """Read a local weight file and check its hash on the very bytes that will be parsed.

    Raises:
        InputError: Missing, unreadable, or not the file that was meant.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{what}: cannot read the weights {path} ({error.strerror}); give the path of a local "
            f"file, nothing is downloaded"
        ) from error
    actual = hashlib.sha256(data).hexdigest()
    if sha256 is not None and actual != sha256.lower():
        raise InputError(
            f"{what}: {path} has sha256 {actual}, expected {sha256}; get the right file, or "
            f"correct the hash if you trust this one"
        )
    return data


def parse_weights(
    data: bytes, path: Path, *, what: str, kinds: str = "safetensors or torch weight file"
) -> dict[str, Any]:
    """Tensors by name from a weight file's bytes, running nothing in it.

    Raises:
        InputError: Neither safetensors nor tensors saved by torch.
    """
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"holds a {type(state).__name__}")
    except Exception as error:
        raise InputError(f"{what}: {path} is no {kinds}") from error
    return state


def _is_torchscript(data: bytes) -> bool:
    """TorchScript archives carry code; weight files do not."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return False
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return any("/code/" in name for name in archive.namelist())


def _network(path: Path, sha256: str | None) -> nn.Module:
    data = read_weights(path, sha256, what="SSCD")
    if _is_torchscript(data):
        if sha256 is None:
            raise InputError(
                f"SSCD: {path} is a TorchScript program, and programs run only with their hash "
                f"pinned; after checking where it comes from set "
                f"sha256={hashlib.sha256(data).hexdigest()}, or use the .torchvision.pt weights"
            )
        try:
            program: nn.Module = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
            return program.eval()
        except RuntimeError as error:
            raise InputError(
                f"SSCD: {path} is no TorchScript program that this torch can load"
            ) from error
    state = parse_weights(
        data, path, what="SSCD", kinds="safetensors file, torch weight file or TorchScript program"
    )
    network = SSCDNet()
    try:
        network.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        expected = set(network.state_dict())
        raise InputError(
            f"SSCD: {path} does not hold a ResNet-50 SSCD in torchvision layout "
            f"({len(expected - set(state))} keys missing, {len(set(state) - expected)} unknown, "
            f"or shapes differ); use sscd_disc_mixup.torchvision.pt, or the .torchscript.pt of "
            f"other models with its sha256"
        ) from error
    return network.eval()


def _prepare(images: Tensor) -> Tensor:
    """Scale and normalise (N, 3, H, W) images in [0, 1]."""
    scaled = F.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (_MEAN, _STD))
    return (scaled - mean) / std


class SSCD(Descriptor):
    """Cosine of SSCD embeddings, above 0.7 a replica as in the paper.

    The threshold belongs to photographs of several hundred pixels: on small images, or behind a
    blurry autoencoder, scores are lower (``calibrate`` warns where the ceiling misses it).
    """

    name = "sscd"

    def __init__(
        self,
        weights: str | Path,
        *,
        sha256: str | None = None,
        threshold: float | None = 0.7,
    ) -> None:
        """Load the network, before anything expensive starts.

        Args:
            weights: Local file: ``.torchvision.pt`` weights, the same as ``.safetensors``, or
                TorchScript (any SSCD model), which is only run with ``sha256``.
            sha256: Expected hash of the file.
            threshold: Fixed threshold in [-1, 1]; None calibrates it.

        Raises:
            InputError: Missing or wrong file, TorchScript without hash.
        """
        super().__init__(threshold=threshold)
        self.network = _network(Path(weights), sha256)

    @torch.no_grad()
    def describe(self, images: Tensor) -> Tensor:
        """Unit embeddings, (N, 512) or the program's width; see ``Descriptor.describe``."""
        check_images(images)
        self.network.to(images.device)
        rows = in_fixed_batches(lambda batch: self.network(_prepare(batch)).float(), images, BATCH)
        return F.normalize(rows, dim=1)
