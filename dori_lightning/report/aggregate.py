"""Many audits as one comparison: refuse what does not belong together, name what is missing.

A mitigation may not move its own yardstick. Each audit calibrates its threshold on the pictures of
its own model; in a comparison all audits of a checkpoint are counted again, from the similarities
they kept, under the threshold of the audit without mitigation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dori_lightning.metrics.replication import cells as cells_of
from dori_lightning.metrics.replication import pair_scores
from dori_lightning.report.belonging import (
    BASELINE,
    check_baselines,
    check_belonging,
    labels_of,
)
from dori_lightning.report.summary import condition_words
from dori_lightning.types import KINDS, InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dori_lightning.report.run_files import Run
    from dori_lightning.types import Calibration, Cell, Condition, Kind, Outcome

__all__ = ["Comparison", "Entry", "Prunings", "compare"]


@dataclass(frozen=True)
class Entry:
    """One checkpoint under one mitigation.

    Attributes:
        checkpoint: Name of the checkpoint.
        label: How the table calls the mitigation: its name, with the settings in which runs of
            one name differ.
        mitigation: Its name.
        runs: Audits behind it.
        cells: Its cells under the checkpoint's one threshold; their mitigation is ``label``.
        reproduced: Condition and kind to pair id to whether the pair was reproduced; None where
            every restart diverged.
        utility: What the mitigation costs in pictures; empty where it was not measured.
        edit: What is known of its edit; empty where nothing is.
    """

    checkpoint: str
    label: str
    mitigation: str
    runs: tuple[Run, ...]
    cells: tuple[Cell, ...]
    reproduced: Mapping[tuple[Condition, Kind], Mapping[str, bool | None]]
    utility: Mapping[str, Any]
    edit: Mapping[str, Any]


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
            entry, said = _entry(label, group, rule)
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
                *(_cells(run.outcomes, run, c, run.mitigation) for c in (run.calibration(), rule)),
                strict=True,
            )
        )
        text += (
            f"; by themselves the runs had {min(values):.3f} to {max(values):.3f}, and {changed} "
            f"of their cells count otherwise here"
        )
    return text + "."


def _cells(
    outcomes: Sequence[Outcome], run: Run, rule: Calibration, label: str
) -> tuple[Cell, ...]:
    return cells_of(
        outcomes,
        rule,
        checkpoint=run.checkpoint,
        mitigation=label,
        aggregation=run.aggregation,
    )


def _entry(label: str, runs: Sequence[Run], rule: Calibration) -> tuple[Entry, list[str]]:
    """Join the runs of one row.

    Raises:
        InputError: Two runs measured the same attack, or they carry different edits.
    """
    first = runs[0]
    notes: list[str] = []
    held: dict[Condition, tuple[Run, list[Outcome]]] = {}
    for run in runs:
        for condition, outcomes in _by_condition(run).items():
            if condition not in held:
                held[condition] = (run, outcomes)
            elif condition.attack == "prompt":
                notes += _repeated(label, held[condition], (run, outcomes), rule)
            else:
                raise InputError(
                    f"two runs hold {label}, {condition_words(condition)}: "
                    f"{held[condition][0].folder} and {run.folder}\n"
                    f"  where: task.runs\n  mend:  leave one of them out"
                )
    everything = [outcome for _, outcomes in held.values() for outcome in outcomes]
    entry = Entry(
        checkpoint=first.checkpoint,
        label=label,
        mitigation=first.mitigation,
        runs=tuple(runs),
        cells=_cells(everything, first, rule, label),
        reproduced={
            (condition, kind): _reproduced(
                [o for o in outcomes if o.pair.kind == kind], first, rule
            )
            for condition, (_, outcomes) in held.items()
            for kind in KINDS
            if any(o.pair.kind == kind for o in outcomes)
        },
        utility=next((u for run in runs if (u := run.document.get("utility"))), {}),
        edit=_edit(label, runs),
    )
    return entry, notes


def _by_condition(run: Run) -> dict[Condition, list[Outcome]]:
    found: dict[Condition, list[Outcome]] = {}
    for outcome in run.outcomes:
        found.setdefault(outcome.condition, []).append(outcome)
    return found


def _scores(outcomes: Sequence[Outcome], run: Run, rule: Calibration) -> dict[str, float]:
    return pair_scores(outcomes, rule.descriptor, aggregation=run.aggregation)


def _reproduced(
    outcomes: Sequence[Outcome], run: Run, rule: Calibration
) -> dict[str, bool | None]:
    return {
        name: None if math.isnan(score) else score > rule.threshold
        for name, score in _scores(outcomes, run, rule).items()
    }


def _repeated(
    label: str,
    kept: tuple[Run, list[Outcome]],
    other: tuple[Run, list[Outcome]],
    rule: Calibration,
) -> Iterator[str]:
    """Compare two measurements of the same prompts: jobs of a grid repeat them."""
    first, second = (_scores(outcomes, run, rule) for run, outcomes in (kept, other))
    gaps = [abs(a - second[name]) for name, a in first.items() if not _same(a, second[name])]
    if gaps:
        gap = "not finite" if any(math.isnan(g) for g in gaps) else f"up to {max(gaps):.3g} apart"
        yield (
            f"{kept[0].checkpoint}, {label}: the prompts were asked in {kept[0].folder.name} and "
            f"in {other[0].folder.name}, with similarities {gap}; the first is shown."
        )


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, abs_tol=1e-6) or (math.isnan(a) and math.isnan(b))


def _edit(label: str, runs: Sequence[Run]) -> Mapping[str, Any]:
    """What is known of a row's edit, from the run that made it where there is one.

    Raises:
        InputError: The runs of one row carry different edits.
    """
    edits = [run.edit for run in runs if run.edit is not None]
    if len({edit.get("identity") for edit in edits}) > 1:
        folders = ", ".join(str(run.folder) for run in runs)
        raise InputError(
            f"the runs of {label} carry different edits: {folders}\n"
            f"  where: task.runs\n"
            f"  mend:  run them again with the same pairs, corpus and seed"
        )
    return next((e for e in edits if e.get("made")), edits[0] if edits else {})


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
