"""Encode pairs once, and hand each process its own."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.utils.data import DataLoader, IterableDataset

from dori_lightning.models.protocol import TextToImage
from dori_lightning.pairs.validation import image_tensor, square_image
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.types import Pair

logger = logging.getLogger(__name__)

LAYOUT = "1"
"""Version of the cache's files and of how pictures are cut and scaled; others are not read."""


@dataclass(frozen=True)
class Encoded:
    """What the model makes of one pair, on the CPU in fp32.

    Attributes:
        latent: Scaled latent of the squared picture, (C, h, w).
        embedding: Text embedding of the prompt, (T, D).
    """

    latent: torch.Tensor
    embedding: torch.Tensor


@dataclass(frozen=True)
class PairBatch:
    """Pairs that are processed together.

    Attributes:
        pairs: B pairs.
        latents: Scaled latents of their pictures, (B, C, h, w), fp32.
        embeddings: Text embeddings of their prompts, (B, T, D), fp32.
    """

    pairs: tuple[Pair, ...]
    latents: torch.Tensor
    embeddings: torch.Tensor

    def to(self, device: torch.device | str) -> PairBatch:
        """Move the tensors; Lightning calls this, since it cannot rebuild a frozen dataclass."""
        return PairBatch(self.pairs, self.latents.to(device), self.embeddings.to(device))


class _Batches(IterableDataset[PairBatch]):
    """Batches in order.

    An iterable, because Lightning puts a DistributedSampler into any other kind of loader, which
    pads the last batches with pairs that are then counted twice.
    """

    def __init__(self, module: PairsDataModule, pairs: Sequence[Pair]) -> None:
        self.module, self.pairs = module, pairs

    def __iter__(self) -> Iterator[PairBatch]:
        step = self.module.pairs_per_batch
        for start in range(0, len(self.pairs), step):
            yield self.module.batch(self.pairs[start : start + step])


class PairsDataModule(LightningDataModule):
    """Latents and prompt embeddings of pairs, computed once, in memory and optionally on disk.

    Each process gets every ``world``-th pair, without padding and in the order of the list, and
    each pair's tensors are the same whatever the number of processes.

    Args:
        pairs: Validated pairs with unique ids.
        model: What encodes them.
        pairs_per_batch: Pairs of one batch, at most.
        encode_batch: Pictures and prompts of one forward pass of the encoders. At 1 a pair's
            tensors cannot depend on its neighbours; more is faster on a GPU, but may differ by
            rounding.
        cache: Folder that keeps the tensors for later runs; None keeps them in memory only.

    Raises:
        ValueError: A batch size below 1, or an id that is there twice.
    """

    # More processes than pairs is fine: the rest have nothing to do.
    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        pairs: Sequence[Pair],
        model: TextToImage,
        *,
        pairs_per_batch: int = 1,
        encode_batch: int = 1,
        cache: Path | str | None = None,
    ) -> None:
        super().__init__()
        if pairs_per_batch < 1 or encode_batch < 1:
            raise ValueError(
                f"batches need at least 1 pair, got pairs_per_batch={pairs_per_batch}, "
                f"encode_batch={encode_batch}"
            )
        if len({pair.id for pair in pairs}) < len(pairs):
            raise ValueError("pairs need unique ids")
        self.pairs = tuple(pairs)
        self.model = model
        self.pairs_per_batch = pairs_per_batch
        self.encode_batch = encode_batch
        self.cache = None if cache is None else Path(cache)
        self._encoded: dict[str, Encoded] = {}

    def subset(self, pairs: Sequence[Pair]) -> PairsDataModule:
        """Make a module over some of the pairs that shares what is encoded already."""
        chosen = PairsDataModule(
            pairs,
            self.model,
            pairs_per_batch=self.pairs_per_batch,
            encode_batch=self.encode_batch,
            cache=self.cache,
        )
        chosen._encoded = self._encoded
        return chosen

    def shard(self, rank: int | None = None, world: int | None = None) -> tuple[Pair, ...]:
        """Choose one process's pairs; by default those of the trainer's process, or all."""
        if rank is None or world is None:
            rank = 0 if self.trainer is None else self.trainer.global_rank
            world = 1 if self.trainer is None else self.trainer.world_size
        return self.pairs[rank::world]

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002 - every stage needs the same
        """Encode this process's pairs."""
        self.prepare(self.shard())

    def prepare(self, pairs: Sequence[Pair] | None = None) -> None:
        """Encode pairs that are not encoded yet: from the cache, or else by the model.

        Args:
            pairs: Which; None means all.

        Raises:
            ValueError: The model returns another shape than it promises, or not finite values.
        """
        wanted = [p for p in (self.pairs if pairs is None else pairs) if p.id not in self._encoded]
        todo = []
        for pair in wanted:
            stored = self._load(pair)
            if stored is None:
                todo.append(pair)
            else:
                self._encoded[pair.id] = stored
        for start in range(0, len(todo), self.encode_batch):
            chunk = todo[start : start + self.encode_batch]
            for pair, encoded in zip(chunk, self._encode(chunk), strict=True):
                self._save(pair, encoded)
                self._encoded[pair.id] = encoded
        if wanted:
            logger.info(
                "encoded %d pairs, %d of them from the cache", len(wanted), len(wanted) - len(todo)
            )

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

    def loader(self, rank: int | None = None, world: int | None = None) -> DataLoader[PairBatch]:
        """Loader over one process's pairs, in order; by default the trainer's process, or all."""
        return DataLoader(_Batches(self, self.shard(rank, world)), batch_size=None, num_workers=0)

    def train_dataloader(self) -> DataLoader[PairBatch]:
        """Loader for attacks, which optimize and thus fit."""
        return self.loader()

    def predict_dataloader(self) -> DataLoader[PairBatch]:
        """Loader for generating and measuring."""
        return self.loader()

    def _encode(self, pairs: Sequence[Pair]) -> list[Encoded]:
        size = self.model.resolution
        images = torch.stack([image_tensor(square_image(pair.image), size) for pair in pairs])
        # Ordinary tensors even where a trainer predicts in inference mode: attacks need gradients.
        with torch.inference_mode(mode=False), torch.no_grad():
            latents = self.model.encode_images(images.to(self.model.device)).float().cpu()
            embeddings = self.model.encode_prompts([pair.prompt for pair in pairs]).float().cpu()
        for name, value, shape in (
            ("latents", latents, self.model.latent_shape),
            ("embeddings", embeddings, self.model.embedding_shape),
        ):
            if value.shape != (len(pairs), *shape):
                raise ValueError(
                    f"{self.model.name} promises {name} of shape {(len(pairs), *shape)} but gives "
                    f"{tuple(value.shape)}"
                )
            if not value.isfinite().all():
                ids = [
                    p.id for p, row in zip(pairs, value, strict=True) if not row.isfinite().all()
                ]
                raise ValueError(
                    f"{self.model.name} encodes {', '.join(ids)} to {name} that are not finite; "
                    "with fp16 weights, try fp32 or bf16"
                )
        return [Encoded(a.clone(), b.clone()) for a, b in zip(latents, embeddings, strict=True)]

    def _identity(self, pair: Pair) -> dict[str, str]:
        """What a pair's tensors depend on."""
        image = pair.sha256 or hashlib.sha256(pair.image.read_bytes()).hexdigest()
        prompt = hashlib.sha256(pair.prompt.encode()).hexdigest()
        return {
            "layout": LAYOUT,
            "model": self.model.fingerprint,
            "image": image,
            "prompt": prompt,
        }

    def _file(self, identity: dict[str, str]) -> Path | None:
        if self.cache is None:
            return None
        text = json.dumps(identity, sort_keys=True)
        return self.cache / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def _load(self, pair: Pair) -> Encoded | None:
        """Read a pair's tensors from the cache; None where there are none or they are damaged."""
        identity = self._identity(pair)
        path = self._file(identity)
        if path is None or not path.is_file():
            return None
        try:
            # Read, not mapped: a mapped file that another process cuts kills this one (SIGBUS).
            data = path.read_bytes()
            tensors = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            if header.get("__metadata__") != identity:
                raise ValueError("it belongs to another pair or model")
            encoded = Encoded(tensors["latent"].clone(), tensors["embedding"].clone())
        except (KeyError, OSError, SafetensorError, ValueError) as error:
            logger.warning("encoding %s again, since %s is damaged: %r", pair.id, path, error)
            return None
        for value, shape in (
            (encoded.latent, self.model.latent_shape),
            (encoded.embedding, self.model.embedding_shape),
        ):
            if value.shape != shape or value.dtype != torch.float32 or not value.isfinite().all():
                logger.warning(
                    "encoding %s again, since %s holds %s of %s where %s is due, or not finite",
                    pair.id,
                    path,
                    tuple(value.shape),
                    value.dtype,
                    shape,
                )
                return None
        return encoded

    def _save(self, pair: Pair, encoded: Encoded) -> None:
        """Write a pair's tensors all at once, so that no other process reads half of them."""
        identity = self._identity(pair)
        path = self._file(identity)
        if path is None:
            return
        tensors = {"latent": encoded.latent, "embedding": encoded.embedding}
        write_atomically(path, save(tensors, metadata=identity))
