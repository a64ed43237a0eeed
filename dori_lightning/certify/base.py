"""What an attack is: one way into a model, tried on images of which some cannot be in it.

An attack is one file here and one in ``conf/attack``. It names what its adversary holds, draws
images that should resemble each pair's, and gives them to an `Attempt` level by level, from the
weakest to the strongest. It knows nothing of which pairs are suspects and which are controls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal, Protocol

import torch

from dori_lightning.audit.context import AuditContext
from dori_lightning.audit.evaluation import measured_check
from dori_lightning.metrics.replication import per_pair
from dori_lightning.mitigations.base import Mitigation
from dori_lightning.mitigations.edits import Edit
from dori_lightning.models.generation import CPU_IMAGES, generation_noise, image_seeds
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.runtime import distributed
from dori_lightning.runtime.batching import fixed_batches, parallel_batches
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Calibration, InputError, Pair

Holds = Literal["prompt", "words", "embedding", "noise", "image", "weights"]
"""What an adversary has besides the model: the training prompt, any words, the input of text
embeddings, the starting noise, (a part of) the image, or the weights themselves."""

Role = Literal["audited", "reference", "planted"]
"""Whose model is attacked: the one under audit, one that never saw the images, or a copy of the
audited one into which images were planted, the positive controls."""


@dataclass(frozen=True)
class Plan:
    """What is known before anything is loaded.

    Attributes:
        mitigation: What is done to the checkpoint.
        family: The checkpoint's family, such as ``sd`` or ``flux``.
        sampling: How images are generated.
        own_tokenizer: Whether the checkpoint has a tokenizer with words, which random weights,
            made to time things on, have not.
    """

    mitigation: Mitigation
    family: str
    sampling: Sampling
    own_tokenizer: bool = True

    @property
    def drawing(self) -> int:
        """Rows through the denoiser that the K images of one embedding take."""
        sampling = self.sampling
        return sampling.images_per_pair * sampling.steps * sampling.rows_per_step


class Attack(Protocol):
    """A way into a model; implementations are frozen dataclasses of settings.

    Attributes:
        name: How reports call it.
        holds: What the adversary holds.
        together: Whether pairs of a group are attacked together by all processes, as where weights
            are trained on them; otherwise processes share them.
        gradient_free: Whether it uses no gradient of the model. Where such an attack succeeds on
            an image that ``dori`` does not bring back, gradients are masked.
        timed: Whether it is asked how long images take beside those that the model cannot hold,
            so that levels that do not count are tried on all.
    """

    timed: ClassVar[bool]

    @property
    def name(self) -> str:
        """How reports call it."""
        ...

    @property
    def holds(self) -> Holds:
        """What the adversary holds."""
        ...

    @property
    def together(self) -> bool:
        """Whether pairs of a group are attacked together."""
        ...

    @property
    def gradient_free(self) -> bool:
        """Whether it uses no gradient of the model."""
        ...

    def check(self, plan: Plan) -> None:
        """Refuse what this attack cannot be run on, before anything is loaded.

        Raises:
            InputError: Says why, and what to do.
        """
        ...

    def rows(self, plan: Plan) -> int:
        """Rows through the denoiser that one image takes at most, its own images included."""
        ...

    def applies(self, subject: Subject) -> bool:
        """Whether it means something on a subject: no way back leads from a reference."""
        ...

    def run(self, subject: Subject, pairs: Sequence[Pair], attempt: Attempt) -> None:
        """Try to bring the images of pairs back.

        Called on every process, without the subject's edit on the model (``subject.carried``).

        Args:
            subject: The model.
            pairs: A group of pairs, all of them.
            attempt: Takes the images, level by level, and says who is left.
        """
        ...


@dataclass(frozen=True)
class AttackBase:
    """What most attacks have in common."""

    name: str
    holds: Holds = field(default="prompt", init=False)
    together: bool = field(default=False, init=False)
    gradient_free: bool = field(default=False, init=False)
    timed: ClassVar[bool] = False

    def check(self, plan: Plan) -> None:
        """Nothing is refused."""

    def applies(self, subject: Subject) -> bool:  # noqa: ARG002
        """On every model."""
        return True


@dataclass(frozen=True)
class Subject:
    """A model that is attacked.

    Attributes:
        role: Whose model it is.
        context: Model without any edit, encoded pairs, sampling, seed.
        edit: What the model carries while it is attacked.
        calibration: When an image is a copy.
        audited: Of a reference, the model under audit: what an attack finds elsewhere to try it on
            that model is tried on the reference as well. None for other roles.
        alone: Whether it is one pair's model: batches on the CPU then hold one pair's images.
    """

    role: Role
    context: AuditContext
    edit: Edit
    calibration: Calibration
    audited: Subject | None = None
    alone: bool = False

    @property
    def model(self) -> LatentDiffusion:
        """The model."""
        return self.context.model

    @property
    def sampling(self) -> Sampling:
        """How images are generated."""
        return self.context.sampling

    @property
    def drawing(self) -> int:
        """Rows through the denoiser that the K images of one embedding take."""
        sampling = self.sampling
        return sampling.images_per_pair * sampling.steps * sampling.rows_per_step

    @cached_property
    def scale(self) -> float:
        """Factor of random starts and of steps from them, by how strongly the model answers."""
        with self.carried():
            return measured_check(self.context, edited=not self.edit.is_empty).scale

    def carried(self) -> AbstractContextManager[None]:
        """The model with its edit, while open."""
        return self.edit.applied(self.model)

    def with_edit(self, edit: Edit) -> Subject:
        """The same model with another edit."""
        return replace(self, edit=edit)

    def by_weights(self, pairs: Sequence[Pair]) -> list[tuple[Subject, frozenset[str]]]:
        """The model as pairs see it, with the same weights for all, and ids of those that do.

        One for all pairs, or under an edit that differs by pair one for each, which is ``alone``.
        """
        if not self.edit.pairs:
            return [(self, frozenset(pair.id for pair in pairs))]
        return [
            (replace(self, edit=self.edit.for_pair(pair.id), alone=True), frozenset({pair.id}))
            for pair in pairs
        ]

    def prompts(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        """Pair id to the embedding (T, D) of its prompt."""
        return {pair.id: self.context.data.encoded(pair).embedding for pair in pairs}

    def latents(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Latents (N, C, h, w) of the pairs' images, on the CPU."""
        return self.context.data.batch(pairs).latents

    def threshold(self, pair: Pair) -> float:
        """Similarity above which an image is a copy of a pair's; NaN where none can be told."""
        return self.calibration.threshold_of(pair.id)

    def closest(self, pair: Pair, images: torch.Tensor) -> tuple[float, int]:
        """How close the closest of images (K, 3, H, W) comes to a pair's image, and its place."""
        measured = self.context.references.measure(pair, images)
        own = measured.similarity[self.calibration.descriptor]
        return float(per_pair(own)), int(own.argmax())

    def starting_noise(self, images: int | None = None) -> torch.Tensor:
        """Starting noise (K, C, h, w) of a pair's images, the same for every pair.

        Args:
            images: K; None for as many as an audit draws.
        """
        shape, sampling = self.model.latent_shape, self.sampling
        if images is not None:
            sampling = replace(sampling, images_per_pair=images)
        return torch.stack([generation_noise(seed, shape) for seed in image_seeds(sampling)])

    def noise_of(self, pairs: Sequence[Pair], count: int, *what: str) -> dict[str, torch.Tensor]:
        """Pair id to noise (count, C, h, w) of its own, drawn by key.

        Args:
            pairs: The pairs.
            count: Images for each.
            what: What it is for, such as an attack's name and its level.
        """
        shape, seed = self.model.latent_shape, self.context.seed
        return {
            pair.id: torch.stack(
                [
                    torch.randn(shape, generator=keyed_generator(*what, seed, pair.id, k))
                    for k in range(count)
                ]
            )
            for pair in pairs
        }

    def draw(
        self,
        embeddings: Mapping[str, torch.Tensor],
        *,
        noise: Mapping[str, torch.Tensor] | None = None,
        sampling: Sampling | None = None,
        sample: Callable[..., torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Draw images of several pairs; the model carries its edit already.

        Batches have one shape on the CPU, so that a pair's images have the same bits in any
        company.

        Args:
            embeddings: Pair id to the embedding (T, D) to draw from, or to what ``sample`` takes.
            noise: Pair id to starting noise (K, C, h, w); None for that of the audit's images.
            sampling: How to draw; None for the audit's way.
            sample: Replaces the sampler: takes embeddings (N, T, D), noise (N, C, h, w), pair ids
                (N) and images' places among their pair's K (N), gives latents (N, C, h, w). A
                defence that filters embeddings is before it, as it is before every sampler.

        Returns:
            Pair id to images (K, 3, H, W) in [0, 1].
        """
        model, own = self.model, sampling or self.sampling
        common = self.starting_noise() if noise is None else None
        rows = []
        for name, embedding in embeddings.items():
            starts = common if noise is None else noise[name]
            assert starts is not None
            rows += [(name, embedding, start, k) for k, start in enumerate(starts)]
        cpu = model.device.type == "cpu"
        width = CPU_IMAGES if cpu else own.batch
        if cpu and self.alone:
            width = min(width, max(1, len(rows)))
        found: dict[str, list[torch.Tensor]] = {name: [] for name in embeddings}
        at_once = width * (parallel_batches(model) if sample is None else 1)
        for begin in range(0, len(rows), at_once):
            distributed.check()
            part = rows[begin : begin + at_once]
            padded = [r for batch, _ in fixed_batches(part, width) for r in batch] if cpu else part
            ids = [name for name, *_ in padded]
            where = torch.stack([row[1] for row in padded])
            starts = torch.stack([row[2] for row in padded])
            if sample is None:
                images = model.generate(where, starts, replace(own, batch=width), pair_ids=ids)
            else:
                places = [row[3] for row in padded]
                where, starts = where.to(model.device), starts.to(model.device)
                with torch.no_grad():
                    if model.embedding_filter is not None:
                        where = model.embedding_filter(where, starts, own)
                    latents = sample(where, starts, ids, places)
                    images = model.decode_latents(latents)
            for (name, *_), image in zip(part, images, strict=False):
                found[name].append(image.cpu())
        return {name: torch.stack(images) for name, images in found.items()}


class Attempt(Protocol):
    """What an attack gives its images to."""

    def left(self, level: str) -> list[Pair]:
        """Pairs of this process that are to be tried at a level, empty where none is.

        A pair is left while no image of it was a copy. At a level where images came back that the
        model cannot hold, no suspect is.
        """
        ...

    def add(
        self,
        level: str,
        images: Mapping[str, torch.Tensor],
        *,
        rows: int,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Score images.

        Args:
            level: What was done, in words that a report shows, such as ``50 steps from random``.
            images: Pair id to images (K, 3, H, W) in [0, 1]; pairs of ``left``.
            rows: Rows through the denoiser that each of these pairs took since its last images,
                these images included.
            notes: Pair id to what its images were drawn from, such as words, where that can be
                read; the record keeps that of the closest image.
        """
        ...


@dataclass
class Afterwards:
    """The attempt of an attack on a model that something was done to first; its levels say so.

    Attributes:
        attempt: Takes the images.
        done: What was done, such as ``150 ordinary steps``.
        rows: Rows through the denoiser that this took, of one image: added to its first images.
        only: Ids of the pairs that it was done for; None for all.
    """

    attempt: Attempt
    done: str
    rows: int = 0
    only: frozenset[str] | None = None
    paid: set[str] = field(default_factory=set)

    def left(self, level: str) -> list[Pair]:
        """Pairs of this process that are to be tried at a level."""
        left = self.attempt.left(f"{self.done}, then {level}")
        return [pair for pair in left if self.only is None or pair.id in self.only]

    def add(
        self,
        level: str,
        images: Mapping[str, torch.Tensor],
        *,
        rows: int,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Score images."""
        level = f"{self.done}, then {level}"
        for name, own in images.items():
            more = 0 if name in self.paid else self.rows
            self.attempt.add(level, {name: own}, rows=rows + more, notes=notes)
        self.paid |= set(images)


def timesteps(model: LatentDiffusion, steps: int) -> torch.Tensor:
    """Timesteps (S,) from noise to image at equal distances, the noisiest first."""
    places = torch.arange(steps, 0, -1, dtype=torch.float64) / steps * model.num_train_timesteps
    return (places.round().long() - 1).to(model.device)


def deterministic(
    model: TextToImage,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    embeddings: torch.Tensor,
    *,
    guidance: float | Sequence[float],
    pair_ids: Sequence[str] | None = None,
    fresh: Callable[[int], torch.Tensor] | None = None,
    after: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor] = lambda x, _: x,
) -> torch.Tensor:
    """Sample from noised latents on: DDIM, or Euler's steps of flow matching, on any family.

    Differentiable where gradients are on.

    Args:
        model: The model.
        x: Latents (N, C, h, w) noised to ``timesteps[0]``.
        timesteps: Timesteps (S,), from noise to image.
        embeddings: Embeddings (N, T, D), or (S, N, T, D) for others at each step.
        guidance: Classifier-free guidance scale, or one for each step.
        pair_ids: Whose rows these are (N).
        fresh: Gives a step's fresh noise (N, C, h, w), for stochastic sampling: see ``renewed``.
        after: Called after each step with the latents and the timestep that they are at, None at
            the end; what it returns goes on.

    Returns:
        Clean latents (N, C, h, w).
    """
    scales = guidance if isinstance(guidance, Sequence) else [guidance] * len(timesteps)
    for place, (now, scale) in enumerate(zip(timesteps, scales, strict=True)):
        own = embeddings[place] if embeddings.dim() == 4 else embeddings
        clean, noise = model.predict_clean_and_noise(
            x, now.expand(len(x)), own, guidance=scale, pair_ids=pair_ids
        )
        if place + 1 == len(timesteps):
            return after(clean, None)
        then = timesteps[place + 1]
        if fresh is not None:
            noise = renewed(model, noise, fresh(place), now, then)
        a, s = (factor.view(-1, 1, 1, 1) for factor in model.scales(then.expand(len(x))))
        x = after(a * clean + s * noise, then)
    return x


def renewed(
    model: TextToImage,
    noise: torch.Tensor,
    fresh: torch.Tensor,
    now: torch.Tensor,
    then: torch.Tensor,
) -> torch.Tensor:
    """Predicted noise, drawn anew as far as the forward process forgets it between two timesteps.

    With it ``a' clean + s' noise`` is a draw from the posterior of the forward process: a step of
    DDPM, or of DDIM with eta = 1. In terms of both factors it holds for flow matching as well:
    what is kept is the ratio of noise to signal at ``then`` to that at ``now``.

    Reference: Song et al., Denoising diffusion implicit models (2010.02502), equation 16.

    Args:
        model: Knows the factors.
        noise: Predicted noise (N, C, h, w).
        fresh: Standard normal noise (N, C, h, w).
        now: Timestep (scalar) at which it was predicted.
        then: The next, cleaner one.
    """
    (a, s), (later_a, later_s) = (model.scales(t[None]) for t in (now, then))
    kept = (a * later_s / (later_a * s)).clamp(0, 1)
    return kept * noise + (1 - kept**2).sqrt() * fresh


def refuse_family(attack: AttackBase, plan: Plan, families: Sequence[str], why: str) -> None:
    """Refuse a family of checkpoints that an attack knows no way into.

    Raises:
        InputError: It is none of ``families``.
    """
    if plan.family not in families:
        raise InputError(
            f"attack {attack.name} does not work on family {plan.family}: {why}",
            where="certify.paths",
            fix=f"leave {attack.name} out of certify.paths",
        )
