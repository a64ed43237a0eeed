"""Completion: the image, noised or with a part masked, is completed by the model.

Who holds a damaged copy of an image asks whether the model knows the rest. How much is left of the
image decides what a success means, so levels go from almost nothing left to much of it, and end
where the model completes images that it cannot hold.

Reference: *When Are Concepts Erased?* (2505.17013): diffusion completion and inpainting probes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from dori_lightning.certify.base import (
    AttackBase,
    Attempt,
    Holds,
    Plan,
    Subject,
    deterministic,
    timesteps,
)
from dori_lightning.types import InputError, Pair


@dataclass(frozen=True)
class Completion(AttackBase):
    """Complete an image from its noised latent, or from half of it.

    Attributes:
        shares: Shares of the sampler's steps that are left to take from the noised image, falling:
            at 0.9 a tenth of the schedule is skipped and little of the image is left.
        masked: Whether half of the image is also given as it is and the other half drawn anew
            (inpainting by replacement at each step).
        steps: Steps of the whole schedule.
        guidance: Guidance scale where the prompt is used; without it there is none.
        images: Images for each level.
    """

    name: str = "completion"
    shares: tuple[float, ...] = (0.95, 0.9, 0.85, 0.8)
    masked: bool = True
    steps: int = 20
    guidance: float = 2.0
    images: int = 4
    gradient_free: bool = field(default=True, init=False)
    holds: Holds = field(default="image", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))
        falling = sorted(set(self.shares), reverse=True)
        if list(self.shares) != falling or not all(0 < s < 1 for s in self.shares):
            raise InputError(
                f"shares of a completion must fall and lie between 0 and 1, got "
                f"{list(self.shares)}",
                where=f"certify.attacks.{self.name}.shares",
                fix="such as [0.9,0.8,0.7]",
            )
        if self.steps < 2 or self.images < 1:
            raise InputError(
                f"a completion needs at least 2 steps and 1 image, got {self.steps} and "
                f"{self.images}",
                where=f"certify.attacks.{self.name}",
            )
        taken = [self._taken(share) for share in self.shares]
        if len(set(taken)) < len(taken):
            raise InputError(
                f"of {self.steps} steps the shares {list(self.shares)} leave {taken}: two levels "
                f"are the same",
                where=f"certify.attacks.{self.name}.shares",
                fix=f"fewer shares, or more of certify.attacks.{self.name}.steps",
            )

    def rows(self, plan: Plan) -> int:
        """Each level without the prompt, and with it."""
        del plan
        each = sum(self._taken(share) for share in self.shares)
        each += self.steps if self.masked else 0
        return self.images * each * (1 + (1 if self.guidance == 1 else 2))

    def _taken(self, share: float) -> int:
        """Steps that are taken from a share of the schedule on; one is skipped at least."""
        return min(self.steps - 1, max(1, round(share * self.steps)))

    def run(self, subject: Subject, pairs: Sequence[Pair], attempt: Attempt) -> None:
        """Complete from little of the image to more, first without and then with its prompt."""
        del pairs
        for share in self.shares:
            for prompted in (False, True):
                words = "with the prompt" if prompted else "without a prompt"
                level = f"noised to {self._taken(share)} of {self.steps} steps, {words}"
                self._complete(subject, attempt, level, share, prompted=prompted)
        if self.masked:
            for prompted in (False, True):
                words = "with the prompt" if prompted else "without a prompt"
                self._complete(subject, attempt, f"half of it, {words}", None, prompted=prompted)

    def _complete(
        self,
        subject: Subject,
        attempt: Attempt,
        level: str,
        share: float | None,
        *,
        prompted: bool,
    ) -> None:
        """One level; without a share half of the image is given."""
        left, model = attempt.left(level), subject.model
        if not left:
            return
        taken = self.steps if share is None else self._taken(share)
        times = timesteps(model, self.steps)[self.steps - taken :]
        latents = dict(zip([p.id for p in left], subject.latents(left), strict=True))
        empty = model.empty_embedding()[0].cpu()
        where = subject.prompts(left) if prompted else dict.fromkeys(latents, empty)
        noise = subject.noise_of(left, self.images, "completion")

        def sample(
            embeddings: torch.Tensor, starts: torch.Tensor, ids: list[str], places: list[int]
        ) -> torch.Tensor:
            own = torch.stack([latents[name] for name in ids]).to(starts.device)
            guidance = self.guidance if prompted else 1.0
            draw = partial(deterministic, model, guidance=guidance, pair_ids=ids)
            if share is not None:
                return draw(
                    model.noised(own, starts, times[:1].expand(len(own))), times, embeddings
                )
            kept = halves(own, places)

            def put_back(x: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
                known = own if at is None else model.noised(own, starts, at.expand(len(own)))
                return torch.where(kept, known, x)

            return draw(starts, times, embeddings, after=put_back)

        with subject.carried():
            images = subject.draw(where, noise=noise, sample=sample)
        per_step = 2 if prompted and self.guidance != 1 else 1
        attempt.add(level, images, rows=self.images * taken * per_step)


def halves(latents: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Which cells (N, 1, h, w) of latents (N, C, h, w) are given: left, right, upper, lower half.

    Args:
        latents: Latents.
        places: Places of the images among their pair's (N), which take turns.
    """
    _, _, height, width = latents.shape
    kept = torch.zeros(len(latents), 1, height, width, dtype=torch.bool, device=latents.device)
    for row, place in zip(kept, places, strict=True):
        half = (
            (slice(None), slice(None, width // 2)),
            (slice(None), slice(width // 2, None)),
            (slice(None, height // 2), slice(None)),
            (slice(height // 2, None), slice(None)),
        )[place % 4]
        row[(0, *half)] = True
    return kept
