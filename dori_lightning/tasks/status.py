"""How far a sweep is: which jobs wait, run, are done or failed and why, and when it will end."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from rich.text import Text

from dori_lightning.report.record import CERTIFICATE_FILE, LOCALITY_FILE
from dori_lightning.runtime.artifacts import is_held
from dori_lightning.runtime.job_status import read_status
from dori_lightning.runtime.logging import answer_console
from dori_lightning.types import InputError

State = Literal["waiting", "running", "done", "failed", "stopped"]

_STYLES: dict[State, str] = {
    "done": "green",
    "running": "cyan",
    "waiting": "dim",
    "stopped": "yellow",
    "failed": "red",
}
_SWEEP = "multirun.yaml"
_OVERRIDES = Path(".hydra") / "overrides.yaml"
_NAME_RUNS = "name the folder of a sweep, or run folders: task.runs=[FOLDER,FOLDER]"


def run(cfg: DictConfig, folder: Path) -> None:
    """Print how far the jobs in ``cfg.task.runs`` are; nothing of theirs is touched.

    Raises:
        InputError: There is no such sweep or run.
    """
    del folder
    found = jobs_of(places_of(cfg.task.runs))
    now = datetime.now(UTC)
    jobs = [job_of(place, now) for place in found.folders]
    jobs += [Job(name, "waiting") for name in found.unstarted]
    console = answer_console(150)
    console.print(_table(jobs))
    console.print(summary(jobs), soft_wrap=True)


@dataclass(frozen=True)
class Job:
    """How far one job is.

    Attributes:
        name: Its folder's name, or its overrides where there is no folder yet.
        state: ``stopped`` is neither running nor ended: killed, preempted or interrupted.
        stage: Its current or last stage, with the share that is done.
        pairs: Pairs that are attacked from at least one initial point.
        seconds: How long it took or has been running; None before it starts.
        error: First line of the error that ended it.
    """

    name: str
    state: State
    stage: str = ""
    pairs: int = 0
    seconds: float | None = None
    error: str = ""


def job_of(folder: Path, now: datetime) -> Job:
    """Read how far the job of a run folder is at the time ``now``."""
    status, running = read_status(folder), is_held(folder)
    pairs = len({path.name.partition(".r")[0] for path in folder.glob("attacks/*/*.safetensors")})
    state: State
    if status is None:  # runs from before there were status files
        done = (folder / "report.json").is_file()
        state = "running" if running else "done" if done else "waiting"
        return Job(folder.name, state, pairs=pairs)
    ended_states: dict[str, State] = {"done": "done", "failed": "failed"}
    state = "running" if running else ended_states.get(status.state, "stopped")
    ended = now if running else datetime.fromisoformat(status.changed)
    seconds = (ended - datetime.fromisoformat(status.started)).total_seconds()
    return Job(
        folder.name,
        state,
        stage=f"{status.stage} {status.done}/{status.total}" if status.stage else "",
        pairs=pairs,
        seconds=(_reported_seconds(folder) or seconds) if state == "done" else seconds,
        error=status.error,
    )


def _reported_seconds(folder: Path) -> float | None:
    """Seconds that a finished audit took over all its starts, by its report."""
    try:
        report = json.loads((folder / "report.json").read_text("utf-8"))
        return float(report["provenance"]["wall_seconds"])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def time_left(jobs: Sequence[Job]) -> timedelta | None:
    """Time until all are done, if each takes the mean of those done; None where none is done.

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
    states = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    text = f"{states} of {len(jobs)} jobs; {sum(job.pairs for job in jobs)} pairs attacked"
    if counts["done"] + counts["failed"] == len(jobs):
        return f"{text}."
    left = time_left(jobs)
    if left is None:
        return f"{text}; no job is done yet to tell the time left."
    return f"{text}; about {left} left."


def _table(jobs: Sequence[Job]) -> Table:
    table = Table()
    for column in ("job", "state", "stage", "pairs", "time", "error"):
        table.add_column(column, overflow="fold")
    for job in jobs:
        table.add_row(
            job.name,
            Text(job.state, style=_STYLES[job.state]),
            job.stage,
            str(job.pairs),
            "" if job.seconds is None else str(timedelta(seconds=round(job.seconds))),
            job.error,
        )
    return table


@dataclass(frozen=True)
class Jobs:
    """Run folders that belong together.

    Attributes:
        folders: Those that exist, in the order of the sweep or as given.
        unstarted: Overrides that distinguish each job of the sweep without a folder.
        others: How many folders in there belong to other sweeps.
        sweeps: Names of the sweeps' folders.
    """

    folders: tuple[Path, ...]
    unstarted: tuple[str, ...] = ()
    others: int = 0
    sweeps: tuple[str, ...] = ()


def places_of(runs: object) -> list[Path]:
    """Folders as ``task.runs`` gives them: one, or a list."""
    given = [runs] if isinstance(runs, str) else list(runs) if hasattr(runs, "__iter__") else []
    if not given or not all(isinstance(place, str) and place for place in given):
        raise InputError(f"task.runs cannot be {runs!r}", where="task.runs", fix=_NAME_RUNS)
    return [Path(place) for place in given]


def jobs_of(places: Sequence[Path], *, planned: bool = False) -> Jobs:
    """Find the run folders that some places stand for.

    A sweep's folder stands for the jobs of the last sweep in it, whether or not they ran; a run
    folder stands for itself; any other folder for the run folders right below it.

    Args:
        places: Sweeps' folders and run folders.
        planned: Look for dry runs rather than audits.

    Raises:
        InputError: A place does not exist, or holds no run.
    """
    found = [_jobs(place, planned=planned) for place in places]
    return Jobs(
        folders=tuple(dict.fromkeys(f.resolve() for jobs in found for f in jobs.folders)),
        unstarted=tuple(name for jobs in found for name in jobs.unstarted),
        others=sum(jobs.others for jobs in found),
        sweeps=tuple(name for jobs in found for name in jobs.sweeps),
    )


def _jobs(place: Path, *, planned: bool) -> Jobs:
    if (place / _SWEEP).is_file():
        return _jobs_of_sweep(place, planned=planned)
    if place.is_dir() and _is_run(place):
        return Jobs((place,))
    below = tuple(sorted(filter(_is_run, place.iterdir()))) if place.is_dir() else ()
    if not below:
        raise InputError(
            f"{place} holds no run" if place.is_dir() else f"no folder {place}",
            where="task.runs",
            fix=_NAME_RUNS,
        )
    return Jobs(below, sweeps=(place.resolve().name,))


def _jobs_of_sweep(place: Path, *, planned: bool) -> Jobs:
    """Match the folders below a sweep with the jobs that its last command asked for."""
    name = place.resolve().name
    folders = {f: _overrides(f) for f in sorted(place.iterdir()) if _is_run(f)}
    jobs = _job_overrides(sweep_overrides(place))
    if jobs is None:
        dry = [f for f, overrides in folders.items() if any(map(_is_dry, overrides)) == planned]
        return Jobs(tuple(dry), sweeps=(name,))
    found: list[Path] = []
    unstarted: list[str] = []
    for job in jobs:
        wanted = {o for o in job if planned or not _is_dry(o)}
        matching = [folder for folder, overrides in folders.items() if overrides == wanted]
        found += matching
        if not matching:
            differing = [o for o in job if not all(o in other for other in jobs)]
            unstarted.append(", ".join(differing or job))
    return Jobs(tuple(found), tuple(unstarted), len(folders) - len(found), (name,))


def _is_run(folder: Path) -> bool:
    names = ("report.json", LOCALITY_FILE, CERTIFICATE_FILE, _OVERRIDES)
    return any((folder / name).is_file() for name in names)


def _is_dry(override: str) -> bool:
    return override.lstrip("+").startswith("task.dry_run=")


def _overrides(folder: Path) -> set[str]:
    """Overrides of the job of a run folder."""
    overrides = _unresolved(folder / _OVERRIDES)
    return set(map(str, overrides)) if isinstance(overrides, list) else set()


def sweep_overrides(folder: Path) -> list[str]:
    """Overrides of a sweep's folder: of its experiment file, then of its command line."""
    cfg = _unresolved(folder / _SWEEP)
    hydra = cfg.get("hydra") if isinstance(cfg, dict) else None
    hydra = hydra if isinstance(hydra, dict) else {}
    params = (hydra.get("sweeper") or {}).get("params") or {}
    given = (hydra.get("overrides") or {}).get("task") or []
    return [*(f"{key}={value}" for key, value in params.items()), *map(str, given)]


def _unresolved(path: Path) -> Any:
    """A yaml of a run folder; it may be a stranger's, so nothing in it is resolved."""
    return OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else None


def _job_overrides(overrides: Sequence[str]) -> list[tuple[str, ...]] | None:
    """Overrides of every job of a sweep; None where they cannot be told from the sweep's."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except (HydraException, ValueError):
        return None
    return [tuple(job) for job in jobs]
