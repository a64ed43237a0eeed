"""How far a sweep is: what waits, runs, is done or failed and why, and when it will end."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dori_lightning.tasks._job_status import read_status
from dori_lightning.tasks._jobs import jobs_of
from dori_lightning.tasks._lock import is_held

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

__all__ = ["Job", "job_of", "run", "summary", "time_left"]

State = Literal["waiting", "running", "done", "failed", "stopped"]

_WIDTH = 150
"""Columns where no terminal says how many there are."""


@dataclass(frozen=True)
class Job:
    """How far one job is.

    Attributes:
        name: Its folder's name, or what tells it apart where there is none yet.
        state: ``stopped`` is neither running nor ended: killed, preempted or interrupted.
        stage: What it does, or did last, with the share that is done.
        pairs: Pairs that are attacked from at least one initial point.
        seconds: How long it took or has been running; None before it starts.
        error: First line of what went wrong.
    """

    name: str
    state: State
    stage: str = ""
    pairs: int = 0
    seconds: float | None = None
    error: str = ""


def run(cfg: DictConfig, folder: Path) -> None:
    """Show how far the jobs in ``cfg.task.runs`` are; nothing of theirs is touched.

    Raises:
        InputError: There is no such sweep or run.
    """
    del folder
    places = cfg.task.runs
    places = [Path(places)] if isinstance(places, str) else [Path(place) for place in places]
    found = jobs_of(places)
    now = datetime.now(UTC)
    jobs = [job_of(place, now) for place in found.folders]
    jobs += [Job(name, "waiting") for name in found.unstarted]
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else _WIDTH)
    console.print(_table(jobs))
    console.print(summary(jobs), soft_wrap=True)


def job_of(folder: Path, now: datetime) -> Job:
    """Read how far the job of a run folder is.

    Args:
        folder: Run folder.
        now: Time to count from.
    """
    said, held = read_status(folder), is_held(folder)
    pairs = len({path.name.partition(".r")[0] for path in folder.glob("attacks/*/*.safetensors")})
    if said is None:
        # runs of the time before status files
        done = (folder / "report.json").is_file()
        return Job(folder.name, "running" if held else "done" if done else "waiting", pairs=pairs)
    state: State = "stopped"
    if held:
        state = "running"
    elif said.state == "done" or said.state == "failed":
        state = "done" if said.state == "done" else "failed"
    started = datetime.fromisoformat(said.started)
    ended = now if held else datetime.fromisoformat(said.changed)
    seconds = (ended - started).total_seconds()
    if state == "done":
        seconds = _whole_time(folder) or seconds
    return Job(
        folder.name,
        state,
        stage=f"{said.stage} {said.done}/{said.total}" if said.stage else "",
        pairs=pairs,
        seconds=seconds,
        error=said.error,
    )


def _whole_time(folder: Path) -> float | None:
    """Seconds that a finished audit took, by its report."""
    try:
        report = json.loads((folder / "report.json").read_text("utf-8"))
        return float(report["provenance"]["wall_seconds"])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def time_left(jobs: Sequence[Job]) -> timedelta | None:
    """When the rest will be done, if it takes as long as what is done; None where none is.

    As many jobs are taken to run at once as do now.
    """
    took = [job.seconds for job in jobs if job.state == "done" and job.seconds is not None]
    if not took:
        return None
    mean = sum(took) / len(took)
    running = [job for job in jobs if job.state == "running"]
    rest = sum(max(mean - (job.seconds or 0.0), 0.0) for job in running)
    rest += mean * sum(job.state in ("waiting", "stopped") for job in jobs)
    return timedelta(seconds=round(rest / max(len(running), 1)))


def summary(jobs: Sequence[Job]) -> str:
    """One line: how many jobs are in which state, pairs attacked, time left."""
    counts = {state: sum(job.state == state for job in jobs) for state in _STYLES}
    parts = [f"{count} {state}" for state, count in counts.items() if count]
    text = (
        f"{', '.join(parts)} of {len(jobs)} jobs; {sum(job.pairs for job in jobs)} pairs attacked"
    )
    left = time_left(jobs)
    if counts["done"] + counts["failed"] == len(jobs):
        return f"{text}."
    return f"{text}; " + (
        f"about {left} left." if left is not None else "no job is done yet to tell the time left."
    )


_STYLES: dict[State, str] = {
    "done": "green",
    "running": "cyan",
    "waiting": "dim",
    "stopped": "yellow",
    "failed": "red",
}


def _table(jobs: Sequence[Job]) -> Table:
    table = Table()
    for column in ("job", "state", "stage", "pairs", "time", "error"):
        table.add_column(column, overflow="fold")
    for job in jobs:
        time = "" if job.seconds is None else str(timedelta(seconds=round(job.seconds)))
        style = _STYLES[job.state]
        table.add_row(
            escape(job.name),
            f"[{style}]{job.state}[/]",
            job.stage,
            str(job.pairs),
            time,
            escape(job.error),
        )
    return table
