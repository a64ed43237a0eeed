"""How NeMo asks how much of a pair's memorization is left under blocked neurons.

`NoiseDifference` is the published criterion. It needs the prompt alone: where the prompt is
memorized, the noises predicted from different latents resemble each other, and blocking counts as
successful where the noise no longer resembles the unblocked one's.

`Replication` is ours, for models whose noises do not tell, such as small ones. It reads the pair's
image, as an auditor may: whether it is still generated.

Reference: Finding NeMo (Hintersdorf et al., 2024), section 3.1, https://arxiv.org/abs/2406.02366.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from dori_lightning.mitigations.activations import PUBLISHED_STEPS, even_timestep
from dori_lightning.mitigations.base import Context, Evaluations, require, require_choices
from dori_lightning.mitigations.edits import Origin, PairMaskEdit
from dori_lightning.models.generation import generation_noise
from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.runtime.batching import OomBackoff, map_batches, parallel_batches
from dori_lightning.types import Pair

ROWS = 16
"""Rows of a batch. On the CPU, 32 save 8 % of the time of a row and 8 cost 20 % more, but with few
pairs left a larger batch is filled up with more copies."""

GPU_ROWS = 64
"""Rows of a batch on a GPU, where no copies fill it up; not measured yet."""

BACKOFF = OomBackoff("NeMo", "sample", "checkpoint.precision=bf16, or a device with more memory")

FIRST_SEED = 60_000
"""Generation seeds of `Replication` begin here, far from those of an audit's images."""

WhenNotMemorized = Literal["leave", "block"]
Forward = Callable[..., torch.Tensor]
Embeddings = Mapping[str, torch.Tensor]
"""Name to text embedding (T, D)."""


@dataclass(frozen=True)
class Question:
    """Rows that are asked about together.

    Attributes:
        pair: Whose rows.
        inputs: What ``Criterion.forward`` takes, each with S rows.
        blocked: Neurons that are blocked for these rows (D,), bool; None for none.
    """

    pair: str
    inputs: tuple[torch.Tensor, ...]
    blocked: torch.Tensor | None = None


Run = Callable[[Sequence[Question]], list[torch.Tensor]]


@dataclass(frozen=True)
class MemorizationProbe:
    """How one pair is asked about.

    Attributes:
        inputs: What ``Criterion.forward`` takes, each with S rows.
        similarity: From what it returns for these rows (S, ...) to how much memorization is left.
        memorized: Whether the unblocked model shows memorization at all.
        notes: What was measured on the unblocked model.
        evaluations: Rows through the denoiser that a row of ``inputs`` takes.
    """

    inputs: tuple[torch.Tensor, ...]
    similarity: Callable[[torch.Tensor], float]
    memorized: bool
    notes: Mapping[str, float]
    evaluations: int = 1


class Criterion(ABC):
    """What shows memorization.

    Attributes:
        min_samples: Fewest noises that a question needs.
    """

    min_samples: ClassVar[int] = 1

    @property
    def searches_all(self) -> bool:
        """Whether neurons are searched for pairs without memorization too."""
        return False

    @abstractmethod
    def forward(self, model: TextToImage, context: Context) -> Forward:
        """What runs the denoiser for a question, with ``pair_ids`` of the rows."""

    @abstractmethod
    def probes(
        self, run: Run, model: TextToImage, *, pairs: Embeddings, context: Context, samples: int
    ) -> tuple[dict[str, MemorizationProbe], float]:
        """Look at the unblocked model.

        Args:
            run: Answers questions by ``forward``.
            model: Checkpoint.
            pairs: Name to embedding.
            context: Gives seed, sampler, references and ordinary prompts.
            samples: Noises S of each question.

        Returns:
            Name to probe, and the similarity that says that memorization is suppressed.
        """

    @abstractmethod
    def work_of_probes(self, sampling: Sampling, *, pairs: int, samples: int) -> Evaluations:
        """What ``probes`` takes."""

    def calibrated(self, threshold: float) -> Criterion:
        """The criterion with a threshold that a search found, where it has one to calibrate."""
        del threshold
        return self


@dataclass(frozen=True)
class NoiseDifference(Criterion):
    """Similarity of predicted noises, less their latents: the published criterion.

    Samples are kept that resemble another one more than the threshold; a prompt without any is
    not memorized. Blocking must bring the similarity of a kept sample with its unblocked self
    down to the threshold.

    Nothing is published for flow matching. There the predicted noise is taken to be all that
    stands between the latent and its clean one, so that, less its latent, it is the clean latent.

    Attributes:
        noise_seed: Of the starting noises, one draw for all pairs.
        timestep: Where noise is predicted, as a place in DDIM's 50 steps. The paper says the
            first one, the released code predicts at the second one from the unchanged noise. Of
            flow matching, in as many even steps down its schedule.
        threshold: Similarity of two samples above which a prompt is memorized; 0.428 for Stable
            Diffusion 1.4. None calibrates: of each ordinary prompt the largest similarity, over
            prompts the mean plus ``threshold_stds`` standard deviations.
        threshold_prompts: Ordinary prompts for that.
        threshold_stds: See ``threshold``.
        when_not_memorized: What becomes of a pair whose prompt shows no memorization: ``leave``
            blocks nothing, as published; ``block`` goes on with all samples.
    """

    min_samples: ClassVar[int] = 2  # they are compared with each other
    noise_seed: int = 1
    timestep: int = 1
    threshold: float | None = None
    threshold_prompts: int = 100
    threshold_stds: float = 1.0
    when_not_memorized: WhenNotMemorized = "leave"

    def __post_init__(self) -> None:
        last, limit, prompts = PUBLISHED_STEPS - 1, self.threshold, self.threshold_prompts
        require(
            0 <= self.timestep <= last, f"criterion.timestep must be in 0..{last}", self.timestep
        )
        require(
            limit is None or 0 < limit < 1, "criterion.threshold must be in (0, 1) or null", limit
        )
        require(prompts >= 2, "criterion.threshold_prompts must be >= 2", prompts)
        require_choices(self, within="criterion.", when_not_memorized=WhenNotMemorized)

    @property
    def searches_all(self) -> bool:
        """Whether to block where nothing is memorized."""
        return self.when_not_memorized == "block"

    def calibrated(self, threshold: float) -> NoiseDifference:
        """The same with a threshold that ordinary prompts need not be looked at for."""
        return replace(self, threshold=threshold)

    def forward(self, model: TextToImage, context: Context) -> Forward:
        """Predicted noise."""
        del context

        def distance_to_clean(noised: torch.Tensor, *given: Any, **ids: Any) -> torch.Tensor:
            return noised - model.predict_clean_and_noise(noised, *given, **ids)[0]

        return distance_to_clean if _is_flow(model) else model.predict_noise

    def probes(
        self, run: Run, model: TextToImage, *, pairs: Embeddings, context: Context, samples: int
    ) -> tuple[dict[str, MemorizationProbe], float]:
        """Compare the samples of every prompt with each other; see `Criterion.probes`.

        Raises:
            InputError: The corpus has too few prompts.
        """
        similarity = fitting(min(model.latent_shape[1:]))
        # one draw for all samples, as released
        generator = torch.Generator("cpu").manual_seed(self.noise_seed)
        latents = torch.randn((samples, *model.latent_shape), generator=generator).to(model.device)
        if _is_flow(model):
            timestep = torch.tensor(even_timestep(model, self.timestep), device=model.device)
        else:
            sampler = Sampling("ddim", PUBLISHED_STEPS)
            timestep = model.sampling_timesteps(sampler)[self.timestep]
        timesteps = timestep.expand(samples)

        def unblocked(
            embeddings: Mapping[str, torch.Tensor],
        ) -> Iterator[tuple[Question, torch.Tensor, torch.Tensor]]:
            """Question, noise differences and each sample's best similarity with another (S,)."""
            questions = [
                Question(name, (latents, timesteps, _repeated(embedding, samples, model)))
                for name, embedding in embeddings.items()
            ]
            for question, noise in zip(questions, run(questions), strict=True):
                differences = noise_difference(noise, latents)
                yield question, differences, pairwise_similarity(differences, similarity).amax(1)

        threshold = self.threshold
        if threshold is None:
            ordinary = context.prompts(model, "calibration", self.threshold_prompts)
            named = {str(k): embedding for k, embedding in enumerate(ordinary)}
            largest = torch.tensor([float(best.max()) for _, _, best in unblocked(named)])
            threshold = float(largest.mean() + self.threshold_stds * largest.std())
        probes = {}
        for question, differences, best in unblocked(pairs):
            memorized = bool((best > threshold).any())
            kept = best > threshold if memorized else torch.ones_like(best, dtype=torch.bool)

            def resemblance(
                noise: torch.Tensor,
                unblocked: torch.Tensor = differences[kept],
                start: torch.Tensor = latents[kept],
            ) -> float:
                return float(similarity(unblocked, noise_difference(noise, start)).max())

            probes[question.pair] = MemorizationProbe(
                tuple(value[kept] for value in question.inputs),
                resemblance,
                memorized,
                {"pairwise": float(best.max()), "kept": int(kept.sum())},
            )
        return probes, threshold

    def work_of_probes(self, sampling: Sampling, *, pairs: int, samples: int) -> Evaluations:
        """A prediction for every sample, of ordinary prompts too."""
        del sampling
        ordinary = self.threshold_prompts if self.threshold is None else 0
        return Evaluations(forward=(pairs + ordinary) * samples)


@dataclass(frozen=True)
class Replication(Criterion):
    """Whether the pair's image is still generated: what an audit asks.

    Noise differences do not tell on small models; how much the prompt helps to denoise the image
    falls to nothing long before guided sampling stops generating it. Every question costs a whole
    sampling.

    Attributes:
        limit: Similarity by the deciding descriptor that a pair's images must not exceed, in
            (0, 1).
    """

    limit: float = 0.5

    def __post_init__(self) -> None:
        require(0 < self.limit < 1, "criterion.limit must be in (0, 1)", self.limit)

    def forward(self, model: TextToImage, context: Context) -> Forward:
        """From starting noise and embeddings to images (N, 3, H, W) in [0, 1]."""

        def generate(
            noise: torch.Tensor, embeddings: torch.Tensor, *, pair_ids: Sequence[str]
        ) -> torch.Tensor:
            latents = model.denoise(embeddings, noise, context.sampling, pair_ids)
            return model.decode_latents(latents)

        return generate

    def probes(
        self, run: Run, model: TextToImage, *, pairs: Embeddings, context: Context, samples: int
    ) -> tuple[dict[str, MemorizationProbe], float]:
        """Generate S images of each pair; names must be those of the context's references."""
        references = context.references
        noise = torch.stack(
            [generation_noise(FIRST_SEED + k, model.latent_shape) for k in range(samples)]
        ).to(model.device)
        questions = [
            Question(pair, (noise, _repeated(embedding, samples, model)))
            for pair, embedding in pairs.items()
        ]
        probes = {}
        for question, images in zip(questions, run(questions), strict=True):
            pair = references.pairs[references.places[question.pair]]

            def similarity(images: torch.Tensor, pair: Pair = pair) -> float:
                return float(references.similarities(images.cpu(), [pair]).max())

            unblocked = similarity(images)
            probes[question.pair] = MemorizationProbe(
                question.inputs,
                similarity,
                unblocked > self.limit,
                {"similarity_unblocked": unblocked},
                evaluations=context.sampling.rows_per_step * context.sampling.steps,
            )
        return probes, self.limit

    def work_of_probes(self, sampling: Sampling, *, pairs: int, samples: int) -> Evaluations:
        """An image of every sample."""
        return Evaluations.of_images(pairs * samples, sampling)


def _is_flow(model: TextToImage) -> bool:
    return model.prediction_type == "velocity"


def _repeated(embedding: torch.Tensor, samples: int, model: TextToImage) -> torch.Tensor:
    return embedding.to(model.device).expand(samples, *embedding.shape)


@dataclass(frozen=True)
class BlockedModel:
    """A model that is asked with each question's neurons blocked, as an edit blocks a pair's.

    On the CPU all batches have `ROWS` rows. Kernels are chosen by shape and work row by row, so an
    answer is bit for bit the same in whatever company a question is asked.

    Attributes:
        model: The model.
        widths: Name of each linear layer to its number of neurons; a set's neurons are those of
            the layers one after the other.
        forward: See ``Criterion.forward``.
    """

    model: TextToImage
    widths: Mapping[str, int]
    forward: Forward

    def masks(self, blocked: torch.Tensor) -> dict[str, torch.Tensor]:
        """Parameter name to blocked output rows (C,), for a set of neurons (D,)."""
        parts = torch.split(blocked, list(self.widths.values()))
        return {
            f"{name}.weight": rows.clone() for name, rows in zip(self.widths, parts, strict=True)
        }

    def run(
        self, questions: Sequence[Question], *, advance: Callable[[int], None] = lambda _: None
    ) -> list[torch.Tensor]:
        """What ``forward`` returns for each question's rows; ``advance`` is told of rows done."""
        masks = {
            str(number): {} if question.blocked is None else self.masks(question.blocked)
            for number, question in enumerate(questions)
        }
        rows = [
            (str(number), tuple(column[k] for column in question.inputs))
            for number, question in enumerate(questions)
            for k in range(len(question.inputs[0]))
        ]

        # autograd's mode is each thread's own
        @torch.no_grad()
        def answer(batch: list[tuple[str, tuple[torch.Tensor, ...]]]) -> torch.Tensor:
            inputs = zip(*(row for _, row in batch), strict=True)
            return self.forward(*map(torch.stack, inputs), pair_ids=[name for name, _ in batch])

        cpu = self.model.device.type == "cpu"
        with PairMaskEdit(Origin(self.model.fingerprint), masks).applied(self.model):
            outputs = map_batches(
                answer,
                rows,
                at_once=ROWS * parallel_batches(self.model) if cpu else GPU_ROWS,
                model=self.model,
                backoff=BACKOFF,
                advance=advance,
            )
        return list(torch.split(torch.stack(outputs), [len(q.inputs[0]) for q in questions]))


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
