"""The program as a whole: how long it takes to start, to audit, and how an audit grows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dori_lightning.attacks.solver import AttackProblem, solve
from dori_lightning.bench.counters import counted
from dori_lightning.bench.record import Row, row_of
from dori_lightning.bench.timing import timed_in_turn
from dori_lightning.types import Budget

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dori_lightning.bench.attack_loops import AttackTask
    from dori_lightning.bench.settings import BenchSettings
    from dori_lightning.bench.subjects import Subject

__all__ = ["audit_rows", "scaling_rows", "startup_rows"]


def _run(arguments: Sequence[str], place: Path) -> float:
    """Run the program with its results below ``place``; seconds it took.

    Raises:
        RuntimeError: It failed; carries the end of what it said.
    """
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dori_lightning", *arguments, f"paths.output={place / 'outputs'}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"},
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(
            f"python -m dori_lightning {' '.join(arguments)} left with {done.returncode}:\n"
            f"{done.stderr[-2000:]}"
        )
    return seconds


def startup_rows(
    settings: BenchSettings, overrides: Sequence[str], place: Path
) -> tuple[Row, ...]:
    """Start the program: its help, its configuration, and an audit that has nothing to do.

    Args:
        settings: How often.
        overrides: What makes an audit of this run's checkpoint and pairs.
        place: Folder for what it writes.
    """
    empty = (
        *_audit(overrides, pairs=1, steps=0), "sampling.steps=2", "sampling.images_per_pair=1",
    )  # fmt: skip
    rows = []
    for name, what, limit, arguments in (
        ("--help", "list of choices", 1.0, ("--help",)),
        ("--cfg job", "composed configuration", 3.0, ("--cfg", "job")),
        ("audit", "audit of one pair without an attack, two sampler steps", 10.0, empty),
    ):
        seconds = []
        for k in range(settings.startup_repeats + 1):
            own = [*arguments, f"name=empty{k}"] if name == "audit" else list(arguments)
            seconds.append(_run(own, place))
        rows.append(
            Row(
                name, what, pairs=1, unit="start", seconds=tuple(seconds[1:]),
                warm_up=seconds[0], values={"at_most_seconds": limit},
            )
        )  # fmt: skip
    return tuple(rows)


def audit_rows(settings: BenchSettings, overrides: Sequence[str], place: Path) -> tuple[Row, ...]:
    """Run a whole audit as a user does, in a process of its own, and the same again.

    Args:
        settings: How much.
        overrides: What makes an audit of this run's checkpoint and pairs.
        place: Folder for what it writes.
    """
    rows = []
    arguments = _audit(overrides, pairs=settings.audit_pairs, steps=settings.audit_steps)
    for name, what in (
        (
            "ours",
            f"audit from the command line, attack from prompts, {settings.audit_steps} steps",
        ),
        ("again", "the same command once more: everything is there already"),
    ):
        seconds = _run([*arguments, "name=whole"], place)
        report = json.loads((place / "outputs" / "whole" / "report.json").read_text("utf-8"))
        rows.append(
            Row(
                name, what, pairs=settings.audit_pairs, seconds=(seconds,),
                samples=int(report["provenance"]["unet_evaluations"]),
                values={"report_seconds": report["provenance"]["wall_seconds"]},
            )
        )  # fmt: skip
    return tuple(rows)


def _audit(overrides: Sequence[str], *, pairs: int, steps: int) -> tuple[str, ...]:
    return (
        "+experiment=audit", *overrides, "attack.inits=[prompt]", "attack.other_inits=null",
        f"attack.budget.steps={steps}", f"pairs.limit={pairs}", "pairs.kinds=[vm]",
        "utility=none", "report.images=none",
    )  # fmt: skip


def scaling_rows(subject: Subject, settings: BenchSettings) -> tuple[Row, ...]:
    """What an attack costs with more budgets to read off it, and with more pairs.

    Pairs beyond those of the list are further restarts of the same ones.
    """
    model, most = subject.model, max(settings.scaling_pairs)
    base = subject.task(
        len(subject.pairs), steps=settings.scaling_steps, noise_batch=settings.noise_batch
    )
    eight = min(8, most)
    ways: dict[str, Any] = {}
    about: dict[str, tuple[str, int]] = {}
    for count in settings.scaling_budgets:
        snapshots = _evenly(count, settings.scaling_steps)
        name = f"{count} budgets" if count > 1 else "1 budget"
        about[name] = (f"{eight} pairs, measured after steps {list(snapshots)}", eight)
        ways[name] = partial(_grown, model, base, eight, snapshots, settings.scaling_steps)
    few = max(1, settings.scaling_steps // 4)
    for count in settings.scaling_pairs:
        name = f"{count} pairs"
        about[name] = (f"{few} steps, one budget", count)
        ways[name] = partial(_grown, model, base, count, (), few)
    counts = {}
    for name, run in ways.items():
        with counted(model) as own:
            run()
        counts[name] = own
    timed = timed_in_turn(
        ways, repeats=settings.scaling_repeats, device=model.device, title="scaling"
    )
    return tuple(
        row_of(
            name, about[name][0], own, pairs=about[name][1], samples=counts[name].unet,
            values={"unet_passes": counts[name].unet_passes},
        )
        for name, own in timed.items()
    )  # fmt: skip


def _evenly(count: int, steps: int) -> tuple[int, ...]:
    """``count`` different steps up to the last one, evenly apart."""
    return tuple(sorted({round(steps * (k + 1) / count) for k in range(count)}))


def _grown(
    model: Any, base: AttackTask, pairs: int, snapshots: tuple[int, ...], steps: int
) -> None:
    """Attack ``pairs`` rows as an audit does, eight pairs of a batch after the other."""
    task = replace(base, steps=steps)
    have = len(task.ids)
    for start in range(0, pairs, 8):
        places = range(start, min(start + 8, pairs))
        solve(
            model,
            AttackProblem(
                tuple(task.ids[k % have] for k in places),
                0,
                task.latents[[k % have for k in places]],
                task.initial[[k % have for k in places]],
                restarts=tuple(k // have for k in places),
            ),
            budget=Budget("none", None, steps),
            lr=task.lr,
            noise_batch=task.noise_batch,
            seed=task.seed,
            snapshots=snapshots,
        )
