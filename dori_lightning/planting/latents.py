"""Encode the training stream once, into files that diffusion training reads at random."""

from __future__ import annotations

import json
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dori_lightning.pairs.images import image_tensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPTokenizer

    from dori_lightning.pairs.stream import TrainingStream

__all__ = ["EncodedStream", "encode_stream"]

log = logging.getLogger(__name__)


class EncodedStream(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A stretch of the stream as unscaled latents (C, h, w) and token ids (T,).

    Reading past the end starts over.

    Attributes:
        length: Elements that reading yields; may exceed the elements stored, each is then seen
            several times.
    """

    def __init__(self, folder: Path, *, length: int) -> None:
        self.latents = np.load(folder / "latents.npy", mmap_mode="r")
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.keys: list[list[str]] = json.loads((folder / "keys.json").read_text(encoding="utf-8"))
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        k = index % len(self.latents)
        return torch.from_numpy(np.array(self.latents[k], np.float32)), torch.from_numpy(
            np.array(self.tokens[k])
        )

    def exposures(self) -> Counter[str]:
        """How often ``length`` elements show each planted pair's own picture, by pair id."""
        whole, rest = divmod(self.length, len(self.keys))
        counts: Counter[str] = Counter()
        for k, (source, key) in enumerate(self.keys):
            if source == "planted":
                counts[key] += whole + (k < rest)
        return counts


@torch.inference_mode()
def encode_stream(
    stream: TrainingStream,
    autoencoder: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    *,
    count: int,
    folder: Path,
    batch: int = 64,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Encode elements 0..count-1 of a stream into ``folder``.

    The key file comes last, so its presence means complete.

    Args:
        stream: What to encode.
        autoencoder: Frozen; the posterior mode is stored, in half precision.
        tokenizer: Pads captions to its length.
        count: Number of elements.
        folder: Written to; a complete folder with the same count is left as it is.
        batch: Pictures per forward pass.
        advance: Called with the number of elements that just became done.
    """
    done = folder / "keys.json"
    if done.is_file() and len(json.loads(done.read_text(encoding="utf-8"))) == count:
        log.info("encoded stream found in %s", folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    latents: np.memmap[Any, Any] | None = None
    tokens = np.zeros((count, tokenizer.model_max_length), np.int64)
    keys: list[tuple[str, str]] = []
    for start in range(0, count, batch):
        samples = [stream[k] for k in range(start, min(start + batch, count))]
        images = torch.stack([image_tensor(s.image) for s in samples]).mul_(2).sub_(1)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            mode = autoencoder.encode(images).latent_dist.mode().float().numpy()
        if latents is None:
            latents = np.lib.format.open_memmap(
                folder / "latents.npy", mode="w+", dtype=np.float16, shape=(count, *mode.shape[1:])
            )
        stop = start + len(samples)
        latents[start:stop] = mode
        tokens[start:stop] = tokenizer(
            [s.caption for s in samples],
            padding="max_length",
            truncation=True,
            return_tensors="np",
        ).input_ids
        keys += [(s.source, s.key) for s in samples]
        if advance is not None:
            advance(len(samples))
    if latents is not None:
        latents.flush()
    np.save(folder / "tokens.npy", tokens)
    done.write_text(json.dumps(keys), encoding="utf-8")
