"""Stronger searches for text embeddings: one for each range of timesteps, and through sampling.

`EmbeddingSearch` looks for one embedding that lowers the denoising loss at all timesteps. A model
may be hard to search in just this way and hold the image all the same. So here the timesteps
share several embeddings, a search keeps to the timesteps at which its gradient says something,
takes other steps from other starts, or lowers the distance of what a short sampler draws to the
image: the last finds defences that only break the denoising loss.

The more numbers are searched, the more images can be drawn that the model does not hold. Controls
say how far a success means anything.

References: Finding DoRI (2507.16880) for the search; Carlini et al., *On evaluating adversarial
robustness* (1902.06705), for searching the objective that decides rather than a stand-in.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch.nn import functional as F

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.attacks.embedding_attack import Job
from dori_lightning.attacks.solver import LOSS_SCALE, RowAdam, units
from dori_lightning.certify.base import (
    AttackBase,
    Attempt,
    Holds,
    Plan,
    Subject,
    deterministic,
    timesteps,
)
from dori_lightning.certify.embeddings import search, whole_search
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.memory import estimate_batch_size, pairs_at_once
from dori_lightning.runtime import distributed
from dori_lightning.runtime.batching import OomBackoff, map_batches
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import INITS, Init, InputError, Pair

_MEMORY = OomBackoff(
    "search through sampling",
    "pair",
    "checkpoint.gradient_checkpointing=true, fewer steps in searches.NAME.through, or a device "
    "with more memory",
)


@dataclass(frozen=True)
class Search:
    """One search of a sequence.

    Attributes:
        init: Where it begins: the pair's ``prompt``, at ``random``, at a ``control_prompt``.
        steps: Adam's steps.
        embeddings: Embeddings over the schedule, each for a range of timesteps of equal length.
        noise_batch: Noise samples of a step, over all embeddings; with ``through`` as many
            starting noises.
        between: Share of the schedule, from 0 (clean) to 1 (noise), at which the loss is drawn.
        through: Sampling steps that the loss goes through, from noise to the latent of the image;
            0 for the denoising loss.
        lr: Adam's learning rate, in the units of ``attack.lr``.
        scale: Factor of random starts, and of the steps from them.
        restarts: Independent searches.
    """

    init: Init = "prompt"
    steps: int = 25
    embeddings: int = 4
    noise_batch: int = 8
    between: tuple[float, float] = (0.0, 1.0)
    through: int = 0
    lr: float = 0.1
    scale: float = 1.0
    restarts: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "between", tuple(self.between))

    def wrong(self) -> str:
        """What no search can do; empty where all is well."""
        low, high = self.between
        least = min(self.steps, self.embeddings, self.noise_batch, self.restarts)
        if self.init not in INITS:
            return f"init must be among {', '.join(INITS)}, got {self.init}"
        if least < 1 or self.through < 0:
            return "steps, embeddings, noise_batch and restarts must be >= 1, through >= 0"
        if not (0 < self.lr < math.inf and 0 < self.scale < math.inf):
            return f"lr and scale must be positive numbers, got {self.lr} and {self.scale}"
        if not 0 <= low < high <= 1:
            return f"between must rise within 0 and 1, got [{low}, {high}]"
        if self.through and (low, high) != (0.0, 1.0):
            return "a search through sampling begins at noise and ends at the image: no between"
        if self.through and self.embeddings > self.through:
            return f"{self.through} sampling steps use no more than as many embeddings"
        if not self.through and self.noise_batch % self.embeddings:
            return "embeddings share the noise samples: noise_batch must be a multiple of them"
        return ""

    @property
    def rows(self) -> int:
        """Rows through the denoiser of all steps."""
        return self.steps * self.noise_batch * max(1, self.through)

    def level(self, restart: int) -> str:
        """What is done, in words."""
        low, high = self.between
        steps = f"{self.steps} step{'' if self.steps == 1 else 's'}"
        words = [f"{steps} from {self.init.replace('_', ' ')}"]
        if self.embeddings > 1:
            words.append(f"{self.embeddings} embeddings over time")
        if self.through:
            words.append(f"through {self.through} sampling steps")
        if (low, high) != (0.0, 1.0):
            words.append(f"noise {low:g} to {high:g}")
        words += [f"rate {self.lr:g}", f"{self.noise_batch} noise samples"]
        if self.scale != 1:
            words.append(f"starts times {self.scale:g}")
        return ", ".join([*words, f"restart {restart}"] if restart else words)

    def ranges(self, count: int) -> list[tuple[int, int]]:
        """Range of timesteps (first, last + 1) of each embedding, the cleanest first.

        Args:
            count: Timesteps of the schedule.
        """
        low, high = (round(share * count) for share in self.between)
        edges = [low + (high - low) * k // self.embeddings for k in range(self.embeddings + 1)]
        return list(pairwise(edges))

    def of(self, times: torch.Tensor, count: int) -> list[int]:
        """Which embedding each of some timesteps (S,) has: that of the nearest range."""
        last = [end for _, end in self.ranges(count)][:-1]
        return [sum(int(time) >= end for end in last) for time in times]


@dataclass(frozen=True)
class StrongSearch(AttackBase):
    """Search embeddings in several ways, one after the other.

    Attributes:
        searches: Names to the searches, the weakest first; None leaves one out.
        images: Images that are drawn at the end of each.
        drawing_steps: Steps of the deterministic sampler that draws them.
        guidance: Guidance scale of drawing; None for that of the audit's images.
    """

    name: str = "dori_strong"
    searches: Mapping[str, Search | None] = field(default_factory=dict)
    images: int = 4
    drawing_steps: int = 20
    guidance: float | None = None
    holds: Holds = field(default="embedding", init=False)

    def __post_init__(self) -> None:
        where = f"certify.attacks.{self.name}"
        if not self.chosen:
            raise InputError(f"attack {self.name} has no searches", where=f"{where}.searches")
        for name, own in self.chosen.items():
            if wrong := own.wrong():
                raise InputError(wrong, where=f"{where}.searches.{name}")
        levels = [own.level(0) for own in self.chosen.values()]
        twice = [level for level in levels if levels.count(level) > 1]
        if twice:
            raise InputError(
                f"attack {self.name} searches twice in one way: {twice[0]}",
                where=f"{where}.searches",
                fix="restarts=2 searches again from elsewhere",
            )
        if min(self.images, self.drawing_steps) < 1:
            raise InputError(f"attack {self.name} needs 1 image and 1 step", where=where)

    @property
    def chosen(self) -> dict[str, Search]:
        """The searches in their order."""
        return {name: own for name, own in self.searches.items() if own is not None}

    def rows(self, plan: Plan) -> int:
        """All steps of all searches, and their images."""
        drawn = self._drawn(self._guidance(plan.sampling.guidance))
        return sum(own.restarts * (own.rows + drawn) for own in self.chosen.values())

    def _guidance(self, usual: float) -> float:
        return usual if self.guidance is None else self.guidance

    def _drawn(self, guidance: float) -> int:
        """Rows through the denoiser of a pair's images."""
        return self.images * self.drawing_steps * (1 if guidance == 1 else 2)

    def run(self, subject: Subject, pairs: Sequence[Pair], attempt: Attempt) -> None:
        """Search in each way in turn, with those whose images are no copies yet."""
        del pairs
        # the searches of ``dori`` begin at the random start 0
        start, drawn = 1, self._drawn(self._guidance(subject.sampling.guidance))
        for own in self.chosen.values():
            for restart in range(own.restarts):
                level = own.level(restart)
                left = attempt.left(level)
                if not left:
                    return
                if own.through:
                    found = search_through(subject, own, left, start)
                else:
                    found = _by_denoising(subject, own, left, start)
                images = self._draw(subject, own, found)
                attempt.add(level, images, rows=own.rows + drawn)
                start += 1

    def _draw(
        self, subject: Subject, own: Search, found: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Images (K, 3, H, W) of embeddings (R, T, D), each within its range of timesteps."""
        model, guidance = subject.model, self._guidance(subject.sampling.guidance)
        times = timesteps(model, self.drawing_steps)
        which = own.of(times, model.num_train_timesteps)
        noise = dict.fromkeys(found, subject.starting_noise(self.images))

        def sample(
            embeddings: torch.Tensor, starts: torch.Tensor, ids: list[str], places: list[int]
        ) -> torch.Tensor:
            del places
            each = [*embeddings.unbind(1)]
            if model.embedding_filter is not None:
                each = [model.embedding_filter(one, starts, subject.sampling) for one in each]
            return deterministic(
                model,
                starts,
                times,
                torch.stack([each[k] for k in which]),
                guidance=guidance,
                pair_ids=ids,
            )

        with subject.carried():
            return subject.draw(found, noise=noise, sample=sample)


def _settings(subject: Subject, own: Search) -> AttackSettings:
    """A search's settings for the solver."""
    each = max(1, own.noise_batch // own.embeddings)
    return whole_search(
        subject.context.attack, own.init, steps=own.steps, noise_batch=each, lr=own.lr
    )


def _by_denoising(
    subject: Subject, own: Search, pairs: Sequence[Pair], start: int
) -> dict[str, torch.Tensor]:
    """Pair id to embeddings (R, T, D) that lower the denoising loss, each in its range."""
    ranges = own.ranges(subject.model.num_train_timesteps)
    settings = _settings(subject, own)
    found = search(subject, settings, pairs, own.init, start, ranges=ranges, spread=own.scale)
    return {name: result.embeddings[:, -1] for name, result in found.items()}


def search_through(
    subject: Subject, own: Search, pairs: Sequence[Pair], start: int
) -> dict[str, torch.Tensor]:
    """Lower the distance of what a few sampling steps draw to the latent of the image.

    Each step draws other starting noise, so that what is found does not hang on one.

    Args:
        subject: The model.
        own: The search.
        pairs: Whose images are looked for.
        start: Which random start and noise.

    Returns:
        Pair id to embeddings (R, T, D), the cleanest range first.
    """
    model, settings = subject.model, _settings(subject, own)
    measured = settings.own_units and own.init == "random"
    scale = own.scale * (subject.scale if measured else 1.0)
    context = replace(subject.context, attack=settings)
    attack = context.attack_context(subject.edit.identity, scale=scale)
    jobs = [Job(pair, own.init, start) for pair in pairs]
    initial = torch.stack([attack.initial(job) for job in jobs]).to(model.device)
    initial = initial[:, None].expand(-1, own.embeddings, -1, -1)
    latents = subject.latents(pairs).to(model.device)
    unit, delta = units(model, settings), torch.zeros_like(initial)
    optimizer = RowAdam(delta, lr=own.lr, scales=tuple(map(attack.scale_of, jobs)))
    shape = (own.noise_batch, *model.latent_shape)
    ids = [pair.id for pair in pairs]
    active = torch.ones(len(pairs), dtype=torch.bool, device=model.device)
    with subject.carried(), model.frozen(), torch.enable_grad():
        size = _pairs_at_once(model, own, ids[0])
        for step in range(own.steps):
            distributed.check()
            keys = (("through sampling", subject.context.seed, name, start, step) for name in ids)
            draws = [torch.randn(shape, generator=keyed_generator(*key)) for key in keys]
            noise = torch.stack(draws).to(model.device)
            point = initial + (delta if unit is None else unit * delta)
            gradient = _gradient(model, own, ids, point, latents, noise, size)
            if unit is not None:
                gradient = unit * gradient
            # a row whose gradient is not finite stays at its last point
            active = active & gradient.flatten(1).isfinite().all(1)
            delta = optimizer.step(delta, gradient, active)
    point = initial + (delta if unit is None else unit * delta)
    return dict(zip(ids, point.cpu(), strict=True))


def _pairs_at_once(model: LatentDiffusion, own: Search, pair_id: str) -> int:
    """Pairs whose passes through all sampling steps are in memory at the same time."""
    samples = own.noise_batch * own.through
    fitting = estimate_batch_size(model, noise_batch=samples, wanted=None, pair_id=pair_id)
    return max(1, min(fitting, pairs_at_once(model)) // own.through)


def _gradient(
    model: LatentDiffusion,
    own: Search,
    ids: Sequence[str],
    point: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """Gradient (N, R, T, D) at embeddings of the distance to latents (N, C, h, w).

    Args:
        model: The model.
        own: The search.
        ids: Pair ids (N).
        point: Embeddings (N, R, T, D).
        latents: The images' latents (N, C, h, w).
        noise: Starting noise (N, B, C, h, w).
        size: Pairs at once.
    """
    times = timesteps(model, own.through)
    which = own.of(times, model.num_train_timesteps)

    @torch.enable_grad()
    def gradient_of(rows: list[int]) -> Sequence[torch.Tensor]:
        embeddings = point[rows].detach().requires_grad_(True)
        width = noise.shape[1]
        # (R, N * B, T, D), then one for each sampling step
        each = embeddings.transpose(0, 1).repeat_interleave(width, 1)
        clean = deterministic(
            model,
            noise[rows].flatten(0, 1),
            times,
            each[which],
            guidance=1.0,
            pair_ids=[ids[row] for row in rows for _ in range(width)],
        )
        wanted = latents[rows].repeat_interleave(width, 0)
        loss = F.mse_loss(clean, wanted, reduction="none").flatten(1).mean(1) / width
        (found,) = torch.autograd.grad(LOSS_SCALE * loss.sum(), embeddings)
        return [*(found / LOSS_SCALE)]

    found = map_batches(gradient_of, range(len(point)), at_once=size, model=model, backoff=_MEMORY)
    return torch.stack(found)
