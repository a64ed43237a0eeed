"""The ladder: what one attack costs, from a naive loop to the package's own."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dori_lightning import lanes
from dori_lightning.attacks.budget import BudgetSettings
from dori_lightning.attacks.campaign import attack_pairs
from dori_lightning.attacks.embedding_attack import ControlPrompts
from dori_lightning.attacks.memory import PeakTensors
from dori_lightning.attacks.settings import AttackSettings
from dori_lightning.attacks.solver import AttackProblem, pairs_at_once, solve
from dori_lightning.bench.attack_loops import Found, fair, hand_written, naive
from dori_lightning.bench.counters import counted
from dori_lightning.bench.operations import (
    counted_operations,
    matmul_peak,
    seconds_alone,
)
from dori_lightning.bench.record import Limits, Row, row_of
from dori_lightning.bench.subjects import compiler, rate_of
from dori_lightning.bench.timing import timed_in_turn
from dori_lightning.progress import hushed
from dori_lightning.types import Budget

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from dori_lightning.bench.attack_loops import AttackTask
    from dori_lightning.bench.subjects import Subject
    from dori_lightning.models.stable_diffusion import StableDiffusion

__all__ = ["attack_rows", "own_attack", "solved"]

WHAT = {
    "B0": "naive: weights trainable, no autocast, picture encoded at every step, one at a time",
    "B1": "fair: frozen, evaluation mode, autocast where the model has it, latents cached, "
    "one at a time",
    "B2": "B1 with channels-last memory and torch.compile",
    "ours": "the package's attack, as an audit calls it",
    "by hand": "the same arithmetic in a loop without the package",
}


def solved(model: StableDiffusion, task: AttackTask) -> Found:
    """The package's solver on a task, without Trainer and ledger."""
    result = solve(
        model,
        AttackProblem(task.ids, 0, task.latents, task.initial),
        budget=Budget("none", None, task.steps),
        lr=task.lr,
        noise_batch=task.noise_batch,
        seed=task.seed,
    )
    return Found(result.embeddings[:, -1], result.losses)


def own_attack(subject: Subject, task: AttackTask) -> Found:
    """The package's attack with everything an audit has around it: Trainer, ledger, files."""
    settings = AttackSettings(
        inits=("random",),
        budget=BudgetSettings(steps=task.steps),
        lr=task.lr,
        noise_batch=task.noise_batch,
    )
    triggers = attack_pairs(
        subject.model,
        subject.pairs[: len(task.ids)],
        trainer=subject.trainer,
        data=subject.workshop.data,
        settings=settings,
        budget=settings.budget.resolve(None),
        controls=ControlPrompts((), None),
        folder=subject.scratch("attacks"),
        seed=task.seed,
        edit="none",
    )
    losses = [t.losses for t in triggers if t.losses is not None]
    return Found(torch.stack([t.embedding for t in triggers]), torch.stack(losses))


def attack_rows(
    model: StableDiffusion,
    task: AttackTask,
    *,
    ours: Callable[[AttackTask], Found],
    repeats: int,
    compiled: bool,
    title: str,
    quality: Mapping[str, Any] | None = None,
) -> tuple[tuple[Row, ...], Limits]:
    """Measure every way in turn.

    Args:
        model: Model under attack.
        task: What is timed.
        ours: The package's attack.
        repeats: Timed rounds.
        compiled: Whether to compile; the row says why not where that cannot be.
        title: What the progress line says.
        quality: ``subject`` and ``task`` for loss and memorization rate; None leaves them out.
    """
    share = pairs_at_once(model) if model.device.type == "cpu" else len(task.ids)
    ways: dict[str, Callable[[AttackTask], Found]] = {
        "B0": partial(naive, model),
        "B1": partial(fair, model),
        "ours": ours,
        "by hand": partial(hand_written, model, share=share),
    }
    eager = dict(ways)
    skipped = _why_not_compiled(model, compiled)
    if not skipped:
        twin: nn.Module = copy.deepcopy(model.denoiser())
        twin.to(memory_format=torch.channels_last)
        twin.eval().requires_grad_(False)
        fast = torch.compile(twin)
        ways["B2"] = partial(fair, model, denoiser=fast)
        # counted without compilation: the same operations
        eager["B2"] = partial(fair, model, denoiser=twin)
    ways = {name: ways[name] for name in WHAT if name in ways}
    one = replace(task, steps=1)
    costs = {name: _cost(model, partial(run, one), len(task.ids)) for name, run in eager.items()}
    # counted one pass after the other
    costs["ours"]["bytes"] *= lanes.count(model)
    limits = _limits(model, one, share)
    timed = timed_in_turn(
        {name: partial(run, task) for name, run in ways.items()},
        repeats=repeats,
        device=model.device,
        title=title,
    )
    needed = limits.gflop_needed * task.steps
    reference: Found = timed["ours"].result
    found = {}
    if quality is not None:
        found = {name: _quality(run, quality) for name, run in ways.items()}
    rows = []
    for name, what in WHAT.items():
        if name not in timed:
            rows.append(Row(name, what, skipped=skipped))
            continue
        own, cost = timed[name], costs[name]
        row = row_of(
            name,
            what,
            own,
            pairs=len(task.ids),
            samples=cost["unet"] * task.steps,
            gflop=cost["gflop"] * task.steps,
        )
        rows.append(
            replace(
                row,
                peak_bytes=cost["bytes"] if row.peak_bytes is None else row.peak_bytes,
                peak_share=1e9 * needed / row.per_pair / limits.peak,
                alone_share=limits.seconds_alone * task.steps / row.per_pair,
                values={
                    "loss_first": float(own.result.losses[:, 0].mean()),
                    "loss_last": float(own.result.losses[:, -1].mean()),
                    "furthest_from_ours": float(
                        (own.result.embeddings - reference.embeddings).abs().max()
                    ),
                    "encoded_each_step": cost["encoded"],
                    **found.get(name, {}),
                },
            )
        )
    whole = replace(
        limits,
        gflop_needed=needed,
        seconds_alone=limits.seconds_alone * task.steps,
    )
    return tuple(rows), whole


def _why_not_compiled(model: StableDiffusion, compiled: bool) -> str:
    if not compiled:
        return "not asked for (compile)"
    return compiler() if model.device.type == "cpu" else ""


def _cost(model: StableDiffusion, run: Callable[[], Any], pairs: int) -> dict[str, Any]:
    """Operations per pair, rows through the model and memory of one step."""
    memory = PeakTensors()
    with lanes.in_one(), counted(model) as counts, memory:
        operations = counted_operations(run)
    return {
        "gflop": operations.flop / 1e9 / pairs,
        "bytes": memory.peak,
        "unet": counts.unet,
        "encoded": counts.encoded,
    }


def _limits(model: StableDiffusion, one: AttackTask, share: int) -> Limits:
    """What a step needs and what its operations take alone, per pair, at a full pass's shapes."""
    full = min(share, len(one.ids))
    operations = counted_operations(
        lambda: hand_written(
            model,
            replace(
                one,
                ids=one.ids[:full],
                images=one.images[:full],
                latents=one.latents[:full],
                initial=one.initial[:full],
            ),
            share=full,
        )
    )
    dtype = model.autocast or next(model.unet.parameters()).dtype
    return Limits(
        peak=matmul_peak(model.device, dtype),
        peak_dtype=str(dtype).removeprefix("torch."),
        gflop_needed=operations.flop / 1e9 / full,
        seconds_alone=seconds_alone(operations, model.device) / full,
    )


def _quality(run: Callable[[AttackTask], Found], quality: Mapping[str, Any]) -> dict[str, Any]:
    """Loss at the end and memorization rate of a longer attack."""
    subject: Subject = quality["subject"]
    with hushed():
        found = run(quality["task"])
    return {
        "steps": quality["task"].steps,
        "final_loss": float(found.losses[:, -5:].mean()),
        "memorization": rate_of(subject.memorization(found.embeddings)),
    }
