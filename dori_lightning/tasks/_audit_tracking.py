"""What an audit tells the loggers of its run.

Curves: ``attack/loss/{init}/{kind}`` against ``attack/step``, and
``audit/memorization_rate/{init}/{kind}``, its interval and ``audit/similarity/...`` against
``audit/steps``, where 0 steps are the prompts as they are. One grid of pictures for each start,
``pictures/{init}``; one table, ``audit/pairs``; and the numbers that runs are compared by,
``final/...`` of ``_audit_numbers``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from dori_lightning.tasks._audit_gallery import COLUMNS, grid, table_rows
from dori_lightning.tasks._audit_numbers import final_numbers
from dori_lightning.types import INITS, KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from dori_lightning.attacks.triggers import Trigger
    from dori_lightning.mitigations.base import Found
    from dori_lightning.report.pictures import Disclosure
    from dori_lightning.report.record import AuditReport
    from dori_lightning.tracking.tracker import Tracker

__all__ = ["track_attack", "track_report"]

_RECORD = (
    "report.json", "pairs.parquet", "report.html", "edit.json", "method.json", "utility.json",
)  # fmt: skip


def track_attack(tracker: Tracker, found: Sequence[Trigger]) -> None:
    """Log the mean loss of the attack from one initial point and restart, by kind and step.

    Args:
        tracker: Loggers of the run.
        found: What the attack found; of each pair, the trigger with the most steps counts.
    """
    init, restart = found[0].condition.init, found[0].restart
    where = f"{init}" if restart == 0 else f"{init}_r{restart}"
    curves: dict[str, torch.Tensor] = {}
    for kind in KINDS:
        longest: dict[str, torch.Tensor] = {}
        for trigger in found:
            losses, name = trigger.losses, trigger.pair.id
            if trigger.pair.kind != kind or losses is None or not len(losses):
                continue
            if name not in longest or len(losses) > len(longest[name]):
                longest[name] = losses
        if longest:
            # steps of a diverged attack are no numbers: left out of the mean, not of the run;
            # so are those that an attack was stopped before
            rows = pad_sequence([*longest.values()], batch_first=True, padding_value=torch.nan)
            curves[f"attack/loss/{where}/{kind}"] = rows.nanmean(0)
    steps = max((len(curve) for curve in curves.values()), default=0)
    tracker.scalars(
        (
            (k + 1, {key: float(c[k]) for key, c in curves.items() if k < len(c)})
            for k in range(steps)
        ),
        step_metric="attack/step",
    )


def track_report(
    tracker: Tracker,
    report: AuditReport,
    found: Found,
    folder: Path,
    *,
    images: Disclosure,
    max_pairs: int,
) -> None:
    """Log what an audit found, once, at its end.

    Args:
        tracker: Loggers of the run.
        report: What was found; its files are in ``folder`` already.
        found: The edit it was found under.
        folder: Run folder.
        images: Whether pictures are shown, blurred or left out.
        max_pairs: Pairs whose pictures are in the table.
    """
    if not tracker.loggers:  # pictures are read and scaled for nobody otherwise
        return
    tracker.scalars(_rates(report), step_metric="audit/steps")
    for init in INITS:
        sheet, caption = grid(report, init, images=images)
        tracker.pictures(f"pictures/{init}", sheet, caption=caption)
    rows = table_rows(report, folder, images=images, max_pairs=max_pairs)
    tracker.table("audit/pairs", COLUMNS, rows)
    _track_files(tracker, report, found, folder)
    tracker.summary({**final_numbers(report, found), "verdict": report.verdict})


def _track_files(tracker: Tracker, report: AuditReport, found: Found, folder: Path) -> None:
    """Hand over embeddings, edit and report, a version of each for the run."""
    name = f"{report.checkpoint}-{report.mitigation}"
    about = {
        "checkpoint": report.checkpoint,
        "fingerprint": report.provenance.fingerprint,
        "mitigation": report.mitigation,
        "edit": found.edit.identity,
        "seed": report.provenance.seed,
    }
    attacks = folder / "attacks"
    tracker.artifact(
        f"{name}-embeddings",
        kind="embedding",
        files={p.relative_to(attacks).as_posix(): p for p in attacks.rglob("*.safetensors")},
        metadata=about,
        copy=False,
    )
    if found.path is not None:
        tracker.artifact(
            f"{name}-edit",
            kind="edit",
            files={"edit.safetensors": found.path},
            metadata={**about, "key": found.key},
        )
    tracker.artifact(
        f"{name}-report",
        kind="report",
        files={file: folder / file for file in _RECORD},
        metadata=about,
    )


def _rates(report: AuditReport) -> Iterator[tuple[int, Mapping[str, float]]]:
    """Rates and similarities of the run's own cells, by steps."""
    rows: dict[int, dict[str, float]] = {}
    for cell in report.cells:
        if cell.mitigation != report.mitigation or not cell.n:
            continue
        # the attack from the prompt begins at the prompt: 0 steps of the same curve
        where = f"{cell.condition.init or 'prompt'}/{cell.kind}"
        row = rows.setdefault(cell.condition.budget.steps, {})
        row[f"audit/memorization_rate/{where}"] = cell.mr
        row[f"audit/memorization_rate_low/{where}"] = cell.mr_ci95[0]
        row[f"audit/memorization_rate_high/{where}"] = cell.mr_ci95[1]
        row[f"audit/similarity/{where}"] = cell.similarity_median
    yield from sorted(rows.items())
