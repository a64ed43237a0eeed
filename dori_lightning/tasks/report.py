"""Many audits as one table and one page: what each mitigation hides, leaves behind, and costs.

A single audit gets its own page again, for instance with its images blurred.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from dori_lightning.report.certificate import Certificate, doors_of, ranking, read_certificate
from dori_lightning.report.claims import Checked, check_claims, read_claims
from dori_lightning.report.comparison import Comparison, HeadlineRow, compare, headline_rows
from dori_lightning.report.findings import sweep_verdict
from dori_lightning.report.pages import write_list, write_page, write_table
from dori_lightning.report.record import (
    Disclosure,
    Run,
    is_certificate,
    is_locality,
    read_run,
    shown_report,
    strictest,
)
from dori_lightning.report.tables import (
    claims_table,
    headline_tables,
    remarks,
    rich_table,
    tables_markdown,
)
from dori_lightning.runtime.artifacts import claim_folder, write_atomically
from dori_lightning.runtime.logging import answer_console
from dori_lightning.tasks.run_record import tracked
from dori_lightning.tasks.status import Jobs, jobs_of, places_of
from dori_lightning.tracking import Tracker
from dori_lightning.types import ClaimsFailedError, InputError

log = logging.getLogger(__name__)


def run(cfg: DictConfig, folder: Path) -> None:
    """Put the audits in ``cfg.task.runs`` into one table and one page in ``folder``.

    Locality runs among them have pages of their own and are left out. A single audit gets its own
    page and no table, unless claims are to be checked against it. Certificates are ranked among
    themselves.

    Raises:
        InputError: The audits are missing, damaged, or do not belong together.
        ClaimsFailedError: ``cfg.task.expected`` claims numbers that the table does not bear out.
    """
    places = places_of(cfg.task.runs)
    expected = cfg.task.expected
    claims = read_claims(Path(expected)) if expected is not None else ()
    certified = [place for place in jobs_of(places).folders if is_certificate(place)]
    if certified:
        claim_folder(folder, {"runs": [str(place.resolve()) for place in places]})
        found = rank(certified, folder)
        _check_claims(check_claims(claims, (), (), doors=doors_of(found)), source=str(expected))
        return
    inputs = _collect(places, images=cfg.report.images.value)
    comparison = None
    if expected is not None or len(inputs.runs) != 1 or inputs.unfinished:
        comparison = compare(inputs.runs, unfinished=inputs.unfinished)
    # after the runs were checked: a mistaken name must not occupy the folder
    claim_folder(folder, {"runs": [str(place.resolve()) for place in places]})
    with tracked(cfg, folder) as tracker:
        if comparison is None:
            _publish_one(inputs, folder, max_pairs=cfg.report.max_pairs)
            _track_files(tracker, folder, "report.html")
            return
        rows = _publish(comparison, inputs, folder, max_pairs=cfg.report.max_pairs)
        _track(tracker, folder)
        if expected is not None:
            checked = check_claims(claims, comparison.cells, rows, sweeps=inputs.sweeps)
            if not checked:
                log.warning("%s claims nothing about these runs", expected)
            _check_claims(checked, source=str(expected))


def rank(places: Sequence[Path], folder: Path) -> list[Certificate]:
    """Put certificates into one table, ``ranking.md``, print it, and return them.

    Raises:
        InputError: One is damaged, or they do not belong together.
    """
    found = [read_certificate(place) for place in places]
    table = ranking(found)
    write_atomically(folder / "ranking.md", tables_markdown([table], ()).encode())
    console = answer_console(150)
    console.print(rich_table(table))
    for place in places:
        console.print(f"page: {place / 'certificate.html'}", soft_wrap=True)
    return found


def _track(tracker: Tracker, folder: Path) -> None:
    """Log the table that was just written, and its files."""
    table = pd.read_parquet(folder / "table.parquet")
    numbers = table.select_dtypes("number").columns
    table[numbers] = table[numbers].astype(float)
    texts = table.columns.difference(numbers)
    table[texts] = table[texts].astype(str)
    tracker.table(
        "report/table",
        [{str(name): value for name, value in row.items()} for row in table.to_dict("records")],
    )
    tracker.summary({"final/rows": len(table)})
    _track_files(tracker, folder, "table.parquet", "cells.parquet", "table.md", "report.html")


def _track_files(tracker: Tracker, folder: Path, *names: str) -> None:
    files = {name: folder / name for name in names}
    tracker.artifact(f"{folder.name}-table", kind="table", files=files)


def make_table(
    places: Sequence[Path],
    folder: Path,
    *,
    images: Disclosure,
    max_pairs: int,
    or_list: bool = False,
) -> None:
    """Aggregate run folders, write table and page into ``folder`` and print the table.

    Args:
        places: Sweeps' folders and run folders.
        folder: Gets ``table.parquet``, ``cells.parquet``, ``table.md`` and ``report.html``.
        images: How images may be shown.
        max_pairs: Most pairs to show with their images.
        or_list: Whether audits that do not belong into one table get a page that lists them.

    Raises:
        InputError: The audits are missing, damaged, or do not belong together.
    """
    inputs = _collect(places, images=images)
    try:
        comparison = compare(inputs.runs, unfinished=inputs.unfinished)
    except InputError as error:
        if not or_list or not inputs.runs:
            raise
        page = write_list(inputs.runs, folder, unfinished=inputs.unfinished, reason=str(error))
        answer_console(150).print(f"page: {page}", soft_wrap=True)
        return
    _publish(comparison, inputs, folder, max_pairs=max_pairs)


@dataclass(frozen=True)
class _Inputs:
    """What the places hold: audits, and runs without a result."""

    runs: tuple[Run, ...]
    unfinished: tuple[str, ...]
    sweeps: tuple[str, ...]
    images: Disclosure


def _collect(places: Sequence[Path], *, images: Disclosure) -> _Inputs:
    """Read the runs that places stand for."""
    jobs = jobs_of(places)
    audits = [place for place in jobs.folders if (place / "report.json").is_file()]
    if jobs.others:
        log.info("%d run folders of other sweeps in there are left out", jobs.others)
    runs = tuple(read_run(place) for place in audits)
    shown = strictest(runs, images)
    return _Inputs(
        runs=runs,
        unfinished=_unfinished(jobs),
        sweeps=jobs.sweeps,
        images=shown,
    )


def _unfinished(jobs: Jobs) -> tuple[str, ...]:
    without = [
        f"{place.name} (not finished or failed, see its log)"
        for place in jobs.folders
        if not (place / "report.json").is_file() and not is_locality(place)
    ]
    return (*without, *(f"{name} (not started)" for name in jobs.unstarted))


def _publish_one(inputs: _Inputs, folder: Path, *, max_pairs: int) -> None:
    """Write the page of a single audit."""
    page = write_page(
        shown_report(inputs.runs[0]),
        folder,
        images=inputs.images,
        max_pairs=max_pairs,
    )
    answer_console(150).print(f"page: {page}", soft_wrap=True)


def _publish(
    comparison: Comparison, inputs: _Inputs, folder: Path, *, max_pairs: int
) -> tuple[HeadlineRow, ...]:
    """Write the table and the page, and print the table."""
    rows = headline_rows(comparison)
    page = write_table(
        comparison,
        rows,
        folder,
        images=inputs.images,
        max_pairs=max_pairs,
    )[-1]
    console = answer_console(150)
    for table in headline_tables(rows):
        console.print(rich_table(table))
    console.print(sweep_verdict(rows).answer)
    for text in remarks(comparison, rows):
        console.print(f"- {text}", highlight=False)
    console.print(f"page: {page}", soft_wrap=True)
    return rows


def _check_claims(checked: Sequence[Checked], *, source: str) -> None:
    """Print every claim beside what was measured.

    Raises:
        ClaimsFailedError: One does not hold.
    """
    if not checked:
        return
    answer_console(150).print(rich_table(claims_table(checked)))
    failed = sum(not item.holds for item in checked)
    if failed:
        raise ClaimsFailedError(
            f"{failed} of {len(checked)} recorded claims do not hold: see the table above\n"
            f"  where: {source}"
        )
