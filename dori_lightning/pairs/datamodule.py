"""Encode pairs once, and serve them in batches."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from dori_lightning.models.protocol import TextToImage
from dori_lightning.pairs.validation import image_tensor, square_image
from dori_lightning.runtime.artifacts import content_hash
from dori_lightning.runtime.cache import TENSORS, Cache, DamagedError, Tensors
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.types import Pair

logger = logging.getLogger(__name__)

LAYOUT = "2"
"""Version of the cache's files and of how images are cut and scaled; others are not read."""


@dataclass(frozen=True)
class Encoded:
    """What the model makes of one pair, on the CPU in fp32.

    Attributes:
        latent: Scaled latent of the squared image, (C, h, w).
        embedding: Text embedding of the prompt, (T, D).
    """

    latent: torch.Tensor
    embedding: torch.Tensor


@dataclass(frozen=True)
class PairBatch:
    """Pairs that are processed together.

    Attributes:
        pairs: B pairs.
        latents: Scaled latents of their images, (B, C, h, w), fp32.
        embeddings: Text embeddings of their prompts, (B, T, D), fp32.
    """

    pairs: tuple[Pair, ...]
    latents: torch.Tensor
    embeddings: torch.Tensor


def image_hash(pair: Pair) -> str:
    """SHA-256 of a pair's image file."""
    return pair.sha256 or hashlib.sha256(pair.image.read_bytes()).hexdigest()


class PairsDataModule(LightningDataModule):
    """Latents and prompt embeddings of pairs, computed once, in memory and optionally on disk.

    Each pair's tensors are the same whatever the number of processes, and each process serves the
    batches that it was given.

    Args:
        pairs: Validated pairs with unique ids.
        model: What encodes them.
        cache: Folder that keeps the tensors for later runs; None keeps them in memory only.

    Raises:
        ValueError: An id is there twice.
    """

    def __init__(
        self, pairs: Sequence[Pair], model: TextToImage, *, cache: Path | str | None = None
    ) -> None:
        super().__init__()
        if len({pair.id for pair in pairs}) < len(pairs):
            raise ValueError("pairs need unique ids")
        self.pairs = tuple(pairs)
        self.model = model
        self.cache = None if cache is None else Cache(Path(cache))
        self._codec = TENSORS.mapped(vars, self._checked)
        self._encoded: dict[str, Encoded] = {}
        self._batches: IterableDataset[Any] | None = None

    def with_pairs(self, pairs: Sequence[Pair]) -> PairsDataModule:
        """Other pairs with the same model and cache."""
        folder = None if self.cache is None else self.cache.folder
        return PairsDataModule(pairs, self.model, cache=folder)

    def serve(self, batches: IterableDataset[Any]) -> PairsDataModule:
        """Serve these batches of pairs to a trainer, in order, on this process.

        An iterable dataset, because Lightning puts a DistributedSampler into the loader of any
        other kind, which pads the last batches with pairs that are then counted twice.
        """
        self._batches = batches
        return self

    def predict_dataloader(self) -> DataLoader[Any]:
        """Loader over the batches that this process serves."""
        assert self._batches is not None, "serve() says which batches"
        return DataLoader(self._batches, batch_size=None, num_workers=0)

    def prepare(self, pairs: Sequence[Pair] | None = None) -> None:
        """Encode pairs that are not encoded yet: from the cache, or else by the model.

        Args:
            pairs: Which; None means all.

        Raises:
            ValueError: The model returns another shape than it promises, or not finite values.
        """
        missing = [
            p for p in (self.pairs if pairs is None else pairs) if p.id not in self._encoded
        ]
        if not missing:
            return
        names = {content_hash(self._key(pair)): pair for pair in missing}
        cached: list[str] = []
        with progress_bar("encode pairs", len(names) if len(names) > 1 else 0) as advance:

            def encode(name: str) -> Encoded:
                encoded = self._encode(names[name])
                advance(1)
                return encoded

            def reuse(name: str) -> None:
                cached.append(name)
                advance(1)

            if self.cache is None:
                found = {name: encode(name) for name in names}
            else:
                keys = {name: self._key(pair) for name, pair in names.items()}
                found = self.cache.share(keys, encode, self._codec, found=reuse)
        # pairs of one image and prompt have one file
        for pair in missing:
            self._encoded[pair.id] = found[content_hash(self._key(pair))]
        logger.info("encoded %d pairs, %d of them from the cache", len(missing), len(cached))

    def encoded(self, pair: Pair) -> Encoded:
        """Look up one pair's tensors, encoding them if need be."""
        self.prepare([pair])
        return self._encoded[pair.id]

    def batch(self, pairs: Sequence[Pair]) -> PairBatch:
        """Stack pairs into a batch, in their order."""
        self.prepare(pairs)
        rows = [self._encoded[pair.id] for pair in pairs]
        return PairBatch(
            pairs=tuple(pairs),
            latents=torch.stack([row.latent for row in rows]),
            embeddings=torch.stack([row.embedding for row in rows]),
        )

    def _encode(self, pair: Pair) -> Encoded:
        """Encode one pair by itself, so that its tensors depend on no other."""
        image = image_tensor(square_image(pair.image), self.model.resolution)[None]
        # ordinary tensors even where a trainer predicts in inference mode: attacks need gradients
        with torch.inference_mode(mode=False), torch.no_grad():
            latents = self.model.encode_images(image.to(self.model.device)).float().cpu().clone()
            embeddings = self.model.encode_prompts([pair.prompt]).float().cpu().clone()
        for name, value, shape in (
            ("latents", latents, self.model.latent_shape),
            ("embeddings", embeddings, self.model.embedding_shape),
        ):
            if value.shape != (1, *shape):
                raise ValueError(
                    f"{self.model.name} promises {name} of shape {(1, *shape)} but gives "
                    f"{tuple(value.shape)}"
                )
            if not value.isfinite().all():
                raise ValueError(
                    f"{self.model.name} encodes {pair.id} to {name} that are not finite; "
                    "with fp16 weights, try fp32 or bf16"
                )
        return Encoded(latents[0], embeddings[0])

    def _key(self, pair: Pair) -> dict[str, str]:
        """What a pair's tensors depend on; its hash is the name of their file."""
        return {
            "layout": LAYOUT,
            "model": self.model.fingerprint,
            "side": str(self.model.resolution),
            "image": image_hash(pair),
            "prompt": hashlib.sha256(pair.prompt.encode()).hexdigest(),
        }

    def _checked(self, tensors: Tensors) -> Encoded:
        shapes = {"latent": self.model.latent_shape, "embedding": self.model.embedding_shape}
        for name, shape in shapes.items():
            value = tensors[name]
            if value.shape != shape or value.dtype != torch.float32 or not value.isfinite().all():
                raise DamagedError(
                    f"{name} is {value.dtype} of shape {tuple(value.shape)} where finite float32 "
                    f"of shape {shape} is due"
                )
        return Encoded(**tensors)
