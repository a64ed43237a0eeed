"""Anchors and surrogates: what a model shall generate in place of a memorized image.

Anchors are images of prompts near a memorized caption, with these prompts (Concept Ablation,
SISS). Surrogates are images alone, from a pruned model, such prompts or the corpus (adversarial
fine-tuning). None of either may resemble *any* image to forget: a pruned model that still
memorizes gives "surrogates" that are the image itself or another memorized one, and a mitigation
that is trained on those looks good by the numbers and is none.

Reference: Ablating Concepts in Text-to-Image Diffusion Models (Kumari et al., 2023), section on
memorized images; there a language model paraphrases the caption, here fixed rules do.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dori_lightning.mitigations.base import (
    Context,
    CostEstimate,
    Evaluations,
    Mitigation,
    edit_key,
    require,
    require_at_least_one,
)
from dori_lightning.mitigations.edits import Edit
from dori_lightning.models.generation import generation_noise
from dori_lightning.models.progress import encode_prompts
from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.pairs.corpus import neighbour_prompts
from dori_lightning.runtime.cache import TENSORS, Cache, Codec, Tensors
from dori_lightning.runtime.logging import progress_bar, with_progress
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
        reused: UNet evaluations that others spent on them.
    """

    latents: dict[str, torch.Tensor]
    embeddings: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]
    notes: dict[str, Any]
    reused: int = 0

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
) -> Anchors:
    """Generate from neighbours of each pair's prompt and keep what does not replicate.

    Latents are kept as the sampler leaves them, which saves the published detour through the
    autoencoder. Augmentation by scale ("a far away ...") is left out.

    Each pair's images are kept beside the edits: all mitigations of a sweep with these settings
    have the same anchors, and share the work where they run at the same time.

    Raises:
        InputError: Not even an ordinary prompt's image passes.
    """
    key = edit_key(settings, model, pairs, context)
    cache, note = Cache(context.folder / "anchors" / key), {"settings": key}
    reused = 0

    def candidates(texts: Mapping[str, torch.Tensor], images: int) -> dict[str, Tensors]:
        """Name to ``latents`` (P, K, C, h, w) of P prompts' K images, ``similarity`` (P, K, N)."""
        each = next(iter(texts.values())).shape[0] * images
        with progress_bar("anchors", len(texts) * each) as advance:

            def generate(name: str) -> Tensors:
                return _generate_anchors(
                    model, context, pairs, texts[name], images, name=name, advance=advance
                )

            def reuse(_: str) -> None:
                nonlocal reused
                reused += Evaluations.of_images(each, context.sampling).forward
                advance(each)

            return cache.share(dict.fromkeys(texts, note), generate, TENSORS, found=reuse)

    limit = settings.max_similarity
    latents: dict[str, torch.Tensor] = {}
    embeddings: dict[str, torch.Tensor] = {}
    targets: dict[str, torch.Tensor] = {}
    without: list[str] = []
    texts: dict[str, torch.Tensor] = {}
    for pair in with_progress("anchors: prompts", pairs):
        prompts = neighbour_prompts(pair, settings.prompts, seed=context.seed, split="calibration")
        texts[pair.id] = model.encode_prompts(prompts).cpu()
    found = candidates(texts, settings.images)
    for k, pair in enumerate(pairs):
        images, similarity = (found[pair.id].pop(name) for name in ("latents", "similarity"))
        rate = (similarity[..., k] > limit).float().mean(1)
        good = vetted(similarity, limit) & (rate <= settings.anchor_rate)[:, None]
        targets[pair.id] = texts[pair.id][rate >= settings.target_rate]
        if good.any():
            rows, _ = good.nonzero(as_tuple=True)
            latents[pair.id], embeddings[pair.id] = images[good], texts[pair.id][rows]
        else:
            without.append(pair.id)
    if without:
        log.warning("no anchor for %s: ordinary images instead", ", ".join(without))
        ordinary = context.prompts(model, "calibration", settings.ordinary).cpu()
        drawn = candidates({"+ordinary": ordinary}, 1)["+ordinary"]
        images, good = drawn["latents"], vetted(drawn["similarity"], limit)[:, 0]
        if not good.any():
            raise InputError(
                f"no anchor for {', '.join(without)}: even images of ordinary prompts resemble a "
                f"memorized one by more than {limit}\n"
                f"  where: mitigation.anchors.max_similarity\n"
                f"  fix:   raise it, or choose another metrics.decider"
            )
        for name in without:
            latents[name], embeddings[name] = images[good][:, 0], ordinary[good]
    notes = {
        "anchors": {name: len(rows) for name, rows in latents.items()},
        "further_targets": {name: len(rows) for name, rows in targets.items() if len(rows)},
        "ordinary_anchors": without,
    }
    return Anchors(latents, embeddings, targets, notes, reused)


def _generate_anchors(
    model: TextToImage,
    context: Context,
    pairs: Sequence[Pair],
    texts: torch.Tensor,
    images: int,
    *,
    name: str,
    advance: Callable[[int], None],
) -> Tensors:
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
        advance(len(denoised))
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
        evaluations: UNet evaluations that were spent on them.
        reused: The same where others spent them, else 0.
    """

    latents: dict[str, torch.Tensor]
    notes: dict[str, Any]
    evaluations: int
    reused: int = 0

    def draw(self, ids: Sequence[str], generator: torch.Generator) -> torch.Tensor:
        """Draw a surrogate for each of N pairs: latents (N, C, h, w)."""
        rows = zip(ids, draw_indices(self.latents, ids, generator), strict=True)
        return torch.stack([self.latents[name][k] for name, k in rows])


def _encode_surrogates(value: Surrogates, key: dict[str, str]) -> bytes:
    about = {"notes": value.notes, "evaluations": value.evaluations}
    return TENSORS.encode(value.latents, {**key, "about": json.dumps(about)})


def _decode_surrogates(path: Path) -> tuple[Surrogates, dict[str, str]]:
    latents, key = TENSORS.decode(path)
    return Surrogates(latents, **json.loads(key["about"])), key


SURROGATES: Codec[Surrogates] = Codec(TENSORS.suffix, _encode_surrogates, _decode_surrogates)
"""Latents by pair id; the rest is in the file's metadata."""


def find_surrogates(
    model: TextToImage,
    pairs: Sequence[Pair],
    context: Context,
    settings: SurrogateSettings,
) -> Surrogates:
    """Generate surrogates and refuse those that resemble any image to forget.

    Tried in turn, until a pair has enough: the source's model with the memorized prompt, the
    model as it is with neighbours of the prompt, one after the other, ordinary images of the
    corpus. They are kept beside the edits, for all mitigations of a sweep with these settings.

    Raises:
        RuntimeError: Not even an ordinary image passes, so the measure or its limit is wrong.
    """
    source = settings.source
    # found by all processes together, so not while others wait for the surrogates
    edit = None if source is None else context.find(source, model, pairs).edit
    key = edit_key(settings, model, pairs, context)
    reused: list[str] = []
    made = Cache(context.folder / "surrogates").share(
        {key: {"settings": key}},
        lambda _: _vetted_surrogates(model, pairs, context, settings, edit),
        SURROGATES,
        found=reused.append,
    )[key]
    return replace(made, reused=made.evaluations if reused else 0)


def _vetted_surrogates(
    model: TextToImage,
    pairs: Sequence[Pair],
    context: Context,
    settings: SurrogateSettings,
    edit: Edit | None,
) -> Surrogates:
    """Generate from the memorized prompts under ``edit``, then as ``find_surrogates`` says."""
    before = model.unet_evaluations
    kept: dict[str, list[torch.Tensor]] = {pair.id: [] for pair in pairs}
    accepted: Counter[str] = Counter()
    refused: Counter[str] = Counter()

    def vet(source: str, candidates: Mapping[str, torch.Tensor]) -> None:
        for name, images in with_progress("surrogates: compare", [*candidates.items()]):
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

    if edit is not None:
        with edit.applied(model):
            prompts = [context.data.encoded(pair).embedding for pair in pairs]
            candidates("mitigated", pairs, prompts)
    texts = {
        pair.id: neighbour_prompts(pair, NEIGHBOURS, seed=context.seed, split="calibration")
        for pair in short()
    }
    for k in range(NEIGHBOURS):
        if needy := short():
            near = [texts[pair.id][k] for pair in needy]
            rows = list(encode_prompts(model, near, "surrogates: prompts"))
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
    latents = {
        name: model.encode_images(torch.stack(images)).cpu()
        for name, images in with_progress("surrogates: encode", [*kept.items()])
    }
    notes = {"kept": dict(accepted), "refused": dict(refused)}
    return Surrogates(latents, notes, model.unet_evaluations - before)


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
