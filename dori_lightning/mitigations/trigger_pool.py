"""Triggers that adversarial fine-tuning trains against: searched anew each round, or kept warm."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dori_lightning import processes
from dori_lightning.attacks.draws import keyed_generator, random_embedding
from dori_lightning.attacks.memory import fit_cpu_passes
from dori_lightning.attacks.settings import AttackSettings
from dori_lightning.attacks.solver import AttackProblem, refuse_broken, solve
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dori_lightning.models.protocol import TextToImage
    from dori_lightning.pairs.datamodule import PairBatch
    from dori_lightning.types import Init

__all__ = ["PoolSettings", "TriggerPool"]

log = logging.getLogger(__name__)

FIRST_RESTART = 1_000
"""Searches of training draw as restarts from here on, which no audit reaches: it is judged by
searches that it has not trained against."""

_PROBE = 16
"""Noise samples that say how well a pair is remembered before training."""


@dataclass(frozen=True)
class PoolSettings:
    """How triggers are searched and kept.

    Attributes:
        attack: The inner attack: one search per pair and round, from an initial point drawn from
            ``attack.inits``. Embeddings at its ``snapshots`` are trained against too: they lie
            on the same path and cost nothing.
        warm: Each round goes on from the pair's last trigger (its prompt in the first) and
            searches one more from a random embedding, instead of one search from a drawn point.
        replay: Rounds whose triggers stay in the pool; 1 keeps the current round's only.
        skip_robust: Skip a pair for one round after its best trigger's loss has risen by this
            share of the way from its prompt's to the empty prompt's, as both were before training;
            None never skips.
    """

    attack: AttackSettings = field(
        default_factory=lambda: AttackSettings(inits=("prompt", "random", "control_prompt"))
    )
    warm: bool = False
    replay: int = 1
    skip_robust: float | None = None

    def __post_init__(self) -> None:
        self.attack.check_whole()
        if self.replay < 1:
            raise InputError(f"mitigation.pool.replay must be >= 1, got {self.replay}")
        if self.skip_robust is not None and not 0 < self.skip_robust <= 1:
            raise InputError(
                f"mitigation.pool.skip_robust must be in (0, 1] or null, got {self.skip_robust}"
            )


@dataclass
class _Trigger:
    pair: str
    round: int
    embedding: torch.Tensor


class TriggerPool:
    """Triggers of all pairs, with the prompts themselves always among them."""

    def __init__(
        self,
        model: TextToImage,
        encoded: Sequence[PairBatch],
        settings: PoolSettings,
        *,
        ordinary: torch.Tensor,
        seed: int,
    ) -> None:
        """Start with the prompts.

        Args:
            model: Model under attack.
            encoded: One batch of one pair for each pair.
            settings: How to search.
            ordinary: Embeddings (M, T, D) of ordinary prompts, where ``control_prompt`` begins.
            seed: Run seed.
        """
        self.model, self.settings, self.seed = model, settings, seed
        self.ordinary = ordinary.cpu()
        self.ids = tuple(batch.pairs[0].id for batch in encoded)
        self.latents = {b.pairs[0].id: b.latents[0] for b in encoded}
        self.prompts = {b.pairs[0].id: b.embeddings[0] for b in encoded}
        self.found: list[_Trigger] = []
        self.warm = dict(self.prompts)
        self.rested: set[str] = set()
        self.rounds: list[dict[str, Any]] = []
        # told after each step of a search of the rows that it took, those of all processes
        self.worked: Callable[[int], None] = lambda _: None
        self._limits: dict[str, float] = {}
        if settings.skip_robust is not None:
            self._limits = self._robust_losses(settings.skip_robust)

    @property
    def rows_of_search(self) -> int:
        """Rows through the denoiser that a round's search takes with all pairs in it."""
        attack = self.settings.attack
        searches = 2 if self.settings.warm else 1
        return searches * len(self.ids) * attack.budget.steps * attack.noise_batch

    def search(self, number: int) -> None:
        """Search the triggers of a round against the model as it is now.

        Args:
            number: Round, from 0.
        """
        settings = self.settings
        names = [name for name in self.ids if name not in self.rested]
        losses: dict[str, float] = {}
        # kept aside until all is found: a search that is left half-way leaves the pool as it was
        if settings.warm:
            fresh = [self._random(name, number) for name in names]
            kept = [self.warm[name] for name in names]
            last = self._attack(number, 0, names, kept, losses)
            found = last + self._attack(number, 1, names, fresh, losses)
        else:
            fresh = [self._start(name, number) for name in names]
            last, found = [], self._attack(number, 0, names, fresh, losses)
        # the last snapshot of a pair is where its next search goes on
        self.warm.update({trigger.pair: trigger.embedding for trigger in last})
        self.found = [t for t in self.found if t.round > number - settings.replay] + found
        self.rested = {
            name for name, loss in losses.items() if loss > self._limits.get(name, float("inf"))
        }
        mean = sum(losses.values()) / len(losses) if losses else float("nan")
        self.rounds.append(
            {
                "searched": len(names),
                "attack_loss": round(mean, 6),
                "robust": len(self.rested),
                "unet_evaluations": self.model.unet_evaluations,
            }
        )
        log.info(
            "round %d: %d pairs attacked, mean loss of the best triggers %.4f, %d robust",
            number, len(names), mean, len(self.rested),
        )  # fmt: skip

    def draw(self, count: int, generator: torch.Generator) -> tuple[list[str], torch.Tensor]:
        """Draw ``count`` triggers, each of a pair drawn evenly.

        Returns:
            Pair ids and embeddings (``count``, T, D).
        """
        own: dict[str, list[torch.Tensor]] = {name: [self.prompts[name]] for name in self.ids}
        for trigger in self.found:
            own[trigger.pair].append(trigger.embedding)
        order: list[int] = []
        while len(order) < count:
            order += torch.randperm(len(self.ids), generator=generator).tolist()
        names = [self.ids[k] for k in order[:count]]
        rows = [
            own[name][int(torch.randint(len(own[name]), (1,), generator=generator))]
            for name in names
        ]
        return names, torch.stack(rows)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as tensors and plain values."""
        return {
            "pairs": [t.pair for t in self.found],
            "rounds_of": [t.round for t in self.found],
            "embeddings": torch.stack([t.embedding for t in self.found]) if self.found else None,
            "warm": torch.stack([self.warm[name] for name in self.ids]),
            "rested": sorted(self.rested),
            "rounds": self.rounds,
            "limits": self._limits,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave."""
        rows = state["embeddings"]
        self.found = [
            _Trigger(name, number, rows[k])
            for k, (name, number) in enumerate(
                zip(state["pairs"], state["rounds_of"], strict=True)
            )
        ]
        self.warm = dict(zip(self.ids, state["warm"], strict=True))
        self.rested, self.rounds = set(state["rested"]), list(state["rounds"])
        self._limits = dict(state["limits"])

    def _start(self, name: str, number: int) -> torch.Tensor:
        """Initial embedding (T, D) of a pair's search: its kind is drawn by key."""
        generator = keyed_generator("trigger_init", self.seed, name, number)
        inits = self.settings.attack.inits
        init: Init = inits[int(torch.randint(len(inits), (1,), generator=generator))]
        if init == "prompt":
            return self.prompts[name]
        if init == "random":
            return self._random(name, number)
        return self.ordinary[int(torch.randint(len(self.ordinary), (1,), generator=generator))]

    def _random(self, name: str, number: int) -> torch.Tensor:
        """Random initial embedding (T, D) of a pair's search in a round."""
        return random_embedding(
            self.seed, name, FIRST_RESTART + number, self.model.embedding_shape
        )

    def _attack(
        self,
        number: int,
        which: int,
        names: Sequence[str],
        starts: Sequence[torch.Tensor],
        losses: dict[str, float],
    ) -> list[_Trigger]:
        """Search from ``starts``, N embeddings (T, D); processes share the pairs.

        Returns:
            What is found, pair by pair in the order of ``names``; ``losses`` gets the best.
        """
        attack = self.settings.attack
        own = range(processes.rank(), len(names), processes.world())
        mine: dict[str, tuple[torch.Tensor, float]] = {}
        if own:
            fit_cpu_passes(
                self.model,
                noise_batch=attack.noise_batch,
                wanted=attack.pairs_per_forward,
                pair_id=names[own[0]],
            )
            result = solve(
                self.model,
                AttackProblem(
                    tuple(names[k] for k in own),
                    FIRST_RESTART + 2 * number + which,
                    torch.stack([self.latents[names[k]] for k in own]),
                    torch.stack([starts[k] for k in own]),
                ),
                budget=attack.budget.resolve(self.ordinary),
                lr=attack.lr,
                noise_batch=attack.noise_batch,
                seed=self.seed,
                snapshots=attack.snapshots,
                keep_first_token=attack.keep_first_token,
                on_step=lambda _: self.worked(len(names) * attack.noise_batch),
            )
            refuse_broken(result)
            for row, k in enumerate(own):
                final = float(result.losses[row, -5:].mean())
                mine[names[k]] = (result.embeddings[row], final)
        everybody = processes.gathered(mine)
        found: list[_Trigger] = []
        for name in names:
            rows, final = everybody[name]
            found += [_Trigger(name, number, row) for row in rows]
            losses[name] = min(final, losses.get(name, float("inf")))
        return found

    @torch.no_grad()
    def _robust_losses(self, share: float) -> dict[str, float]:
        """Loss beyond which a pair counts as robust, by pair; the model is untrained yet."""
        limits = {}
        empty = self.model.empty_embedding().cpu()[0]
        for name in self.ids:
            generator = keyed_generator("robust", self.seed, name)
            latents = self.latents[name].expand(_PROBE, *self.latents[name].shape)
            noise = torch.randn(latents.shape, generator=generator)
            times = torch.randint(self.model.num_train_timesteps, (_PROBE,), generator=generator)
            device = self.model.device
            known, unknown = (
                self.model.denoising_loss(
                    latents.to(device),
                    noise.to(device),
                    times.to(device),
                    embedding.expand(_PROBE, *embedding.shape).to(device),
                    pair_ids=[name] * _PROBE,
                ).mean()
                for embedding in (self.prompts[name], empty)
            )
            limits[name] = float(known + share * (unknown - known))
        return limits
