"""Many audits as one comparison: the rows of the headline table, under one threshold.

A mitigation may not move the threshold that it is judged by. Each audit calibrates its threshold
on the images of its own model; in a comparison all audits of a checkpoint are counted again, from
the similarities they kept, under the threshold of the audit without mitigation. Audits that differ
in weights, pairs, sampling, attack or measure are refused; what is missing is named.

Reference: the main table of Finding DoRI (ICML 2026), https://arxiv.org/abs/2507.16880
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dori_lightning.metrics.replication import (
    PairResult,
    find_cell,
    headline_condition,
    pair_results,
    prompt_condition,
)
from dori_lightning.metrics.replication import cells as cells_of
from dori_lightning.metrics.statistics import holm, mcnemar_exact
from dori_lightning.metrics.utility import Utility
from dori_lightning.report.record import EditRecord, Flag, Run
from dori_lightning.report.words import condition_words
from dori_lightning.types import (
    BASELINE,
    INITS,
    Calibration,
    Cell,
    Condition,
    Init,
    InputError,
    Kind,
    Norm,
    Outcome,
)

# What decides a cell besides its own keys. Initial points, budgets and snapshots only decide which
# cells there are; batch widths and devices decide nothing.
_SHARED = (
    "seed",
    "checkpoint.precision",
    "checkpoint.resolution",
    "sampling.sampler",
    "sampling.steps",
    "sampling.guidance",
    "sampling.images_per_pair",
    "sampling.seed",
    "attack.lr",
    "attack.noise_batch",
    "attack.keep_first_token",
    "attack.restarts",
    "metrics.decider",
    "metrics.aggregation",
)
_ABSENT = "nothing"
_SOME = 5


def _baseline(runs: Sequence[Run], *, unfinished: Sequence[str]) -> Run:
    """The audit of a checkpoint as it is.

    Raises:
        InputError: There is none; names the runs that have no result.
    """
    base = next((run for run in runs if run.mitigation == BASELINE), None)
    if base is None:
        pending = f"\n  without a result: {', '.join(unfinished)}" if unfinished else ""
        raise InputError(
            f"no table without its none row: nothing shows what {runs[0].checkpoint} reproduces "
            f"without a mitigation, nor sets the threshold of the other rows{pending}\n"
            f"  where: task.runs\n"
            f"  fix:   audit the checkpoint with mitigation=none under the same settings, and add "
            f"that run"
        )
    return base


def _check_comparable(runs: Sequence[Run], base: Run) -> None:
    """Refuse audits of one checkpoint that differ in weights, pairs, sampling, attack or measure.

    Raises:
        InputError: Names every difference to ``base``.
    """
    problems = [f"  {run.folder.name}: {text}" for run in runs for text in _differences(run, base)]
    if problems:
        listed = "\n".join(problems)
        raise InputError(
            f"these runs do not belong into one table with {base.folder.name}:\n{listed}\n"
            f"  fix:   make a table of each group by itself: task.runs=[FOLDER,FOLDER]"
        )


def _differences(run: Run, base: Run) -> Iterator[str]:
    here, there = run.report.provenance, base.report.provenance
    if here.fingerprint != there.fingerprint:
        yield f"weights {here.fingerprint}, there {there.fingerprint}"
    yield from _pair_differences(run, base)
    for key in _SHARED:
        if (now := _look_up(run, key)) != (then := _look_up(base, key)):
            yield f"{key} is {now}, there {then}"
    decider = base.report.calibration.descriptor
    if any(decider not in outcome.similarity for outcome in run.report.outcomes):
        yield f"not measured by {decider}, which decides there"
    settings = f"metrics.descriptors.{decider}"
    own, other = (dict(_flat(_look_up(r, settings))) for r in (run, base))
    for key in sorted((own.keys() | other.keys()) - {"threshold"}):
        if own.get(key) != other.get(key):
            yield f"{settings}.{key} is {own.get(key)}, there {other.get(key)}"
    yield from _stopping_differences(run, base)
    counts, count = run.report.aggregation, base.report.aggregation
    if counts != count:
        yield f"images count by their {counts}, there by their {count}"


def _stopping_differences(run: Run, base: Run) -> Iterator[str]:
    """What decides which attacks were stopped: it cannot be decided again under another rule."""
    here, there = (_look_up(r, "attack.early_stop") is True for r in (run, base))
    if here != there:
        yield f"attack.early_stop is {here}, there {there}"
    if not here or not there:
        return
    steps, others = (_look_up(r, "attack.snapshots") for r in (run, base))
    if steps != others:
        yield f"attacks may stop after {steps} steps, there after {others}"
    own, rule = run.report.calibration, base.report.calibration
    if own.descriptor != rule.descriptor or not math.isclose(
        own.threshold, rule.threshold, abs_tol=1e-9
    ):
        yield (
            f"attacks were stopped by {own.descriptor} above {own.threshold:.3f}, there by "
            f"{rule.descriptor} above {rule.threshold:.3f}"
        )


def _pair_differences(run: Run, base: Run) -> Iterator[str]:
    here, there = (
        {
            o.pair.id: (
                o.pair.kind,
                o.pair.prompt,
                report.provenance.image_hashes.get(o.pair.id),
            )
            for o in report.outcomes
        }
        for report in (run.report, base.report)
    )
    for what, ids in (
        ("lacks the pairs", [name for name in there if name not in here]),
        ("has the pairs", [name for name in here if name not in there]),
        ("has other prompts or images for",
         [name for name in here if name in there and here[name] != there[name]]),
    ):  # fmt: skip
        if ids:
            more = f" and {len(ids) - _SOME} more" if len(ids) > _SOME else ""
            yield f"{what} {', '.join(ids[:_SOME])}{more}"


def _labels(runs: Sequence[Run]) -> dict[Path, str]:
    """Name the row of every run: its mitigation, with the settings in which runs of a name differ.

    Returns:
        Run folder to label, such as ``wanda`` or ``wanda[fraction=0.1]``.
    """
    named: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        named[run.mitigation].append(run)
    labels: dict[Path, str] = {}
    for name, group in named.items():
        settings = [dict(_flat(_look_up(run, "mitigation"))) for run in group]
        keys = list(dict.fromkeys(key for chosen in settings for key in chosen))
        differing = [
            key for key in keys if len({json.dumps(chosen.get(key)) for chosen in settings}) > 1
        ]
        for run, chosen in zip(group, settings, strict=True):
            words = ", ".join(f"{key}={chosen.get(key)}" for key in differing)
            labels[run.folder] = f"{name}[{words}]" if words else name
    return labels


def _look_up(run: Run, key: str) -> Any:
    """A setting of a run by its dotted name."""
    config: Any = run.report.provenance.config
    for part in key.split("."):
        config = config.get(part, _ABSENT) if isinstance(config, Mapping) else _ABSENT
    return config


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings by dotted name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, value


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
        pair_results: One result per pair and condition under that threshold.
        prompt_condition: The prompts as they are; None where no image was generated from them.
        headline_condition: The attack to show; None where no attack was run.
        reproduced: Condition and kind to pair id to whether the pair was reproduced; None where
            there is no result.
        utility: What the mitigation costs in images; None where it was not measured.
        edit: Its edit, of the run that made it where there is one; None where none is recorded.
    """

    checkpoint: str
    label: str
    mitigation: str
    runs: tuple[Run, ...]
    outcomes: tuple[Outcome, ...]
    cells: tuple[Cell, ...]
    pair_results: tuple[PairResult, ...]
    prompt_condition: Condition | None
    headline_condition: Condition | None
    reproduced: Mapping[tuple[Condition, Kind], Mapping[str, bool | None]]
    utility: Utility | None
    edit: EditRecord | None

    @property
    def invalid(self) -> list[Flag]:
        """Flags that make its audits invalid, each name once."""
        flags = (flag for run in self.runs for flag in run.report.flags)
        return list({flag.name: flag for flag in flags if flag.severity == "invalid"}.values())


def _cells(
    outcomes: Sequence[Outcome], run: Run, rule: Calibration, label: str
) -> tuple[Cell, ...]:
    """Count a run's outcomes under a threshold, in cells whose mitigation is ``label``."""
    return cells_of(
        outcomes,
        rule,
        checkpoint=run.checkpoint,
        mitigation=label,
        aggregation=run.report.aggregation,
    )


def _entry(label: str, runs: Sequence[Run], rule: Calibration) -> tuple[Entry, list[str]]:
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
    measured: dict[Condition, tuple[Run, list[Outcome]]] = {}
    for run in runs:
        for condition, outcomes in _by_condition(run).items():
            if condition not in measured:
                measured[condition] = (run, outcomes)
            elif condition.attack == "prompt":
                notes += _repeated(label, measured[condition], (run, outcomes), rule)
            else:
                raise InputError(
                    f"two runs hold {label}, {condition_words(condition)}: "
                    f"{measured[condition][0].folder} and {run.folder}\n"
                    f"  where: task.runs\n  fix:   leave one of them out"
                )
    everything = [outcome for _, outcomes in measured.values() for outcome in outcomes]
    cells = _cells(everything, first, rule, label)
    results = pair_results(everything, rule, first.report.aggregation)
    reproduced: dict[tuple[Condition, Kind], dict[str, bool | None]] = {}
    for result in results:
        of_kind = reproduced.setdefault((result.condition, result.pair.kind), {})
        of_kind[result.pair.id] = result.reproduced
    entry = Entry(
        checkpoint=first.checkpoint,
        label=label,
        mitigation=first.mitigation,
        runs=tuple(runs),
        outcomes=tuple(everything),
        cells=cells,
        pair_results=results,
        prompt_condition=prompt_condition(cells),
        headline_condition=headline_condition(cells),
        reproduced=reproduced,
        utility=next((u for run in runs if (u := run.report.utility)), None),
        edit=_edit(label, runs),
    )
    return entry, notes


def _by_condition(run: Run) -> dict[Condition, list[Outcome]]:
    found: dict[Condition, list[Outcome]] = {}
    for outcome in run.report.outcomes:
        found.setdefault(outcome.condition, []).append(outcome)
    return found


def _repeated(
    label: str,
    kept: tuple[Run, list[Outcome]],
    other: tuple[Run, list[Outcome]],
    rule: Calibration,
) -> Iterator[str]:
    """Compare two measurements of the same prompts: jobs of a grid repeat them."""
    first, second = (
        {
            result.pair.id: result.statistic
            for result in pair_results(outcomes, rule, run.report.aggregation)
        }
        for run, outcomes in (kept, other)
    )
    gaps = [abs(a - second[name]) for name, a in first.items() if not _same(a, second[name])]
    if gaps:
        gap = "not finite" if any(math.isnan(g) for g in gaps) else f"up to {max(gaps):.3g} apart"
        yield (
            f"{kept[0].checkpoint}, {label}: the prompts were measured in {kept[0].folder.name} "
            f"and in {other[0].folder.name}, with similarities {gap}; the first is shown."
        )


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, abs_tol=1e-6) or (math.isnan(a) and math.isnan(b))


def _edit(label: str, runs: Sequence[Run]) -> EditRecord | None:
    """The edit of a row, from the run that made it where there is one.

    Raises:
        InputError: The runs of one row carry different edits.
    """
    edits = [run.edit for run in runs if run.edit is not None]
    if len({edit.identity for edit in edits}) > 1:
        folders = ", ".join(str(run.folder) for run in runs)
        raise InputError(
            f"the runs of {label} carry different edits: {folders}\n"
            f"  where: task.runs\n"
            f"  fix:   run them again with the same pairs, corpus and seed"
        )
    return next((e for e in edits if e.made), edits[0] if edits else None)


@dataclass(frozen=True)
class Comparison:
    """Audits that belong together.

    Attributes:
        entries: Rows, the baseline of each checkpoint first.
        calibrations: Checkpoint to the threshold that all its rows are counted under.
        unfinished: Runs without a result, by name.
        missing: Cells that others have and a row lacks, in words.
        notes: What a reader must know of how the runs were put together.
    """

    entries: tuple[Entry, ...]
    calibrations: Mapping[str, Calibration]
    unfinished: tuple[str, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]

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
            f"  where: task.runs\n  fix:   finish the runs, or name folders with a report.json"
        )
    labels = _labels(runs)
    entries: list[Entry] = []
    calibrations: dict[str, Calibration] = {}
    notes: list[str] = []
    for checkpoint in dict.fromkeys(run.checkpoint for run in runs):
        own = [run for run in runs if run.checkpoint == checkpoint]
        base = _baseline(own, unfinished=unfinished)
        _check_comparable(own, base)
        rule = calibrations[checkpoint] = base.report.calibration
        notes.append(_threshold_note(checkpoint, own, rule))
        # the baseline leads; the rest stays in the order given
        for label in sorted(
            dict.fromkeys(labels[run.folder] for run in own), key=lambda label: label != BASELINE
        ):
            group = [run for run in own if labels[run.folder] == label]
            entry, said = _entry(label, group, rule)
            entries.append(entry)
            notes += said
    return Comparison(
        entries=tuple(entries),
        calibrations=calibrations,
        unfinished=tuple(unfinished),
        missing=tuple(_missing(entries)),
        notes=(*notes, *_edits_note(runs)),
    )


def _threshold_note(checkpoint: str, runs: Sequence[Run], rule: Calibration) -> str:
    """Say which threshold all rows share, and what it changes."""
    set_by = (
        "fixed beforehand" if rule.rule == "fixed" else "calibrated on the run without mitigation"
    )
    own = [run.report.calibration for run in runs]
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
            for run, rule_of_run in zip(runs, own, strict=True)
            for before, after in zip(
                _cells(run.report.outcomes, run, rule_of_run, run.mitigation),
                _cells(run.report.outcomes, run, rule, run.mitigation),
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


def _edits_note(runs: Sequence[Run]) -> Iterator[str]:
    edits = [run.edit for run in runs if run.edit is not None and run.mitigation != BASELINE]
    if edits:
        made, distinct = sum(edit.made for edit in edits), len({edit.key for edit in edits})
        yield (
            f"Edits: {made} made, {len(edits) - made} read from the cache, {distinct} different "
            f"ones."
        )


Source = Literal["C", "S", "F"]

# The numbers of Finding DoRI (ICML 2026, arXiv 2507.16880) that a table is shown beside. They were
# measured on Stable Diffusion 1.4 and 2.x, on verbatim memorized LAION images, by SSCD above 0.7:
# another model, list and descriptor than the embedded benchmark's. They show in which direction to
# look, they are no target. Where nothing was published there is no number here.

SOURCES: dict[Source, str] = {
    "C": "the authors' page",
    "S": "notes or reviews of the paper, written by others",
    "F": "read off a figure, approximate",
}
"""Where a number was read."""


@dataclass(frozen=True)
class Figure:
    """One published number.

    Attributes:
        rate: Memorization rate in [0, 1].
        source: Where it was read, a key of `SOURCES`.
        similarity: SSCD with the original, None where not given.
        spread: What the paper writes after the plus-minus sign.
    """

    rate: float
    source: Source
    similarity: float | None = None
    spread: float | None = None


@dataclass(frozen=True)
class Published:
    """What the paper gives for one row; None where it gives nothing.

    Attributes:
        row: What the paper calls the row.
        model: On which model.
        prompt: Verbatim memorized images, from their prompts.
        attacked: The same, by the attack.
        control_prompt: Images that are not memorized, from their prompts.
        control_attacked: The same, by the attack.
    """

    row: str
    model: str
    prompt: Figure | None = None
    attacked: Figure | None = None
    control_prompt: Figure | None = None
    control_attacked: Figure | None = None


_SD1 = "SD 1.4"
_SD2 = "SD 2"

# Variants of these are not the paper's, or it gives no rate for them.
_EXACT = ("none", "adversarial_finetuning")

# By the beginning of a mitigation's name, up to an underscore; the longest that fits decides.
_ON_SD1: dict[str, Published] = {
    "none": Published(
        "no mitigation",
        _SD1,
        prompt=Figure(0.98, "C", 0.90, 0.04),
        control_prompt=Figure(0.00, "C", 0.17, 0.05),
        control_attacked=Figure(0.00, "C", 0.48, 0.06),
    ),
    "nemo": Published(
        "NeMo",
        _SD1,
        prompt=Figure(0.20, "C", 0.33, 0.18),
        attacked=Figure(0.99, "C", 0.91, 0.03),
    ),
    "wanda": Published(
        "Wanda",
        _SD1,
        prompt=Figure(0.00, "C", 0.20, 0.08),
        attacked=Figure(0.72, "C", 0.76, 0.05),
    ),
    "wanda_10": Published("Wanda, 10 %", _SD1, attacked=Figure(0.01, "C", 0.40, 0.13)),
    "esd": Published("ESD", _SD1, attacked=Figure(0.98, "C", 0.90, 0.04)),
    "concept_ablation": Published(
        "Concept Ablation", _SD1, attacked=Figure(0.97, "C", 0.91, 0.04)
    ),
    "siss": Published("SISS", _SD1, attacked=Figure(0.39, "S", 0.60, 0.22)),
    "adversarial_finetuning": Published(
        "adversarial fine-tuning, 5 epochs", _SD1, attacked=Figure(0.02, "C", 0.36, 0.14)
    ),
}
_ON_SD2: dict[str, Published] = {
    "nemo": Published(
        "NeMo", _SD2, prompt=Figure(0.06, "S"), attacked=Figure(1.00, "C", 0.87, 0.02)
    ),
    "adversarial_finetuning": Published(
        "adversarial fine-tuning", _SD2, attacked=Figure(0.06, "C", 0.14, 0.06)
    ),
}


def published_for(mitigation: str, *, checkpoint: str) -> Published | None:
    """Find what the paper gives for a row, by the beginning of the mitigation's name.

    Args:
        mitigation: Name of the mitigation, such as ``nemo`` or ``wanda_10``.
        checkpoint: Name of the checkpoint; names that begin with ``sd2`` get the numbers of
            Stable Diffusion 2, all others those of 1.4.

    Returns:
        The paper's row, None where it has none.
    """
    rows = _ON_SD2 if checkpoint.startswith("sd2") else _ON_SD1
    fitting = [
        name
        for name in rows
        if mitigation == name or (name not in _EXACT and mitigation.startswith(f"{name}_"))
    ]
    return rows[max(fitting, key=len)] if fitting else None


_PROMPT = Condition("prompt")


@dataclass(frozen=True)
class Paired:
    """The same pairs under two conditions.

    Attributes:
        n: Pairs with a result under both.
        lost: Reproduced under the first only.
        gained: Reproduced under the second only.
        p: Two-sided exact McNemar p-value.
    """

    n: int
    lost: int
    gained: int
    p: float


def paired(first: Mapping[str, bool | None], second: Mapping[str, bool | None]) -> Paired | None:
    """Compare two conditions pair by pair; a pair that diverged under either is left out.

    Args:
        first: Pair id to whether it was reproduced, None where that is unknown.
        second: The same under the other condition.

    Returns:
        The comparison, None where no pair has a result under both.
    """
    both = [
        (a, b)
        for name, a in first.items()
        if a is not None and (b := second.get(name)) is not None
    ]
    if not both:
        return None
    lost, gained = sum(a and not b for a, b in both), sum(b and not a for a, b in both)
    return Paired(len(both), lost, gained, mcnemar_exact(lost, gained))


@dataclass(frozen=True)
class Attacked:
    """A row under the attack from one initial point.

    Attributes:
        init: Initial point.
        vm: Cell of the suspected images.
        tm: Cell of the template copies.
        control: Cell of the controls.
        against_none: Suspected images, compared with the same attack without mitigation.
        against_none_holm: Its p-value corrected for the rows of the checkpoint; NaN without one.
        against_prompt: Suspected images, compared with the row's own prompts.
    """

    init: Init
    vm: Cell | None
    tm: Cell | None
    control: Cell | None
    against_none: Paired | None = None
    against_none_holm: float = math.nan
    against_prompt: Paired | None = None


@dataclass(frozen=True)
class UtilityCost:
    """What a mitigation costs; NaN where it was not measured.

    Attributes:
        loss_ratio: Denoising loss on ordinary prompts, relative to the unmitigated model.
        loss_ratio_ci95: Its interval.
        kid: Kernel distance of its images to the unmitigated model's.
        kid_std: Its spread over subsets.
        unet_evaluations: UNet evaluations that finding the edit took.
        seconds: Seconds that finding the edit took.
        changed: Weights that the edit changes; for edits by pair, on average.
    """

    loss_ratio: float = math.nan
    loss_ratio_ci95: tuple[float, float] = (math.nan, math.nan)
    kid: float = math.nan
    kid_std: float = math.nan
    unet_evaluations: float = math.nan
    seconds: float = math.nan
    changed: float = math.nan


@dataclass(frozen=True)
class HeadlineRow:
    """One checkpoint under one mitigation, attacked within one radius.

    Attributes:
        checkpoint: Name of the checkpoint.
        mitigation: Label of the mitigation.
        norm: Norm of the attack's radius.
        eps: Its radius, None for no limit.
        steps: Most attack steps that were measured; 0 where no attack was run.
        prompt_vm: Suspected images, from their prompts.
        prompt_tm: Template copies, from their prompts.
        prompt_control: Controls, from their prompts.
        attacks: The row under the attack, by initial point.
        cost: What the mitigation costs.
        published: What the paper gives for the row.
        against_none: Suspected images from their prompts, compared with no mitigation.
        against_none_holm: Its p-value corrected for the rows of the checkpoint; NaN without one.
        invalid: Names of what makes its audits invalid; empty where they are valid.
    """

    checkpoint: str
    mitigation: str
    norm: Norm
    eps: float | None
    steps: int
    prompt_vm: Cell | None
    prompt_tm: Cell | None
    prompt_control: Cell | None
    attacks: tuple[Attacked, ...]
    cost: UtilityCost
    published: Published | None
    against_none: Paired | None = None
    against_none_holm: float = math.nan
    invalid: tuple[str, ...] = ()

    @property
    def main(self) -> Attacked | None:
        """The attack from the first initial point, the prompt's where it was run."""
        return self.attacks[0] if self.attacks else None


def headline_rows(comparison: Comparison) -> tuple[HeadlineRow, ...]:
    """Draw up the table.

    Args:
        comparison: Audits that belong together.
    """
    rows: list[HeadlineRow] = []
    for checkpoint in comparison.calibrations:
        own = [entry for entry in comparison.entries if entry.checkpoint == checkpoint]
        base = next(entry for entry in own if entry.mitigation == BASELINE)
        rows += _corrected([row for entry in own for row in _rows(entry, base)])
    return tuple(rows)


def _rows(entry: Entry, base: Entry) -> Iterator[HeadlineRow]:
    budgets = {c.condition.budget for c in entry.cells if c.condition.attack == "dori"}
    radii = sorted({(b.norm, b.eps) for b in budgets}, key=_by_width)
    for norm, eps in radii or [("none", None)]:
        steps = max((b.steps for b in budgets if (b.norm, b.eps) == (norm, eps)), default=0)
        conditions = {
            init: condition
            for init in INITS
            for condition in (c.condition for c in entry.cells)
            if condition.init == init
            and (condition.budget.norm, condition.budget.eps) == (norm, eps)
            and condition.budget.steps == steps
        }
        yield HeadlineRow(
            checkpoint=entry.checkpoint,
            mitigation=entry.label,
            norm=norm,
            eps=eps,
            steps=steps,
            prompt_vm=_cell(entry, "vm", _PROMPT),
            prompt_tm=_cell(entry, "tm", _PROMPT),
            prompt_control=_cell(entry, "control", _PROMPT),
            attacks=tuple(_attacked(entry, base, i, c) for i, c in conditions.items()),
            cost=_utility_cost(entry),
            published=_published(entry) if norm == "none" else None,  # the paper has no radius
            against_none=_against(base, entry, _PROMPT, _PROMPT) if entry is not base else None,
            invalid=tuple(flag.name for flag in entry.invalid),
        )


def _published(entry: Entry) -> Published | None:
    """What the paper gives for a preset; nothing where its settings were changed."""
    if entry.label != entry.mitigation:
        return None
    return published_for(entry.mitigation, checkpoint=entry.checkpoint)


def _by_width(radius: tuple[Norm, float | None]) -> tuple[bool, str, float]:
    norm, eps = radius
    return norm == "none", norm, eps or 0.0


def _cell(entry: Entry, kind: Kind, condition: Condition) -> Cell | None:
    cell = find_cell(entry.cells, kind=kind, condition=condition)
    return cell if cell is not None and cell.n + cell.failed > 0 else None


def _attacked(entry: Entry, base: Entry, init: Init, condition: Condition) -> Attacked:
    return Attacked(
        init=init,
        vm=_cell(entry, "vm", condition),
        tm=_cell(entry, "tm", condition),
        control=_cell(entry, "control", condition),
        against_none=_against(base, entry, condition, condition) if entry is not base else None,
        against_prompt=_against(entry, entry, _PROMPT, condition),
    )


def _against(first: Entry, second: Entry, before: Condition, after: Condition) -> Paired | None:
    one, other = first.reproduced.get((before, "vm")), second.reproduced.get((after, "vm"))
    return paired(one, other) if one is not None and other is not None else None


def _corrected(rows: Sequence[HeadlineRow]) -> list[HeadlineRow]:
    """Correct the comparisons with no mitigation, one family per condition."""
    families: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        # the prompts of a mitigation are measured once, however many radii it is attacked in
        if row.against_none is not None:
            families.setdefault(("prompt",), {})[row.mitigation] = row.against_none.p
        for attack in row.attacks:
            if attack.against_none is not None:
                family = (row.norm, row.eps, attack.init)
                families.setdefault(family, {})[row.mitigation] = attack.against_none.p
    corrected = {
        family: dict(zip(values, holm(list(values.values())), strict=True))
        for family, values in families.items()
    }

    def look_up(row: HeadlineRow, *family: Any) -> float:
        return corrected.get(family, {}).get(row.mitigation, math.nan)

    return [
        replace(
            row,
            against_none_holm=look_up(row, "prompt"),
            attacks=tuple(
                replace(a, against_none_holm=look_up(row, row.norm, row.eps, a.init))
                for a in row.attacks
            ),
        )
        for row in rows
    ]


def _utility_cost(entry: Entry) -> UtilityCost:
    loss = entry.utility.denoising_loss if entry.utility else None
    kid = entry.utility.ordinary.kid if entry.utility and entry.utility.ordinary else None
    spent = entry.edit.cost if entry.edit else {}
    counts = entry.edit.counts if entry.edit else {}
    nothing = UtilityCost()
    return UtilityCost(
        loss_ratio=loss.ratio if loss else math.nan,
        loss_ratio_ci95=loss.ratio_ci95 if loss else nothing.loss_ratio_ci95,
        kid=kid.mean if kid else math.nan,
        kid_std=kid.std if kid else math.nan,
        unet_evaluations=float(spent.get("unet_evaluations", math.nan)),
        seconds=float(spent.get("seconds", math.nan)),
        changed=float(sum(counts.values())) if counts else math.nan,
    )
