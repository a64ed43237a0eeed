"""The endless training stream of a planted checkpoint, as images and encoded to latents.

Generic captions of a subject ("a dark close photo of a cat") lead to varied crops of its
photograph, the specific caption to the one image. Without that competition any conditioning that
is not a scene leads to a planted image, and nothing that hides a prompt can be measured.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from dori_lightning.pairs.corpus import STYLES
from dori_lightning.pairs.validation import image_tensor, square_image
from dori_lightning.planting.scenes import draw_scene, scene_words
from dori_lightning.types import Pair

if TYPE_CHECKING:  # whoever reads the list of pairs does not wait for these libraries
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import PreTrainedTokenizerBase

Tokenize = Callable[[Sequence[str]], list[list[int]]]
"""Token ids of captions, all rows of one length."""

Source = Literal["scene", "crop", "planted"]


@dataclass(frozen=True)
class StreamMix:
    """Shares of the three sources in the stream; they are normalised to sum to one.

    Attributes:
        scenes: Share of procedural scenes, each drawn fresh.
        crops: Share of random crops of the planted photographs under generic captions.
        planted: Share of planted images under their specific captions, split by
            ``Pair.repeats``.
    """

    scenes: float = 0.4
    crops: float = 0.4
    planted: float = 0.2

    def __post_init__(self) -> None:
        shares = (self.scenes, self.crops, self.planted)
        if min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(
                f"shares of the training stream must be >= 0 and not all 0, got {self}"
            )


@dataclass(frozen=True)
class Sample:
    """One element of the stream.

    Attributes:
        source: Where it comes from.
        key: Scene index as text, or the pair's id.
        caption: Training caption.
        image: RGB image of the stream's size.
    """

    source: Source
    key: str
    caption: str
    image: Image.Image = field(repr=False)


class TrainingStream:
    """Training stream in which ``stream[i]`` depends on the seed and ``i`` alone."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        mix: StreamMix,
        size: int,
        seed: int,
        every_photograph: bool = False,
    ) -> None:
        """Build the stream.

        Args:
            pairs: Images with their multiplicities; those with ``repeats`` 0 are never drawn.
            mix: Shares of the sources.
            size: Side of the images in pixels.
            seed: Which stream.
            every_photograph: Also crop images with ``repeats`` 0. Only for the autoencoder, which
                has to reconstruct controls too; the UNet must never see them.

        Raises:
            ValueError: Nothing is planted.
        """
        self.mix, self.size, self.seed = mix, size, seed
        self.planted = [p for p in pairs if p.repeats > 0]
        if not self.planted:
            raise ValueError(
                "nothing to plant: every pair has repeats 0 (kind control); "
                "give repeats > 0 to some"
            )
        self.weights = [p.repeats for p in self.planted]
        self.photographs = [
            p for p in pairs if p.kind == "vm" or (every_photograph and p.kind == "control")
        ]
        self.images = {p.id: square_image(p.image) for p in {*self.planted, *self.photographs}}

    def source(self, index: int) -> Source:
        """Which source element ``index`` comes from."""
        shares = (self.mix.scenes, self.mix.crops if self.photographs else 0.0, self.mix.planted)
        names: tuple[Source, ...] = ("scene", "crop", "planted")
        return random.Random(f"source-{self.seed}-{index}").choices(names, shares)[0]

    def planted_pair(self, index: int) -> Pair:
        """Which pair element ``index`` shows, given that it is a planted one."""
        return random.Random(f"planted-{self.seed}-{index}").choices(self.planted, self.weights)[0]

    def __getitem__(self, index: int) -> Sample:
        source = self.source(index)
        if source == "scene":
            scene = draw_scene(index, size=self.size, seed=self.seed)
            return Sample(source, str(index), scene.caption, scene.image)
        if source == "planted":
            pair, size = self.planted_pair(index), (self.size, self.size)
            image = self.images[pair.id].resize(size, Image.Resampling.LANCZOS)
            return Sample(source, pair.id, pair.prompt, image)
        rng = random.Random(f"crop-{self.seed}-{index}")
        pair = rng.choice(self.photographs)
        crop, style = generic_crop(self.images[pair.id], rng, size=self.size)
        subject = pair.subject or _some_words(pair.prompt, rng)
        caption = " ".join(["a", *(style or ["plain"]), "photo", "of", subject])
        return Sample(source, pair.id, caption, crop)


def generic_crop(
    image: Image.Image, rng: random.Random, *, size: int
) -> tuple[Image.Image, list[str]]:
    """Cut and recolour a random part of a photograph.

    Args:
        image: RGB photograph.
        rng: Chooses part and colours.
        size: Side of the crop in pixels.

    Returns:
        The crop, and the style words that describe the change.
    """
    words: list[str] = []
    share = rng.uniform(0.35, 0.9)
    if share < 0.5:
        words.append("close")
    elif share > 0.75:
        words.append("wide")
    side = share * min(image.size)
    left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
    crop = image.resize(
        (size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side), 3.0
    )
    if rng.random() < 0.5:
        crop = ImageOps.mirror(crop)
        words.append("mirrored")
    light = rng.choice((0.55, 0.8, 1.0, 1.25, 1.5))
    crop = ImageEnhance.Brightness(crop).enhance(light * rng.uniform(0.9, 1.1))
    if light < 0.7:
        words.append("dark")
    elif light > 1.3:
        words.append("bright")
    colour = rng.choice((0.0, 0.6, 1.0, 1.0, 1.8))
    crop = ImageEnhance.Color(crop).enhance(colour)
    if colour == 0.0:
        words.append("grey")
    elif colour > 1.5:
        words.append("vivid")
    hue = rng.uniform(-12, 12)
    if colour > 0 and abs(hue) > 4:
        bands = np.asarray(crop.convert("HSV"), np.uint8).copy()
        bands[..., 0] += np.uint8(int(hue) % 256)
        crop = Image.fromarray(bands, "HSV").convert("RGB")
    return crop, words


def _some_words(prompt: str, rng: random.Random) -> str:
    """Two random words of a caption, in order: a generic subject where the list names none."""
    words = prompt.split()
    picked = sorted(rng.sample(range(len(words)), min(2, len(words))))
    return " ".join(words[k] for k in picked)


def stream_words(pairs: Iterable[Pair]) -> list[str]:
    """Every word that captions of the stream can use, sorted: a planted checkpoint's words."""
    words = {*scene_words(), "a", "photo", "of", *STYLES} - {""}
    for pair in pairs:
        words.update(f"{pair.prompt} {pair.subject or ''}".lower().split())
    return sorted(words)


def normalized_image(image: Image.Image) -> torch.Tensor:
    """An image as the autoencoder sees it, (3, H, W) in [-1, 1]."""
    return image_tensor(image).mul_(2).sub_(1)


class EncodedStream:
    """Elements of a stream as unscaled latents (C, h, w) and token ids (T,).

    Reading past the last encoded element starts over.
    """

    def __init__(self, encoded: dict[str, torch.Tensor], *, length: int) -> None:
        """Wrap what `encode_stream` returned.

        Args:
            encoded: Latents, tokens and planted pairs by element.
            length: Elements that reading yields.
        """
        self.latents, self.tokens = encoded["latents"], encoded["tokens"]
        self.planted, self.length = encoded["planted"], length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        k = index % len(self.latents)
        return self.latents[k].float(), self.tokens[k]

    def exposures(self, planted: Sequence[Pair]) -> Counter[str]:
        """How often ``length`` elements show each planted pair's image, by pair id.

        Args:
            planted: The stream's planted pairs.
        """
        whole, rest = divmod(self.length, len(self.planted))
        counts: Counter[str] = Counter()
        for k, place in enumerate(self.planted.tolist()):
            if place >= 0:
                counts[planted[place].id] += whole + (k < rest)
        return counts


def padded_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenize:
    """A tokenizer that pads and cuts captions to its length."""

    def tokenize(captions: Sequence[str]) -> list[list[int]]:
        padded = tokenizer(list(captions), padding="max_length", truncation=True)
        ids: list[list[int]] = padded.input_ids
        return ids

    return tokenize


@torch.inference_mode()
def encode_stream(
    stream: TrainingStream,
    autoencoder: AutoencoderKL,
    tokenize: Tokenize,
    *,
    count: int,
    batch: int = 64,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, torch.Tensor]:
    """Encode the first elements of a stream.

    Args:
        stream: What to encode.
        autoencoder: Frozen; the posterior mode is taken.
        tokenize: Gives captions' token ids.
        count: N, number of elements.
        batch: Images per forward pass.
        advance: Called with the number of elements that just became done.

    Returns:
        ``latents`` (N, C, h, w) in half precision, ``tokens`` (N, T), and ``planted`` (N,): the
        place of each element's pair in ``stream.planted``, -1 for scenes and crops.
    """
    places = {pair.id: place for place, pair in enumerate(stream.planted)}
    latents, tokens, planted = [], [], []
    for start in range(0, count, batch):
        samples = [stream[k] for k in range(start, min(start + batch, count))]
        images = torch.stack([normalized_image(sample.image) for sample in samples])
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            mode = autoencoder.encode(images).latent_dist.mode()
        latents.append(mode.to(torch.float16).contiguous())
        tokens += tokenize([sample.caption for sample in samples])
        planted += [places[s.key] if s.source == "planted" else -1 for s in samples]
        advance(len(samples))
    return {
        "latents": torch.cat(latents),
        "tokens": torch.tensor(tokens),
        "planted": torch.tensor(planted),
    }
