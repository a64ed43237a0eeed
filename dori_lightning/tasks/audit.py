"""Which pairs a checkpoint still reproduces, prompted and attacked, and how sure we are of it."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console

from dori_lightning.files import write_atomically
from dori_lightning.mitigations.effect import changed_weights
from dori_lightning.report.belonging import BASELINE
from dori_lightning.report.conclusions import make_report
from dori_lightning.report.effort import attack_effort
from dori_lightning.report.page import write_page
from dori_lightning.report.plots import write_figures
from dori_lightning.report.record import write_report
from dori_lightning.report.tables import cells_table
from dori_lightning.report.utility_files import write_utility
from dori_lightning.report.verdict import INVALID
from dori_lightning.tasks._audit_numbers import objective
from dori_lightning.tasks._audit_setup import method_of, set_up
from dori_lightning.tasks._audit_stages import attack_and_draw, measure_all, price
from dori_lightning.tasks._audit_tracking import track_attack, track_report
from dori_lightning.tasks._folder import check_folder
from dori_lightning.tasks._plan import plan
from dori_lightning.tasks._plan_costs import drawn as drawn_by
from dori_lightning.tasks._provenance import plain, provenance_of
from dori_lightning.tasks._tracking import tracked
from dori_lightning.tasks._workshop import edit_record

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

    from dori_lightning.report.pictures import Disclosure
    from dori_lightning.report.record import AuditReport
    from dori_lightning.tracking.tracker import Tracker

__all__ = ["run"]


def run(cfg: DictConfig, folder: Path) -> float | None:
    """Audit a checkpoint and write the report into ``folder``.

    Returns:
        Memorization rate of vm pairs under the strongest condition measured, for sweepers; None
        without vm pairs, and where the audit is invalid.
    """
    if cfg.task.dry_run:
        plan(cfg, folder)
        return None
    # first of all: a mistaken command must not reach the logged run that the folder belongs to
    check_folder(folder, method_of(plain(cfg)))
    tags = (str(cfg.checkpoint.name), str(cfg.mitigation.name))
    with tracked(cfg, folder, tags=tags) as tracker:
        return _audit(cfg, folder, tracker)


def _audit(cfg: DictConfig, folder: Path, tracker: Tracker) -> float | None:
    started = datetime.now(UTC)
    bench = set_up(cfg, folder, tracker)
    found = bench.workshop.find(bench.mitigation, bench.model, bench.suspected)
    drawn = attack_and_draw(bench, found.edit, on_round=partial(track_attack, tracker))
    if not bench.trainer.is_global_zero:
        return None
    measured = measure_all(bench, drawn)
    utility = price(bench, found.edit, measured.calibration)
    if utility is not None:
        write_utility(utility, folder)
    changed = changed_weights(found.edit, bench.model)
    record = edit_record(found, bench.mitigation.name, changed=changed)
    write_atomically(folder / "edit.json", record)
    report = make_report(
        checkpoint=bench.model.name,
        mitigation=bench.mitigation.name,
        cells=measured.cells,
        calibration=measured.calibration,
        outcomes=measured.outcomes,
        baseline=measured.baseline,
        utility=utility,
        effort=attack_effort(
            measured.outcomes,
            noise_batch=bench.settings.noise_batch,
            picture_evaluations=drawn_by(1, bench.sampling).forward,
        ),
        provenance=provenance_of(cfg, bench.model, bench.pairs, started=started),
        skipped=bench.pairs.skipped,
        inert=changed == 0 and bench.mitigation.name != BASELINE,
    )
    images, max_pairs = cfg.report.images.value, cfg.report.max_pairs
    _write(report, folder, images=images, max_pairs=max_pairs)
    track_report(tracker, report, found, folder, images=images, max_pairs=max_pairs)
    return objective(report)


def _write(report: AuditReport, folder: Path, *, images: Disclosure, max_pairs: int) -> None:
    """Write record, figures and page, and say the answer on the console."""
    write_report(report, folder)
    write_figures(report, folder, images=images)
    page = write_page(report, folder, images=images, max_pairs=max_pairs)
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else 120)
    title = f"{INVALID}: {', '.join(report.invalid)}" if report.invalid else None
    console.print(cells_table(report.cells, title=title))
    console.print(report.verdict)
    console.print(f"page: {page}", soft_wrap=True)
