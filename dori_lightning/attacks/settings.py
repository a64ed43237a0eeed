"""Settings of the attack as the configuration gives them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dori_lightning.attacks.budget import BudgetSettings
from dori_lightning.types import INITS, Init, InputError, Kind

__all__ = ["AttackSettings"]


@dataclass(frozen=True)
class AttackSettings:
    """How embeddings are attacked; the defaults are the paper's (Finding DoRI, 2507.16880).

    Attributes:
        inits: Initial points to attack from: the pair's ``prompt``, a ``random`` standard normal
            embedding, the embedding of an unrelated ``control_prompt``.
        other_inits: Initial points that tm and control pairs are attacked from; None for all of
            ``inits``. The attack on controls tests the method, not the checkpoint, so one initial
            point can be enough.
        budget: Steps and ball.
        lr: Adam's learning rate, CLIP units.
        noise_batch: Noise samples and timesteps per pair and step.
        restarts: Independent attacks per pair and init; a pair counts as reproduced if any of
            them succeeds.
        keep_first_token: Leave the start token alone. Whether the paper does is unknown; default
            as published: no.
        snapshots: Steps at which to measure besides the last one; free, since they lie on one
            trajectory.
        early_stop: Stop a pair's attack at the first snapshot whose pictures are copies; the
            others go on in full passes. Rates are cumulative then, see
            ``metrics.first_success``.
        pairs_per_forward: Pairs that share a forward pass; changes speed and memory, not results.
            None chooses by the free memory, see ``memory.pairs_that_fit``. On the CPU
            it is how many pairs are kept together; its passes have one width.
    """

    inits: tuple[Init, ...] = ("prompt", "random")
    other_inits: tuple[Init, ...] | None = None
    budget: BudgetSettings = field(default_factory=BudgetSettings)
    lr: float = 0.1
    noise_batch: int = 8
    restarts: int = 1
    keep_first_token: bool = False
    snapshots: tuple[int, ...] = ()
    early_stop: bool = False
    pairs_per_forward: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "inits", tuple(self.inits))
        object.__setattr__(self, "snapshots", tuple(sorted(set(self.snapshots))))
        if self.other_inits is not None:
            object.__setattr__(self, "other_inits", tuple(self.other_inits))
            stray = [init for init in self.other_inits if init not in self.inits]
            if stray:
                raise InputError(
                    f"attack.other_inits must be among attack.inits, got {', '.join(stray)}"
                )
        unknown = [init for init in self.inits if init not in INITS]
        if unknown:
            raise InputError(
                f"attack.inits must be among {', '.join(INITS)}, "
                f"got {', '.join(map(str, unknown))}"
            )
        if len(set(self.inits)) != len(self.inits):
            raise InputError(
                f"attack.inits names one initial point twice: {', '.join(self.inits)}"
            )
        if not 0 < self.lr < math.inf:
            raise InputError(f"attack.lr must be a positive number, got {self.lr}")
        for name in ("noise_batch", "restarts", "pairs_per_forward"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"attack.{name} must be >= 1, got {value}")
        if self.snapshots and self.snapshots[0] < 0:
            raise InputError(f"attack.snapshots must be >= 0, got {list(self.snapshots)}")
        if self.early_stop and not any(s < self.budget.steps for s in self.snapshots):
            raise InputError(
                f"attack.early_stop stops at snapshots, and attack.snapshots="
                f"{list(self.snapshots)} has none before the last step, {self.budget.steps}\n"
                f"  mend:  give some, as in attack.snapshots=[1,10,25], or leave "
                f"attack.early_stop=false"
            )

    def check_whole(self) -> None:
        """Refuse to stop early where nobody looks at pictures during the attack.

        Raises:
            InputError: ``early_stop`` is set.
        """
        if self.early_stop:
            raise InputError(
                "attack.early_stop is for audits, which look at pictures between the stretches "
                "of an attack; nothing else does\n  mend:  attack.early_stop=false"
            )

    def inits_of(self, kind: Kind) -> tuple[Init, ...]:
        """Initial points that pairs of a kind are attacked from."""
        return self.inits if kind == "vm" or self.other_inits is None else self.other_inits
