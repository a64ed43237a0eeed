"""Ordinary prompts and images as a model sees them, encoded when they are first wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dori_lightning.models.progress import encode_prompts
from dori_lightning.models.protocol import TextToImage
from dori_lightning.pairs.corpus import Corpus, Split
from dori_lightning.pairs.datamodule import LAYOUT
from dori_lightning.runtime.artifacts import content_hash
from dori_lightning.runtime.cache import TENSORS, Cache

ENCODED_AT_ONCE = 16
"""Elements whose images are in memory together."""


@dataclass(frozen=True)
class Encodings:
    """N ordinary prompts and images as the model sees them, fp32 on the CPU.

    Attributes:
        embeddings: Text embeddings (N, T, D).
        latents: Scaled latents (N, C, h, w).
    """

    embeddings: torch.Tensor
    latents: torch.Tensor


class EncodedCorpus:
    """The first elements of a corpus' split, each encoded when it is first asked for.

    Latents are kept in files, one an element, so whoever asks later, such as another job of a
    sweep, reads them. Embeddings of prompts take far more room than latents and one pass of the
    text encoder, so they are kept in memory alone. Every element is encoded by itself, so it is
    the same whoever asks first.

    Attributes:
        prompts: All N captions.
    """

    def __init__(
        self, corpus: Corpus, model: TextToImage, split: Split, count: int, *, cache: Cache
    ) -> None:
        """Check that the corpus has as many elements with images; nothing is encoded yet.

        Args:
            corpus: Where they come from.
            model: What encodes them.
            split: Which split.
            count: N, its first elements.
            cache: Where latents are kept.

        Raises:
            InputError: The corpus has fewer, or no images.
        """
        corpus.examples(split, count, model.resolution, only=())
        self.prompts = corpus.prompts(split, count)
        self._corpus, self._model, self._split = corpus, model, split
        self._cache = cache
        self._key: dict[str, str | int] = {
            "layout": LAYOUT,
            "model": model.fingerprint,
            "device": model.device.type,  # roundings differ
            "resolution": model.resolution,
            "corpus": corpus.identity,
            "split": split,
        }
        self._folder = content_hash(self._key)[:24]
        self._encoded: dict[int, Encodings] = {}

    def __len__(self) -> int:
        return len(self.prompts)

    def embeddings(self) -> torch.Tensor:
        """Text embeddings (N, T, D) of all prompts, fp32 on the CPU."""
        return encode_prompts(self._model, self.prompts, "ordinary prompts").cpu()

    def rows(
        self, places: Sequence[int], *, advance: Callable[[int], None] = lambda _: None
    ) -> Encodings:
        """Encodings of some elements.

        Args:
            places: Their places, from 0, at least one; a place may come twice.
            advance: Called with the number of elements that are there now, those of earlier calls
                too.

        Raises:
            ValueError: Latents are not finite.
        """
        model = self._model
        missing = [place for place in dict.fromkeys(places) if place not in self._encoded]
        advance(len(places) - len(missing))
        # the numbers of the weights' own precision, also where a fit computes in a mixed one
        with (
            torch.inference_mode(mode=False),
            torch.no_grad(),
            torch.autocast(model.device.type, enabled=False),
        ):
            for start in range(0, len(missing), ENCODED_AT_ONCE):
                part = missing[start : start + ENCODED_AT_ONCE]
                embeddings = model.encode_prompts([self.prompts[place] for place in part]).cpu()
                for place, *encoded in zip(part, embeddings, self._latents(part), strict=True):
                    self._encoded[place] = Encodings(*encoded)
                advance(len(part))
        rows = [self._encoded[place] for place in places]
        return Encodings(
            torch.stack([row.embeddings for row in rows]),
            torch.stack([row.latents for row in rows]),
        )

    def _latents(self, places: Sequence[int]) -> list[torch.Tensor]:
        """Latents (C, h, w) of some elements, out of the cache or encoded and kept there."""
        found = {
            place: self._cache.read(self._name(place), self._key, TENSORS) for place in places
        }
        missing = [place for place, stored in found.items() if stored is None]
        if missing:
            count, resolution = len(self), self._model.resolution
            images = self._corpus.examples(self._split, count, resolution, only=missing).images
            latents = self._model.encode_images(images).cpu()
            if not latents.isfinite().all():
                raise ValueError(
                    f"{self._model.name} encodes ordinary images to latents that are not finite; "
                    f"with fp16 weights, try fp32 or bf16"
                )
            for place, latent in zip(missing, latents, strict=True):
                stored = found[place] = {"latent": latent}
                self._cache.write(self._name(place), stored, self._key, TENSORS)
        return [stored["latent"] for stored in found.values() if stored is not None]

    def _name(self, place: int) -> str:
        """Name of an element's file, without suffix."""
        return f"{self._folder}/{place:06d}"
