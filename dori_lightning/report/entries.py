"""The rows of a comparison: the runs of one mitigation joined, under one threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dori_lightning.metrics.replication import cells as cells_of
from dori_lightning.metrics.replication import pair_scores
from dori_lightning.report.summary import condition_words
from dori_lightning.types import KINDS, InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dori_lightning.report.run_files import Run
    from dori_lightning.types import Calibration, Cell, Condition, Kind, Outcome

__all__ = ["Entry", "make_entry", "run_cells"]


@dataclass(frozen=True)
class Entry:
    """One checkpoint under one mitigation.

    Attributes:
        checkpoint: Name of the checkpoint.
        label: How the table calls the mitigation: its name, with the settings in which runs of
            one name differ.
        mitigation: Its name.
        runs: Audits behind it.
        outcomes: What they measured, each condition once.
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
    outcomes: tuple[Outcome, ...]
    cells: tuple[Cell, ...]
    reproduced: Mapping[tuple[Condition, Kind], Mapping[str, bool | None]]
    utility: Mapping[str, Any]
    edit: Mapping[str, Any]

    @property
    def invalid(self) -> list[Mapping[str, Any]]:
        """Flags that make its audits invalid, each name once."""
        named = {
            flag["name"]: flag
            for run in self.runs
            for flag in run.document["flags"]
            if flag["severity"] == "invalid"
        }
        return list(named.values())


def run_cells(
    outcomes: Sequence[Outcome], run: Run, rule: Calibration, label: str
) -> tuple[Cell, ...]:
    """Count a run's outcomes under a threshold, in cells whose mitigation is ``label``."""
    return cells_of(
        outcomes,
        rule,
        checkpoint=run.checkpoint,
        mitigation=label,
        aggregation=run.aggregation,
    )


def make_entry(label: str, runs: Sequence[Run], rule: Calibration) -> tuple[Entry, list[str]]:
    """Join the runs of one row.

    Args:
        label: Name of the row.
        runs: Its audits.
        rule: The checkpoint's one threshold.

    Returns:
        The row, and what a reader must know of how it was joined.

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
        outcomes=tuple(everything),
        cells=run_cells(everything, first, rule, label),
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
