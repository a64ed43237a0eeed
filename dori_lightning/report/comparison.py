"""Many audits as one comparison: the rows of the headline table, under the same thresholds.

A mitigation may not move the threshold that it is judged by. Each audit calibrates its threshold
on the images of its own model; in a comparison all audits of a checkpoint are counted again, from
the similarities they kept, under the threshold of the audit without mitigation. Audits that differ
in weights, pairs, sampling, attack or measure are refused; what is missing is named.

Reference: the main table of Finding DoRI (ICML 2026), https://arxiv.org/abs/2507.16880
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter

from dori_lightning.metrics.replication import (
    PairResult,
    find_cell,
    headline_condition,
    pair_results,
    prompt_condition,
)
from dori_lightning.metrics.replication import cells as cells_of
from dori_lightning.metrics.statistics import Paired, holm, paired
from dori_lightning.metrics.utility import Utility
from dori_lightning.report.record import EditRecord, Flag, Run
from dori_lightning.report.words import condition_words
from dori_lightning.runtime.artifacts import leaves
from dori_lightning.types import (
    BASELINE,
    INITS,
    KINDS,
    Budget,
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
    "sampling.distilled_guidance",
    "sampling.images_per_pair",
    "sampling.seed",
    "attack.lr",
    "attack.noise_batch",
    "attack.restarts",
    "metrics.decider",
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


def _differences(run: Run, base: Run) -> Iterator[str]:
    """How audits of one checkpoint differ in weights, pairs, sampling, attack or measure."""
    here, there = run.report, base.report
    own, rule = here.calibration, there.calibration
    if here.provenance.fingerprint != there.provenance.fingerprint:
        yield f"checkpoint {here.provenance.fingerprint}, there {there.provenance.fingerprint}"
    yield from _pair_differences(run, base)
    decider = f"metrics.descriptors.{rule.descriptor}"
    settings = {
        f"{decider}.{key}"
        for one in (run, base)
        for key, _ in leaves(_look_up(one, decider))
        if key not in ("", "threshold")
    }
    for key in (*_SHARED, *sorted(settings)):
        absent = _ABSENT if key in _SHARED else None
        if (now := _look_up(run, key, absent)) != (then := _look_up(base, key, absent)):
            yield f"{key} is {now}, there {then}"
    if any(rule.descriptor not in outcome.similarity for outcome in here.outcomes):
        yield f"not measured by {rule.descriptor}, which decides there"
    # what decides which attacks were stopped cannot be decided again under another rule
    stops, stopped = (_look_up(one, "attack.early_stop") is True for one in (run, base))
    for key in ("one_image", "futility"):
        now, then = (_look_up(one, f"attack.{key}", None) or None for one in (run, base))
        if now != then:
            yield f"attack.{key} is {now}, there {then}"
    if stops != stopped:
        yield f"attack.early_stop is {stops}, there {stopped}"
    elif stops:
        steps, others = map(_stops, (run, base))
        if steps != others:
            yield f"attacks may stop after {steps} steps, there after {others}"
        same_threshold = math.isclose(own.threshold, rule.threshold, abs_tol=1e-9)
        if own.descriptor != rule.descriptor or not same_threshold:
            yield (
                f"attacks were stopped by {own.descriptor} above {own.threshold:.3f}, there by "
                f"{rule.descriptor} above {rule.threshold:.3f}"
            )


def _stops(run: Run) -> list[int]:
    """Steps after which a run's attacks could be stopped."""
    keys = ("attack.snapshots", "attack.looks")
    return sorted({step for key in keys for step in _look_up(run, key, None) or ()})


def _pair_differences(run: Run, base: Run) -> Iterator[str]:
    here, there = (
        {
            pair.id: (pair.kind, pair.prompt, report.provenance.image_hashes.get(pair.id))
            for pair in (outcome.pair for outcome in report.outcomes)
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
        settings = [dict(leaves(_look_up(run, "mitigation"))) for run in group]
        keys = list(dict.fromkeys(key for chosen in settings for key in chosen if key))
        differing = [
            key for key in keys if len({json.dumps(chosen.get(key)) for chosen in settings}) > 1
        ]
        for run, chosen in zip(group, settings, strict=True):
            words = ", ".join(f"{key}={chosen.get(key)}" for key in differing)
            labels[run.folder] = f"{name}[{words}]" if words else name
    return labels


def _look_up(run: Run, key: str, absent: str | None = _ABSENT) -> Any:
    """A setting of a run by its dotted name."""
    config: Any = run.report.provenance.config
    for part in key.split("."):
        config = config.get(part, absent) if isinstance(config, Mapping) else absent
    return config


@dataclass(frozen=True)
class Entry:
    """One checkpoint under one mitigation.

    Attributes:
        label: How the table calls the mitigation: its name, with the settings in which runs of
            one name differ.
        outcomes: What they measured, each condition once.
        cells: Its cells under the checkpoint's one threshold; their mitigation is ``label``.
        pair_results: One result per pair and condition under that threshold.
        edit: Its edit, of the run that made it where there is one; None where none is recorded.
    """

    label: str
    runs: tuple[Run, ...]
    outcomes: tuple[Outcome, ...]
    cells: tuple[Cell, ...]
    pair_results: tuple[PairResult, ...]
    edit: EditRecord | None

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint."""
        return self.runs[0].checkpoint

    @property
    def mitigation(self) -> str:
        """Name of the mitigation."""
        return self.runs[0].mitigation

    @property
    def spoken(self) -> tuple[Condition | None, Condition | None]:
        """The prompts as they are, and the attack to show; None where they were not run."""
        return prompt_condition(self.cells), headline_condition(self.cells)

    @cached_property
    def reproduced(self) -> dict[tuple[Condition, Kind], dict[str, bool | None]]:
        """Condition and kind to pair id to whether it was reproduced, None without a result."""
        found: dict[tuple[Condition, Kind], dict[str, bool | None]] = {}
        for result in self.pair_results:
            of_kind = found.setdefault((result.condition, result.pair.kind), {})
            of_kind[result.pair.id] = result.reproduced
        return found

    @property
    def utility(self) -> Utility | None:
        """What the mitigation costs in images; None where it was not measured."""
        return next((run.report.utility for run in self.runs if run.report.utility), None)

    @property
    def invalid(self) -> list[Flag]:
        """Flags that make its audits invalid, each name once."""
        flags = (flag for run in self.runs for flag in run.report.flags)
        return list({flag.name: flag for flag in flags if flag.severity == "invalid"}.values())


def _entry(label: str, runs: Sequence[Run], rule: Calibration) -> tuple[Entry, list[str]]:
    """Join the runs of one row.

    Returns:
        The row, and what a reader must know of how it was joined.

    Raises:
        InputError: Two runs measured the same attack, or they carry different edits.
    """
    notes: list[str] = []
    measured: dict[Condition, tuple[Run, list[Outcome]]] = {}
    for run in runs:
        found: dict[Condition, list[Outcome]] = {}
        for outcome in run.report.outcomes:
            found.setdefault(outcome.condition, []).append(outcome)
        for condition, outcomes in found.items():
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
    edits = [run.edit for run in runs if run.edit is not None]
    if len({edit.identity for edit in edits}) > 1:
        raise InputError(
            f"the runs of {label} carry different edits: "
            f"{', '.join(str(run.folder) for run in runs)}\n"
            f"  where: task.runs\n"
            f"  fix:   run them again with the same pairs, corpus and seed"
        )
    everything = tuple(outcome for _, outcomes in measured.values() for outcome in outcomes)
    entry = Entry(
        label=label,
        runs=tuple(runs),
        outcomes=everything,
        cells=cells_of(everything, rule, checkpoint=runs[0].checkpoint, mitigation=label),
        pair_results=pair_results(everything, rule),
        edit=next((edit for edit in edits if edit.made), edits[0] if edits else None),
    )
    return entry, notes


def _repeated(
    label: str,
    kept: tuple[Run, list[Outcome]],
    other: tuple[Run, list[Outcome]],
    rule: Calibration,
) -> Iterator[str]:
    """Compare two measurements of the same prompts: jobs of a grid repeat them."""
    first, second = (
        {result.pair.id: result.statistic for result in pair_results(outcomes, rule)}
        for _, outcomes in (kept, other)
    )
    gaps = [
        abs(value - second[name])
        for name, value in first.items()
        if not np.isclose(value, second[name], rtol=0, atol=1e-6, equal_nan=True)
    ]
    if gaps:
        gap = "not finite" if any(math.isnan(g) for g in gaps) else f"up to {max(gaps):.3g} apart"
        yield (
            f"{kept[0].checkpoint}, {label}: the prompts were measured in {kept[0].folder.name} "
            f"and in {other[0].folder.name}, with similarities {gap}; the first is shown."
        )


@dataclass(frozen=True)
class Comparison:
    """Audits that belong together.

    Attributes:
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
        problems = [f"  {run.folder.name}: {x}" for run in own for x in _differences(run, base)]
        if problems:
            listed = "\n".join(problems)
            raise InputError(
                f"these runs do not belong into one table with {base.folder.name}:\n{listed}\n"
                f"  fix:   make a table of each group by itself: task.runs=[FOLDER,FOLDER]; "
                f"checkpoints of one table need a name each: checkpoint.name=NAME"
            )
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
    """Say which threshold all rows share, and which the runs had by themselves."""
    set_by = (
        "fixed beforehand" if rule.rule == "fixed" else "calibrated on the run without mitigation"
    )
    rules = [run.report.calibration for run in runs]
    own = dict.fromkeys(f"{own.threshold:.3f} by {own.descriptor}" for own in rules)
    others = f"; by themselves the runs had {', '.join(own)}" if len(own) > 1 else ""
    shared = "each image's own threshold, median" if rule.scales else "one threshold,"
    return (
        f"{checkpoint}: all rows are counted under {shared} {rule.threshold:.3f} by "
        f"{rule.descriptor}, {set_by}{others}."
    )


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

SOURCES: dict[Source, str] = {
    "C": "the authors' page",
    "S": "notes or reviews of the paper, written by others",
    "F": "read off a figure, approximate",
}
"""Where a published number was read."""


@dataclass(frozen=True)
class Figure:
    """One published number.

    Attributes:
        rate: Memorization rate in [0, 1].
        source: Where it was read, a key of `SOURCES`.
    """

    rate: float
    source: Source


@dataclass(frozen=True, kw_only=True)
class Published:
    """What Finding DoRI (ICML 2026) gives for one row; None where it gives nothing.

    Its numbers (``published.json``) were measured on Stable Diffusion 1.4 and 2.x, on verbatim
    memorized LAION images, by SSCD above 0.7: another model, list and descriptor than the embedded
    benchmark's. They show in which direction to look, they are no target.

    Attributes:
        mitigation: Name of the mitigation, or its beginning, up to an underscore.
        exact: Whether variants, whose names only begin so, are not the paper's.
        checkpoints: Beginning of the names of the checkpoints that it is for.
        row: What the paper calls it.
        model: The paper's model.
        prompt: Verbatim memorized images, from their prompts.
        attacked: The same, by the attack.
    """

    mitigation: str
    checkpoints: str
    row: str
    model: str
    exact: bool = False
    prompt: Figure | None = None
    attacked: Figure | None = None


@cache
def _published() -> tuple[Published, ...]:
    path = Path(__file__).with_name("published.json")
    return TypeAdapter(tuple[Published, ...]).validate_json(path.read_bytes())


def published_for(mitigation: str, *, checkpoint: str) -> Published | None:
    """Find what the paper gives for a row: the longest beginning of the mitigation's name decides.

    Args:
        mitigation: Name of the mitigation, such as ``nemo`` or ``wanda_10``.
        checkpoint: Name of the checkpoint; names that begin with ``sd2`` get the numbers of
            Stable Diffusion 2, all others those of 1.4.
    """
    model = "sd2" if checkpoint.startswith("sd2") else ""
    fitting = [
        row
        for row in _published()
        if row.checkpoints == model
        and (
            row.mitigation == mitigation
            or (not row.exact and mitigation.startswith(f"{row.mitigation}_"))
        )
    ]
    return max(fitting, key=lambda row: len(row.mitigation), default=None)


_Radius = tuple[Norm, float | None]
Other = Literal["none", "prompt"]
OTHERS: tuple[Other, ...] = ("none", "prompt")


@dataclass(frozen=True, kw_only=True)
class HeadlineRow:
    """One checkpoint under one mitigation, attacked within one radius. Costs not measured are NaN.

    Attributes:
        eps: Its radius, None for no limit.
        steps: Most attack steps that were measured; 0 where no attack was run.
        cells: Kind and initial point to the cell at these steps; None stands for the prompts.
        tests: Initial point to the suspected images from there, compared with ``none``, the same
            without mitigation, or with ``prompt``, the row's own prompts.
        loss_ratio: Denoising loss on ordinary prompts, relative to the unmitigated model.
        loss_ratio_ci95: Its interval.
        kid: Kernel distance of its images to the unmitigated model's.
        kid_std: Its spread over subsets.
        unet_evaluations: UNet evaluations that finding the edit took.
        work: Rows through each part of the model in all, edit included, by name; of the first
            process of each run.
        seconds: Seconds that finding the edit took.
        weights_changed: Weights that have another value under the edit (``Edit.changed``).
        published: What the paper gives for the row.
        invalid: Names of what makes its audits invalid; empty where they are valid.
    """

    checkpoint: str
    mitigation: str
    norm: Norm
    eps: float | None
    steps: int
    cells: Mapping[tuple[Kind, Init | None], Cell]
    tests: Mapping[tuple[Init | None, Other], Paired]
    loss_ratio: float = math.nan
    loss_ratio_ci95: tuple[float, float] = (math.nan, math.nan)
    kid: float = math.nan
    kid_std: float = math.nan
    unet_evaluations: float = math.nan
    work: Mapping[str, int] = field(default_factory=dict)
    seconds: float = math.nan
    weights_changed: float = math.nan
    published: Published | None = None
    invalid: tuple[str, ...] = ()

    @property
    def inits(self) -> tuple[Init, ...]:
        """Initial points that were attacked from, the prompt's first."""
        return tuple(init for init in INITS if any(start == init for _, start in self.cells))

    def prompted(self, kind: Kind) -> Cell | None:
        """The cell of a kind from its prompts."""
        return self.cells.get((kind, None))

    def attacked(self, kind: Kind) -> Cell | None:
        """The cell of a kind under the attack from the first initial point."""
        return self.cells.get((kind, self.inits[0])) if self.inits else None


def headline_rows(comparison: Comparison) -> tuple[HeadlineRow, ...]:
    """Draw up the table."""
    rows: list[HeadlineRow] = []
    for checkpoint in comparison.calibrations:
        own = [entry for entry in comparison.entries if entry.checkpoint == checkpoint]
        base = next(entry for entry in own if entry.mitigation == BASELINE)
        rows += _corrected([row for entry in own for row in _rows(entry, base)])
    return tuple(rows)


def _rows(entry: Entry, base: Entry) -> Iterator[HeadlineRow]:
    """The rows of a mitigation, from the narrowest radius to none."""
    budgets = {c.condition.budget for c in entry.cells if c.condition.attack == "dori"}
    radii: set[_Radius] = {(b.norm, b.eps) for b in budgets} or {("none", None)}
    prompt = Condition("prompt")
    for norm, eps in sorted(radii, key=_by_width):
        steps = max((b.steps for b in budgets if (b.norm, b.eps) == (norm, eps)), default=0)
        conditions: dict[Init | None, Condition] = {None: prompt}
        conditions |= {init: Condition("dori", init, Budget(norm, eps, steps)) for init in INITS}
        cells = {
            (kind, init): cell
            for init, condition in conditions.items()
            for kind in KINDS
            if (cell := find_cell(entry.cells, kind=kind, condition=condition)) is not None
        }
        own = {i: entry.reproduced.get((c, "vm"), {}) for i, c in conditions.items()}
        others = {i: base.reproduced.get((c, "vm"), {}) for i, c in conditions.items()}
        tests: dict[tuple[Init | None, Other], Paired | None] = {}
        for init, results in own.items():
            tests[init, "none"] = paired(others[init], results) if entry is not base else None
            tests[init, "prompt"] = paired(own[None], results) if init is not None else None
        preset = entry.label == entry.mitigation and norm == "none"  # the paper has no radius
        yield HeadlineRow(
            checkpoint=entry.checkpoint,
            mitigation=entry.label,
            norm=norm,
            eps=eps,
            steps=steps,
            cells=cells,
            tests={key: test for key, test in tests.items() if test is not None},
            published=(
                published_for(entry.mitigation, checkpoint=entry.checkpoint) if preset else None
            ),
            invalid=tuple(flag.name for flag in entry.invalid),
            **_costs(entry),
        )


def _by_width(radius: _Radius) -> tuple[bool, str, float]:
    norm, eps = radius
    return norm == "none", norm, eps or 0.0


def _costs(entry: Entry) -> dict[str, Any]:
    """What a mitigation costs, where it was measured."""
    utility, edit = entry.utility, entry.edit
    loss = utility.denoising_loss if utility else None
    kid = utility.ordinary.kid if utility and utility.ordinary else None
    names = ("unet_evaluations", "seconds")
    found: dict[str, Any] = {
        name: float(edit.cost[name]) for name in names if edit and name in edit.cost
    }
    origins = [run.report.provenance for run in entry.runs]
    work = Counter({"unet_evaluations": sum(origin.unet_evaluations for origin in origins)})
    for origin in origins:
        work.update(asdict(origin.coder_rows) if origin.coder_rows else {})
    found["work"] = work
    if loss:
        found |= {"loss_ratio": loss.ratio, "loss_ratio_ci95": loss.ratio_ci95}
    if kid:
        found |= {"kid": kid.mean, "kid_std": kid.std}
    if edit and edit.changed_weights is not None:
        found["weights_changed"] = float(edit.changed_weights)
    return found


def _corrected(rows: Sequence[HeadlineRow]) -> list[HeadlineRow]:
    """Correct the comparisons with no mitigation, one family per condition."""

    def family(row: HeadlineRow, init: Init | None) -> tuple[Any, ...]:
        # the prompts of a mitigation are measured once, however many radii it is attacked in
        return (None,) if init is None else (init, row.norm, row.eps)

    families: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        for (init, other), test in row.tests.items():
            if other == "none":
                families[family(row, init)][row.mitigation] = test.p
    corrected = {
        name: dict(zip(values, holm(list(values.values())), strict=True))
        for name, values in families.items()
    }
    return [
        replace(
            row,
            tests={
                (init, other): replace(test, p_holm=corrected[family(row, init)][row.mitigation])
                if other == "none"
                else test
                for (init, other), test in row.tests.items()
            },
        )
        for row in rows
    ]
