"""Anchors: ordinary pictures near a memorized one, which the model shall show in its place.

Prompts near a memorized caption are generated from; those that bring back a memorized picture are
no anchors, and no picture is one that resembles *any* picture to forget.

Reference: Ablating Concepts in Text-to-Image Diffusion Models (Kumari et al., 2023), section on
memorized images; there a language model paraphrases the caption, here fixed rules do.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from dori_lightning.mitigations.base import (
    Context,
    Evaluations,
    Mitigation,
    edit_key,
    require_pairs,
)
from dori_lightning.mitigations.edits import WeightEdit
from dori_lightning.mitigations.finetuning import (
    FinetuneSettings,
    Finetuning,
    check_disk,
    finetune,
)
from dori_lightning.models.generation import generation_noise
from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.pairs.corpus import neighbour_prompts
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import InputError, Pair

# -------- anchors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnchorSettings:
    """How anchors are found; the defaults are those of Concept Ablation with SSCD.

    Attributes:
        prompts: Neighbours of each pair's prompt that are tried.
        images: Pictures generated from each, with the run's sampler.
        max_similarity: Largest similarity, by the deciding descriptor, that an anchor may have
            with any picture to forget.
        anchor_rate: A prompt is an anchor where at most this share of its pictures is above
            ``max_similarity`` for its own pair.
        target_rate: A prompt with at least this share is to be forgotten like the pair's own.
        ordinary: Ordinary prompts whose pictures are the anchors of pairs that are left with none.
    """

    prompts: int = 20
    images: int = 10
    max_similarity: float = 0.5
    anchor_rate: float = 0.3
    target_rate: float = 0.6
    ordinary: int = 32

    def __post_init__(self) -> None:
        for name in ("prompts", "images", "ordinary"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"mitigation.anchors.{name} must be >= 1, got {getattr(self, name)}"
                )
        if not 0 < self.max_similarity < 1:
            raise InputError(
                f"mitigation.anchors.max_similarity must be in (0, 1), got {self.max_similarity}"
            )
        if not 0 <= self.anchor_rate < self.target_rate:
            raise InputError(
                f"mitigation.anchors needs 0 <= anchor_rate < target_rate, got "
                f"{self.anchor_rate} and {self.target_rate}"
            )

    def estimate_work(self, sampling: Sampling, pairs: int) -> Evaluations:
        """Estimate what finding the anchors of a number of pairs takes."""
        return Evaluations.of_images(pairs * self.prompts * self.images, sampling)


@dataclass(frozen=True)
class Anchors:
    """Pictures that stand in for memorized ones, with their prompts, on the CPU.

    Attributes:
        latents: Pair id to latents (K, C, h, w), K at least 1.
        embeddings: Pair id to the embeddings (K, T, D) of the prompts that they were made from.
        targets: Pair id to the embeddings (R, T, D) of prompts that bring the picture back too;
            R may be 0.
        notes: How many there are, and which pairs have ordinary pictures; plain values.
    """

    latents: dict[str, torch.Tensor]
    embeddings: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]
    notes: dict[str, Any]

    def draw(
        self, ids: Sequence[str], generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw an anchor for each of N pairs: latents (N, C, h, w) and embeddings (N, T, D)."""
        rows = [
            int(torch.randint(len(self.latents[name]), (1,), generator=generator)) for name in ids
        ]
        return (
            torch.stack([self.latents[name][k] for name, k in zip(ids, rows, strict=True)]),
            torch.stack([self.embeddings[name][k] for name, k in zip(ids, rows, strict=True)]),
        )


class OnAnchors(Mitigation, Protocol):
    """A mitigation that fine-tunes on anchors."""

    @property
    def anchors(self) -> AnchorSettings:
        """How anchors are found."""
        ...

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        ...

    @property
    def finetune(self) -> FinetuneSettings:
        """Optimizer settings."""
        ...


def finetune_on_anchors(
    method: OnAnchors,
    make: Callable[[Anchors], Finetuning],
    model: TextToImage,
    pairs: Sequence[Pair],
    context: Context,
) -> WeightEdit:
    """Find anchors with the model as it is, then train.

    Args:
        method: The mitigation.
        make: Builds its module from the anchors.
        model: Whose denoiser is trained.
        pairs: Pairs to forget.
        context: What mitigations work with.
    """
    require_pairs(pairs, method.name)
    key = edit_key(method, model, pairs, context)
    check_disk(model, method.finetune, context, key=key)
    anchors = find_anchors(
        model, pairs, context, method.anchors, folder=context.scratch(key) / "anchors"
    )
    return finetune(
        lambda: make(anchors),
        model,
        context,
        steps=method.steps,
        key=key,
        title=method.name,
        notes=anchors.notes,
    )


def find_anchors(
    model: TextToImage,
    pairs: Sequence[Pair],
    context: Context,
    settings: AnchorSettings,
    *,
    folder: Path,
) -> Anchors:
    """Generate from neighbours of each pair's prompt and keep what does not replicate.

    Latents are kept as the sampler leaves them, which saves the published detour through the
    autoencoder. Augmentation by scale ("a far away ...") is left out.

    Args:
        model: The model as it is.
        pairs: N pairs to forget.
        context: Gives seed, sampler, descriptor and ordinary prompts.
        settings: What passes.
        folder: Where each pair's pictures are kept, for a run that goes on where another was cut.

    Raises:
        InputError: Not even an ordinary prompt's picture passes.
    """
    latents: dict[str, torch.Tensor] = {}
    embeddings: dict[str, torch.Tensor] = {}
    targets: dict[str, torch.Tensor] = {}
    needy: list[str] = []
    with progress_bar("anchors", len(pairs) * settings.prompts * settings.images) as advance:
        for k, pair in enumerate(pairs):
            prompts = neighbour_prompts(
                pair, settings.prompts, seed=context.seed, split="calibration"
            )
            texts = model.encode_prompts(prompts).cpu()
            drawn, similarity = _generated(
                model, context, pairs, texts, settings.images, path=folder / f"{pair.id}.anchors"
            )
            over = similarity[..., k] > settings.max_similarity
            rate = over.float().mean(1)
            good = (similarity.amax(2) <= settings.max_similarity) & (
                rate <= settings.anchor_rate
            )[:, None]
            targets[pair.id] = texts[rate >= settings.target_rate]
            if good.any():
                rows, _ = good.nonzero(as_tuple=True)
                latents[pair.id], embeddings[pair.id] = drawn[good], texts[rows]
            else:
                needy.append(pair.id)
            advance(settings.prompts * settings.images)
    if needy:
        log.warning("no anchor for %s: ordinary pictures instead", ", ".join(needy))
        texts = model.encode_prompts(
            context.corpus.prompts("calibration", settings.ordinary)
        ).cpu()
        drawn, similarity = _generated(
            model, context, pairs, texts, 1, path=folder / "+ordinary.anchors"
        )
        good = similarity.amax(2)[:, 0] <= settings.max_similarity
        if not good.any():
            raise InputError(
                f"no anchor for {', '.join(needy)}: even pictures of ordinary prompts resemble a "
                f"memorized one by more than {settings.max_similarity}\n"
                f"  where: mitigation.anchors.max_similarity\n"
                f"  fix:   raise it, or choose another metrics.decider"
            )
        for name in needy:
            latents[name], embeddings[name] = drawn[good][:, 0], texts[good]
    notes = {
        "anchors": {name: len(rows) for name, rows in latents.items()},
        "further_targets": {name: len(rows) for name, rows in targets.items() if len(rows)},
        "ordinary_anchors": needy,
    }
    return Anchors(latents, embeddings, targets, notes)


def _generated(
    model: TextToImage,
    context: Context,
    pairs: Sequence[Pair],
    texts: torch.Tensor,
    images: int,
    *,
    path: Path,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (P, K, C, h, w) of K pictures from P embeddings and their similarities (P, K, N).

    What an earlier run left at ``path`` is read; the folder's name stands for all that decides it.
    """
    if path.is_file():
        try:
            found = load(path.read_bytes())
            return found["latents"], found["similarity"]
        except (SafetensorError, KeyError) as error:
            log.warning("generating %s again, since it is damaged: %r", path, error)
    shape = model.latent_shape
    noise = torch.stack(
        [
            torch.randn(shape, generator=keyed_generator("anchor", context.seed, path.stem, k))
            for k in range(len(texts) * images)
        ]
    )
    rows, batch = texts.repeat_interleave(images, 0), context.sampling.batch
    latents, similarity = [], []
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        drawn = model.denoise(rows[part], noise[part], context.sampling)
        similarity.append(
            context.references.similarities(model.decode_latents(drawn).cpu(), pairs)
        )
        latents.append(drawn.cpu())
    made = {
        "latents": torch.cat(latents).view(len(texts), images, *shape),
        "similarity": torch.cat(similarity).view(len(texts), images, len(pairs)),
    }
    write_atomically(path, save(made))
    return made["latents"], made["similarity"]


# -------- surrogates
# Surrogates: what a model shall show instead of a memorized picture, each vetted against all.
#
# A pruned model that still memorizes gives "surrogates" that are the picture itself or another
# memorized one; trained on those, a defence looks good by the numbers and is none.

FIRST_SEED = 50_000
"""Generation seeds of candidates begin here, far from those of an audit's pictures."""

NEIGHBOURS = 3
"""Neighbours of a prompt that are tried before ordinary pictures are taken."""


@dataclass(frozen=True)
class SurrogateSettings:
    """Where surrogates come from.

    Attributes:
        source: Mitigation whose model draws them from the memorized prompts. Which one the paper
            used is unknown; any that hides most pictures from their prompts will do, since what
            it lets through is refused. None begins with neighbours of the prompts: cheaper, and
            better pictures where the pruned model draws nothing worth showing.
        per_pair: Surrogates of each pair.
        candidates: Pictures drawn for a pair before the next source of surrogates is tried.
        max_similarity: Largest similarity, by the deciding descriptor, that a surrogate may have
            with *any* picture to forget.
    """

    source: Mitigation | None
    per_pair: int = 4
    candidates: int = 8
    max_similarity: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.per_pair <= self.candidates:
            raise InputError(
                f"mitigation.surrogates needs 1 <= per_pair <= candidates, got "
                f"{self.per_pair} and {self.candidates}"
            )
        if not 0 < self.max_similarity < 1:
            raise InputError(
                f"mitigation.surrogates.max_similarity must be in (0, 1), "
                f"got {self.max_similarity}"
            )


@dataclass(frozen=True)
class Surrogates:
    """Surrogates of pairs.

    Attributes:
        latents: Pair id to scaled latents (S, C, h, w), S at least 1.
        notes: How many came from where and how many were refused; plain values.
    """

    latents: dict[str, torch.Tensor]
    notes: dict[str, Any]


def find_surrogates(
    model: TextToImage,
    pairs: Sequence[Pair],
    context: Context,
    settings: SurrogateSettings,
) -> Surrogates:
    """Draw surrogates and refuse those that resemble any picture to forget.

    Tried in turn, until a pair has enough: the source's model with the memorized prompt, the
    model as it is with neighbours of the prompt, one after the other, ordinary pictures of the
    corpus.

    Raises:
        RuntimeError: Not even an ordinary picture passes, so the measure or its limit is wrong.
    """
    kept: dict[str, list[torch.Tensor]] = {pair.id: [] for pair in pairs}
    refused: Counter[str] = Counter()
    origin: Counter[str] = Counter()

    def keep(pair: Pair, images: torch.Tensor, source: str) -> None:
        good = context.references.similarities(images, pairs).amax(1) < settings.max_similarity
        room = settings.per_pair - len(kept[pair.id])
        chosen = list(images[good][:room])
        kept[pair.id] += chosen
        origin[source] += len(chosen)
        refused[source] += int((~good).sum())

    def short() -> list[Pair]:
        return [pair for pair in pairs if len(kept[pair.id]) < settings.per_pair]

    if settings.source is not None:
        edit = context.find(settings.source, model, pairs).edit
        with edit.applied(model):
            prompts = [context.data.encoded(pair).embedding for pair in pairs]
            drawn = _draw(model, context, pairs, prompts, settings.candidates)
        for pair in pairs:
            keep(pair, drawn[pair.id], "mitigated")
    texts = {
        pair.id: neighbour_prompts(pair, NEIGHBOURS, seed=context.seed, split="calibration")
        for pair in short()
    }
    for k in range(NEIGHBOURS):
        needy = short()
        if needy:
            rows = list(model.encode_prompts([texts[pair.id][k] for pair in needy]))
            drawn = _draw(model, context, needy, rows, settings.candidates)
            for pair in needy:
                keep(pair, drawn[pair.id], "neighbour")
    needy = short()
    if needy:
        count = settings.candidates * len(needy)
        ordinary = context.corpus.examples("calibration", count, model.resolution).images
        for k, pair in enumerate(needy):
            keep(pair, ordinary[k :: len(needy)], "ordinary")
    empty = [pair.id for pair in pairs if not kept[pair.id]]
    if empty:
        raise RuntimeError(
            f"no surrogate for {', '.join(empty)}: even ordinary pictures resemble a memorized "
            f"one by more than {settings.max_similarity}; raise "
            f"mitigation.surrogates.max_similarity or choose another metrics.decider"
        )
    log.info("surrogates: kept %s, refused %s", dict(origin), dict(refused))
    latents = {name: model.encode_images(torch.stack(rows)).cpu() for name, rows in kept.items()}
    return Surrogates(latents, {"kept": dict(origin), "refused": dict(refused)})


def _draw(
    model: TextToImage,
    context: Context,
    pairs: Sequence[Pair],
    embeddings: Sequence[torch.Tensor],
    count: int,
) -> dict[str, torch.Tensor]:
    """Draw ``count`` pictures from each embedding (T, D), the same seeds for each."""
    noise = torch.stack(
        [generation_noise(FIRST_SEED + k, model.latent_shape) for k in range(count)]
    )
    images = model.generate(
        torch.stack(list(embeddings)).repeat_interleave(count, 0),
        noise.repeat(len(pairs), 1, 1, 1),
        replace(context.sampling, batch=min(context.sampling.batch, 64)),
        pair_ids=[pair.id for pair in pairs for _ in range(count)],
    ).cpu()
    return dict(zip((p.id for p in pairs), torch.split(images, count), strict=True))
