"""Many audits as one comparison: refuse what does not belong together, name what is missing.

A mitigation may not move its own yardstick. Each audit calibrates its threshold on the pictures of
its own model; in a comparison all audits of a checkpoint are counted again, from the similarities
they kept, under the threshold of the audit without mitigation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dori_lightning.report.belonging import (
    BASELINE,
    check_baselines,
    check_belonging,
    labels_of,
)
from dori_lightning.report.entries import make_entry, run_cells
from dori_lightning.report.summary import condition_words
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dori_lightning.report.entries import Entry
    from dori_lightning.report.run_files import Run
    from dori_lightning.types import Calibration, Cell, Condition, Kind

__all__ = ["Comparison", "Prunings", "compare"]


@dataclass(frozen=True)
class Prunings:
    """How often a mitigation was worked out, and how often its stored edit was read.

    Attributes:
        made: Runs that made their edit.
        reused: Runs that read it.
        distinct: Different edits among them.
    """

    made: int
    reused: int
    distinct: int


@dataclass(frozen=True)
class Comparison:
    """Audits that belong together.

    Attributes:
        entries: Rows, the baseline of each checkpoint first.
        calibrations: Checkpoint to the threshold that all its rows are counted under.
        unfinished: Runs without a result, by name.
        missing: Cells that others have and a row lacks, in words.
        notes: What a reader must know of how the runs were put together.
        prunings: Edits made and reused; None where no run says.
    """

    entries: tuple[Entry, ...]
    calibrations: Mapping[str, Calibration]
    unfinished: tuple[str, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    prunings: Prunings | None

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Cells of all rows."""
        return tuple(cell for entry in self.entries for cell in entry.cells)


def compare(runs: Sequence[Run], *, unfinished: Sequence[str] = ()) -> Comparison:
    """Put audits into one comparison.

    Args:
        runs: Finished audits, in the order in which rows shall appear.
        unfinished: Names of runs that belong to it and have no result.

    Raises:
        InputError: There is nothing to compare, a checkpoint has no audit without mitigation, or
            the audits differ in what they must share.
    """
    if not runs:
        raise InputError(
            f"no run has a result yet, so there is no table; without one: "
            f"{', '.join(unfinished) or 'none was given'}\n"
            f"  where: task.runs\n  mend:  finish the runs, or name folders with a report.json"
        )
    check_baselines(runs, unfinished=unfinished)
    labels = labels_of(runs)
    entries: list[Entry] = []
    calibrations: dict[str, Calibration] = {}
    notes: list[str] = []
    for checkpoint in dict.fromkeys(run.checkpoint for run in runs):
        own = [run for run in runs if run.checkpoint == checkpoint]
        base = next(run for run in own if run.mitigation == BASELINE)
        check_belonging(own, base)
        rule = calibrations[checkpoint] = base.calibration()
        notes.append(_threshold_note(checkpoint, own, rule))
        # the baseline leads; the rest stays in the order given
        for label in sorted(dict.fromkeys(labels[run.folder] for run in own), key=_not_baseline):
            group = [run for run in own if labels[run.folder] == label]
            entry, said = make_entry(label, group, rule)
            entries.append(entry)
            notes += said
    return Comparison(
        entries=tuple(entries),
        calibrations=calibrations,
        unfinished=tuple(unfinished),
        missing=tuple(_missing(entries)),
        notes=tuple(notes),
        prunings=_prunings(runs),
    )


def _not_baseline(label: str) -> bool:
    return label != BASELINE


def _threshold_note(checkpoint: str, runs: Sequence[Run], rule: Calibration) -> str:
    """Say which threshold all rows share, and what it changes."""
    set_by = (
        "fixed beforehand" if rule.rule == "fixed" else "calibrated on the run without mitigation"
    )
    own = [run.calibration() for run in runs]
    text = (
        f"{checkpoint}: all rows are counted under one threshold, {rule.threshold:.3f} by "
        f"{rule.descriptor}, {set_by}"
    )
    others = sorted({run.descriptor for run in own} - {rule.descriptor})
    if others:
        text += f"; some runs by themselves chose {', '.join(others)}"
    values = [c.threshold for c in own if c.descriptor == rule.descriptor]
    if any(not math.isclose(value, rule.threshold, abs_tol=1e-9) for value in values):
        changed = sum(
            before.hits != after.hits
            for run in runs
            for before, after in zip(
                *(
                    run_cells(run.outcomes, run, c, run.mitigation)
                    for c in (run.calibration(), rule)
                ),
                strict=True,
            )
        )
        text += (
            f"; by themselves the runs had {min(values):.3f} to {max(values):.3f}, and {changed} "
            f"of their cells count otherwise here"
        )
    return text + "."


def _missing(entries: Sequence[Entry]) -> Iterator[str]:
    """Name the cells that other rows of the checkpoint have and a row lacks."""
    for checkpoint in dict.fromkeys(entry.checkpoint for entry in entries):
        own = [entry for entry in entries if entry.checkpoint == checkpoint]
        wanted = dict.fromkeys(key for entry in own for key in entry.reproduced)
        for entry in own:
            lacking: dict[Condition, list[Kind]] = {}
            for condition, kind in wanted:
                if (condition, kind) not in entry.reproduced:
                    lacking.setdefault(condition, []).append(kind)
            for condition, kinds in lacking.items():
                yield (
                    f"{checkpoint}, {entry.label}: {condition_words(condition)} "
                    f"({', '.join(kinds)})"
                )


def _prunings(runs: Sequence[Run]) -> Prunings | None:
    edits = [r.edit for r in runs if r.edit is not None and r.mitigation != BASELINE]
    if not edits:
        return None
    made = sum(bool(edit.get("made")) for edit in edits)
    return Prunings(made, len(edits) - made, len({str(edit.get("key")) for edit in edits}))
