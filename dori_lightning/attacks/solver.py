"""Search the text embedding that makes a frozen model predict the noise of one image.

Every draw of noise depends on seed, pair, restart and step alone. So a result does not depend on
who else is in the batch, on the number of processes or on a resume.

Reference: Finding DoRI (2507.16880), section "adversarial text embeddings": Adam, learning rate
0.1, 50 steps, a batch of 8 noise samples and timesteps drawn anew at every step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from dori_lightning.attacks.budget import AttackSettings, evaluation_steps, project
from dori_lightning.attacks.timesteps import TimestepDraws
from dori_lightning.models.memory import ATTACK, pairs_at_once
from dori_lightning.models.protocol import TextToImage
from dori_lightning.runtime import distributed
from dori_lightning.runtime.batching import OomBackoff, map_batches, to_device
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Budget, InputError

log = logging.getLogger(__name__)

_MEMORY = OomBackoff(
    ATTACK,
    "pair",
    "checkpoint.precision=bf16, attack.samples_per_forward=1, or a device with more memory; a "
    "pair's noise samples (attack.noise_batch) are part of the method and are never cut",
)


LOSS_SCALE = 2.0**14
"""Of the loss while it is differentiated: a mean over noise samples and pixels has gradients that
fp16 rounds to zero. A power of two, so that fp32 and bf16 give the same bits as without."""


@dataclass(frozen=True)
class AttackProblem:
    """N independent searches that share batches and nothing else.

    Attributes:
        ids: Pair ids, length N.
        restarts: Which restart each row is, length N.
        latents: Latents of the images to reproduce (N, C, h, w).
        initial: Initial embeddings (N, T, D).
        scales: Factors of the learning rate, length N; None for 1 each.
        ranges: First timestep, and the one after the last, that each row's loss is drawn at,
            length N; None for all timesteps.
    """

    ids: tuple[str, ...]
    restarts: tuple[int, ...]
    latents: torch.Tensor
    initial: torch.Tensor
    scales: tuple[float, ...] | None = None
    ranges: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class OptimizerState:
    """State of N searches between two steps, fp32 on the CPU unless said otherwise.

    Attributes:
        delta: Offsets from the initial embeddings (N, T, D), in the units of the search; a sum
            would lose last bits.
        mean: Adam's running means (N, T, D).
        square: Adam's running means of squares (N, T, D).
        count: Steps that Adam took of each row (N,), float64.
    """

    delta: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor
    count: torch.Tensor


@dataclass(frozen=True)
class AttackResult:
    """Embeddings and losses of N searches, finished or on their way.

    Attributes:
        ids: Pair ids, length N.
        embeddings: Embeddings after each snapshot, (N, S, T, D), fp32 on the CPU.
        snapshots: Steps of these embeddings, length S; 0 is the initial point.
        losses: Attack loss at each step taken (N, steps), before the step's update; NaN after
            divergence.
        diverged: Whether the loss or gradient stopped being finite (N,); such a row keeps its
            last finite point.
        no_gradient: Whether the first gradient was exactly zero (N,): the text does not reach the
            loss. Such a row stays where it began, and its losses are NaN.
        state: What the searches need to go on; None where they took all their steps.
    """

    ids: tuple[str, ...]
    embeddings: torch.Tensor
    snapshots: tuple[int, ...]
    losses: torch.Tensor
    diverged: torch.Tensor
    no_gradient: torch.Tensor
    state: OptimizerState | None = None

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return int(self.losses.shape[1])

    def row(self, index: int) -> AttackResult:
        """One search of them."""
        return self.rows(slice(index, index + 1))

    def rows(self, own: slice) -> AttackResult:
        """Some searches of them."""
        state = self.state
        return replace(
            self,
            ids=self.ids[own],
            embeddings=self.embeddings[own],
            losses=self.losses[own],
            diverged=self.diverged[own],
            no_gradient=self.no_gradient[own],
            state=state and OptimizerState(**{k: v[own] for k, v in vars(state).items()}),
        )


def concat(results: Sequence[AttackResult]) -> AttackResult:
    """Rows of searches that took the same steps and can all go on."""
    states = [vars(result.state) for result in results if result.state is not None]
    return AttackResult(
        ids=tuple(name for result in results for name in result.ids),
        embeddings=torch.cat([result.embeddings for result in results]),
        snapshots=results[0].snapshots,
        losses=torch.cat([result.losses for result in results]),
        diverged=torch.cat([result.diverged for result in results]),
        no_gradient=torch.cat([result.no_gradient for result in results]),
        state=OptimizerState(**{k: torch.cat([s[k] for s in states]) for k in states[0]}),
    )


def solve(
    model: TextToImage,
    problem: AttackProblem,
    *,
    budget: Budget,
    settings: AttackSettings,
    seed: int = 0,
    density: torch.Tensor | None = None,
    resume_from: AttackResult | None = None,
    stop_at: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> AttackResult:
    """Solve N embedding searches in shared batches.

    The loss is the mean over the noise batch, summed over pairs, so that a pair's gradient is the
    same in any company: bit for bit on the CPU, where all batches have one shape, up to kernel
    rounding elsewhere. The model's weights take no gradient and are not touched.

    A row whose loss or gradient is not finite, or whose first gradient is exactly zero, stands
    still from there on and is marked: its search says nothing about the model. Where no row is
    left after the first step, the search ends there.

    The optimization may be split into segments with different rows in each (``stop_at``,
    ``resume_from``): results are identical.

    Args:
        model: Model under attack.
        problem: Images and initial embeddings.
        budget: Steps and radius.
        settings: Learning rate, noise samples and snapshots.
        seed: Run seed for the draws.
        density: Where the text matters (``model_check.text_density``), for timesteps by
            importance.
        resume_from: Result of the same rows up to some step, with their state; None begins at 0.
        stop_at: Step to stop at; None takes all of the budget's.
        on_step: Called after each step with its number.

    Raises:
        InputError: Not even one pair fits into memory.
        Interrupted: The run was told to leave.
    """
    end = budget.steps if stop_at is None else stop_at
    snapshots = tuple(s for s in evaluation_steps(settings.stops, budget.steps) if s <= end)
    initial = problem.initial.to(model.device, torch.float32)
    latents = problem.latents.to(model.device, torch.float32)
    rows, noises = len(problem.ids), settings.noise_batch
    spread = model.spread()
    unit = units(model, settings)
    schedules = _schedules(model, problem, settings, density)
    delta = torch.zeros_like(initial)

    def point() -> torch.Tensor:
        return initial + (delta if unit is None else unit * delta)

    optimizer = RowAdam(delta, lr=settings.lr, scales=problem.scales)
    active = torch.ones(rows, dtype=torch.bool, device=model.device)
    dead = ~active
    steps, losses, embeddings = range(end), list[torch.Tensor](), list[torch.Tensor]()
    if resume_from is not None and resume_from.state is not None:
        delta = resume_from.state.delta.to(model.device)
        optimizer.restore(resume_from.state)
        dead = resume_from.no_gradient.to(model.device)
        active = ~(dead | resume_from.diverged.to(model.device))
        steps = range(resume_from.steps, end) if bool(active.any()) else range(0)
        losses = [*resume_from.losses.to(model.device).unbind(1)]
        embeddings = [*resume_from.embeddings.unbind(1)]
    elif 0 in snapshots:
        embeddings = [initial.cpu()]
    shape = (noises, *latents.shape[1:])
    repeated = latents.repeat_interleave(noises, 0)
    with model.frozen(), torch.enable_grad():
        for step in steps:
            distributed.check()
            draws = [
                noise_and_timesteps(seed, name, restart, step, shape=shape, schedule=schedule)
                for name, restart, schedule in zip(
                    problem.ids, problem.restarts, schedules, strict=True
                )
            ]
            noise = to_device(torch.cat([d[0] for d in draws]), model.device)
            timesteps = to_device(torch.cat([d[1] for d in draws]), model.device)
            weighed = [weights for *_, weights in draws if weights is not None]
            loss, gradient = loss_and_gradient(
                model, problem.ids, point(), repeated, noise, timesteps,
                weights=to_device(torch.cat(weighed), model.device) if weighed else None,
                at_once=settings.samples_at_once,
            )  # fmt: skip
            if unit is not None:
                gradient = unit * gradient
            with torch.no_grad():
                finite = loss.isfinite() & gradient.flatten(1).isfinite().all(1)
                if step == 0:
                    dead = finite & (gradient.flatten(1).abs().amax(1) == 0)
                    active = ~dead
                active = active & finite
                losses.append(torch.where(active, loss, torch.nan))
                delta = project(optimizer.step(delta, gradient, active), budget, spread)
            if step + 1 in snapshots:
                embeddings.append(point().cpu())
            none_left = step == 0 and not bool(active.any())
            if on_step is not None:
                on_step(step + 1)
            if none_left:
                log.warning("%s", _why_none(model, problem.ids, dead.cpu(), timesteps))
                break
    stacked = torch.full((rows, end), torch.nan)
    if losses:
        stacked[:, : len(losses)] = torch.stack(losses, 1).cpu()
    embeddings += [point().cpu()] * (len(snapshots) - len(embeddings))
    no_gradient = dead.cpu()
    return AttackResult(
        ids=problem.ids,
        embeddings=torch.stack(embeddings, 1),
        snapshots=snapshots,
        losses=stacked,
        diverged=~active.cpu() & ~no_gradient,
        no_gradient=no_gradient,
        state=None if end == budget.steps else optimizer.state(delta),
    )


def _schedules(
    model: TextToImage,
    problem: AttackProblem,
    settings: AttackSettings,
    density: torch.Tensor | None,
) -> list[TimestepDraws]:
    """How each row's timesteps are drawn.

    Raises:
        InputError: By importance, where rows have ranges of their own.
    """
    count = model.num_train_timesteps
    if problem.ranges is None:
        return [TimestepDraws(0, count, settings.timesteps, density)] * len(problem.ids)
    if settings.timesteps == "importance":
        raise InputError(
            "timesteps are drawn by importance from a density over the whole schedule, but these "
            "searches have ranges of it",
            where="attack.timesteps",
            fix="uniform or stratified",
        )
    return [TimestepDraws(first, last, settings.timesteps) for first, last in problem.ranges]


def units(model: TextToImage, settings: AttackSettings) -> torch.Tensor | None:
    """How far a unit of the search moves each cell (T, D), zero where it may not move one.

    None where every cell moves in its own number.
    """
    spread, cells = model.spread(), model.free(settings.parts)
    if spread.absolute and bool(cells.all()):
        return None
    return (spread.std * cells).to(model.device)


def loss_and_gradient(
    model: TextToImage,
    ids: Sequence[str],
    point: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    at_once: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss (N,) and gradient (N, T, D) at ``point``, by passes of ``at_once`` samples of a pair.

    On the CPU every batch has the same shape, so a pair gets the same bits wherever and with
    whomever it stands.

    Args:
        model: The model, its weights frozen.
        ids: Pair ids, length N.
        point: Embeddings (N, T, D).
        latents: Latents (N * B, C, h, w), B of each pair in a row.
        noise: Noise that is added to them.
        timesteps: Timesteps (N * B,).
        weights: Factors of the samples' losses (N * B,); None for one each.
        at_once: Samples of a pair in one pass.
    """
    batch = len(noise) // len(point)

    def loss_and_gradient(rows: list[int]) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        index = to_device(torch.tensor(rows), model.device)
        every = index[:, None] * batch + torch.arange(batch, device=model.device)
        embeddings = point[index].detach().requires_grad_(True)
        passes = []
        for chosen in torch.split(every, at_once, 1):
            samples, width = chosen.flatten(), chosen.shape[1]
            loss = model.denoising_loss(
                latents[samples],
                noise[samples],
                timesteps[samples],
                embeddings[:, None].expand(-1, width, -1, -1).flatten(0, 1),
                pair_ids=[ids[row] for row in rows for _ in range(width)],
            )
            if weights is not None:
                loss = weights[samples] * loss
            loss = loss.view(len(rows), width).mean(1)
            if width < batch:
                loss = loss * (width / batch)
            (gradient,) = torch.autograd.grad(LOSS_SCALE * loss.sum(), embeddings)
            passes.append((loss.detach(), gradient / LOSS_SCALE))
        losses, gradients = zip(*passes, strict=True)
        return zip(sum(losses), sum(gradients), strict=True)

    found = map_batches(
        loss_and_gradient,
        range(len(point)),
        at_once=pairs_at_once(model) if model.device.type == "cpu" else len(point),
        model=model,
        backoff=_MEMORY,
    )
    return torch.stack([loss for loss, _ in found]), torch.stack([grad for _, grad in found])


def noise_and_timesteps(
    seed: int,
    pair_id: str,
    restart: int,
    step: int,
    *,
    shape: tuple[int, ...],
    schedule: TimestepDraws,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Noise and timesteps of one attack step for one pair.

    Args:
        seed: Run seed.
        pair_id: Which pair.
        restart: Which restart.
        step: Attack step, from 0.
        shape: (B, C, h, w).
        schedule: How timesteps are drawn.

    Returns:
        Standard normal noise (B, C, h, w), independent for each of the B elements, timesteps (B,)
        and, where not all are one, the weights (B,) of their losses.
    """
    generator = keyed_generator("attack", seed, pair_id, restart, step)
    noise = torch.randn(shape, generator=generator)
    return noise, *schedule.draw(shape[0], generator)


def random_embedding(
    seed: int, pair_id: str, restart: int, shape: tuple[int, int]
) -> torch.Tensor:
    """Standard normal numbers (T, D) that the ``random`` initial point is made of.

    Reference: Finding DoRI (2507.16880), section on initialisation.
    """
    return torch.randn(shape, generator=keyed_generator("init", seed, pair_id, restart))


class RowAdam:
    """Adam (Kingma & Ba, 2015) with independent state, step count and mask for each row.

    Elementwise the same arithmetic as ``torch.optim.Adam``; rows that are masked out keep value
    and state.
    """

    betas, eps = (0.9, 0.999), 1e-8

    def __init__(
        self, rows: torch.Tensor, *, lr: float, scales: Sequence[float] | None = None
    ) -> None:
        factors = torch.tensor(scales or [1.0] * len(rows), dtype=torch.float64)
        factors = factors.view(-1, *([1] * (rows.dim() - 1)))
        self.lr = lr * factors.to(rows.device)
        self.mean, self.square = torch.zeros_like(rows), torch.zeros_like(rows)
        # float64: 1 - 0.999 loses four digits in float32
        self.count = torch.zeros(
            len(rows), *([1] * (rows.dim() - 1)), device=rows.device, dtype=torch.float64
        )

    def state(self, delta: torch.Tensor) -> OptimizerState:
        """State of the rows, on the CPU, from which they can go on later.

        Args:
            delta: Their current values (N, T, D).
        """
        return OptimizerState(
            delta.cpu(), self.mean.cpu(), self.square.cpu(), self.count.flatten().cpu()
        )

    def restore(self, state: OptimizerState) -> None:
        """Go on from the state of as many rows."""
        device, shape = self.count.device, self.count.shape
        self.mean, self.square = state.mean.to(device), state.square.to(device)
        self.count = state.count.view(shape).to(device)

    def step(
        self, rows: torch.Tensor, gradient: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        """Return updated rows; ``active`` (N,) says which rows move.

        Args:
            rows: Current values (N, ...).
            gradient: Their gradient (N, ...), finite where active.
            active: Boolean mask (N,).
        """
        mask = active.view(-1, *([1] * (rows.dim() - 1)))
        gradient = torch.where(mask, gradient, 0.0)
        first, second = self.betas
        self.count = self.count + mask
        self.mean = torch.where(mask, self.mean * first + gradient * (1 - first), self.mean)
        self.square = torch.where(
            mask, self.square * second + gradient * gradient * (1 - second), self.square
        )
        count = self.count.clamp_min(1)
        scale = self.square.sqrt() / (1 - second**count).sqrt().to(rows.dtype) + self.eps
        update = (self.lr / (1 - first**count)).to(rows.dtype) * self.mean / scale
        return torch.where(mask, rows - update, rows)


_NO_GRADIENT = (
    "the text embedding does not reach the loss, so the attack could never succeed and its "
    "failure would look like a perfect defence"
)
_NOT_FINITE = (
    "the checkpoint or its precision is broken: try checkpoint.precision=fp32, or bf16 instead of "
    "fp16"
)


class BrokenAttackError(RuntimeError):
    """The attack has no gradient to follow, so its failure would say nothing about the model."""


def refuse_broken(result: AttackResult) -> None:
    """Refuse a search whose failure would be taken for a robust model by whoever trains on it.

    Raises:
        BrokenAttackError: Some row has no gradient, or none was finite from the first step on.
    """
    if bool(result.no_gradient.any()):
        raise BrokenAttackError(_no_gradient(result.ids, result.no_gradient))
    if result.losses.numel() and bool(result.losses.isnan()[:, 0].all()):
        raise BrokenAttackError(
            f"the attack's first gradient is not finite for any of {', '.join(result.ids)}; "
            f"{_NOT_FINITE}"
        )


def _no_gradient(ids: Sequence[str], dead: torch.Tensor) -> str:
    names = [name for name, is_dead in zip(ids, dead.tolist(), strict=True) if is_dead]
    return f"the attack's first gradient is exactly zero for {', '.join(names)}: {_NO_GRADIENT}"


def _why_none(
    model: TextToImage, ids: Sequence[str], dead: torch.Tensor, timesteps: torch.Tensor
) -> str:
    """Why no row can go on after the first step."""
    if bool(dead.any()):
        return _no_gradient(ids, dead)
    dtype = str(next(iter(model.parameters())).dtype).removeprefix("torch.")
    return (
        f"the attack's first gradient is not finite for any of {', '.join(ids)} (weights in "
        f"{dtype}, timesteps {int(timesteps.min())} to {int(timesteps.max())}); {_NOT_FINITE}"
    )
