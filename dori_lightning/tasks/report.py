"""Many audits as one table: what each mitigation hides, what the attack still finds, the price."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dori_lightning.report.aggregate import compare
from dori_lightning.report.claims import (
    ClaimsFailedError,
    check_claims,
    claims_table,
    read_claims,
)
from dori_lightning.report.headline import headline_rows
from dori_lightning.report.headline_tables import headline_tables, remarks, rich_table
from dori_lightning.report.run_files import read_run
from dori_lightning.report.sweep_page import write_table
from dori_lightning.report.sweep_verdict import sweep_answer
from dori_lightning.tasks._folder import claim_folder
from dori_lightning.tasks._jobs import jobs_of
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from dori_lightning.report.aggregate import Comparison
    from dori_lightning.report.claims import Claim
    from dori_lightning.report.headline import HeadlineRow

__all__ = ["make_table", "run"]

log = logging.getLogger(__name__)

_WIDTH = 150
"""Columns of the tables where no terminal says how many there are."""


def run(cfg: DictConfig, folder: Path) -> None:
    """Put the audits in ``cfg.task.runs`` into one table in ``folder``.

    Raises:
        InputError: The audits are missing, damaged, or do not belong together.
        ClaimsFailedError: ``cfg.task.expected`` claims numbers that the table does not bear out.
    """
    places = _places(cfg.task.runs)
    expected = cfg.task.expected
    claims = read_claims(Path(expected)) if expected is not None else ()
    comparison, sweeps = _collect(places)
    # after the runs were found good: a mistaken name must not occupy the folder
    claim_folder(folder, {"runs": [str(place.resolve()) for place in places]})
    rows = _publish(comparison, folder)
    if expected is not None:
        _hold_against(claims, comparison, rows, sweeps=sweeps, source=str(expected))


def make_table(places: Sequence[Path], folder: Path) -> None:
    """Aggregate run folders, write the table into ``folder`` and print it.

    Args:
        places: Sweeps' folders and run folders.
        folder: Gets ``table.parquet``, ``cells.parquet``, ``table.md`` and ``table.html``.

    Raises:
        InputError: The audits are missing, damaged, or do not belong together.
    """
    comparison, _ = _collect(places)
    _publish(comparison, folder)


def _collect(places: Sequence[Path]) -> tuple[Comparison, tuple[str, ...]]:
    """Read and compare the runs that places stand for; also names the sweeps among the places."""
    jobs = jobs_of(places)
    finished = [place for place in jobs.folders if (place / "report.json").is_file()]
    unfinished = [
        f"{place.name} (not finished or failed, see its log)"
        for place in jobs.folders
        if place not in finished
    ]
    unfinished += [f"{name} (not started)" for name in jobs.unstarted]
    if jobs.others:
        log.info("%d run folders of other sweeps in there are left out", jobs.others)
    return compare([read_run(place) for place in finished], unfinished=unfinished), jobs.sweeps


def _publish(comparison: Comparison, folder: Path) -> tuple[HeadlineRow, ...]:
    """Write the table and print it."""
    rows = headline_rows(comparison)
    page = write_table(comparison, rows, folder)[-1]
    console = _console()
    for table in headline_tables(rows):
        console.print(rich_table(table))
    console.print(sweep_answer(rows))
    for text in remarks(comparison, rows):
        console.print(f"- {text}", markup=False, highlight=False)
    console.print(f"page: {page}", soft_wrap=True, markup=False)
    return rows


def _places(runs: object) -> list[Path]:
    """Folders as the configuration gives them: one, or a list."""
    given = [runs] if isinstance(runs, str) else list(runs) if hasattr(runs, "__iter__") else []
    if not given or not all(isinstance(place, str) and place for place in given):
        raise InputError(
            f"task.runs cannot be {runs!r}\n  where: task.runs\n"
            f"  mend:  name the folder of a sweep, or run folders: task.runs=[FOLDER,FOLDER]"
        )
    return [Path(place) for place in given]


def _console() -> Console:
    return Console(file=sys.stderr, width=None if sys.stderr.isatty() else _WIDTH)


def _hold_against(
    claims: Sequence[Claim],
    comparison: Comparison,
    rows: Sequence[HeadlineRow],
    *,
    sweeps: Sequence[str],
    source: str,
) -> None:
    """Print every claim beside what was measured.

    Raises:
        ClaimsFailedError: One does not hold.
    """
    checked = check_claims(claims, comparison.cells, rows, sweeps=sweeps)
    if not checked:
        log.warning("%s claims nothing about these runs", source)
        return
    _console().print(claims_table(checked))
    failed = sum(not item.holds for item in checked)
    if failed:
        raise ClaimsFailedError(
            f"{failed} of {len(checked)} recorded claims do not hold: see the table above\n"
            f"  where: {source}"
        )
