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
    """Images to generate from one embedding.

    Attributes:
        folder: Where they go, one ``{seed}.png`` each.
        embedding: Text embedding (T, D).
        pair_id: Whose images they are, for edits that differ by pair.
        seeds: Their generation seeds; None for those of all K images.
        kept: Folder where the same images may be kept already.
    """

    folder: Path
    embedding: torch.Tensor
    pair_id: str | None = None
    seeds: tuple[int, ...] | None = None
    kept: Path | None = None


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

    On the CPU every batch has one shape, so that an image gets the same bits in a resumed run, and
    alone or with the others of its embedding.

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
    every, missing = image_seeds(sampling), list[tuple[GenerationRequest, int, dict[str, str]]]()
    for request in requests:
        there = 0
        for seed in request.seeds or every:
            key = _key(model, sampling, request.embedding, seed, edit)
            if _is_there(request, seed, key):
                there += 1
            else:
                missing.append((request, seed, key))
        advance(there)
    cpu, together = model.device.type == "cpu", len(every)
    share = max(1, (CPU_IMAGES if cpu else sampling.batch) // together) * together
    if cpu:
        sampling = replace(sampling, batch=min(CPU_IMAGES, share))
    # images of more than one batch have their batches in parallel
    width = share * (parallel_batches(model) if share <= CPU_IMAGES else 1)
    for start in range(0, len(missing), width):
        part = missing[start : start + width]
        padded = [row for batch, _ in fixed_batches(part, share) for row in batch] if cpu else part
        owners = [request.pair_id for request, _, _ in padded if request.pair_id is not None]
        images = model.generate(
            torch.stack([request.embedding for request, _, _ in padded]),
            torch.stack([generation_noise(seed, model.latent_shape) for _, seed, _ in padded]),
            sampling,
            pair_ids=owners or None,
        )
        for (request, seed, key), image in zip(part, images, strict=False):
            Cache(request.folder).write(str(seed), image, key, PNG)
        advance(len(part))
    return len(missing)


def _is_there(request: GenerationRequest, seed: int, key: dict[str, str]) -> bool:
    """Whether an image is in a request's folder, or is kept elsewhere and now copied there."""
    own = Cache(request.folder)
    if own.read(str(seed), key, PNG) is not None:
        return True
    kept = None if request.kept is None else Cache(request.kept).read(str(seed), key, PNG)
    if kept is not None:
        own.write(str(seed), kept, key, PNG)
    return kept is not None


def load_images(folder: Path, seeds: Sequence[int]) -> torch.Tensor:
    """Read generated images (K, 3, H, W) in [0, 1]."""
    return torch.stack([PNG.decode(folder / f"{seed}.png")[0] for seed in seeds])
