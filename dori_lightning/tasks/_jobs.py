"""Which run folders a sweep, or a list of folders, stands for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from dori_lightning.report.locality.section import LOCALITY_FILE
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Jobs", "jobs_of"]

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
            f"  mend:  name the folder of a sweep, or run folders: task.runs=[FOLDER,FOLDER]"
        )
    if (place / _SWEEP).is_file():
        return _sweep(place, planned=planned)
    if _is_run(place):
        return Jobs((place,))
    below = tuple(sorted(folder for folder in place.iterdir() if _is_run(folder)))
    if not below:
        raise InputError(
            f"{place} holds no run\n  where: task.runs\n"
            f"  mend:  name the folder of a sweep, or run folders: task.runs=[FOLDER,FOLDER]"
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
