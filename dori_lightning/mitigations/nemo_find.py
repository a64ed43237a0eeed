"""Run NeMo: watch the unblocked model, select, refine.

Reference: Finding NeMo (Hintersdorf et al., 2024), https://arxiv.org/abs/2406.02366.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dori_lightning import lanes
from dori_lightning.metrics.multiscale import MultiScaleSimilarity, fitting
from dori_lightning.mitigations.activations import (
    ActivationStatistics,
    activation_statistics,
    activations,
)
from dori_lightning.mitigations.nemo_measure import (
    Watched,
    measurement,
    pairwise_maxima,
    watch_losses,
    watch_noises,
)
from dori_lightning.mitigations.nemo_passes import BlockedPasses, blocked_passes
from dori_lightning.mitigations.nemo_pictures import drawing, watch_pictures
from dori_lightning.mitigations.nemo_search import run_searches
from dori_lightning.mitigations.nemo_selection import Schedule, levels_of
from dori_lightning.mitigations.nemo_stages import PairSearch
from dori_lightning.models.protocol import Sampling
from dori_lightning.progress import stage
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

    from dori_lightning.mitigations.base import Workshop
    from dori_lightning.mitigations.nemo import NeMo
    from dori_lightning.models.protocol import TextToImage
    from dori_lightning.pairs.datamodule import Encoded

__all__ = ["PUBLISHED_STEPS", "NeMoFindings", "find_neurons"]

PUBLISHED_STEPS = 50

LANE_ROWS = 32
"""Rows of a pass at most where several go side by side (``lanes``): wider ones gain nothing there,
and what is left for guesses of what will be asked next costs as much as what is asked."""


@dataclass(frozen=True)
class NeMoFindings:
    """What NeMo found.

    Attributes:
        masks: Pair id to parameter name to blocked output rows (C,), bool.
        notes: Pair id to how it went; plain values.
        threshold: Similarity above which a prompt counts as memorized.
        statistics: Hash of the activation statistics.
    """

    masks: dict[str, dict[str, torch.Tensor]]
    notes: dict[str, dict[str, Any]]
    threshold: float
    statistics: str


def find_neurons(
    settings: NeMo, model: TextToImage, pairs: Mapping[str, Encoded], workshop: Workshop
) -> NeMoFindings:
    """Find neurons for embeddings, whether they are those of prompts or not.

    Args:
        settings: The mitigation's settings.
        model: Checkpoint; left as it was.
        pairs: Name to embedding and latent; latents are read with ``denoising_loss`` only.
        workshop: Gives ordinary prompts and the seed.

    Raises:
        InputError: The model has no such layers, the statistics belong to another checkpoint, the
            corpus has too few prompts, or the similarity does not fit into the latents.
    """
    layers = _layers(settings, model)
    statistics = (
        activation_statistics(
            model, workshop.corpus.prompts("calibration", settings.statistics_prompts)
        )
        if settings.statistics is None
        else ActivationStatistics.load(Path(settings.statistics), model)
    )
    with _passes(settings, model, layers, workshop) as passes:
        watched, threshold = _watch(settings, model, pairs, workshop, passes)
        chosen = {
            pair: own
            for pair, own in watched.items()
            if own.memorized or settings.when_not_memorized == "block"
        }
        searches = {}
        schedule = Schedule(
            start_z=settings.start_z,
            z_step=settings.z_step,
            min_z=settings.min_z,
            start_k=settings.start_k,
            k_step=settings.k_step,
            two_sided=settings.z_two_sided,
        )
        for pair in chosen:
            active = {n: activations(m, pairs[pair].embedding[None])[0] for n, m in layers.items()}
            levels = levels_of(active, statistics, schedule)
            searches[pair] = PairSearch(levels, threshold, settings.refine, settings.refine_group)
        with stage(f"mitigate: {settings.name}", len(searches)) as advance:
            asked = run_searches(
                searches,
                measurement(passes, chosen),
                rows={pair: len(own.inputs[0]) for pair, own in chosen.items()},
                capacity=passes.rows * passes.beside,
                candidates=settings.candidates,
                finished=lambda _: advance(1),
            )
    return NeMoFindings(
        {pair: _masks(searches.get(pair), passes.widths) for pair in pairs},
        {
            pair: _note(own, searches.get(pair), asked.get(pair, 0))
            for pair, own in watched.items()
        },
        threshold,
        statistics.identity,
    )


def _layers(settings: NeMo, model: TextToImage) -> dict[str, nn.Module]:
    """Value layers by name, as the settings choose them."""
    found = model.layers("cross_attention.value", settings.stages)
    if not found:
        raise InputError(
            f"{model.name} has no cross-attention in {', '.join(settings.stages)}\n"
            f"  mend:  mitigation.stages=[down,mid,up]"
        )
    if settings.layers is None:
        return found
    starts = tuple(f"{start}." for start in settings.layers)
    strangers = [start for start in starts if not any(n.startswith(start) for n in found)]
    if strangers or not settings.layers:
        raise InputError(
            f"no value layer of {model.name} is below {', '.join(strangers) or 'nothing'}\n"
            f"  where: mitigation.layers\n"
            f"  mend:  modules that hold some of {', '.join(found)}; null takes all of them"
        )
    return {name: module for name, module in found.items() if name.startswith(starts)}


@contextmanager
def _passes(
    settings: NeMo, model: TextToImage, layers: Mapping[str, nn.Module], workshop: Workshop
) -> Iterator[BlockedPasses]:
    forwards: dict[str, Callable[..., torch.Tensor]] = {
        "noise_ssim": model.predict_noise,
        "denoising_loss": model.denoising_loss,
        "replication": drawing(model, workshop),
    }
    forward = forwards[settings.criterion]
    rows, beside = settings.rows, lanes.count(model)
    if lanes.small(model):
        rows = max(settings.samples, min(rows, LANE_ROWS))
    with (
        model.frozen(),
        torch.no_grad(),
        blocked_passes(layers, forward, rows=rows, beside=beside) as passes,
    ):
        yield passes


def _watch(
    settings: NeMo,
    model: TextToImage,
    pairs: Mapping[str, Encoded],
    workshop: Workshop,
    passes: BlockedPasses,
) -> tuple[dict[str, Watched], float]:
    """Unblocked behaviour of every pair, and the similarity that says it is gone."""
    if settings.criterion == "denoising_loss":
        watched = watch_losses(passes, pairs, model, samples=settings.samples, seed=workshop.seed)
        return watched, 1 - settings.suppressed_share
    if settings.criterion == "replication":
        limit = settings.replication_limit
        samples = settings.samples
        pictures = watch_pictures(passes, pairs, model, workshop, samples=samples, limit=limit)
        return pictures, limit
    side = min(model.latent_shape[1:])
    fits = fitting(side)
    similarity = MultiScaleSimilarity(
        fits.scales if settings.scales is None else settings.scales,
        fits.window if settings.window is None else settings.window,
    )
    similarity.check(side)
    generator = torch.Generator("cpu").manual_seed(settings.noise_seed)
    # one draw for all samples, as released
    latents = torch.randn((settings.samples, *model.latent_shape), generator=generator)
    shared: dict[str, Any] = {
        "latents": latents.to(model.device),
        "timestep": model.sampling_timesteps(Sampling("ddim", PUBLISHED_STEPS))[settings.timestep],
        "similarity": similarity,
    }
    threshold = settings.threshold
    if threshold is None:
        ordinary = workshop.prompts(model, "calibration", settings.threshold_prompts)
        largest = pairwise_maxima(passes, ordinary, **shared)
        threshold = float(largest.mean() + settings.threshold_stds * largest.std())
    embeddings = {pair: encoded.embedding for pair, encoded in pairs.items()}
    return watch_noises(passes, embeddings, threshold=threshold, **shared), threshold


def _masks(search: PairSearch | None, widths: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Blocked rows by parameter; none at all for a pair that was left alone."""
    blocked = (
        torch.zeros(sum(widths.values()), dtype=torch.bool) if search is None else search.blocked
    )
    parts = torch.split(blocked, list(widths.values()))
    return {f"{n}.weight": part.clone() for n, part in zip(widths, parts, strict=True)}


def _note(watched: Watched, search: PairSearch | None, asked: int) -> dict[str, Any]:
    """How one pair's search went.

    ``one_at_a_time`` and ``unet_evaluations`` count rows of forward passes: those that one test
    after the other would have taken, and those of the tests made (without the copies that fill up
    passes).
    """
    note: dict[str, Any] = {"memorized": watched.memorized, **watched.notes}
    if search is None:
        return note
    rows = len(watched.inputs[0]) * watched.evaluations
    level = search.selection.level
    return {
        **note,
        "suppressed": search.selection.suppressed,
        "z": level.z,
        "k": level.k,
        "selected": int(level.blocked.sum()),
        "similarity_selected": search.selection.similarity,
        "refined": int(search.blocked.sum()),
        "similarity_refined": search.similarity,
        "target": search.target,
        "tests": search.tests,
        "one_at_a_time": search.tests * rows,
        "unet_evaluations": asked * rows,
    }
