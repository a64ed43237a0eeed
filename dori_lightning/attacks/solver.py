"""Search the text embedding that makes a frozen model predict the noise of one picture.

Reference: Finding DoRI (2507.16880), section "adversarial text embeddings": Adam, learning rate
0.1, 50 steps, a batch of 8 noise samples and timesteps drawn anew at every step.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

import torch

from dori_lightning import lanes, processes
from dori_lightning.attacks.budget import looked_at, project
from dori_lightning.attacks.draws import noise_and_timesteps
from dori_lightning.attacks.results import AttackProblem, AttackResult
from dori_lightning.attacks.row_adam import RowAdam
from dori_lightning.halving import Passes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dori_lightning.models.protocol import TextToImage
    from dori_lightning.types import Budget

__all__ = [
    "AttackProblem",
    "AttackResult",
    "BrokenAttackError",
    "pairs_at_once",
    "refuse_broken",
    "solve",
]

log = logging.getLogger(__name__)

_TOO_LARGE = (
    "checkpoint.precision=bf16, or a device with more memory; a pair's noise samples "
    "(attack.noise_batch) are part of the method and are never cut"
)

_DEAF = (
    "the text embedding does not reach the loss, so the attack could never succeed and its "
    "failure would look like a perfect defence"
)
_BROKEN = (
    "the checkpoint or its precision is broken: try checkpoint.precision=fp32, or bf16 instead of "
    "fp16"
)

PASS_PAIRS = 8
"""Pairs of a forward pass where memory does not decide."""

LANE_PAIRS = 4
"""Pairs of a forward pass where several go side by side (``lanes``): wider was no faster, and
fills up more."""

PASS_KIND = "attack"
"""Under this name a model remembers how wide its memory lets a pass be, see ``halving.Passes``."""


def pairs_at_once(model: TextToImage) -> int:
    """Pairs of a model that are computed at the same time where memory does not decide."""
    return LANE_PAIRS * lanes.count(model) if lanes.small(model) else PASS_PAIRS


class BrokenAttackError(RuntimeError):
    """The attack has no gradient to follow, so its failure would say nothing about the model."""


def solve(
    model: TextToImage,
    problem: AttackProblem,
    *,
    budget: Budget,
    lr: float = 0.1,
    noise_batch: int = 8,
    seed: int = 0,
    snapshots: Sequence[int] = (),
    keep_first_token: bool = False,
    so_far: AttackResult | None = None,
    until: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> AttackResult:
    """Solve N embedding searches in shared forward passes.

    The loss is the mean over the noise batch, summed over pairs, so that a pair's gradient is the
    same in any company: bit for bit on the CPU, where each pair has its own pass, up to kernel
    rounding elsewhere. The model's weights take no gradient and are not touched.

    A row whose loss or gradient is not finite, or whose first gradient is exactly zero, stands
    still from there on and is marked: its search says nothing about the model. Where no row is
    left after the first step, the search ends there.

    A search can be taken in stretches, with other rows beside it in each: draws depend on pair,
    restart and step alone, so the rows get the bits that one stretch would have given them.

    Args:
        model: Model under attack.
        problem: Pictures and initial embeddings.
        budget: Steps and ball.
        lr: Adam's learning rate, in CLIP units per step.
        noise_batch: B, noise samples and timesteps per pair and step.
        seed: Run seed for the draws.
        snapshots: Steps after which to keep the embedding besides the last one; those beyond the
            budget are dropped.
        keep_first_token: Leave the first (start) token as it is, as Wen et al. (2024) do.
        so_far: What the same rows found up to some step, with their state; None begins at 0.
        until: Step to stop at; None takes all of the budget's.
        on_step: Called after each step with its number.

    Raises:
        InputError: Not even one pair fits the memory.
        Interrupted: The run was told to leave.
    """
    end = budget.steps if until is None else until
    wanted = tuple(s for s in looked_at(snapshots, budget.steps) if s <= end)
    initial = problem.initial.to(model.device, torch.float32)
    latents = problem.latents.to(model.device, torch.float32)
    rows, batch = len(problem.ids), noise_batch
    delta = torch.zeros_like(initial)
    optimizer = RowAdam(delta, lr=lr)
    active = torch.ones(rows, dtype=torch.bool, device=model.device)
    dead = ~active
    steps, losses, kept = range(end), list[torch.Tensor](), list[torch.Tensor]()
    if so_far is not None and so_far.state is not None:
        delta = so_far.state.delta.to(model.device)
        optimizer.restore(so_far.state)
        dead = so_far.no_gradient.to(model.device)
        active = ~(dead | so_far.diverged.to(model.device))
        steps = range(so_far.steps, end) if bool(active.any()) else range(0)
        losses = [*so_far.losses.to(model.device).unbind(1)]
        kept = [*so_far.embeddings.unbind(1)]
    elif 0 in wanted:
        kept = [initial.cpu()]
    token_mask = torch.ones(initial.shape[1], 1, device=model.device)
    if keep_first_token:
        token_mask[0] = 0.0
    shape = (batch, *latents.shape[1:])
    share = pairs_at_once(model) if model.device.type == "cpu" else rows
    restarts = problem.restarts or (problem.restart,) * rows
    repeated = latents.repeat_interleave(batch, 0)
    passes = Passes(PASS_KIND, "pair", model.pass_limits, _TOO_LARGE)
    with model.frozen(), torch.enable_grad():
        for step in steps:
            processes.check()
            draws = [
                noise_and_timesteps(
                    seed,
                    name,
                    restart,
                    step,
                    shape=shape,
                    timesteps=model.num_train_timesteps,
                )
                for name, restart in zip(problem.ids, restarts, strict=True)
            ]
            noise = torch.cat([d[0] for d in draws]).to(model.device)
            timesteps = torch.cat([d[1] for d in draws]).to(model.device)
            point = initial + delta
            loss, gradient = passes.run(
                partial(_loss_and_gradient, model, problem.ids, point, repeated, noise, timesteps),
                share,
            )
            gradient = gradient * token_mask
            with torch.no_grad():
                finite = loss.isfinite() & gradient.flatten(1).isfinite().all(1)
                if step == 0:
                    dead = finite & (gradient.flatten(1).abs().amax(1) == 0)
                    active = ~dead
                active = active & finite
                losses.append(torch.where(active, loss, torch.nan))
                delta = project(optimizer.step(delta, gradient, active), budget)
            if step + 1 in wanted:
                kept.append((initial + delta).cpu())
            none_left = step == 0 and not bool(active.any())
            if on_step is not None:
                on_step(step + 1)
            if none_left:
                log.warning("%s", _why_none(model, problem.ids, dead.cpu(), timesteps))
                break
    stacked = torch.full((rows, end), torch.nan)
    if losses:
        stacked[:, : len(losses)] = torch.stack(losses, 1).cpu()
    kept += [(initial + delta).cpu()] * (len(wanted) - len(kept))
    no_gradient = dead.cpu()
    return AttackResult(
        problem.ids,
        problem.restart,
        torch.stack(kept, 1),
        wanted,
        stacked,
        ~active.cpu() & ~no_gradient,
        no_gradient,
        None if end == budget.steps else optimizer.state(delta),
    )


def _loss_and_gradient(
    model: TextToImage,
    ids: Sequence[str],
    point: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    at_once: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss (N,) and gradient (N, T, D) at ``point``, of ``at_once`` pairs at the same time.

    These are several passes where a small model's go side by side. The last pass is filled up to
    the pairs of the others with a copy of its first, and what the copies give is dropped. Kernels
    are chosen by shape and work row by row, so with every pass of one shape a pair gets the same
    bits on the CPU wherever and with whomever it stands.
    """
    batch = len(noise) // len(point)
    beside = min(lanes.count(model), at_once)
    share = at_once // beside

    def one_pass(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        count = min(share, len(point) - start)
        index = torch.tensor([start + k if k < count else start for k in range(share)])
        samples = (index[:, None] * batch + torch.arange(batch)).flatten()
        rows = point[index].detach().requires_grad_(True)
        context = rows[:, None].expand(-1, batch, -1, -1).flatten(0, 1)
        loss = model.denoising_loss(
            latents[samples],
            noise[samples],
            timesteps[samples],
            context,
            pair_ids=[ids[k] for k in index.repeat_interleave(batch).tolist()],
        )
        loss = loss.view(share, batch).mean(1)
        (gradient,) = torch.autograd.grad(loss.sum(), rows)
        return loss.detach()[:count], gradient[:count]

    starts = range(0, len(point), share)
    found = lanes.side_by_side([partial(one_pass, start) for start in starts], beside)
    return torch.cat([loss for loss, _ in found]), torch.cat([grad for _, grad in found])


def refuse_broken(result: AttackResult) -> None:
    """Refuse a search whose failure would be taken for a robust model by whoever trains on it.

    Raises:
        BrokenAttackError: Some row has no gradient, or none was finite from the first step on.
    """
    dead = [name for name, no in zip(result.ids, result.no_gradient.tolist(), strict=True) if no]
    if dead:
        raise BrokenAttackError(
            f"the attack's first gradient is exactly zero for {', '.join(dead)}: {_DEAF}"
        )
    steps = result.losses.shape[1]
    if steps and len(result.ids) and bool(result.losses.isnan()[:, 0].all()):
        raise BrokenAttackError(
            f"the attack's first gradient is not finite for any of {', '.join(result.ids)}; "
            f"{_BROKEN}"
        )


def _why_none(
    model: TextToImage, ids: Sequence[str], dead: torch.Tensor, timesteps: torch.Tensor
) -> str:
    """Why no row can go on after the first step."""
    if bool(dead.any()):
        deaf = [name for name, no in zip(ids, dead.tolist(), strict=True) if no]
        return f"the attack's first gradient is exactly zero for {', '.join(deaf)}: {_DEAF}"
    dtype = str(next(iter(model.parameters())).dtype).removeprefix("torch.")
    return (
        f"the attack's first gradient is not finite for any of {', '.join(ids)} (weights in "
        f"{dtype}, timesteps {int(timesteps.min())} to {int(timesteps.max())}); {_BROKEN}"
    )
