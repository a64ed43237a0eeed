"""What the rest of the code may know about a text-to-image model.

Diffusion and flow matching share one notation: a latent x at timestep t is noised to
``a x + s e`` with standard normal noise e; ``scales`` gives a and s. For diffusion a^2 + s^2 = 1,
for flow matching a + s = 1. A model may predict e, ``v = a e - s x`` or the velocity ``e - x``:
whatever it is, it implies the clean latent and the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import nn

from dori_lightning.models.conditioning import Part, Spread
from dori_lightning.models.vocabulary import Vocabulary
from dori_lightning.types import CoderRows, require, require_at_least_one, require_choices

Sampler = Literal["ddim", "dpm++", "euler", "flow_euler", "flow_dpm++"]
LayerRole = Literal["text.value", "text.key", "feed_forward.out", "feed_forward.out.text"]

ROLE_ALIASES: dict[str, LayerRole] = {
    "cross_attention.value": "text.value",
    "cross_attention.key": "text.key",
}
"""Names from when every text layer was one of cross-attention."""


@dataclass(frozen=True)
class Sampling:
    """How images are generated.

    Attributes:
        sampler: ``ddim``, ``dpm++`` (multistep DPM-Solver++), ``euler``, or for flow matching
            ``flow_euler`` and ``flow_dpm++``; each family of checkpoints has some of them.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale; 1 turns guidance off. The unconditional branch
            is the empty prompt.
        images_per_pair: K, the images made per pair and condition.
        seed: First generation seed; image k uses ``seed + k``, the same for every pair.
        batch: Images per forward pass; changes speed and memory, not results (up to kernel
            rounding).
        distilled_guidance: Guidance scale that a model distilled from a guided one takes as an
            input, at no further row; None for models without that input.
    """

    sampler: Sampler = "ddim"
    steps: int = 50
    guidance: float = 7.0
    images_per_pair: int = 10
    seed: int = 2
    batch: int = 16
    distilled_guidance: float | None = None

    def __post_init__(self) -> None:
        require_choices(self, within="sampling.", sampler=Sampler)
        require_at_least_one(self, "steps", "images_per_pair", "batch", within="sampling.")
        require(self.seed >= 0, "sampling.seed must be >= 0", self.seed)
        finite = math.isfinite(self.guidance)
        require(finite, "sampling.guidance must be a finite number", self.guidance)
        distilled = self.distilled_guidance
        good = distilled is None or 0 <= distilled < math.inf
        require(good, "sampling.distilled_guidance must be a number >= 0 or null", distilled)

    @property
    def rows_per_step(self) -> int:
        """Rows through the denoiser that a step of one image takes: two with guidance."""
        return 1 if self.guidance == 1.0 else 2

    @property
    def method(self) -> str:
        """What of these settings decides an image, besides its seed."""
        distilled = "" if self.distilled_guidance is None else f"|{self.distilled_guidance}"
        return f"{self.sampler}|{self.steps}|{self.guidance}{distilled}"


@dataclass(frozen=True)
class Cut:
    """A prompt of which a text encoder takes the beginning only.

    Attributes:
        encoder: Its kind and component, such as ``CLIP (text_encoder)``.
        tokens: Tokens of the prompt, with those of start and end.
        limit: Tokens that the encoder takes.
        lost: The end of the prompt that it does not see, as its tokenizer spells it.
    """

    encoder: str
    tokens: int
    limit: int
    lost: str


EmbeddingFilter: TypeAlias = "Callable[[torch.Tensor, torch.Tensor, Sampling], torch.Tensor]"
"""What a defence at inference does to embeddings (N, T, D) before they are generated from, given
the starting noise (N, C, h, w) and the sampler."""


class TextToImage(Protocol):
    """A latent diffusion or flow matching model under audit.

    Shapes: N images, latent (C, h, w), embedding (T, D), image (3, H, W) with H = W =
    ``resolution``. An embedding holds everything that an image is conditioned on, ``parts`` below
    each other (``models.conditioning``). Timesteps are whole numbers 0..``num_train_timesteps``
    - 1 from clean to noise, whatever the denoiser itself is told of time. Wherever ``pair_ids``
    (N) is taken, it says whose rows these are, for edits that differ by pair; layers find it in
    ``row_pairs`` while the denoiser runs.

    Attributes:
        parts: What the rows of an embedding are.
        samplers: What images can be drawn with, the usual one first.
        prediction_type: ``epsilon``, ``v_prediction`` or ``velocity``.
        stages: Stretches of the denoiser that its layers are chosen by, in execution order.
        text_stream: Whether text passes the blocks beside the image, as in joint attention, so
            that what the layers ``text.value`` take depends on noise and time too.
        unet_evaluations: Rows that went through the denoiser so far.
        coder_rows: Rows that went through text encoder and autoencoder so far.
        max_batch_sizes: Largest batch that fits into memory, by kind of batch; empty while memory
            has not run out (``OomBackoff``).
        row_pairs: Whose rows the denoiser's current or last pass in this thread holds.
        embedding_filter: Applied to embeddings before anything is generated from them.
    """

    name: str
    fingerprint: str
    resolution: int
    latent_shape: tuple[int, int, int]
    embedding_shape: tuple[int, int]
    parts: tuple[Part, ...]
    num_train_timesteps: int
    samplers: tuple[Sampler, ...]
    prediction_type: str
    stages: tuple[str, ...]
    text_stream: ClassVar[bool]
    device: torch.device
    unet_evaluations: int
    coder_rows: CoderRows
    max_batch_sizes: dict[str, int]
    row_pairs: tuple[str, ...] | None
    embedding_filter: EmbeddingFilter | None

    def cuts(self, prompt: str) -> tuple[Cut, ...]:
        """What text encoders leave of a prompt that is too long for them; none where all fits."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts to embeddings (N, T, D), fp32, no gradient."""
        ...

    def vocabulary(self) -> Vocabulary:
        """Words that somebody can type, each one token.

        Raises:
            InputError: The family reads prompts with other text encoders than CLIP's.
        """
        ...

    def encode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Input embeddings (N, n, W) of n words to embeddings (N, T, D), fp32; differentiable.

        What ``encode_prompts`` gives for them: start and end token and padding are the prompt's
        usual ones, and pooled outputs are read at the end token.

        Args:
            tokens: Rows of ``vocabulary().inputs``, or anything between them; n at most its limit.

        Raises:
            InputError: The family reads prompts with other text encoders than CLIP's.
        """
        ...

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] to scaled latents (N, C, h, w): posterior mode.

        Latents are fp32 and carry no gradient.
        """
        ...

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (N, C, h, w) to images (N, 3, H, W) in [0, 1], no gradient."""
        ...

    def denoising_loss(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor,
        *,
        pair_ids: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """Per-example mean squared error (N,) of what the model predicts: noise, v or velocity.

        Differentiable.

        Args:
            latents: Scaled latents (N, C, h, w).
            noise: Standard normal noise (N, C, h, w) that is added to them.
            timesteps: Timesteps (N,), 0..``num_train_timesteps`` - 1.
            embeddings: Text embeddings (N, T, D).
            pair_ids: Whose rows these are (N).
        """
        ...

    def empty_embedding(self) -> torch.Tensor:
        """Embedding (1, T, D) of no prompt, the unconditional branch of guidance.

        Mostly that of the empty prompt; some families have zeros in its place.
        """
        ...

    def free(self, which: Sequence[str] | None = None) -> torch.Tensor:
        """Cells (T, D) of an embedding that a search may move, bool on the CPU.

        Args:
            which: Names of the parts to search; None for every free one.

        Raises:
            InputError: There is no such free part.
        """
        ...

    def read(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Rows (..., T) of embeddings (..., T, D) that the denoiser reads, bool.

        All of them but the padding of families that mask it. Padding is zero, has no gradient and
        stays as it is in every search.
        """
        ...

    def spread(self) -> Spread:
        """Where random starts lie and how far a step is, in each part's own units.

        Measured once, on ``conditioning.ORDINARY_PROMPTS``; Stable Diffusion keeps the published
        standard normal of absolute numbers.
        """
        ...

    def random_start(
        self, normal: torch.Tensor, *, scale: float = 1.0, parts: Sequence[str] | None = None
    ) -> torch.Tensor:
        """Random embeddings (..., T, D) that hold nothing of any prompt.

        Of parts with a mask, as many rows are read as half of the ordinary prompts have.

        Args:
            normal: Standard normal numbers (..., T, D).
            scale: Factor of the usual spread.
            parts: Names of the parts that are searched; None for every free one. The others are
                those of the empty prompt.
        """
        ...

    def searched_alone(
        self, embeddings: torch.Tensor, parts: Sequence[str] | None = None
    ) -> torch.Tensor:
        """Embeddings (..., T, D) with the empty prompt's values in all but the searched parts.

        The mask of a searched part stays, too.
        """
        ...

    def scales(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (N,), (N,) of latent and noise at ``timesteps`` (N,), fp32, in [0, 1]."""
        ...

    def variances(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Squares of ``scales``; without the rounding of a root where the schedule says them."""
        ...

    def noised(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Forward process: latents (N, C, h, w) at ``timesteps`` (N,) under ``noise``."""
        ...

    def predict_noise(
        self,
        noised: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor,
        *,
        pair_ids: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """Noise (N, C, h, w) that the model predicts in noised latents; differentiable.

        Whatever it predicts is converted.
        """
        ...

    def predict_clean_and_noise(
        self,
        noised: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor,
        *,
        guidance: float = 1.0,
        pair_ids: Sequence[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean latents and noise (N, C, h, w) that a prediction implies; differentiable.

        ``a' clean + s' noise`` is a deterministic sampler's next latent. Where a is zero and the
        model predicts noise, the clean latent is not finite: no such prediction tells it.

        Args:
            noised: Noised latents (N, C, h, w).
            timesteps: Their timesteps (N,).
            embeddings: Embeddings (N, T, D).
            guidance: Classifier-free guidance scale; other than 1 takes two rows for each.
            pair_ids: Whose rows these are (N).
        """
        ...

    def sampling_timesteps(self, sampling: Sampling) -> torch.Tensor:
        """Timesteps (S,) that a sampler visits, from noise to image; the nearest whole ones.

        Raises:
            InputError: The sampler has more steps than there are timesteps, or is none of the
                family's.
        """
        ...

    def denoise(
        self,
        embeddings: torch.Tensor,
        noise: torch.Tensor,
        sampling: Sampling,
        pair_ids: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """Embeddings (N, T, D) and noise to scaled latents (N, C, h, w), without gradient.

        The embedding filter is not applied.
        """
        ...

    def generate(
        self,
        embeddings: torch.Tensor,
        noise: torch.Tensor,
        sampling: Sampling,
        *,
        pair_ids: Sequence[str] | None = None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> torch.Tensor:
        """Embeddings (N, T, D) to images (N, 3, H, W) in [0, 1], without gradient.

        Args:
            embeddings: Text embeddings (N, T, D).
            noise: Starting noise (N, C, h, w).
            sampling: Sampler settings.
            pair_ids: Whose images these are (N).
            advance: Called with the number of images that were just made.

        Raises:
            InputError: Not even one image fits into memory.
        """
        ...

    def layers(
        self, role: LayerRole | str, stages: Sequence[str] | None = None
    ) -> dict[str, nn.Module]:
        """Layers of the denoiser by role, in execution order, keyed by module name.

        The paper's seven cross-attention layers of Stable Diffusion are ``text.value`` in the
        stages down and mid.

        Args:
            role: ``text.value`` and ``text.key``: what turns text into values and keys of
                attention; ``feed_forward.out``: the last layer of feed-forward blocks, with
                ``.text`` of those that only text passes. A name of ``ROLE_ALIASES`` is another's.
            stages: Some of the model's stages; None for all of them.

        Raises:
            InputError: The model has no such role, stage, or layer: an edit of nothing would look
                like one that does not work.
        """
        ...

    def default_stages(self, role: LayerRole | str) -> tuple[str, ...]:
        """Stages that methods look at where nothing else is said."""
        ...

    def value_input(self, embeddings: torch.Tensor) -> torch.Tensor:
        """What the layers ``text.value`` take (N, tokens, width): the text alone.

        These are the first rows of the embeddings; ``read`` says which of them count.

        Raises:
            InputError: They take more than the text; see ``text_stream``.
        """
        ...

    def is_text_weight(self, name: str) -> bool:
        """Whether text enters the picture through a weight of the denoiser (ESD's ``x``)."""
        ...

    def is_outer_weight(self, name: str) -> bool:
        """Whether a weight of the denoiser lies outside of its blocks, in time and output."""
        ...

    def denoiser(self) -> nn.Module:
        """The denoiser itself: what fine-tuning trains and edits change."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weights of the denoiser."""
        ...

    def frozen_copy(self) -> TextToImage:
        """Teacher for fine-tuning: a denoiser of its own, as it is now, which nothing trains.

        It takes the denoiser's memory once more, shares everything else and counts its own
        evaluations.
        """
        ...

    def frozen(self) -> AbstractContextManager[None]:
        """Evaluation mode and no weight gradients while open; both are put back afterwards."""
        ...
