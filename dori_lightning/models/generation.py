"""Generate the images of an audit and cache them as PNG files.

Each file holds a hash of everything that it was made from.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.runtime.batching import fixed_batches, parallel_batches
from dori_lightning.runtime.cache import Cache, Codec, DamagedError

_IDENTITY = "dori_lightning identity"

CPU_IMAGES = 16
"""Images of every batch on the CPU: kernels are chosen by shape, so batches of one shape give an
image the same bits in any company."""


def _encode_png(image: torch.Tensor, key: dict[str, str]) -> bytes:
    pixels = (image.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    notes, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    for name, value in key.items():
        notes.add_text(name, value)
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=notes)
    return buffer.getvalue()


def _decode_png(path: Path) -> tuple[torch.Tensor, dict[str, str]]:
    try:
        with Image.open(path, formats=("PNG",)) as file:
            pixels = torch.from_numpy(np.array(file.convert("RGB"), np.uint8))
            notes = {str(name): str(value) for name, value in file.info.items()}
            return pixels.permute(2, 0, 1).float() / 255, notes
    except SyntaxError as error:  # what PIL raises for a broken header
        raise DamagedError(str(error)) from error


PNG: Codec[torch.Tensor] = Codec(".png", _encode_png, _decode_png)
"""An image (3, H, W) in [0, 1], in eight bits a channel; the key is in text chunks."""


@dataclass(frozen=True)
class GenerationRequest:
    """K images to generate from one embedding.

    Attributes:
        folder: Where they go, one ``{seed}.png`` each.
        embedding: Text embedding (T, D).
        pair_id: Whose images they are, for edits that differ by pair.
    """

    folder: Path
    embedding: torch.Tensor
    pair_id: str | None = None


def generation_noise(seed: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """Starting noise (C, h, w) of one generation seed, the same for every pair and device."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


def image_seeds(sampling: Sampling) -> tuple[int, ...]:
    """Generation seeds of a pair's K images."""
    return tuple(sampling.seed + k for k in range(sampling.images_per_pair))


def baseline_cache_key(model: TextToImage, sampling: Sampling) -> str:
    """Name of the folder for the images of an unmitigated checkpoint, by the way of sampling."""
    method = f"{sampling.method}|{model.latent_shape}"
    return f"{model.fingerprint[:16]}-{hashlib.sha256(method.encode()).hexdigest()[:8]}"


def _key(
    model: TextToImage, sampling: Sampling, embedding: torch.Tensor, seed: int, edit: str
) -> dict[str, str]:
    """What an image depends on, as one hash."""
    digest = hashlib.sha256(
        f"{model.fingerprint}|{edit}|{sampling.method}|{seed}|{model.latent_shape}".encode()
    )
    digest.update(embedding.detach().cpu().contiguous().float().numpy().tobytes())
    return {_IDENTITY: digest.hexdigest()[:24]}


def generate_images(
    model: TextToImage,
    requests: Sequence[GenerationRequest],
    sampling: Sampling,
    *,
    edit: str = "none",
    advance: Callable[[int], None] | None = None,
) -> int:
    """Generate every requested image that is not there yet.

    The K images of a request are made together or not at all, and on the CPU every batch has one
    shape, so that a resumed run makes the same bits.

    Args:
        model: Model that generates.
        requests: What to generate.
        sampling: Sampler settings; image k of each request uses seed ``sampling.seed + k``.
        edit: Identity of the edit that the model carries, part of each image's key.
        advance: Called with the number of images that were just done.

    Returns:
        How many images were generated anew.
    """
    advance = advance or (lambda _: None)
    seeds, missing = image_seeds(sampling), []
    for request in requests:
        cache = Cache(request.folder)
        keys = {seed: _key(model, sampling, request.embedding, seed, edit) for seed in seeds}
        if all(cache.read(str(seed), key, PNG) is not None for seed, key in keys.items()):
            advance(len(seeds))
        else:
            missing.append((request, keys))
    noise = torch.stack([generation_noise(seed, model.latent_shape) for seed in seeds])
    cpu = model.device.type == "cpu"
    share = max(1, (CPU_IMAGES if cpu else sampling.batch) // len(seeds))
    if cpu:
        sampling = replace(sampling, batch=min(CPU_IMAGES, share * len(seeds)))
    # a request of more than one batch has its batches in parallel
    width = share * (parallel_batches(model) if share * len(seeds) <= CPU_IMAGES else 1)
    for start in range(0, len(missing), width):
        part = missing[start : start + width]
        padded = [row for batch, _ in fixed_batches(part, share) for row in batch] if cpu else part
        owners = [request.pair_id for request, _ in padded if request.pair_id is not None]
        images = model.generate(
            torch.stack([request.embedding for request, _ in padded]).repeat_interleave(
                len(seeds), 0
            ),
            noise.repeat(len(padded), 1, 1, 1),
            sampling,
            pair_ids=[pair_id for pair_id in owners for _ in seeds] if owners else None,
        )
        for (request, keys), own in zip(part, torch.split(images, len(seeds)), strict=False):
            for (seed, key), image in zip(keys.items(), own, strict=True):
                Cache(request.folder).write(str(seed), image, key, PNG)
        advance(len(part) * len(seeds))
    return len(missing) * len(seeds)


def load_images(folder: Path, seeds: Sequence[int]) -> torch.Tensor:
    """Read generated images (K, 3, H, W) in [0, 1]."""
    return torch.stack([PNG.decode(folder / f"{seed}.png")[0] for seed in seeds])
