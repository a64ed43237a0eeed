"""What a job would take, said before it starts: a dry run needs no weights, list or pictures."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console
from rich.table import Table

from dori_lightning.files import write_atomically
from dori_lightning.tasks._jobs import jobs_of
from dori_lightning.tasks._plan_costs import CHECKPOINTS, FRACTION, Evaluations
from dori_lightning.tasks._plan_edits import Part
from dori_lightning.tasks._plan_job import JobPlan, plan_of
from dori_lightning.types import KINDS, InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from omegaconf import DictConfig

__all__ = ["PLAN_FILE", "plan", "sum_plans"]

log = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
_WIDTH = 150


def plan(cfg: DictConfig, folder: Path) -> None:
    """Print what the audit would take and write ``plan.json`` into ``folder``.

    A job of a sweep whose end adds up the plans leaves the printing to that.

    Raises:
        InputError: The attack's settings or ``task.assume_pairs`` are impossible.
    """
    job = plan_of(cfg)
    record = (json.dumps(asdict(job), indent=2, sort_keys=True) + "\n").encode()
    write_atomically(folder / PLAN_FILE, record)
    if not _is_summed():
        _print([job], title=f"Plan of {folder.name}: nothing is computed")


def _is_summed() -> bool:
    if not HydraConfig.initialized():
        return False
    settings = HydraConfig.get()
    return settings.mode is RunMode.MULTIRUN and bool(settings.callbacks)


def sum_plans(folder: Path) -> None:
    """Add up the plans of a sweep's jobs, print them and write ``plan.json`` into ``folder``.

    Work that jobs share is counted once.

    Raises:
        InputError: No job left a plan.
    """
    jobs = jobs_of([folder], planned=True)
    found = [place for place in jobs.folders if (place / PLAN_FILE).is_file()]
    if not found:
        raise InputError(
            f"no job of the sweep left a {PLAN_FILE}\n  where: {folder}\n"
            f"  mend:  run it again with task.dry_run=true, and see why its jobs fail"
        )
    lost = len(jobs.folders) - len(found) + len(jobs.unstarted)
    if lost:
        log.warning("%d jobs have no plan: the sum is without them", lost)
    plans = [_read(place / PLAN_FILE) for place in found]
    _print(plans, title=f"Plan of the sweep {folder.name}: nothing is computed")
    total = {
        "jobs": len(plans),
        "without_plan": lost,
        "work": {name: asdict(_total(group)) for name, group in _by_checkpoint(plans).items()},
        "hours": _hours(plans),
        "bytes": _disk(plans),
        "not_counted": list(_not_counted(plans)),
    }
    record = (json.dumps(total, indent=2, sort_keys=True) + "\n").encode()
    write_atomically(folder / PLAN_FILE, record)


def _read(path: Path) -> JobPlan:
    held = json.loads(path.read_text(encoding="utf-8"))
    shared = {
        key: Part(**{**part, "work": Evaluations(**part["work"])})
        for key, part in held["shared"].items()
    }
    pairs = {kind: held["pairs"][kind] for kind in KINDS if kind in held["pairs"]}
    work = Evaluations(**held["work"])
    return JobPlan(**{**held, "pairs": pairs, "work": work, "shared": shared})


def _by_checkpoint(plans: Sequence[JobPlan]) -> dict[str, list[JobPlan]]:
    groups: dict[str, list[JobPlan]] = {}
    for job in plans:
        groups.setdefault(job.checkpoint, []).append(job)
    return groups


def _shared(plans: Iterable[JobPlan]) -> dict[str, Part]:
    return {key: part for job in plans for key, part in job.shared.items()}


def _total(plans: Sequence[JobPlan]) -> Evaluations:
    work = [job.work for job in plans] + [part.work for part in _shared(plans).values()]
    return sum(work, start=Evaluations())


def _hours(plans: Sequence[JobPlan]) -> dict[str, float]:
    """Estimated hours by device, over all checkpoints whose cost is known."""
    hours: dict[str, float] = {}
    for checkpoint, group in _by_checkpoint(plans).items():
        cost = CHECKPOINTS.get(checkpoint)
        for device, value in (cost.hours(_total(group)) if cost else {}).items():
            hours[device] = hours.get(device, 0.0) + value
    return hours


def _disk(plans: Sequence[JobPlan]) -> float:
    """Estimated bytes, edits included, over all checkpoints whose sizes are known."""
    total = sum(job.bytes or 0.0 for job in plans)
    for checkpoint, group in _by_checkpoint(plans).items():
        cost = CHECKPOINTS.get(checkpoint)
        if cost is not None:
            stored = sum(part.weights for part in _shared(group).values())
            total += stored * cost.parameters * 4
            total += sum(p.pictures for p in _shared(group).values()) * cost.picture_bytes
    return total


def _not_counted(plans: Sequence[JobPlan]) -> Iterator[str]:
    for checkpoint in sorted(set(_by_checkpoint(plans)) - set(CHECKPOINTS)):
        yield f"hours and disk of {checkpoint}: what its denoiser costs is not known"
    for part in _shared(plans).values():
        if part.unknown:
            yield f"{part.what}: {part.unknown}"
    yield "loading, encoding of pictures, descriptors and reports"


def _print(plans: Sequence[JobPlan], *, title: str) -> None:
    """Show the jobs, what they share, and the sum."""
    hours = _hours(plans)
    table = Table(title=title, title_justify="left")
    table.add_column("job")
    for name in ("pairs", "attacks", "forward+backward", "forward", "training", "pictures",
                 *(f"h, {device}" for device in hours), "disk"):  # fmt: skip
        table.add_column(name, justify="right")
    several = len(_by_checkpoint(plans)) > 1, len({job.ball for job in plans}) > 1
    for job in plans:
        words = (
            job.checkpoint if several[0] else "",
            job.mitigation,
            job.ball if several[1] else "",
        )
        counts = "+".join(str(count) for count in job.pairs.values())
        table.add_row(
            " ".join(filter(None, words)), counts, f"{job.attacks:,}",
            *_cells(job.checkpoint, job.work, job.pictures, hours), _size(job.bytes),
        )  # fmt: skip
    table.add_section()
    for checkpoint, group in _by_checkpoint(plans).items():
        cost = CHECKPOINTS.get(checkpoint)
        for part in _shared(group).values():
            kept = part.weights * cost.parameters * 4 if cost else 0.0
            kept += part.pictures * cost.picture_bytes if cost else 0.0
            table.add_row(
                f"{part.what}, once", "", "",
                *_cells(checkpoint, part.work, part.work.decoded, hours),
                _size(kept if cost else None),
            )  # fmt: skip
    table.add_section()
    total = _total(plans)
    table.add_row(
        "total", "", f"{sum(job.attacks for job in plans):,}", *_counts(total),
        f"{total.decoded:,}", *(_time(value) for value in hours.values()), _size(_disk(plans)),
    )  # fmt: skip
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else _WIDTH)
    console.print(table)
    for text in _remarks(plans):
        console.print(f"- {text}", markup=False, highlight=False)


def _cells(
    checkpoint: str, work: Evaluations, pictures: int, devices: Iterable[str]
) -> tuple[str, ...]:
    cost = CHECKPOINTS.get(checkpoint)
    hours = cost.hours(work) if cost else {}
    return (*_counts(work), f"{pictures:,}", *(_time(hours.get(device)) for device in devices))


def _counts(work: Evaluations) -> tuple[str, str, str]:
    return f"{work.attack:,}", f"{work.forward:,}", f"{work.training:,}"


def _time(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:,.1f}" if hours >= 10 else f"{hours:.2f}"


def _size(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def _flop(tflop: float) -> str:
    return f"{tflop:,.2f} TFLOP" if tflop >= 0.1 else f"{1e3 * tflop:,.2f} GFLOP"


def _remarks(plans: Sequence[JobPlan]) -> Iterator[str]:
    for text in dict.fromkeys(f"pairs {job.pairs_from}" for job in plans):
        yield f"{text} ({'+'.join(plans[0].pairs)})" if text != "pairs list" else "pairs as listed"
    for checkpoint in _by_checkpoint(plans):
        cost = CHECKPOINTS.get(checkpoint)
        if cost is None:
            continue
        speeds = ", ".join(
            f"{_flop(speed)}/s on {device}" for device, speed in cost.speeds.items()
        )
        yield (
            f"{checkpoint}: a row takes {_flop(cost.forward)} forward, "
            f"{_flop(cost.forward + cost.to_embedding)} with the embedding's gradient, "
            f"{_flop(cost.forward + cost.to_weights)} with that of all weights; {speeds}"
        )
    if any(len(CHECKPOINTS[c].speeds) > 1 for c in _by_checkpoint(plans) if c in CHECKPOINTS):
        yield f"hours are of one card at {FRACTION:.0%} of its dense bf16 peak: estimates"
    if any(job.at_most for job in plans):
        yield "attack.early_stop: counted as if no image came back before the last step"
    for text in _not_counted(plans):
        yield f"not counted: {text}"
