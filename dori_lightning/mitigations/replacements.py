"""Anchors and surrogates: what a model shall generate in place of a memorized image.

Anchors are images of prompts near a memorized caption, with these prompts (Concept Ablation,
SISS). Surrogates are images alone, from a pruned model, such prompts or the corpus (adversarial
fine-tuning). None of either may resemble *any* image to forget: a pruned model that still
memorizes gives "surrogates" that are the image itself or another memorized one, and a mitigation
that is trained on those looks good by the numbers and is none.

Reference: Ablating Concepts in Text-to-Image Diffusion Models (Kumari et al., 2023), section on
memorized images; there a language model paraphrases the caption, here fixed rules do.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch

from dori_lightning.mitigations.base import (
    Context,
    CostEstimate,
    Evaluations,
    Mitigation,
    require,
    require_at_least_one,
)
from dori_lightning.models.generation import generation_noise
from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.pairs.corpus import neighbour_prompts
from dori_lightning.runtime.cache import TENSORS, Cache
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import InputError, Pair

log = logging.getLogger(__name__)

FIRST_SEED = 50_000
"""Generation seeds of candidate surrogates begin here, far from those of an audit's images."""

NEIGHBOURS = 3
"""Neighbours of a prompt that are tried for surrogates before ordinary images are taken."""


def vetted(similarity: torch.Tensor, max_similarity: float) -> torch.Tensor:
    """Which images (...,) resemble none of N pairs, by their similarities (..., N) to them."""
    return similarity.amax(-1) <= max_similarity


def draw_indices(
    sets: Mapping[str, Sized], ids: Sequence[str], generator: torch.Generator
) -> list[int]:
    """Draw an element of each pair's set, evenly."""
    return [int(torch.randint(len(sets[name]), (1,), generator=generator)) for name in ids]


@dataclass(frozen=True)
class AnchorSettings:
    """How anchors are found; the defaults are those of Concept Ablation with SSCD.

    Attributes:
        prompts: Neighbours of each pair's prompt that are tried.
        images: Images generated from each, with the run's sampler.
        max_similarity: Largest similarity, by the deciding descriptor, that an anchor may have
            with any image to forget.
        anchor_rate: A prompt's images are anchors where at most this share of them is above
            ``max_similarity`` for its own pair.
        target_rate: A prompt with at least this share is to be forgotten like the pair's own.
        ordinary: Ordinary prompts whose images are the anchors of pairs that are left with none.
    """

    prompts: int = 20
    images: int = 10
    max_similarity: float = 0.5
    anchor_rate: float = 0.3
    target_rate: float = 0.6
    ordinary: int = 32

    def __post_init__(self) -> None:
        require_at_least_one(self, "prompts", "images", "ordinary", within="anchors.")
        limit, rates = self.max_similarity, (self.anchor_rate, self.target_rate)
        require(0 < limit < 1, "anchors.max_similarity must be in (0, 1)", limit)
        require(0 <= rates[0] < rates[1], "anchors needs 0 <= anchor_rate < target_rate", rates)

    def estimate_cost(self, sampling: Sampling, pairs: int, *, training: int) -> CostEstimate:
        """Estimate what finding the anchors of a number of pairs takes, and then ``training``."""
        images = Evaluations.of_images(pairs * self.prompts * self.images, sampling)
        return CostEstimate(images + Evaluations(training=training), stored_weights=1.0)


@dataclass(frozen=True)
class Anchors:
    """Images that stand in for memorized ones, with their prompts, on the CPU.

    Attributes:
        latents: Pair id to latents (K, C, h, w), K at least 1.
        embeddings: Pair id to the embeddings (K, T, D) of the prompts that they were made from.
        targets: Pair id to the embeddings (R, T, D) of prompts that bring the image back too;
            R may be 0.
        notes: How many there are, and which pairs have ordinary images; plain values.
    """

    latents: dict[str, torch.Tensor]
    embeddings: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]
    notes: dict[str, Any]

    def draw(
        self, ids: Sequence[str], generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw an anchor for each of N pairs: latents (N, C, h, w) and embeddings (N, T, D)."""
        rows = list(zip(ids, draw_indices(self.latents, ids, generator), strict=True))
        return (
            torch.stack([self.latents[name][k] for name, k in rows]),
            torch.stack([self.embeddings[name][k] for name, k in rows]),
        )


def find_anchors(
    model: TextToImage,
    pairs: Sequence[Pair],
    context: Context,
    settings: AnchorSettings,
    *,
    key: str,
) -> Anchors:
    """Generate from neighbours of each pair's prompt and keep what does not replicate.

    Latents are kept as the sampler leaves them, which saves the published detour through the
    autoencoder. Augmentation by scale ("a far away ...") is left out.

    Each pair's images are cached with the checkpoints of the fit of the edit's ``key``.

    Raises:
        InputError: Not even an ordinary prompt's image passes.
    """
    cache = Cache(context.scratch(key) / "anchors")

    def candidates(
        name: str, texts: torch.Tensor, images: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (P, K, C, h, w) of P prompts' K images, and their similarities (P, K, N)."""
        stored = cache.read(name, {"edit": key}, TENSORS)
        if stored is None:
            stored = _generate_anchors(model, context, pairs, texts, images, name=name)
            cache.write(name, stored, {"edit": key}, TENSORS)
        return stored["latents"], stored["similarity"]

    limit = settings.max_similarity
    latents: dict[str, torch.Tensor] = {}
    embeddings: dict[str, torch.Tensor] = {}
    targets: dict[str, torch.Tensor] = {}
    without: list[str] = []
    with progress_bar("anchors", len(pairs) * settings.prompts * settings.images) as advance:
        for k, pair in enumerate(pairs):
            prompts = neighbour_prompts(
                pair, settings.prompts, seed=context.seed, split="calibration"
            )
            texts = model.encode_prompts(prompts).cpu()
            images, similarity = candidates(pair.id, texts, settings.images)
            rate = (similarity[..., k] > limit).float().mean(1)
            good = vetted(similarity, limit) & (rate <= settings.anchor_rate)[:, None]
            targets[pair.id] = texts[rate >= settings.target_rate]
            if good.any():
                rows, _ = good.nonzero(as_tuple=True)
                latents[pair.id], embeddings[pair.id] = images[good], texts[rows]
            else:
                without.append(pair.id)
            advance(settings.prompts * settings.images)
    if without:
        log.warning("no anchor for %s: ordinary images instead", ", ".join(without))
        texts = model.encode_prompts(
            context.corpus.prompts("calibration", settings.ordinary)
        ).cpu()
        images, similarity = candidates("+ordinary", texts, 1)
        good = vetted(similarity, limit)[:, 0]
        if not good.any():
            raise InputError(
                f"no anchor for {', '.join(without)}: even images of ordinary prompts resemble a "
                f"memorized one by more than {limit}\n"
                f"  where: mitigation.anchors.max_similarity\n"
                f"  fix:   raise it, or choose another metrics.decider"
            )
        for name in without:
            latents[name], embeddings[name] = images[good][:, 0], texts[good]
    notes = {
        "anchors": {name: len(rows) for name, rows in latents.items()},
        "further_targets": {name: len(rows) for name, rows in targets.items() if len(rows)},
        "ordinary_anchors": without,
    }
    return Anchors(latents, embeddings, targets, notes)


def _generate_anchors(
    model: TextToImage,
    context: Context,
    pairs: Sequence[Pair],
    texts: torch.Tensor,
    images: int,
    *,
    name: str,
) -> dict[str, torch.Tensor]:
    """Generate some images from each of P embeddings and compare them with all pairs."""
    shape, count = model.latent_shape, len(texts) * images
    keys = [keyed_generator("anchor", context.seed, name, k) for k in range(count)]
    noise = torch.stack([torch.randn(shape, generator=key) for key in keys])
    rows, batch = texts.repeat_interleave(images, 0), context.sampling.batch
    latents, similarity = [], []
    for start in range(0, count, batch):
        part = slice(start, start + batch)
        denoised = model.denoise(rows[part], noise[part], context.sampling)
        decoded = model.decode_latents(denoised).cpu()
        similarity.append(context.references.similarities(decoded, pairs))
        latents.append(denoised.cpu())
    return {
        "latents": torch.cat(latents).view(len(texts), images, *shape),
        "similarity": torch.cat(similarity).view(len(texts), images, len(pairs)),
    }


@dataclass(frozen=True)
class SurrogateSettings:
    """Where surrogates come from.

    Attributes:
        source: Mitigation whose model generates them from the memorized prompts. Which one the
            paper used is unknown; any that hides most memorized images will do, since what it
            lets through is refused. None begins with neighbours of the prompts: cheaper, and
            better images where the pruned model generates nothing worth showing.
        per_pair: Surrogates of each pair.
        candidates: Most images generated for a pair, ``per_pair`` at a time, before the next
            source of surrogates is tried.
        max_similarity: Largest similarity, by the deciding descriptor, that a surrogate may have
            with *any* image to forget.
    """

    source: Mitigation | None
    per_pair: int = 4
    candidates: int = 8
    max_similarity: float = 0.5

    def __post_init__(self) -> None:
        numbers, limit = (self.per_pair, self.candidates), self.max_similarity
        require(
            1 <= numbers[0] <= numbers[1], "surrogates needs 1 <= per_pair <= candidates", numbers
        )
        require(0 < limit < 1, "surrogates.max_similarity must be in (0, 1)", limit)


@dataclass(frozen=True)
class Surrogates:
    """Images to show in place of memorized ones, on the CPU.

    Attributes:
        latents: Pair id to scaled latents (S, C, h, w), S at least 1.
        notes: How many came from where and how many were refused; plain values.
    """

    latents: dict[str, torch.Tensor]
    notes: dict[str, Any]

    def draw(self, ids: Sequence[str], generator: torch.Generator) -> torch.Tensor:
        """Draw a surrogate for each of N pairs: latents (N, C, h, w)."""
        rows = zip(ids, draw_indices(self.latents, ids, generator), strict=True)
        return torch.stack([self.latents[name][k] for name, k in rows])


def find_surrogates(
    model: TextToImage,
    pairs: Sequence[Pair],
    context: Context,
    settings: SurrogateSettings,
) -> Surrogates:
    """Generate surrogates and refuse those that resemble any image to forget.

    Tried in turn, until a pair has enough: the source's model with the memorized prompt, the
    model as it is with neighbours of the prompt, one after the other, ordinary images of the
    corpus.

    Raises:
        RuntimeError: Not even an ordinary image passes, so the measure or its limit is wrong.
    """
    kept: dict[str, list[torch.Tensor]] = {pair.id: [] for pair in pairs}
    accepted: Counter[str] = Counter()
    refused: Counter[str] = Counter()

    def vet(source: str, candidates: Mapping[str, torch.Tensor]) -> None:
        for name, images in candidates.items():
            similarity = context.references.similarities(images, pairs)
            good = vetted(similarity, settings.max_similarity)
            chosen = list(images[good][: settings.per_pair - len(kept[name])])
            kept[name] += chosen
            accepted[source] += len(chosen)
            refused[source] += int((~good).sum())

    def short() -> list[Pair]:
        return [pair for pair in pairs if len(kept[pair.id]) < settings.per_pair]

    def candidates(source: str, needy: Sequence[Pair], rows: Sequence[torch.Tensor]) -> None:
        """Generate for pairs that are short of surrogates, no more than they need."""
        left = list(zip(needy, rows, strict=True))
        for first in range(0, settings.candidates, settings.per_pair):
            left = [(p, row) for p, row in left if len(kept[p.id]) < settings.per_pair]
            if not left:
                break
            seeds = range(first, min(first + settings.per_pair, settings.candidates))
            own, embeddings = zip(*left, strict=True)
            vet(source, _generate(model, context, own, embeddings, seeds))

    if settings.source is not None:
        edit = context.find(settings.source, model, pairs).edit
        with edit.applied(model):
            prompts = [context.data.encoded(pair).embedding for pair in pairs]
            candidates("mitigated", pairs, prompts)
    texts = {
        pair.id: neighbour_prompts(pair, NEIGHBOURS, seed=context.seed, split="calibration")
        for pair in short()
    }
    for k in range(NEIGHBOURS):
        if needy := short():
            rows = list(model.encode_prompts([texts[pair.id][k] for pair in needy]))
            candidates("neighbour", needy, rows)
    if needy := short():
        count = settings.candidates * len(needy)
        ordinary = context.corpus.examples("calibration", count, model.resolution).images
        vet("ordinary", {pair.id: ordinary[k :: len(needy)] for k, pair in enumerate(needy)})
    empty = [name for name, images in kept.items() if not images]
    if empty:
        raise RuntimeError(
            f"no surrogate for {', '.join(empty)}: even ordinary images resemble a memorized "
            f"one by more than {settings.max_similarity}; raise "
            f"mitigation.surrogates.max_similarity or choose another metrics.decider"
        )
    log.info("surrogates: kept %s, refused %s", dict(accepted), dict(refused))
    latents = {name: model.encode_images(torch.stack(rows)).cpu() for name, rows in kept.items()}
    return Surrogates(latents, {"kept": dict(accepted), "refused": dict(refused)})


def _generate(
    model: TextToImage,
    context: Context,
    pairs: Sequence[Pair],
    embeddings: Sequence[torch.Tensor],
    seeds: Sequence[int],
) -> dict[str, torch.Tensor]:
    """Generate an image for each seed from each pair's embedding (T, D)."""
    noise = torch.stack(
        [generation_noise(FIRST_SEED + seed, model.latent_shape) for seed in seeds]
    )
    with progress_bar("surrogates", len(pairs) * len(seeds)) as advance:
        images = model.generate(
            torch.stack(list(embeddings)).repeat_interleave(len(seeds), 0),
            noise.repeat(len(pairs), 1, 1, 1),
            replace(context.sampling, batch=min(context.sampling.batch, 64)),
            pair_ids=[pair.id for pair in pairs for _ in seeds],
            advance=advance,
        ).cpu()
    return dict(zip((p.id for p in pairs), torch.split(images, len(seeds)), strict=True))
