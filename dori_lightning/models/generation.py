"""Generate the pictures of an audit and keep them as files.

Each file holds the hash of what it was made from.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.runtime import batching
from dori_lightning.runtime.artifacts import write_atomically

_IDENTITY = "dori_lightning identity"

CPU_PICTURES = 16
"""Pictures of every forward pass on the CPU: kernels are chosen by shape, so passes of one shape
give a picture the same bits in any company."""


@dataclass(frozen=True)
class GenerationRequest:
    """K pictures to make from one embedding.

    Attributes:
        folder: Where they go, one ``{seed}.png`` each.
        embedding: Text embedding (T, D).
        pair_id: Whose pictures they are, for edits that differ by pair.
    """

    folder: Path
    embedding: torch.Tensor
    pair_id: str | None = None


def generation_noise(seed: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """Starting noise (C, h, w) of one generation seed, the same for every pair and device."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


def image_seeds(sampling: Sampling) -> tuple[int, ...]:
    """Generation seeds of a pair's K pictures."""
    return tuple(sampling.seed + k for k in range(sampling.images_per_pair))


def baseline_cache_key(model: TextToImage, sampling: Sampling) -> str:
    """Name of the folder for what a checkpoint draws as it is, under one way of sampling."""
    method = f"{sampling.sampler}|{sampling.steps}|{sampling.guidance}|{model.latent_shape}"
    return f"{model.fingerprint[:16]}-{hashlib.sha256(method.encode()).hexdigest()[:8]}"


def _identity(
    model: TextToImage, sampling: Sampling, embedding: torch.Tensor, seed: int, edit: str
) -> str:
    digest = hashlib.sha256(
        f"{model.fingerprint}|{edit}|{sampling.sampler}|{sampling.steps}|{sampling.guidance}|{seed}|"
        f"{model.latent_shape}".encode()
    )
    digest.update(embedding.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:24]


def _is_done(path: Path, identity: str) -> bool:
    """Whether a whole picture with this identity is there already."""
    if not path.is_file():
        return False
    try:
        with Image.open(path, formats=("PNG",)) as file:
            file.load()
            return file.info.get(_IDENTITY) == identity
    except (OSError, UnidentifiedImageError, SyntaxError):
        return False


def _write(path: Path, image: torch.Tensor, identity: str) -> None:
    pixels = (image.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    note = PngImagePlugin.PngInfo()
    note.add_text(_IDENTITY, identity)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=note)
    write_atomically(path, buffer.getvalue())


def generate_images(
    model: TextToImage,
    orders: Sequence[GenerationRequest],
    sampling: Sampling,
    *,
    edit: str = "none",
    advance: Callable[[int], None] | None = None,
) -> int:
    """Make every ordered picture that is not there yet.

    The K pictures of an order are made together or not at all, and on the CPU every pass has one
    shape, so that a resumed run makes the same bits.

    Args:
        model: Model that draws.
        orders: What to draw.
        sampling: Sampler settings; picture k of each order uses seed ``sampling.seed + k``.
        edit: Identity of the edit that the model carries, part of each picture's identity.
        advance: Called with the number of pictures that just became done.

    Returns:
        How many pictures were drawn anew.
    """
    seeds = image_seeds(sampling)
    missing = []
    for order in orders:
        names = [_identity(model, sampling, order.embedding, seed, edit) for seed in seeds]
        if all(
            _is_done(order.folder / f"{seed}.png", name)
            for seed, name in zip(seeds, names, strict=True)
        ):
            _advance(advance, len(seeds))
        else:
            missing.append((order, names))
    noise = torch.stack([generation_noise(seed, model.latent_shape) for seed in seeds])
    cpu = model.device.type == "cpu"
    share = max(1, (CPU_PICTURES if cpu else sampling.batch) // len(seeds))
    # an order of more than one pass has its passes side by side, and its own call
    width = share * (batching.parallel_batches(model) if share * len(seeds) <= CPU_PICTURES else 1)
    for start in range(0, len(missing), width):
        part = missing[start : start + width]
        full = [*part, *[part[0]] * (-len(part) % share)] if cpu else part
        embeddings = torch.stack([order.embedding for order, _ in full])
        owners = [order.pair_id for order, _ in full if order.pair_id is not None]
        images = model.generate(
            embeddings.repeat_interleave(len(seeds), 0),
            noise.repeat(len(full), 1, 1, 1),
            replace(sampling, batch=min(CPU_PICTURES, share * len(seeds))) if cpu else sampling,
            pair_ids=[name for name in owners for _ in seeds] if owners else None,
        )
        for (order, names), own in zip(part, torch.split(images, len(seeds)), strict=False):
            for seed, name, image in zip(seeds, names, own, strict=True):
                _write(order.folder / f"{seed}.png", image, name)
        _advance(advance, len(part) * len(seeds))
    return len(missing) * len(seeds)


def _advance(advance: Callable[[int], None] | None, count: int) -> None:
    if advance is not None:
        advance(count)


def load_images(folder: Path, seeds: Sequence[int]) -> torch.Tensor:
    """Read generated pictures (K, 3, H, W) in [0, 1]."""
    rows = []
    for seed in seeds:
        with Image.open(folder / f"{seed}.png", formats=("PNG",)) as file:
            rows.append(torch.from_numpy(np.array(file.convert("RGB"), np.uint8)).permute(2, 0, 1))
    return torch.stack(rows).float().div_(255)
