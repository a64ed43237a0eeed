"""How far a sweep is: what waits, runs, is done or failed and why, and when it will end."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dori_lightning.report.record import LOCALITY_FILE
from dori_lightning.runtime.artifacts import is_held
from dori_lightning.runtime.job_status import read_status
from dori_lightning.types import InputError

# -------- jobs
# Which run folders a sweep, or a list of folders, stands for.

_SWEEP = "multirun.yaml"
_OVERRIDES = Path(".hydra") / "overrides.yaml"
_DRY_RUN = "task.dry_run"


@dataclass(frozen=True)
class Jobs:
    """Run folders that belong together.

    Attributes:
        folders: Those that exist, in the order of the sweep or as given.
        unstarted: Jobs of the sweep that have no folder, by what tells them apart.
        others: How many folders in there belong to other sweeps.
        sweeps: Names of the sweeps' folders.
    """

    folders: tuple[Path, ...]
    unstarted: tuple[str, ...] = ()
    others: int = 0
    sweeps: tuple[str, ...] = ()


def jobs_of(places: Sequence[Path], *, planned: bool = False) -> Jobs:
    """Find the run folders that some places stand for.

    A sweep's folder stands for the jobs of the last sweep in it, whether or not they ran; a run
    folder stands for itself; any other folder for the run folders right below it.

    Args:
        places: Sweeps' folders and run folders.
        planned: Whether dry runs are looked for rather than audits.

    Raises:
        InputError: A place does not exist, or holds no run.
    """
    found = [_jobs(place, planned=planned) for place in places]
    folders = dict.fromkeys(folder.resolve() for jobs in found for folder in jobs.folders)
    return Jobs(
        folders=tuple(folders),
        unstarted=tuple(name for jobs in found for name in jobs.unstarted),
        others=sum(jobs.others for jobs in found),
        sweeps=tuple(name for jobs in found for name in jobs.sweeps),
    )


def _jobs(place: Path, *, planned: bool) -> Jobs:
    if not place.is_dir():
        raise InputError(
            f"no folder {place}\n  where: task.runs\n"
            f"  fix:   name the folder of a sweep, or run folders: task.runs=[FOLDER,FOLDER]"
        )
    if (place / _SWEEP).is_file():
        return _sweep(place, planned=planned)
    if _is_run(place):
        return Jobs((place,))
    below = tuple(sorted(folder for folder in place.iterdir() if _is_run(folder)))
    if not below:
        raise InputError(
            f"{place} holds no run\n  where: task.runs\n"
            f"  fix:   name the folder of a sweep, or run folders: task.runs=[FOLDER,FOLDER]"
        )
    return Jobs(below, sweeps=(place.resolve().name,))


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("report.json", LOCALITY_FILE, _OVERRIDES))


def _sweep(place: Path, *, planned: bool) -> Jobs:
    """Match the folders below a sweep with the jobs that its last command asked for."""
    name = place.resolve().name
    held = {folder: _overrides(folder) for folder in sorted(place.iterdir()) if _is_run(folder)}
    wanted = _wanted(place / _SWEEP)
    if wanted is None:
        fitting = [f for f, own in held.items() if any(map(_is_dry, own)) == planned]
        return Jobs(tuple(fitting), sweeps=(name,))
    folders: list[Path] = []
    unstarted: list[str] = []
    for job in wanted:
        plain = frozenset(o for o in job if not _is_dry(o))
        dry = [o for o in job if _is_dry(o)]
        overrides = plain | set(dry) if planned else plain
        fitting = [folder for folder, own in held.items() if own == overrides]
        folders += fitting
        if not fitting:
            unstarted.append(_tell_apart(job, wanted))
    return Jobs(tuple(folders), tuple(unstarted), len(held) - len(folders), (name,))


def _overrides(folder: Path) -> frozenset[str]:
    path = folder / _OVERRIDES
    if not path.is_file():
        return frozenset()
    held = _as_written(path)
    return frozenset(map(str, held)) if isinstance(held, list) else frozenset()


def _is_dry(override: str) -> bool:
    return override.lstrip("+").startswith(f"{_DRY_RUN}=")


def _wanted(path: Path) -> list[tuple[str, ...]] | None:
    """Overrides of every job of a sweep; None where they cannot be told from its file."""
    held = _as_written(path)
    hydra = held.get("hydra") if isinstance(held, dict) else None
    hydra = hydra if isinstance(hydra, dict) else {}
    params = (hydra.get("sweeper") or {}).get("params") or {}
    given = [f"{key}={value}" for key, value in params.items()]
    given += map(str, (hydra.get("overrides") or {}).get("task") or [])
    options: dict[str, list[str]] = {}
    try:
        for override in OverridesParser.create().parse_overrides(given):
            key = override.get_key_element()
            if override.is_sweep_override():
                values = [str(value) for value in override.sweep_string_iterator()]
            else:
                values = [override.get_value_element_as_str()]
            # what the command line says comes last and decides
            options[key] = [f"{key}={value}" for value in values]
    except (HydraException, ValueError):
        return None
    return list(itertools.product(*options.values()))


def _as_written(path: Path) -> Any:
    """A yaml of a run folder, which may be somebody else's: nothing in it is resolved."""
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)


def _tell_apart(job: Sequence[str], jobs: Sequence[Sequence[str]]) -> str:
    """What distinguishes a job from the others of its sweep."""
    differing = [part for part in job if not all(part in other for other in jobs)]
    return ", ".join(differing) or ", ".join(job)


# -------- status

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
