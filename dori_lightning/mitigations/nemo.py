"""Block the value neurons of cross-attention that a memorized prompt needs.

Reference: Finding NeMo (Hintersdorf et al., 2024), https://arxiv.org/abs/2406.02366.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dori_lightning.mitigations.activations import (
    ActivationStatistics,
    activation_statistics,
    activations,
    read_statistics,
)
from dori_lightning.mitigations.base import Context, CostEstimate, Evaluations, require_pairs
from dori_lightning.mitigations.edits import MaskEdit, Origin, PairMaskEdit
from dori_lightning.mitigations.nemo_criteria import (
    BlockedPasses,
    MultiScaleSimilarity,
    Watched,
    blocked_passes,
    drawing,
    fitting,
    measurement,
    pairwise_maxima,
    watch_losses,
    watch_noises,
    watch_pictures,
)
from dori_lightning.mitigations.nemo_search import PairSearch, Schedule, levels_of, run_searches
from dori_lightning.models.protocol import Sampling, Stage, TextToImage
from dori_lightning.pairs.datamodule import Encoded
from dori_lightning.runtime import batching
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.types import InputError, Pair

# -------- nemo_find
# Run NeMo: watch the unblocked model, select, refine.
#
# Reference: Finding NeMo (Hintersdorf et al., 2024), https://arxiv.org/abs/2406.02366.

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
    settings: NeMo, model: TextToImage, pairs: Mapping[str, Encoded], context: Context
) -> NeMoFindings:
    """Find neurons for embeddings, whether they are those of prompts or not.

    Args:
        settings: The mitigation's settings.
        model: Checkpoint; left as it was.
        pairs: Name to embedding and latent; latents are read with ``denoising_loss`` only.
        context: Gives ordinary prompts and the seed.

    Raises:
        InputError: The model has no such layers, the statistics belong to another checkpoint, the
            corpus has too few prompts, or the similarity does not fit into the latents.
    """
    layers = _layers(settings, model)
    statistics = (
        activation_statistics(
            model, context.corpus.prompts("calibration", settings.statistics_prompts)
        )
        if settings.statistics is None
        else ActivationStatistics.load(Path(settings.statistics), model)
    )
    with _passes(settings, model, layers, context) as passes:
        watched, threshold = _watch(settings, model, pairs, context, passes)
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
        with progress_bar(f"mitigate: {settings.name}", len(searches)) as advance:
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
            f"  fix:   mitigation.stages=[down,mid,up]"
        )
    if settings.layers is None:
        return found
    starts = tuple(f"{start}." for start in settings.layers)
    strangers = [start for start in starts if not any(n.startswith(start) for n in found)]
    if strangers or not settings.layers:
        raise InputError(
            f"no value layer of {model.name} is below {', '.join(strangers) or 'nothing'}\n"
            f"  where: mitigation.layers\n"
            f"  fix:   modules that hold some of {', '.join(found)}; null takes all of them"
        )
    return {name: module for name, module in found.items() if name.startswith(starts)}


@contextmanager
def _passes(
    settings: NeMo, model: TextToImage, layers: Mapping[str, nn.Module], context: Context
) -> Iterator[BlockedPasses]:
    forwards: dict[str, Callable[..., torch.Tensor]] = {
        "noise_ssim": model.predict_noise,
        "denoising_loss": model.denoising_loss,
        "replication": drawing(model, context),
    }
    forward = forwards[settings.criterion]
    rows, beside = settings.rows, batching.parallel_batches(model)
    if batching.is_small(model):
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
    context: Context,
    passes: BlockedPasses,
) -> tuple[dict[str, Watched], float]:
    """Unblocked behaviour of every pair, and the similarity that says it is gone."""
    if settings.criterion == "denoising_loss":
        watched = watch_losses(passes, pairs, model, samples=settings.samples, seed=context.seed)
        return watched, 1 - settings.suppressed_share
    if settings.criterion == "replication":
        limit = settings.replication_limit
        samples = settings.samples
        pictures = watch_pictures(passes, pairs, model, context, samples=samples, limit=limit)
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
        ordinary = context.prompts(model, "calibration", settings.threshold_prompts)
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


# -------- nemo


@dataclass(frozen=True)
class NeMo:
    """Find, for each pair, few value neurons without which its prompt is not memorized.

    The defaults are the published ones but for ``threshold``, which holds for one checkpoint.

    Attributes:
        name: How reports call it.
        scope: ``pair`` blocks for each pair its own neurons, as published; ``union`` blocks all of
            them for everybody.
        stages: Where value layers are blocked: ``down`` and ``mid`` are the published seven. Which
            layers carry the conditioning depends on the checkpoint; ``task=statistics`` measures.
        layers: Of those, only the value layers in these modules, such as ``down_blocks.1``; None
            takes all, as published. Blocking layers that the picture does not hang on costs the
            rest of the model and hides nothing.
        criterion: What shows memorization. ``noise_ssim``, published: similarity of noise
            differences, from the prompt alone. ``denoising_loss``: how much of the prompt's help
            in denoising the pair's picture is left, see ``nemo_measure``. ``replication``:
            whether the picture is still drawn, see ``nemo_pictures``.
        samples: Noises per question.
        noise_seed: Of the starting noises of ``noise_ssim``, one draw for all pairs.
        timestep: Where ``noise_ssim`` predicts, as a place in DDIM's 50 steps. The paper says the
            first one, the released code predicts at the second one from the unchanged noise.
        statistics: File with activation statistics (``task=statistics``); None computes them from
            the corpus.
        statistics_prompts: Ordinary prompts for that. Published: 50,000.
        threshold: Similarity of two samples of ``noise_ssim`` above which a prompt is memorized,
            and which blocking must not exceed; 0.428 for Stable Diffusion 1.4. None calibrates: of
            each ordinary prompt the largest similarity, over prompts the mean plus
            ``threshold_stds`` standard deviations.
        threshold_prompts: Ordinary prompts for that.
        threshold_stds: See ``threshold``.
        suppressed_share: Share of the prompt's help that must be gone with ``denoising_loss``, in
            (0, 1].
        replication_limit: Similarity by the deciding descriptor that a pair's pictures must not
            exceed with ``replication``, in (0, 1).
        start_z: First level: neurons beyond this many standard deviations are blocked.
        z_step: How much lower each next level is.
        min_z: Levels are above it.
        start_k: First level: how many of each layer's most active neurons are blocked.
        k_step: How many more each next level has; 0 with ``start_k`` 0 goes by z alone.
        z_two_sided: Whether activations below the mean count, as in the paper's text and the
            released code; its algorithm 2 is one-sided.
        refine: Whether to unblock what is not needed.
        refine_group: Neurons of a layer that refinement tries to unblock together; published: 1.
            More asks fewer questions and leaves more neurons blocked.
        when_not_memorized: What becomes of a pair whose prompt shows no memorization: ``leave``
            blocks nothing, as published; ``block`` goes on with all samples (``noise_ssim``).
        scales: Scales of the similarity; None for the published 3, or what fits.
        window: Its window; None for the published 11, or what fits.
        rows: Rows of every forward pass; at least ``samples``. Fewer where passes
            go side by side (``nemo_find.LANE_ROWS``).
        candidates: Questions of one pair in a pass, at most. 1 asks one at a time; more is faster
            where few pairs are left and finds the same neurons.
    """

    name: str = "nemo"
    scope: Literal["pair", "union"] = "pair"
    stages: tuple[Stage, ...] = ("down", "mid")
    layers: tuple[str, ...] | None = None
    criterion: Literal["noise_ssim", "denoising_loss", "replication"] = "noise_ssim"
    samples: int = 10
    noise_seed: int = 1
    timestep: int = 1
    statistics: str | None = None
    statistics_prompts: int = 1000
    threshold: float | None = None
    threshold_prompts: int = 100
    threshold_stds: float = 1.0
    suppressed_share: float = 0.5
    replication_limit: float = 0.5
    start_z: float = 5.0
    z_step: float = 0.25
    min_z: float = 1.0
    start_k: int = 0
    k_step: int = 1
    z_two_sided: bool = True
    refine: bool = True
    refine_group: int = 1
    when_not_memorized: Literal["leave", "block"] = "leave"
    scales: int | None = None
    window: int | None = None
    rows: int = 64
    candidates: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        known = ("down", "mid", "up")
        noise = self.criterion == "noise_ssim"
        for good, rule in (
            (self.scope in ("pair", "union"), "scope must be pair or union"),
            (
                bool(self.stages) and set(self.stages) <= set(known),
                f"stages must be some of {', '.join(known)}",
            ),
            (
                self.criterion in ("noise_ssim", "denoising_loss", "replication"),
                "criterion must be noise_ssim, denoising_loss or replication",
            ),
            (self.samples >= (2 if noise else 1), "samples must be >= 2 for noise_ssim, else 1"),
            (
                0 <= self.timestep < PUBLISHED_STEPS,
                f"timestep must be in 0..{PUBLISHED_STEPS - 1}",
            ),
            (self.statistics_prompts >= 2, "statistics_prompts must be >= 2"),
            (self.threshold_prompts >= 2, "threshold_prompts must be >= 2"),
            (self.threshold is None or 0 < self.threshold < 1, "threshold must be in (0, 1)"),
            (0 < self.suppressed_share <= 1, "suppressed_share must be in (0, 1]"),
            (0 < self.replication_limit < 1, "replication_limit must be in (0, 1)"),
            (0 <= self.min_z < self.start_z, "start_z must be above min_z, and that >= 0"),
            (self.z_step > 0, "z_step must be positive"),
            (self.start_k >= 0 and self.k_step >= 0, "start_k and k_step must be >= 0"),
            (
                self.when_not_memorized in ("leave", "block"),
                "when_not_memorized must be leave or block",
            ),
            (
                noise or self.when_not_memorized == "leave",
                "when_not_memorized=block needs criterion=noise_ssim: a loss that the prompt does "
                "not lower cannot be raised to that without it",
            ),
            (self.refine_group >= 1, "refine_group must be >= 1"),
            (self.rows >= self.samples, "rows must be at least samples"),
            (self.candidates >= 1, "candidates must be >= 1"),
        ):
            if not good:
                raise InputError(f"mitigation {self.name}: {rule}\n  got:   {self}")

    def file_hashes(self) -> dict[str, str]:
        """Hash of the statistics file, where there is one; see ``base.settings_fingerprint``."""
        if self.statistics is None:
            return {}
        return {"statistics": hashlib.sha256(read_statistics(Path(self.statistics))).hexdigest()}

    def estimate_cost(self, sampling: Sampling, pairs: int) -> CostEstimate:
        """Estimate the first pass over a number of pairs to forget, the only known part."""
        rows = pairs * self.samples
        if self.criterion == "replication":
            work = Evaluations.of_images(rows, sampling)
        elif self.criterion == "denoising_loss":
            work = Evaluations(forward=2 * rows)  # with the prompt and with the empty one
        else:
            ordinary = self.threshold_prompts if self.threshold is None else 0
            work = Evaluations(forward=rows + ordinary * self.samples)
        return CostEstimate(
            work,
            "only the first look at each prompt is counted; the search depends on what it finds "
            "(published: 15.7 s a vm prompt and 45.9 s a tm prompt on a V100 or A100)",
        )

    def apply(
        self, model: TextToImage, pairs: Sequence[Pair], context: Context
    ) -> MaskEdit | PairMaskEdit:
        """Find the neurons of every pair and return their masks."""
        require_pairs(pairs, self.name)
        found = self.find(model, {pair.id: context.data.encoded(pair) for pair in pairs}, context)
        one_at_a_time = sum(own.get("one_at_a_time", 0) for own in found.notes.values())
        origin = Origin(
            model.fingerprint,
            cost={"unet_evaluations_one_at_a_time": one_at_a_time},
            notes={
                "threshold": found.threshold,
                "statistics": found.statistics,
                "pairs": found.notes,
            },
        )
        if self.scope == "pair":
            return PairMaskEdit(origin, found.masks)
        parameters = next(iter(found.masks.values()))
        return MaskEdit(
            origin,
            {
                name: torch.stack([own[name] for own in found.masks.values()]).any(0)
                for name in parameters
            },
        )

    def find(
        self, model: TextToImage, pairs: Mapping[str, Encoded], context: Context
    ) -> NeMoFindings:
        """Find neurons for embeddings, whether they are those of prompts or not.

        Args:
            model: Checkpoint.
            pairs: Name to embedding and latent; latents are read with ``denoising_loss`` only.
            context: Gives ordinary prompts and the seed.
        """
        return find_neurons(self, model, pairs, context)
