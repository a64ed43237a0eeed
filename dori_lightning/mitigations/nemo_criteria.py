"""How much of a pair's memorization is left under blocked neurons: ways to ask the model.

``noise_ssim`` is the published one. It needs the prompt alone: where the prompt is memorized, the
noises predicted from different latents resemble each other, and blocking counts as successful
where the noise no longer resembles the unblocked one's.

``denoising_loss`` is ours, for models whose noises do not tell, such as small ones. It reads the
pair's picture, as an auditor may: how well the prompt still helps to denoise that picture, from 1
(as unblocked) to 0 (as the empty prompt does).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from dori_lightning.metrics.calibration import ReferenceImages
from dori_lightning.mitigations.base import Context
from dori_lightning.mitigations.nemo_search import Probe
from dori_lightning.models.generation import generation_noise
from dori_lightning.models.protocol import TextToImage
from dori_lightning.pairs.datamodule import Encoded
from dori_lightning.runtime import batching
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import InputError

# -------- multiscale
# Compare predicted noises at several scales: how NeMo sees that a prompt is memorized.
#
# Where a prompt is memorized, the first noises that the model predicts carry one structure
# whatever the latent they began from; where it is not, they differ.
#
# Reference: Finding NeMo (Hintersdorf et al., 2024), section 3.1,
# https://arxiv.org/abs/2406.02366.

BETA = 0.33
PUBLISHED_SCALES = 3
PUBLISHED_WINDOW = 11
COARSEST = 16
"""Side of the coarsest scale of a published latent: 64 halved twice."""


@dataclass(frozen=True)
class MultiScaleSimilarity:
    """MS-SSIM as NeMo's published numbers were computed.

    That is what torchmetrics before 1.5 returned: the border that windows reach over is left out
    at *every* scale. Since 1.5 the library keeps it at the last scale, which shifts all values and
    with them the published threshold of 0.428; here it is left out again.

    Attributes:
        scales: Scales; each halves the side of the one before.
        window: Side of the Gaussian window, odd; its standard deviation is 1.5 x window / 11.
    """

    scales: int = PUBLISHED_SCALES
    window: int = PUBLISHED_WINDOW

    def __post_init__(self) -> None:
        if self.scales < 1 or self.window < 3 or self.window % 2 == 0:
            raise InputError(
                f"the similarity of noises needs scales >= 1 and an odd window >= 3, got {self}"
            )

    def check(self, side: int) -> None:
        """Refuse maps that the coarsest window does not fit into.

        Args:
            side: Shorter side of the maps, in latent pixels.

        Raises:
            InputError: Says what would fit.
        """
        if side // 2 ** (self.scales - 1) < self.window:
            fits = fitting(side)
            raise InputError(
                f"{self.scales} scales with a window of {self.window} do not fit into a latent of "
                f"{side} pixels\n"
                f"  fix:   scales={fits.scales} window={fits.window}, or null to let them adapt"
            )

    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Similarity (N,) of maps with maps, in [0, 1], 1 where they are equal.

        The constants that steady the quotients follow from the range of values of the whole call,
        taken anew at every scale, as published. So what one row gives depends on the others: ask
        for what belongs together, and for nothing else, in one call.

        Args:
            first: Maps (N, C, h, w).
            second: Maps (N, C, h, w).
        """
        sigma, border = 1.5 * self.window / PUBLISHED_WINDOW, self.window // 2
        terms = []
        for scale in range(self.scales):
            last = scale == self.scales - 1
            _, term = structural_similarity_index_measure(
                first,
                second,
                sigma=sigma,
                kernel_size=self.window,
                reduction="none",
                return_full_image=last,
                return_contrast_sensitivity=not last,
            )
            if last:  # the contrast terms come without their border already
                term = term[..., border:-border, border:-border].flatten(1).mean(1)
            terms.append(torch.relu(term) ** BETA)
            if not last:
                first, second = F.avg_pool2d(first, 2), F.avg_pool2d(second, 2)
        return torch.stack(terms).prod(0)


def fitting(side: int) -> MultiScaleSimilarity:
    """As published for latents of 64 pixels and more; what fits into smaller ones.

    Scales are dropped until the coarsest side is that of the published one, 16 pixels, and the
    window is at most half of the coarsest side: 2 scales at 32 pixels, 1 at 16, both with a window
    of 7, and 3 at 8 pixels. The published window would fit into 16 pixels too, but without its
    border a latent of that size would be judged by its central 6 x 6 pixels alone.

    Args:
        side: Shorter side of the latents, in latent pixels.
    """
    if side >= COARSEST * 2 ** (PUBLISHED_SCALES - 1):
        return MultiScaleSimilarity()
    scales = 2 if side >= 2 * COARSEST else 1
    half = side // 2**scales
    return MultiScaleSimilarity(
        scales, max(3, min(PUBLISHED_WINDOW, half if half % 2 else half - 1))
    )


def noise_difference(noise: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """What the model changes in a latent, each sample and channel scaled to [0, 1].

    A channel in which nothing differs becomes zero.

    Args:
        noise: Predicted noise (N, C, h, w).
        latents: The latents it was predicted from (N, C, h, w).
    """
    difference = noise - latents
    low = difference.amin(dim=(-2, -1), keepdim=True)
    width = difference.amax(dim=(-2, -1), keepdim=True) - low
    return (difference - low) / torch.where(width > 0, width, torch.ones_like(width))


def pairwise_similarity(
    differences: torch.Tensor, similarity: MultiScaleSimilarity
) -> torch.Tensor:
    """Similarity of every sample with every other one, (N, N); the diagonal is zero.

    Args:
        differences: Noise differences (N, C, h, w) of one prompt.
        similarity: How two of them are compared; all pairs share one range of values.
    """
    count = len(differences)
    first, second = torch.triu_indices(count, count, offset=1).unbind(0)
    matrix = differences.new_zeros(count, count)
    if count > 1:
        matrix[first, second] = similarity(differences[first], differences[second])
    return matrix + matrix.T


# -------- nemo_passes
# Forward passes in which every row has neurons of its own blocked.


@dataclass(frozen=True)
class Part:
    """Rows of a pass that belong together.

    Attributes:
        pair: Whose rows.
        inputs: What the pass takes, each with S rows.
        blocked: Neurons that are blocked for these rows (D,), bool; None for none.
    """

    pair: str
    inputs: tuple[torch.Tensor, ...]
    blocked: torch.Tensor | None = None


@dataclass
class BlockedPasses:
    """Forward passes in which every row has neurons of its own blocked.

    All passes have the same number of rows; the last ones are filled up with copies whose outcome
    is dropped. Kernels are chosen by shape and work row by row, so on the CPU an answer is bit for
    bit the same in whatever company a question is asked.

    Attributes:
        forward: The model's ``predict_noise`` or ``denoising_loss``, or a whole sampling.
        widths: Layer name to number of its neurons, in order.
        rows: Rows of a pass.
        beside: Passes side by side, see ``lanes``.
    """

    forward: Callable[..., torch.Tensor]
    widths: Mapping[str, int]
    rows: int
    beside: int = 1
    _of_thread: threading.local = field(default_factory=threading.local, init=False)

    @property
    def keep(self) -> dict[str, torch.Tensor] | None:
        """Layer name to what goes through (rows, 1, C), while this thread runs a pass."""
        return getattr(self._of_thread, "keep", None)

    def run(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        """What ``forward`` returns for each part, in as many passes as it takes."""
        full: list[list[Part]] = []
        taken = self.rows
        for part in parts:
            size = len(part.inputs[0])
            if taken + size > self.rows:
                full.append([])
                taken = 0
            full[-1].append(part)
            taken += size
        found = batching.run_parallel([partial(self._pass, own) for own in full], self.beside)
        return [rows for own in found for rows in own]

    # autograd's mode is each thread's own
    @torch.no_grad()
    def _pass(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        sizes = [len(part.inputs[0]) for part in parts]
        spare = self.rows - sum(sizes)
        if spare < 0:
            raise ValueError(f"{sum(sizes)} rows do not fit into a pass of {self.rows}")
        owners = [part.pair for part, size in zip(parts, sizes, strict=True) for _ in range(size)]
        inputs = [
            torch.cat([*columns, columns[0][:1].expand(spare, *columns[0].shape[1:])])
            for columns in zip(*(part.inputs for part in parts), strict=True)
        ]
        free = torch.zeros(sum(self.widths.values()), dtype=torch.bool)
        masks = torch.stack([free if p.blocked is None else p.blocked for p in parts] + [free])
        keep = ~masks.repeat_interleave(torch.tensor([*sizes, spare]), 0).to(inputs[0].device)
        layers = torch.split(keep[:, None], list(self.widths.values()), dim=2)
        self._of_thread.keep = dict(zip(self.widths, layers, strict=True))
        try:
            output = self.forward(*inputs, pair_ids=[*owners, *[owners[0]] * spare])
        finally:
            self._of_thread.keep = None
        return list(torch.split(output[: sum(sizes)], sizes))


@contextmanager
def blocked_passes(
    layers: Mapping[str, nn.Module],
    forward: Callable[..., torch.Tensor],
    *,
    rows: int,
    beside: int = 1,
) -> Iterator[BlockedPasses]:
    """Passes with hooks on ``layers`` while open: what an edit does, row by row.

    Args:
        layers: Linear layers by name, in the order of a set's neurons.
        forward: The model's ``predict_noise`` or ``denoising_loss``, or a whole sampling.
        rows: Rows of a pass.
        beside: Passes side by side.
    """
    linear: dict[str, nn.Linear] = {}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"only linear layers can be blocked, {name} is no such")
        linear[name] = layer
    widths = {name: x.out_features for name, x in linear.items()}
    passes = BlockedPasses(forward, widths, rows, beside)
    handles = []
    try:
        for name, layer in linear.items():
            handles.append(layer.register_forward_hook(_hook(passes, name)))
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def _hook(passes: BlockedPasses, name: str) -> Any:
    def hook(module: nn.Linear, _: Any, output: torch.Tensor) -> torch.Tensor | None:
        if (kept := passes.keep) is None:
            return None
        # a neuron without its weights still gives its bias, as under an edit
        rest = output.new_zeros(()) if module.bias is None else module.bias.to(output.dtype)
        keep = kept[name]
        # guided sampling runs all rows without and with their prompts, one set after the other
        keep = keep.repeat(len(output) // len(keep), 1, 1)
        return torch.where(keep, output, rest)

    return hook


# -------- nemo_measure


@dataclass(frozen=True)
class Watched:
    """A pair under watch.

    Attributes:
        inputs: What a pass takes to answer a question, each with S rows.
        similarity: From what the pass returns for these rows (S, ...) to how much memorization is
            left.
        memorized: Whether the unblocked model shows memorization at all.
        notes: What was measured on the unblocked model.
        evaluations: Rows through the denoiser that a row of a pass takes.
    """

    inputs: tuple[torch.Tensor, ...]
    similarity: Callable[[torch.Tensor], float]
    memorized: bool
    notes: Mapping[str, float]
    evaluations: int = 1


def measurement(
    passes: BlockedPasses, watched: Mapping[str, Watched]
) -> Callable[[Sequence[Probe]], list[float]]:
    """What searches ask: pair id and blocked set to how much memorization is left."""

    def measure(probes: Sequence[Probe]) -> list[float]:
        parts = [Part(p.pair, watched[p.pair].inputs, p.blocked) for p in probes]
        return [
            watched[part.pair].similarity(output)
            for part, output in zip(parts, passes.run(parts), strict=True)
        ]

    return measure


def watch_noises(
    passes: BlockedPasses,
    embeddings: Mapping[str, torch.Tensor],
    *,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    similarity: MultiScaleSimilarity,
    threshold: float,
) -> dict[str, Watched]:
    """Watch noise differences: the published measurement.

    Samples are kept that resemble another one more than ``threshold``; a prompt without any is
    not memorized, and then all are kept.

    Args:
        passes: Of ``predict_noise``.
        embeddings: Pair id to text embedding (T, D).
        latents: Starting noise (S, C, h, w), the same for every pair.
        timestep: Scalar.
        similarity: Compares noise differences.
        threshold: Similarity of two samples above which a prompt is memorized.
    """
    found = {}
    for pair, best, noises in _unblocked(passes, embeddings, latents, timestep, similarity):
        kept = best > threshold
        memorized = bool(kept.any())
        if not memorized:
            kept = torch.ones_like(kept)
        inputs = _noise_inputs(embeddings[pair], latents, timestep)
        found[pair] = Watched(
            tuple(value[kept] for value in inputs),
            _Resemblance(noises[kept], latents[kept], similarity),
            memorized,
            {"pairwise": float(best.max()), "kept": int(kept.sum())},
        )
    return found


def pairwise_maxima(
    passes: BlockedPasses,
    embeddings: torch.Tensor,
    *,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    similarity: MultiScaleSimilarity,
) -> torch.Tensor:
    """Largest similarity of two samples of each prompt, (N,): what a threshold is set from.

    Args:
        passes: Of ``predict_noise``.
        embeddings: Text embeddings (N, T, D).
        latents: Starting noise (S, C, h, w).
        timestep: Scalar.
        similarity: Compares noise differences.
    """
    named = {str(k): row for k, row in enumerate(embeddings)}
    rows = _unblocked(passes, named, latents, timestep, similarity)
    return torch.tensor([float(best.max()) for _, best, _ in rows])


def _unblocked(
    passes: BlockedPasses,
    embeddings: Mapping[str, torch.Tensor],
    latents: torch.Tensor,
    timestep: torch.Tensor,
    similarity: MultiScaleSimilarity,
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Pair id, each sample's best similarity with another (S,) and noise differences."""
    parts = [Part(p, _noise_inputs(e, latents, timestep)) for p, e in embeddings.items()]
    for part, noise in zip(parts, passes.run(parts), strict=True):
        noises = noise_difference(noise, latents)
        yield part.pair, pairwise_similarity(noises, similarity).amax(1), noises


def _noise_inputs(
    embedding: torch.Tensor, latents: torch.Tensor, timestep: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    count = len(latents)
    embedding = embedding.to(latents.device)
    return latents, timestep.expand(count), embedding.expand(count, *embedding.shape)


@dataclass(frozen=True, eq=False)
class _Resemblance:
    """Largest similarity, over samples, of a noise with the unblocked one.

    Attributes:
        unblocked: Noise differences (S, C, h, w).
        latents: Where they began (S, C, h, w).
        similarity: Compares them.
    """

    unblocked: torch.Tensor
    latents: torch.Tensor
    similarity: MultiScaleSimilarity

    def __call__(self, noise: torch.Tensor) -> float:
        blocked = noise_difference(noise, self.latents)
        return float(self.similarity(self.unblocked, blocked).max())


def watch_losses(
    passes: BlockedPasses,
    pairs: Mapping[str, Encoded],
    model: TextToImage,
    *,
    samples: int,
    seed: int,
) -> dict[str, Watched]:
    """Watch each pair's own denoising loss, at draws that its name decides.

    A pair is not memorized where its prompt does not lower the loss.

    Args:
        passes: Of ``denoising_loss``.
        pairs: Pair id to latent and embedding.
        model: Whose empty embedding and schedule.
        samples: Noise samples S; timestep k is uniform on the k-th of S equal parts.
        seed: Of the draws.
    """
    empty = model.empty_embedding()[0]
    known: list[Part] = []
    for pair, encoded in pairs.items():
        latent = encoded.latent.to(model.device)
        generator = keyed_generator("nemo loss", seed, pair)
        noise = torch.randn((samples, *latent.shape), generator=generator)
        place = (torch.arange(samples) + torch.rand(samples, generator=generator)) / samples
        timesteps = (place * model.num_train_timesteps).long()
        drawn = (
            latent.expand_as(noise),
            noise.to(model.device),
            timesteps.clamp(max=model.num_train_timesteps - 1).to(model.device),
        )
        for embedding in (encoded.embedding.to(model.device), empty):
            rows = embedding.expand(samples, *embedding.shape)
            known.append(Part(pair, (*drawn, rows)))
    losses = [float(loss.double().mean()) for loss in passes.run(known)]
    found = {}
    for k in range(0, len(known), 2):
        prompted, unprompted = losses[k], losses[k + 1]
        found[known[k].pair] = Watched(
            known[k].inputs,
            _Help(prompted, unprompted),
            prompted < unprompted,
            {"loss": prompted, "loss_empty_prompt": unprompted},
        )
    return found


@dataclass(frozen=True)
class _Help:
    """Share of the prompt's help that is left: 1 as unblocked, 0 as under the empty prompt.

    Attributes:
        prompted: Unblocked loss under the prompt.
        unprompted: Unblocked loss under the empty prompt.
    """

    prompted: float
    unprompted: float

    def __call__(self, losses: torch.Tensor) -> float:
        loss = float(losses.double().mean())
        return (self.unprompted - loss) / (self.unprompted - self.prompted)


# -------- nemo_pictures
# Watch whether blocked neurons keep the picture from being drawn: the question itself.
#
# Between the noise differences of the paper, which do not tell on small models, and the denoising
# loss, which falls to the empty prompt's level long before guided sampling stops drawing the
# picture, this asks what an audit asks. It costs a whole sampling for every question.

FIRST_SEED = 60_000
"""Generation seeds of the search begin here, far from those of an audit's pictures."""


def drawing(model: TextToImage, context: Context) -> Callable[..., torch.Tensor]:
    """Forward pass from starting noise and embeddings to pictures (N, 3, H, W) in [0, 1]."""

    def draw(
        noise: torch.Tensor, embeddings: torch.Tensor, *, pair_ids: Sequence[str]
    ) -> torch.Tensor:
        return model.decode_latents(model.denoise(embeddings, noise, context.sampling, pair_ids))

    return draw


def watch_pictures(
    passes: BlockedPasses,
    pairs: Mapping[str, Encoded],
    model: TextToImage,
    context: Context,
    *,
    samples: int,
    limit: float,
) -> dict[str, Watched]:
    """Watch each pair's most similar picture by the deciding descriptor.

    Args:
        passes: Of ``drawing``.
        pairs: Pair id to embedding; ids must be pairs of the context's references.
        model: Whose latents have which shape.
        context: Gives references and the sampler.
        samples: Pictures S of each question.
        limit: Similarity above which the unblocked model counts as reproducing the picture.
    """
    noise = torch.stack(
        [generation_noise(FIRST_SEED + k, model.latent_shape) for k in range(samples)]
    ).to(model.device)
    parts = [
        Part(pair, (noise, encoded.embedding.to(model.device).expand(samples, -1, -1)))
        for pair, encoded in pairs.items()
    ]
    guided = 1 if context.sampling.guidance == 1.0 else 2
    found = {}
    for part, pictures in zip(parts, passes.run(parts), strict=True):
        similarity = _Closest(context.references, part.pair)
        unblocked = similarity(pictures)
        found[part.pair] = Watched(
            part.inputs,
            similarity,
            unblocked > limit,
            {"similarity_unblocked": unblocked},
            evaluations=guided * context.sampling.steps,
        )
    return found


@dataclass(frozen=True, eq=False)
class _Closest:
    """Largest similarity of pictures (S, 3, H, W) with a pair's original."""

    references: ReferenceImages
    pair: str

    def __call__(self, pictures: torch.Tensor) -> float:
        pair = self.references.pairs[self.references.places[self.pair]]
        return float(self.references.similarities(pictures.cpu(), [pair]).max())
