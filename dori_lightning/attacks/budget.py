"""Budget and settings of an attack: steps, norm and radius around the initial embedding."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from dori_lightning.attacks.timesteps import Timesteps, require_timesteps
from dori_lightning.models.conditioning import Spread
from dori_lightning.types import (
    INITS,
    Budget,
    Init,
    InputError,
    Kind,
    Norm,
    require,
    require_at_least_one,
)

_NEEDS_CONTROLS = (
    "a relative budget needs at least two control pairs with different prompts; add pairs of "
    "kind control or set attack.budget.relative=false"
)


@dataclass(frozen=True)
class BudgetSettings:
    """A budget before the checkpoint is known.

    Attributes:
        norm: ``none`` limits the steps alone (the paper's budget), ``l2`` and ``linf`` also the
            distance to the initial embedding, by projection.
        radius: Largest distance; ignored where ``norm`` is ``none``.
        relative: Whether ``radius`` is a multiple of the median distance (in the same norm)
            between the embeddings of control prompts, which makes it comparable across
            checkpoints, or absolute in CLIP units.
        steps: Gradient steps.

    Checkpoints with several parts of conditioning have a ball in each of them: its radius is that
    multiple of the median distance of ordinary prompts in this part.
    """

    norm: Norm = "none"
    radius: float | None = None
    relative: bool = True
    steps: int = 50

    def __post_init__(self) -> None:
        norm, radius = self.norm, self.radius
        known = norm in ("none", "l2", "linf")
        require(known, "attack.budget.norm must be none, l2 or linf", repr(norm))
        require(self.steps >= 0, "attack.budget.steps must be >= 0", self.steps)
        near = norm == "none" or (radius is not None and 0 <= radius < math.inf)
        require(near, f"attack.budget.radius must be a number >= 0 for norm {norm}", radius)

    @property
    def needs_controls(self) -> bool:
        """Whether ``resolve`` looks at control prompts."""
        return self.norm != "none" and self.relative

    def resolve(
        self, control_embeddings: torch.Tensor | None, *, own_units: bool = False
    ) -> Budget:
        """Fix the radius for a checkpoint.

        Args:
            control_embeddings: Embeddings (M, T, D) of control prompts, None where there are none.
            own_units: Whether the checkpoint has measured units of its own (``Spread``); then the
                radius stays relative.

        Raises:
            InputError: The radius is relative but there are fewer than two different control
                prompts, or absolute for parts that have no unit in common.
        """
        if self.norm == "none" or self.radius is None:
            return Budget("none", None, self.steps)
        if own_units:
            if self.relative:
                return Budget(self.norm, float(self.radius), self.steps)
            raise InputError(
                "an absolute radius means nothing where a checkpoint is conditioned on several "
                "parts of different scale",
                where="attack.budget.relative",
                fix="attack.budget.relative=true",
            )
        if not self.relative:
            return Budget(self.norm, float(self.radius), self.steps)
        if control_embeddings is None:
            raise InputError(_NEEDS_CONTROLS)
        return Budget(
            self.norm,
            float(self.radius) * median_distance(control_embeddings, self.norm),
            self.steps,
        )


def evaluation_steps(snapshots: Iterable[int], steps: int) -> tuple[int, ...]:
    """Steps after which an attack is evaluated: snapshots on its way, and its end, rising."""
    return tuple(sorted({s for s in snapshots if 0 <= s <= steps} | {steps}))


def median_distance(embeddings: torch.Tensor, norm: Norm) -> float:
    """Median pairwise distance of embeddings, over all numbers of each.

    Args:
        embeddings: Embeddings (M, T, D).
        norm: ``l2`` for the Euclidean norm, otherwise the maximum norm.

    Raises:
        InputError: Fewer than two embeddings differ.
    """
    flat = embeddings.flatten(1).double()
    p = 2.0 if norm == "l2" else math.inf
    distances = torch.pdist(flat, p)
    if len(distances) == 0 or float(distances.max()) == 0:
        raise InputError(_NEEDS_CONTROLS)
    return float(distances[distances > 0].median())


def project(delta: torch.Tensor, budget: Budget, spread: Spread | None = None) -> torch.Tensor:
    """Nearest point to ``delta`` within the budget's radius, each row for itself.

    Args:
        delta: Offsets (N, T, D) from the initial embeddings.
        budget: Radius and norm; ``none`` returns ``delta`` as it is.
        spread: Units of a checkpoint's parts, each of which has a ball of its own; None for one
            ball in the embedding's own numbers.
    """
    if budget.norm == "none" or budget.eps is None:
        return delta
    if spread is None or spread.absolute:
        return _nearest(delta, budget.norm, budget.eps)
    delta = delta.clone()
    for part, distance in zip(spread.parts, spread.distances[budget.norm], strict=True):
        part.of(delta).copy_(_nearest(part.of(delta), budget.norm, budget.eps * distance))
    return delta


def _nearest(delta: torch.Tensor, norm: Norm, radius: float) -> torch.Tensor:
    """Nearest points of a ball around zero to ``delta`` (N, rows, columns)."""
    if norm == "linf":
        return delta.clamp(-radius, radius)
    length: torch.Tensor = delta.flatten(1).norm(dim=1).clamp_min(torch.finfo(delta.dtype).tiny)
    return delta * (radius / length).clamp(max=1.0)[:, None, None]


@dataclass(frozen=True)
class AttackSettings:
    """How embeddings are attacked; the defaults are the paper's (Finding DoRI, 2507.16880).

    Attributes:
        inits: Initial points to attack from: the pair's ``prompt``, a ``random`` standard normal
            embedding, the embedding of an unrelated ``control_prompt``.
        other_inits: Initial points that tm and control pairs are attacked from; None for all of
            ``inits``. The attack on controls tests the method, not the checkpoint, so one initial
            point can be enough; an audit whose answer rests on another one attacks them there too.
        budget: Steps and radius.
        lr: Adam's learning rate: in CLIP units for Stable Diffusion, as published; for other
            families in standard deviations of each part over ordinary prompts.
        noise_batch: Noise samples and timesteps per pair and step.
        timesteps: How these timesteps are drawn: ``uniform``, as published, ``stratified``,
            by ``importance``, or from a range of the schedule; see ``attacks.timesteps``.
        restarts: Independent attacks per pair and init; a pair counts as reproduced if any of
            them succeeds.
        own_units: Whether audits scale random starts, and the steps from them, by how strongly
            the model answers to its text, where that is far from usual (``check_model``).
        snapshots: Steps at which to measure besides the last one; free, since they lie on one
            trajectory.
        early_stop: Stop a pair's attack at the first snapshot or look whose images are copies; the
            others go on in full batches. Rates are cumulative then, see ``metrics.replication``.
        looks: Steps at which ``early_stop`` also looks at an attack, without a rate of their own.
        one_image: Draw one image at a time: the first of a prompt, and the others only where it is
            no copy; at each look another one. What took all its steps is drawn whole.
        futility: Share, in (0, 1), of images that the model does not hold that are attacked all
            the same; the others are not, see ``metrics.evidence.find_futile``. None attacks all.
        samples_per_forward: Noise samples of a pair in one pass, where memory does not hold all
            of them; the gradients of several passes are added, so the result is the same up to
            rounding. None for all.
        parts: Names of the parts of the conditioning that are searched; None for every free one.
            The others stay the prompt's where an attack begins there, and are the empty prompt's
            where it begins elsewhere, so that no trace of the prompt is left.
        pairs_per_forward: Pairs of a batch; changes speed and memory, not results. None chooses by
            the free memory, see ``models.memory.estimate_batch_size``. On the CPU forward passes
            have one shape, whatever the batch.
    """

    inits: tuple[Init, ...] = ("prompt", "random")
    other_inits: tuple[Init, ...] | None = None
    budget: BudgetSettings = field(default_factory=BudgetSettings)
    lr: float = 0.1
    noise_batch: int = 8
    timesteps: Timesteps = "uniform"
    restarts: int = 1
    own_units: bool = True
    snapshots: tuple[int, ...] = ()
    early_stop: bool = False
    looks: tuple[int, ...] = ()
    one_image: bool = False
    futility: float | None = None
    samples_per_forward: int | None = None
    parts: tuple[str, ...] | None = None
    pairs_per_forward: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "inits", tuple(self.inits))
        for name in ("snapshots", "looks"):
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))
        if isinstance(self.timesteps, Sequence) and not isinstance(self.timesteps, str):
            object.__setattr__(self, "timesteps", tuple(self.timesteps))
        require_timesteps(self.timesteps)
        if self.parts is not None:
            object.__setattr__(self, "parts", tuple(self.parts))
        if self.other_inits is not None:
            object.__setattr__(self, "other_inits", tuple(self.other_inits))
            stray = [init for init in self.other_inits if init not in self.inits]
            require(not stray, "attack.other_inits must be among attack.inits", ", ".join(stray))
        unknown = [str(init) for init in self.inits if init not in INITS]
        among = ", ".join(INITS)
        require(not unknown, f"attack.inits must be among {among}", ", ".join(unknown))
        if len(set(self.inits)) != len(self.inits):
            raise InputError(
                f"attack.inits names one initial point twice: {', '.join(self.inits)}"
            )
        require(0 < self.lr < math.inf, "attack.lr must be a positive number", self.lr)
        counts = ["noise_batch", "restarts"]
        optional = ("pairs_per_forward", "samples_per_forward")
        counts += [name for name in optional if getattr(self, name) is not None]
        require_at_least_one(self, *counts, within="attack.")
        for name in ("snapshots", "looks"):
            early = list(getattr(self, name))
            require(min(early, default=0) >= 0, f"attack.{name} must be >= 0", early)
        if self.early_stop and not any(s < self.budget.steps for s in self.stops):
            raise InputError(
                f"attack.early_stop stops at snapshots, and attack.snapshots="
                f"{list(self.snapshots)} has none before the last step, {self.budget.steps}\n"
                f"  fix:   give some, as in attack.snapshots=[1,10,25], or leave "
                f"attack.early_stop=false"
            )

        level = self.futility
        require(level is None or 0 < level < 1, "attack.futility must lie between 0 and 1", level)
        on_its_way = {"looks": self.looks, "one_image": self.one_image, "futility": level}
        asked = [name for name, value in on_its_way.items() if value]
        if asked and not self.early_stop:
            raise InputError(
                f"attack.{asked[0]} is for attacks that are looked at on their way",
                where=f"attack.{asked[0]}",
                fix="attack.early_stop=true, or attack=dori_sequential",
            )

    @property
    def stops(self) -> tuple[int, ...]:
        """Steps after which attacks may be evaluated, besides the last one, rising."""
        return tuple(sorted({*self.snapshots, *self.looks}))

    @property
    def samples_at_once(self) -> int:
        """Noise samples of a pair in one pass."""
        return min(self.noise_batch, self.samples_per_forward or self.noise_batch)

    def check_whole(self) -> None:
        """Refuse early stop where no images are evaluated during the attack.

        Raises:
            InputError: ``early_stop`` is set.
        """
        if self.early_stop:
            raise InputError(
                "attack.early_stop is for audits, which evaluate images between the segments of "
                "an attack; nothing else does\n  fix:   attack.early_stop=false"
            )

    def inits_of(self, kind: Kind) -> tuple[Init, ...]:
        """Initial points that pairs of a kind are attacked from."""
        return self.inits if kind == "vm" or self.other_inits is None else self.other_inits
