"""Measure what a mitigation costs: the mitigated model against the unmitigated one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dori_lightning.metrics.feature_distance import (
    FEWEST_GROUPS,
    LatentFeatures,
    frechet_pictures,
)
from dori_lightning.metrics.utility import LossRow, Utility
from dori_lightning.metrics.utility_comparison import (
    compare_losses,
    compare_pictures,
    count_replicas,
    replicated_before,
)
from dori_lightning.progress import stage
from dori_lightning.tasks._utility_cache import Unmitigated
from dori_lightning.tasks._utility_losses import LossExamples, corpus_id, denoising_losses
from dori_lightning.tasks._utility_pictures import PictureSet, near_prompts, ordinary_prompts
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dori_lightning.metrics.feature_distance import Features
    from dori_lightning.metrics.measure import Originals
    from dori_lightning.metrics.utility import Comparison, PictureRow, UtilitySettings
    from dori_lightning.mitigations.edits import Edit
    from dori_lightning.models.protocol import Sampling, TextToImage
    from dori_lightning.pairs.corpus import Corpus
    from dori_lightning.types import Pair

__all__ = ["measure_utility"]

log = logging.getLogger(__name__)


def measure_utility(
    model: TextToImage,
    edit: Edit,
    *,
    pairs: Sequence[Pair],
    corpus: Corpus,
    originals: Originals,
    sampling: Sampling,
    settings: UtilitySettings,
    folder: Path,
    cache: Path,
    descriptor: str,
    threshold: float,
    seed: int = 0,
) -> Utility:
    """Compare the model with and without an edit on what nobody wanted to forget.

    Ordinary prompts and pictures are those that the corpus keeps for evaluation: no mitigation has
    calibrated on them. What cannot be measured here is left out, with the reason.

    Args:
        model: The model, without the edit.
        edit: What the mitigation changes.
        pairs: Suspected pairs, whose neighbour prompts are drawn.
        corpus: Ordinary prompts and pictures.
        originals: The pairs' pictures, described; also says which measures there are.
        sampling: How pictures are generated.
        settings: How much is measured.
        folder: Run folder; the mitigated model's pictures go to ``pictures/utility`` in it.
        cache: Folder for what the unmitigated model does, shared by the jobs of a sweep.
        descriptor: The deciding descriptor.
        threshold: Similarity above which a picture counts as a replica.
        seed: Run seed.

    Raises:
        InputError: The edit was made for another checkpoint.
    """
    plan = _plan(
        model, pairs, corpus, sampling=sampling, settings=settings, folder=folder, cache=cache,
        seed=seed,
    )  # fmt: skip
    losses = _run(model, edit, plan, batch=sampling.batch, key=corpus.identity)
    left_out = dict(plan.left_out)
    features: Features = settings.inception or LatentFeatures(
        model.encode_images, model.latent_shape[0]
    )
    compared: dict[str, Comparison] = {}
    rows: list[PictureRow] = []
    for name, pictures in plan.pictures.items():
        own, before, after = pictures.describe(originals, features, descriptor=descriptor)
        rows += own
        if name == "neighbours":
            old = replicated_before(
                own, threshold=threshold, aggregation=originals.measures.aggregation
            )
            stay = [k for k, row in enumerate(own) if row.id not in old]
            own, before, after = [own[k] for k in stay], before[stay], after[stay]
            if not own:
                left_out[name] = "every one brought its original back without the mitigation"
                continue
        compared[name] = compare_pictures(
            own, before, after, features=f"{features.name}, {features.dimension} features",
            seed=seed,
        )  # fmt: skip
        left_out.update(_gaps(name, compared[name], features))
    near = [row for row in rows if row.kind == "neighbour"]
    for name, reason in left_out.items():
        log.info("utility: %s is left out: %s", name, reason)
    return Utility(
        descriptor=descriptor,
        denoising_loss=compare_losses(losses, seed=seed) if losses else None,
        ordinary=compared.get("ordinary"),
        neighbours=compared.get("neighbours"),
        replicas=count_replicas(
            near, threshold=threshold, aggregation=originals.measures.aggregation
        )
        if near
        else None,
        left_out=left_out,
        loss_rows=tuple(losses),
        picture_rows=tuple(rows),
    )


@dataclass(frozen=True)
class _Plan:
    """What both models will be given.

    Attributes:
        cache: Where the unmitigated model's results lie.
        examples: For denoising losses; None where left out.
        pictures: ``ordinary`` and ``neighbours``, as far as they are not left out.
        left_out: What will not be measured: name to reason.
    """

    cache: Unmitigated
    examples: LossExamples | None
    pictures: dict[str, PictureSet]
    left_out: dict[str, str]


def _plan(
    model: TextToImage,
    pairs: Sequence[Pair],
    corpus: Corpus,
    *,
    sampling: Sampling,
    settings: UtilitySettings,
    folder: Path,
    cache: Path,
    seed: int,
) -> _Plan:
    kept = Unmitigated(cache, model, sampling)
    left_out: dict[str, str] = {}
    sets: dict[str, PictureSet] = {}
    where = folder / "pictures" / "utility"
    examples = None
    try:
        examples = _examples(model, corpus, settings, seed=seed)
    except InputError as error:
        left_out["denoising_loss"] = _first_line(error)
    if examples is None:
        left_out.setdefault("denoising_loss", "not asked for (utility.examples=0)")
    asked = []
    try:
        asked = ordinary_prompts(
            corpus.prompts("evaluation", settings.prompts) if settings.prompts else ()
        )
    except InputError as error:
        left_out["ordinary"] = _first_line(error)
    if asked:
        sets["ordinary"] = PictureSet.of(
            model, asked, sampling=sampling, pictures=settings.pictures, cache=kept, folder=where
        )
    else:
        left_out.setdefault("ordinary", "not asked for (utility.prompts=0)")
    near, without = near_prompts(pairs, settings.neighbours)
    if near:
        sets["neighbours"] = PictureSet.of(
            model, near, sampling=sampling, pictures=settings.neighbour_pictures, cache=kept,
            folder=where,
        )  # fmt: skip
    elif not settings.neighbours or not pairs:
        reason = "no suspected pairs" if settings.neighbours else "utility.neighbours=0"
        left_out["neighbours"] = f"not asked for ({reason})"
    if without:
        left_out["neighbours of some pairs" if near else "neighbours"] = (
            f"{len(without)} of {len(pairs)} pairs; the first: {next(iter(without.values()))}"
        )
    return _Plan(kept, examples, sets, left_out)


def _examples(
    model: TextToImage, corpus: Corpus, settings: UtilitySettings, *, seed: int
) -> LossExamples | None:
    if not settings.examples:
        return None
    found = corpus.examples("evaluation", settings.examples, model.resolution)
    return LossExamples(
        prompts=found.prompts,
        embeddings=model.encode_prompts(found.prompts),
        latents=model.encode_images(found.images),
        draws=settings.draws,
        seed=seed,
    )


def _run(model: TextToImage, edit: Edit, plan: _Plan, *, batch: int, key: str) -> list[LossRow]:
    """Let both models draw, and return what they lose on ordinary pictures."""
    examples, sets = plan.examples, list(plan.pictures.values())
    count = sum(pictures.pictures for pictures in sets)
    before = after = torch.empty(0)
    with plan.cache.alone():
        if examples is not None:
            named = (key, len(examples.prompts), examples.draws, examples.seed)
            before = plan.cache.losses(
                named, lambda: denoising_losses(model, examples, batch=batch)
            )
        with stage("utility, unmitigated", count) as advance:
            for pictures in sets:
                pictures.draw_unmitigated(advance)
    with edit.applied(model), stage("utility, mitigated", count) as advance:
        if examples is not None:
            after = denoising_losses(model, examples, batch=batch)
        for pictures in sets:
            pictures.draw_mitigated(edit.identity, advance)
    if examples is None:
        return []
    return [
        LossRow(
            id=corpus_id(k),
            prompt=prompt,
            draw=r,
            timestep=examples.draw(k, r, model.num_train_timesteps)[1],
            unmitigated=float(before[k, r]),
            mitigated=float(after[k, r]),
        )
        for k, prompt in enumerate(examples.prompts)
        for r in range(examples.draws)
    ]


def _gaps(name: str, found: Comparison, features: Features) -> dict[str, str]:
    """What a comparison had to leave out, by the names that reports use."""
    prefix = "" if name == "ordinary" else f"{name}."
    gaps = {}
    if found.kid is None:
        gaps[f"{prefix}kid"] = f"needs {FEWEST_GROUPS} independent prompts or pairs"
    if found.fid is None:
        gaps[f"{prefix}fid"] = (
            f"needs {frechet_pictures(features.dimension)} pictures by each model for "
            f"{features.dimension} features, there are {found.prompts * found.pictures_each}"
        )
    if found.alignment is None:
        gaps[f"{prefix}alignment"] = "needs a local CLIP model (metrics.alignment)"
    return gaps


def _first_line(error: InputError) -> str:
    return str(error).splitlines()[0]
