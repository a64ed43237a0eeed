"""What an audit tells the loggers of its run.

Curves: ``attack/loss/{init}/{kind}`` against ``attack/step``, and
``audit/memorization_rate/{init}/{kind}``, its interval and ``audit/similarity/...`` against
``audit/steps``, where 0 steps are the prompts as they are. One grid of pictures for each start,
``pictures/{init}``; one table, ``audit/pairs``; and the numbers that runs are compared by,
``final/...`` of ``_audit_numbers``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from dori_lightning.attacks.embedding_attack import Conditioning
from dori_lightning.locality.estimates import Rate
from dori_lightning.locality.layers import WeightFindings
from dori_lightning.metrics.replication import (
    find_cell,
    per_pair,
)
from dori_lightning.mitigations.base import EditResult
from dori_lightning.report.images import attack_grid, thumbnail
from dori_lightning.report.locality import LocalityReport
from dori_lightning.report.record import AuditReport, Disclosure
from dori_lightning.report.words import condition_words
from dori_lightning.tracking import Tracker
from dori_lightning.types import INITS, KINDS, Condition, Outcome

if TYPE_CHECKING:
    from dori_lightning.locality.study import Transfers


# -------- audit_gallery
# An audit's pictures and pairs as loggers show them: a grid for each start, and one table.

COLUMNS = (
    "mitigation", "pair", "kind", "prompt", "repeats", "attack", "init", "steps", "restart",
    "status", "similarity", "reproduced", "diversity", "lpips", "alignment", "loss_first",
    "loss_last", "displacement", "embedding", "picture",
)  # fmt: skip

_SIDE = 128
_PROMPT = Condition("prompt")


def table_rows(
    report: AuditReport, folder: Path, *, images: Disclosure, max_pairs: int
) -> list[list[Any]]:
    """One row of ``COLUMNS`` for each pair, condition and restart.

    Args:
        report: What was found.
        folder: Run folder; files are named relative to it.
        images: Whether pictures are shown, blurred or left out.
        max_pairs: Pairs with pictures, from their prompts and the attack that the verdict names.
    """
    drawn = {_PROMPT, report.headline_condition}
    pictured = {*list(dict.fromkeys(o.pair.id for o in report.outcomes))[:max_pairs]}
    groups: Sequence[tuple[str, Sequence[Outcome]]] = (
        (report.mitigation, report.outcomes), ("none", report.baseline),
    )  # fmt: skip
    return [
        [
            *_row(report, mitigation, outcome, folder),
            _closest(report, outcome, images)
            if outcome.condition in drawn and outcome.pair.id in pictured
            else None,
        ]
        for mitigation, outcomes in groups
        for outcome in outcomes
    ]


def _row(report: AuditReport, mitigation: str, outcome: Outcome, folder: Path) -> list[Any]:
    pair, condition, rule = outcome.pair, outcome.condition, report.calibration
    similarity = float(per_pair(outcome.similarity[rule.descriptor], report.aggregation))
    embedding = (
        folder / "attacks" / f"{condition.init}" / f"{pair.id}.r{outcome.restart}.safetensors"
    )
    attacked = condition.attack == "dori"
    return [
        mitigation, pair.id, pair.kind, pair.prompt, float(pair.repeats), condition.attack,
        condition.init or "", condition.budget.steps, outcome.restart, outcome.status,
        similarity, bool(similarity > rule.threshold), outcome.diversity,
        _mean(outcome.lpips), _mean(outcome.alignment), _number(outcome.loss_first),
        _number(outcome.loss_last), _number(outcome.displacement),
        embedding.relative_to(folder).as_posix() if attacked else "",
    ]  # fmt: skip


def _closest(report: AuditReport, outcome: Outcome, images: Disclosure) -> Image.Image | None:
    """The picture of an outcome that is closest to the original."""
    values = [float(v) for v in outcome.similarity[report.calibration.descriptor]]
    if not outcome.images or all(math.isnan(value) for value in values):
        return None
    best = max(range(len(values)), key=lambda k: (not math.isnan(values[k]), values[k]))
    return thumbnail(outcome.images[best], images, side=_SIDE)


def _mean(values: Any) -> float:
    return math.nan if values is None else float(values.mean())


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


# -------- audit_numbers
# The numbers that audits are compared and sorted by.


def objective(report: AuditReport) -> float | None:
    """Memorization rate of vm pairs under the strongest condition measured.

    None without any, and where the audit is invalid: a sweeper would take what breaks the attack
    for the best mitigation.
    """
    if report.invalid:
        return None
    rates = (cell.mr for cell in report.cells if cell.kind == "vm" and cell.n)
    return max(rates, default=None)


def final_numbers(report: AuditReport, found: EditResult) -> dict[str, float | None]:
    """What runs are compared and sorted by; None where it was not measured.

    ``final/objective`` is what a sweeper minimises; ``mr`` are memorization rates, ``attack`` is
    the condition that the verdict speaks of, ``before`` the checkpoint without the mitigation.
    """
    own, attack = report.own_cells, report.headline_condition
    before = [cell for cell in report.cells if cell.mitigation == "none" and report.baseline]
    numbers: dict[str, float | None] = {"final/objective": objective(report)}
    for what, cells, condition in (
        ("prompt", own, _PROMPT), ("attack", own, attack), ("before", before, _PROMPT),
    ):  # fmt: skip
        for kind in KINDS:
            cell = find_cell(cells, kind=kind, condition=condition)
            if cell is not None and cell.n:
                numbers[f"final/mr_{what}_{kind}"] = cell.mr
                numbers[f"final/similarity_{what}_{kind}"] = cell.similarity_median
    utility, budget, cost = report.utility, report.recommended_budget, found.edit.origin
    loss = utility.denoising_loss if utility else None
    kid = utility.ordinary.kid if utility and utility.ordinary else None
    return {
        **numbers,
        "final/attack_steps": attack.budget.steps if attack else None,
        "final/recommended_steps": budget.steps if budget else None,
        "final/invalid": float(bool(report.invalid)),
        "final/failed": sum(cell.failed for cell in own),
        "final/threshold": report.calibration.threshold,
        "final/auc": report.calibration.auc,
        "final/loss_ratio": loss.ratio if loss else None,
        "final/kid": kid.mean if kid else None,
        "final/edit_weights": sum(found.edit.counts().values()),
        "final/edit_unet_evaluations": cost.cost.get("unet_evaluations") if cost else None,
        "final/unet_evaluations": report.provenance.unet_evaluations,
        "final/seconds": report.provenance.wall_seconds,
    }


# -------- audit_tracking

_RECORD = (
    "report.json", "pairs.parquet", "report.html", "edit.json", "method.json", "utility.json",
)  # fmt: skip


def track_attack(tracker: Tracker, found: Sequence[Conditioning]) -> None:
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
    found: EditResult,
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
        attacks = [c.condition for c in report.cells if c.condition.init == init]
        if attacks:
            attack = max(attacks, key=lambda condition: condition.budget.steps)
            tracker.pictures(
                f"pictures/{init}",
                attack_grid(report, attack, images=images),
                caption=f"{report.checkpoint}, mitigation {report.mitigation}; "
                f"{condition_words(attack)}. Below an image: its similarity to the original; "
                f"framed: above the threshold {report.calibration.threshold:.2f}",
            )
    rows = table_rows(report, folder, images=images, max_pairs=max_pairs)
    tracker.table("audit/pairs", COLUMNS, rows)
    _track_files(tracker, report, found, folder)
    tracker.summary({**final_numbers(report, found), "verdict": report.verdict})


def _track_files(tracker: Tracker, report: AuditReport, found: EditResult, folder: Path) -> None:
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


# -------- locality_tracking
# What a locality run tells the loggers.
#
# Curves: ``locality/rate/{start}/{held}`` and its interval against ``locality/steps``, and
# ``locality/line_rate/{toward}`` against ``locality/percent_of_line``. Tables:
# ``locality/transfers`` (success on other models) and ``locality/weights`` (agreement of the
# selected sets by layer). Every figure, and the record with its page as an artifact. No picture of
# an image is among them.

_TRANSFERS = ("model", "searched", "images", "start", "hits", "asked", "rate", "low", "high")
_WEIGHTS = (
    "method", "parameter", "group", "sets", "smallest", "largest", "iou", "iou_between",
    "iou_nonempty", "chance", "both_empty",
)  # fmt: skip


def track_locality(
    tracker: Tracker, report: LocalityReport, folder: Path, *, objective: float | None
) -> None:
    """Log what a locality run found, once, at its end.

    Args:
        tracker: Loggers of the run.
        report: What was found; its files are in ``folder`` already.
        folder: Run folder.
        objective: What sweepers compare runs by; None where there is nothing to compare.
    """
    if not tracker.loggers:
        return
    figures = sorted(folder.glob("figures/locality_*.png"))
    if report.at_large is not None:
        tracker.scalars(_by_steps(report.at_large), step_metric="locality/steps")
        tracker.scalars(_by_place(report.at_large), step_metric="locality/percent_of_line")
        tracker.table("locality/transfers", _TRANSFERS, _transfers(report.at_large))
    if report.weights is not None:
        tracker.table("locality/weights", _WEIGHTS, _selections(report.weights))
    for path in figures:
        with Image.open(path) as figure:
            tracker.pictures(f"locality/{path.stem}", figure, caption=path.stem)
    tracker.summary({"final/objective": objective})
    found = [*folder.glob("locality.*"), *folder.glob("figures/*")]
    tracker.artifact(
        f"{report.checkpoint}-{report.mitigation}-locality",
        kind="report",
        files={path.relative_to(folder).as_posix(): path for path in found},
    )


def _by_steps(found: Transfers) -> Iterator[tuple[int, Mapping[str, float]]]:
    rows: dict[int, dict[str, float]] = {}
    for point in found.budget:
        if point.rate.n:
            row = rows.setdefault(point.steps, {})
            row.update(_with_interval("rate", f"{point.start}/{point.held}", point.rate))
    yield from sorted(rows.items())


def _by_place(found: Transfers) -> Iterator[tuple[int, Mapping[str, float]]]:
    rows: dict[int, dict[str, float]] = {}
    for point in found.lines:
        if point.rate.n:
            row = rows.setdefault(round(100 * point.place), {})
            row.update(_with_interval("line_rate", point.toward, point.rate))
    yield from sorted(rows.items())


def _with_interval(name: str, where: str, rate: Rate) -> dict[str, float]:
    low, high = rate.ci95
    return {
        f"locality/{name}/{where}": rate.rate,
        f"locality/{name}_low/{where}": low,
        f"locality/{name}_high/{where}": high,
    }


def _transfers(found: Transfers) -> list[list[object]]:
    return [
        [
            own.model, own.searched, own.held, own.start, own.rate.hits, own.rate.n,
            *map(_finite, (own.rate.rate, *own.rate.ci95)),
        ]
        for own in found.transfers
    ]  # fmt: skip


def _selections(found: WeightFindings) -> list[list[object]]:
    return [
        [
            own.method, own.parameter, own.group, own.count, own.smallest, own.largest,
            *map(_finite, (own.iou.value, own.iou_between.value, own.iou_nonempty, own.chance)),
            own.both_empty,
        ]
        for own in found.layers
    ]  # fmt: skip


def _finite(value: float) -> float | None:
    """A number, or None where there was nothing to average."""
    return value if math.isfinite(value) else None
