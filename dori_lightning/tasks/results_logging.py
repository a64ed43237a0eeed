"""What an audit and a locality run log: losses as the attack goes on, all else at the end.

An audit: curves ``attack/loss/{init}/{kind}`` against ``attack/step``, and
``audit/memorization_rate/{init}/{kind}``, its interval and ``audit/similarity/...`` against
``audit/steps``, where 0 steps are the prompts as they are. One grid of images for each start,
``pictures/{init}``; one table, ``audit/pairs``; the numbers that runs are compared by,
``final/...``; embeddings, edit and report as artifacts.

A locality run: curves ``locality/rate/{start}/{held}`` and its interval against
``locality/steps``, and ``locality/line_rate/{toward}`` against ``locality/percent_of_line``;
every table and figure of its page, and the record with its page as an artifact. No image of a
pair is among them.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from dori_lightning.attacks.embedding_attack import Conditioning
from dori_lightning.metrics.replication import find_cell
from dori_lightning.mitigations.base import EditResult
from dori_lightning.report.certificate import Certificate, door_table, level_table
from dori_lightning.report.images import attack_grid, thumbnail
from dori_lightning.report.locality import LocalityReport, number_tables
from dori_lightning.report.record import CERTIFICATE_FILE, AuditReport, Disclosure
from dori_lightning.report.words import condition_words
from dori_lightning.tracking import Tracker
from dori_lightning.types import BASELINE, INITS, KINDS, Condition

_SIDE = 128  # pixels a side of an image in a table
_PROMPT = Condition("prompt")

_RECORD = (
    "report.json", "pairs.parquet", "report.html", "edit.json", "method.json", "utility.json",
)  # fmt: skip


def track_attack(tracker: Tracker, found: Sequence[Conditioning]) -> None:
    """Log the mean loss of the attack from one initial point and restart, by kind and step.

    Args:
        tracker: Loggers of the run.
        found: Embeddings that the attack found; of each pair, the one with the most steps counts.
    """
    init, restart = found[0].condition.init, found[0].restart
    where = f"{init}" if restart == 0 else f"{init}_r{restart}"
    curves: dict[str, torch.Tensor] = {}
    for kind in KINDS:
        measured = [
            (conditioning.pair.id, conditioning.losses)
            for conditioning in found
            if conditioning.pair.kind == kind and conditioning.losses is not None
        ]
        longest = dict(sorted(measured, key=lambda item: len(item[1])))
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
    changed: int | None,
    images: Disclosure,
    max_pairs: int,
) -> None:
    """Log the results of an audit.

    Args:
        tracker: Loggers of the run.
        report: The results; their files are in ``folder`` already.
        found: The edit under audit.
        folder: Run folder.
        changed: Weights that have another value under the edit; None as in ``Edit.changed``.
        images: Whether images are shown, blurred or left out.
        max_pairs: Pairs whose images are in the table.
    """
    if not tracker.loggers:  # images are read and scaled for nobody otherwise
        return
    tracker.scalars(
        _by_step(
            (
                cell.condition.budget.steps,
                {
                    **_rate("audit/memorization_rate", where, cell.mr, cell.mr_ci95),
                    f"audit/similarity/{where}": cell.similarity_median,
                },
            )
            for cell in report.own_cells
            if cell.n
            # the attack from the prompt begins at the prompt: 0 steps of the same curve
            for where in [f"{cell.condition.init or 'prompt'}/{cell.kind}"]
        ),
        step_metric="audit/steps",
    )
    for init in INITS:
        attacks = [c.condition for c in report.cells if c.condition.init == init]
        if attacks:
            attack = max(attacks, key=lambda condition: condition.budget.steps)
            tracker.image(
                f"pictures/{init}",
                attack_grid(report, attack, images=images),
                caption=f"{report.checkpoint}, mitigation {report.mitigation}; "
                f"{condition_words(attack)}. Below an image: its similarity to the original; "
                f"framed: above the threshold {report.calibration.threshold:.2f}",
            )
    tracker.table("audit/pairs", _pair_rows(report, images=images, max_pairs=max_pairs))
    _track_files(tracker, report, found, folder)
    tracker.summary({**final_numbers(report, found, changed=changed), "verdict": report.verdict})


def _pair_rows(report: AuditReport, *, images: Disclosure, max_pairs: int) -> list[dict[str, Any]]:
    """One row for each pair and condition; ``pairs.parquet`` has one for each image.

    The first ``max_pairs`` pairs have an image in the rows of their prompts and of the attack that
    the verdict names: the one closest to the original.
    """
    shown = (_PROMPT, report.headline_condition)
    pictured = list(dict.fromkeys(o.pair.id for o in report.outcomes))[:max_pairs]
    rows = []
    for mitigation, results in (
        (report.mitigation, report.pair_results), (BASELINE, report.baseline_results),
    ):  # fmt: skip
        for result in results:
            pair, condition, picture = result.pair, result.condition, None
            if result.picture and condition in shown and pair.id in pictured:
                picture = thumbnail(result.picture, images, side=_SIDE)
            rows.append(
                {
                    "mitigation": mitigation,
                    "pair": pair.id,
                    "kind": pair.kind,
                    "prompt": pair.prompt,
                    "repeats": float(pair.repeats),
                    "attack": condition.attack,
                    "init": condition.init or "",
                    "steps": condition.budget.steps,
                    "status": result.status,
                    "similarity": result.statistic,
                    "reproduced": result.reproduced,
                    "picture": picture,
                }
            )
    return rows


def _track_files(tracker: Tracker, report: AuditReport, found: EditResult, folder: Path) -> None:
    """Log embeddings, edit and report as artifacts, a version of each for the run."""
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


def objective(report: AuditReport) -> float | None:
    """Memorization rate of vm pairs under the strongest condition measured.

    None without vm pairs, and where the audit is invalid: a sweeper would take what breaks the
    attack for the best mitigation.
    """
    if report.invalid:
        return None
    rates = (cell.mr for cell in report.cells if cell.kind == "vm" and cell.n)
    return max(rates, default=None)


def final_numbers(
    report: AuditReport, found: EditResult, *, changed: int | None
) -> dict[str, float | None]:
    """The numbers that runs are compared and sorted by; None where not measured.

    ``final/objective`` is the number that a sweeper minimises; ``mr`` are memorization rates,
    ``attack`` is the condition that the verdict speaks of, ``before`` the checkpoint without the
    mitigation.
    """
    own, attack = report.own_cells, report.headline_condition
    before = [cell for cell in report.cells if cell.mitigation == BASELINE and report.baseline]
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
        "final/edit_weights": changed,
        "final/edit_unet_evaluations": cost.cost.get("unet_evaluations") if cost else None,
        "final/unet_evaluations": report.provenance.unet_evaluations,
        "final/seconds": report.provenance.wall_seconds,
    }


def track_locality(
    tracker: Tracker, report: LocalityReport, folder: Path, *, objective: float | None
) -> None:
    """Log the results of a locality run.

    Args:
        tracker: Loggers of the run.
        report: The results; their files are in ``folder`` already.
        folder: Run folder.
        objective: The number that sweepers compare runs by; None where there is none.
    """
    if not tracker.loggers:
        return
    transfer = report.transfer
    if transfer is not None:
        tracker.scalars(
            _by_step(
                (p.steps, _rate("locality/rate", f"{p.start}/{p.held}", p.rate.rate, p.rate.ci95))
                for p in transfer.budget
                if p.rate.n
            ),
            step_metric="locality/steps",
        )
        tracker.scalars(
            _by_step(
                (
                    round(100 * p.place),
                    _rate("locality/line_rate", p.toward, p.rate.rate, p.rate.ci95),
                )
                for p in transfer.lines
                if p.rate.n
            ),
            step_metric="locality/percent_of_line",
        )
    for table in number_tables(report):
        rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
        tracker.table(f"locality/{table.title.lower().replace(' ', '_')}", rows)
    for path in sorted(folder.glob("figures/locality_*.png")):
        with Image.open(path) as figure:
            tracker.image(f"locality/{path.stem}", figure, caption=path.stem)
    tracker.summary({"final/objective": objective})
    files = [*folder.glob("locality.*"), *folder.glob("figures/*")]
    tracker.artifact(
        f"{report.checkpoint}-{report.mitigation}-locality",
        kind="report",
        files={path.relative_to(folder).as_posix(): path for path in files},
    )


def track_certificate(tracker: Tracker, certificate: Certificate, folder: Path) -> None:
    """Log a certificate: who is not back after how much work, doors, images, and its files.

    Args:
        tracker: Loggers of the run.
        certificate: What was found; its files are in ``folder`` already.
        folder: Run folder.
    """
    if not tracker.loggers:
        return
    curves = [(own.group, own.work, own.share) for own in certificate.survivals]
    tracker.scalars(
        _by_step(
            (work, {f"certify/not_back/{group}": share})
            for group, works, shares in curves
            for work, share in zip(works, shares, strict=True)
        ),
        step_metric="certify/work",
    )
    for name, table in (
        ("doors", door_table(certificate)), ("levels", level_table(certificate)),
    ):  # fmt: skip
        rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
        tracker.table(f"certify/{name}", rows)
    for path in sorted(folder.glob("figures/certificate_*.png")):
        with Image.open(path) as figure:
            tracker.image(f"certify/{path.stem}", figure, caption=path.stem)
    tracker.summary(
        {
            "final/answer": certificate.answer,
            "final/objective": certificate.first_work or certificate.most_work,
            "final/first_work": certificate.first_work,
            "final/most_work": certificate.most_work,
            "final/back": len(certificate.opened),
            "final/held_by_loss": len(certificate.held) if certificate.traces else None,
            "final/planted_found": certificate.planted_found if certificate.planted else None,
            "final/seconds": certificate.provenance.wall_seconds,
        }
    )
    files = [folder / CERTIFICATE_FILE, folder / "certificate.html", *folder.glob("figures/*")]
    tracker.artifact(
        f"{certificate.checkpoint}-{certificate.mitigation}-certificate",
        kind="report",
        files={path.relative_to(folder).as_posix(): path for path in files},
    )


def _by_step(
    points: Iterable[tuple[int, Mapping[str, float]]],
) -> list[tuple[int, Mapping[str, float]]]:
    """Join the metrics of each step, in order."""
    rows: dict[int, dict[str, float]] = {}
    for step, values in points:
        rows.setdefault(step, {}).update(values)
    return sorted(rows.items())


def _rate(name: str, series: str, rate: float, ci95: tuple[float, float]) -> dict[str, float]:
    """A rate and its 95 % interval, as three metrics."""
    return {
        f"{name}/{series}": rate,
        f"{name}_low/{series}": ci95[0],
        f"{name}_high/{series}": ci95[1],
    }
