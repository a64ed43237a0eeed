"""The record of an audit, and the files of a run folder that hold it.

``report.json`` is the contract with other tools; ``pairs.parquet`` has the numbers of every
generated image, so that no mean has to be believed. Both are written and read here, and so are
the files that say what a mitigation costs (``utility.json`` and two tables).
"""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import numpy as np
import pyarrow as pa
from pydantic import BeforeValidator

from dori_lightning.attacks.model_check import ModelCheck
from dori_lightning.metrics.evidence import (
    BaseEvidence,
    ImageEvidence,
    Origin,
    Power,
    UnseenImage,
    origin_of,
)
from dori_lightning.metrics.replication import (
    AttackEffort,
    PairResult,
    Search,
    Trust,
    attack_trust,
    cells,
    first_successes,
    headline_condition,
    pair_results,
    prompt_condition,
    search_of,
)
from dori_lightning.metrics.utility import PictureRow, Utility
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.runtime.documents import (
    json_bytes,
    parquet_bytes,
    read_rows,
    relative_to,
    stored,
)
from dori_lightning.runtime.redaction import redact
from dori_lightning.types import (
    BASELINE,
    Budget,
    Calibration,
    Cell,
    CoderRows,
    Condition,
    FusedLora,
    InputError,
    Number,
    Outcome,
    Pair,
    Reference,
    ReplacedPart,
)

EDIT_FILE = "edit.json"
LOCALITY_FILE = "locality.json"
CERTIFICATE_FILE = "certificate.json"

Disclosure = Literal["full", "blurred", "none"]
"""How images may be shown, from all to nothing; what blurring throws away is gone."""

NOT_KEPT = Path()
"""Stands for an image whose file is not where a run left it."""

Severity = Literal["info", "warning", "critical", "invalid"]


@dataclass(frozen=True)
class Flag:
    """One thing that limits what the numbers mean.

    Attributes:
        name: Stable identifier, such as ``controls_replicate``.
        severity: ``invalid`` takes from the audit what it was made for: whatever did not come
            back says nothing. ``critical`` makes the verdict unreliable, ``warning`` weakens it,
            ``info`` explains.
    """

    name: str
    severity: Severity
    text: str


@dataclass(frozen=True)
class Provenance:
    """Where the numbers come from.

    Attributes:
        git_sha: Commit of the code, None outside a checkout.
        platform: Operating system and architecture, without the machine's name.
        config: Resolved configuration, already redacted.
        fingerprint: Hash of everything of the checkpoint that decides results.
        image_hashes: Pair id to SHA-256 of the image's file, and ``ID/FILE`` of further
            reference images.
        unet_evaluations: Forward passes of the UNet, in rows, of the first process.
        coder_rows: Prompts and images through its text encoder and autoencoder; None in records
            of earlier versions.
        replaced: Parts of the checkpoint whose weights are from other files.
        loras: What was added to its weights.
        commit: Commit of the hub id that the checkpoint is from; None for other sources.
        numerics: Torch's switches that decide how a GPU rounds, TF32 among them; empty elsewhere.
    """

    git_sha: str | None
    packages: dict[str, str]
    python: str
    platform: str
    device: str
    seed: int
    config: dict[str, Any]
    checkpoint: str
    fingerprint: str
    image_hashes: dict[str, str]
    started: datetime
    finished: datetime
    unet_evaluations: int
    wall_seconds: float
    replaced: tuple[ReplacedPart, ...] = ()
    loras: tuple[FusedLora, ...] = ()
    numerics: dict[str, bool] = field(default_factory=dict)
    coder_rows: CoderRows | None = None
    commit: str | None = None


def _cell_fields(row: Any) -> Any:
    """A cell of ``report.json`` as the fields of ``Cell``."""
    if not isinstance(row, Mapping):
        return row
    spread = row.get("similarity")
    spread = spread if isinstance(spread, Mapping) else {}
    return {
        **row,
        "condition": {name: row.get(name) for name in ("attack", "init", "budget")},
        **{f"similarity_{name}": spread[name] for name in ("median", "mad") if name in spread},
    }


def _base_fields(base: Any) -> Any:
    """The base of ``report.json`` as the fields of ``BaseEvidence``."""
    if not isinstance(base, Mapping):
        return base
    return {**base, "cells": [_cell_fields(row) for row in base.get("cells", ())]}


def _calibration_fields(rule: Any) -> Any:
    """The calibration of ``report.json`` as the fields of ``Calibration``."""
    if not isinstance(rule, Mapping):
        return rule
    roc = [
        (
            point.get("false_positive_rate"),
            point.get("true_positive_rate"),
            # the first point lies above every similarity, which JSON has no number for
            math.inf if point.get("threshold") is None else point["threshold"],
        )
        for point in rule.get("roc", ())
        if isinstance(point, Mapping)
    ]
    # records of earlier versions have quantiles only
    return {"null": (), "ceiling": (), **rule, "roc": roc}


def _utility_fields(document: Any) -> Any:
    """The layout of ``Utility.to_dict`` as the fields of ``Utility``."""
    if not isinstance(document, Mapping):
        return document
    near = document.get("neighbours") or {}
    return {
        **document,
        "ordinary": _comparison_fields(document),
        "neighbours": _comparison_fields(near),
        "replicas": near.get("replicating"),
    }


def _comparison_fields(images: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """One comparison of two models' images, of the layout of ``Utility.to_dict``."""
    if images.get("prompts") is None:
        return None
    prefix = "similarity_to_unmitigated"
    similarity = {
        name.replace(prefix, "similarity"): value
        for name, value in images.items()
        if name.startswith(prefix)
    }
    return {**images, **similarity}


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """The part of an audit that ``report.json`` holds.

    What follows from its fields (from ``invalid`` on) is computed once and not written.

    Attributes:
        images: One row for each suspected image; empty in records of schema 1.
        unseen: How far images came back that the model cannot hold.
        false_discovery_rate: Of the images answered yes; NaN in records of earlier versions.
        reference_model: Rows of a model that never saw the images; empty without one.
        base: What the same attacks find in the checkpoint that this one was tuned from; None
            where none is known.
        power: How many planted images the attack found; None where it was not measured.
        check: What the attack had to work with; None in records of earlier versions.
        check_before: The same without the mitigation; None where there is none.
        schema_version: Version of the layout of ``report.json``.
        mitigation: Name of the mitigation; ``none`` for the checkpoint as it is.
        verdict: The answer in words, for a reader who is not an engineer.
        recommended_budget: Largest budget that leaves the controls alone, None where there is
            none.
        flags: What limits the numbers' meaning, gravest first.
        utility: What the mitigation costs; None where it was not measured.
        effort: What the attack took; None in records of earlier versions.
    """

    images: tuple[ImageEvidence, ...] = ()
    unseen: tuple[UnseenImage, ...] = ()
    false_discovery_rate: Number = math.nan
    reference_model: tuple[Annotated[Cell, BeforeValidator(_cell_fields)], ...] = ()
    base: Annotated[BaseEvidence | None, BeforeValidator(_base_fields)] = None
    power: Power | None = None
    check: ModelCheck | None = None
    check_before: ModelCheck | None = None
    schema_version: Literal[1, 2] = 2
    checkpoint: str
    mitigation: str
    verdict: str
    cells: tuple[Annotated[Cell, BeforeValidator(_cell_fields)], ...]
    calibration: Annotated[Calibration, BeforeValidator(_calibration_fields)]
    recommended_budget: Budget | None
    flags: tuple[Flag, ...]
    provenance: Provenance
    utility: Annotated[Utility | None, BeforeValidator(_utility_fields)] = None
    effort: AttackEffort | None = None

    @property
    def invalid(self) -> tuple[str, ...]:
        """Names of the flags that make the audit invalid; empty where it is valid."""
        return tuple(flag.name for flag in self.flags if flag.severity == "invalid")

    @cached_property
    def origins(self) -> dict[str, Origin]:
        """Suspected image to where it is from; empty without a base."""
        base = {row.id: row.answer for row in self.base.images} if self.base else {}
        return {
            row.id: origin_of(row.answer, base[row.id]) for row in self.images if row.id in base
        }

    @cached_property
    def own_cells(self) -> tuple[Cell, ...]:
        """Cells of the mitigation under audit, without those of the baseline."""
        return tuple(cell for cell in self.cells if cell.mitigation == self.mitigation)

    @cached_property
    def prompt_condition(self) -> Condition | None:
        """The prompts as they are; None where no image was generated from them."""
        return prompt_condition(self.own_cells)

    @cached_property
    def headline_condition(self) -> Condition | None:
        """The attack that the verdict speaks of; None where no attack was run."""
        return headline_condition(self.own_cells)

    @cached_property
    def trust(self) -> Trust:
        """What the controls say of that attack."""
        return attack_trust(self.own_cells, self.headline_condition)


@dataclass(frozen=True, kw_only=True)
class AuditReport(AuditRecord):
    """Everything that an audit found: its record, and every pair under every condition.

    Attributes:
        outcomes: Every pair under every condition.
        baseline: Outcomes of the same prompts before the mitigation; empty where they were not
            measured.
    """

    outcomes: tuple[Outcome, ...]
    baseline: tuple[Outcome, ...] = field(default=())

    @cached_property
    def pair_results(self) -> tuple[PairResult, ...]:
        """One result per pair and condition under the mitigation."""
        return pair_results(self.outcomes, self.calibration)

    @cached_property
    def baseline_results(self) -> tuple[PairResult, ...]:
        """One result per pair from its prompt before the mitigation."""
        return pair_results(self.baseline, self.calibration)

    @cached_property
    def first_successes(self) -> dict[Search, int]:
        """Steps after which each attack first reproduced its pair; others are left out."""
        return first_successes(self.outcomes, self.calibration)


def write_report(report: AuditReport, folder: Path) -> Path:
    """Write ``report.json`` and ``pairs.parquet``.

    Both are serialised before either file is touched, and ``report.json`` comes last: where it is
    new, the parquet file belongs to it.

    The folder is made if needed; paths of images are stored relative to it.

    Returns:
        Path of ``report.json``.

    Raises:
        TypeError: The configuration holds something that JSON cannot.
    """
    document = json_bytes(_document(report))
    outcomes = (*report.outcomes, *report.baseline)
    names = sorted({f"{_SIMILARITY}{name}" for o in outcomes for name in o.similarity})
    columns = {**_PAIR_COLUMNS, **dict.fromkeys(names, _NUMBER)}
    if any(outcome.pair.others for outcome in outcomes):
        columns |= _REFERENCE_COLUMNS
    if any(outcome.pair.cut_by for outcome in outcomes):
        columns |= _CUT_COLUMNS
    table = parquet_bytes(pair_rows(report, folder), columns)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "pairs.parquet", table)
    return write_atomically(folder / "report.json", document)


def _document(report: AuditReport) -> dict[str, Any]:
    """The content of ``report.json`` as plain values."""
    budget, effort = report.recommended_budget, report.effort
    return {
        "schema_version": report.schema_version,
        "checkpoint": report.checkpoint,
        "mitigation": report.mitigation,
        "verdict": report.verdict,
        "invalid": list(report.invalid),
        "flags": [asdict(flag) for flag in report.flags],
        "cells": [_cell_document(cell) for cell in report.cells],
        "calibration": _calibration_document(report.calibration),
        "recommended_budget": asdict(budget) if budget else None,
        "images": [asdict(row) for row in report.images],
        "unseen": [asdict(row) for row in report.unseen],
        "false_discovery_rate": report.false_discovery_rate,
        "reference_model": [_cell_document(cell) for cell in report.reference_model],
        "base": _base_document(report),
        "power": asdict(report.power) if report.power else None,
        "check": asdict(report.check) if report.check else None,
        "check_before": asdict(report.check_before) if report.check_before else None,
        "pairs": _pair_documents(report),
        "utility": report.utility.to_dict() if report.utility else None,
        "effort": asdict(effort) if effort else None,
        "provenance": {**asdict(report.provenance), "config": redact(report.provenance.config)},
    }


def _cell_document(cell: Cell) -> dict[str, Any]:
    """The inverse of ``_cell_fields``."""
    row = asdict(cell)
    condition = row.pop("condition")
    spread = {name: row.pop(f"similarity_{name}") for name in ("median", "mad")}
    return {**row, **condition, "similarity": spread}


def _base_document(report: AuditReport) -> dict[str, Any] | None:
    """The inverse of ``_base_fields``, with where each image is from."""
    if report.base is None:
        return None
    cells = [_cell_document(cell) for cell in report.base.cells]
    return {**asdict(report.base), "cells": cells, "origins": report.origins}


def _calibration_document(calibration: Calibration) -> dict[str, Any]:
    roc = ("false_positive_rate", "true_positive_rate", "threshold")
    return {
        **asdict(calibration),
        "roc": [dict(zip(roc, point, strict=True)) for point in calibration.roc],
    }


def _pair_documents(report: AuditReport) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for result in report.pair_results:
        pair = result.pair
        known = {name: getattr(pair, name) for name in ("id", *_OF_PAIRS)}
        if pair.cut_by:
            known["cut_by"] = list(pair.cut_by)
        if pair.others:
            known["references"] = [own.sha256 for own in pair.references]
        row = rows.setdefault(pair.id, {**known, "conditions": []})
        closest = {"reference": result.reference.sha256} if result.reference else {}
        row["conditions"].append(
            {
                **asdict(result.condition),
                "status": result.status,
                "best_similarity": result.best,
                "statistic": result.statistic,
                "reproduced": result.reproduced,
                **closest,
            }
        )
    return list(rows.values())


_TEXT, _NUMBER, _WHOLE = pa.string(), pa.float64(), pa.int64()
_PAIR_COLUMNS: dict[str, pa.DataType] = {
    "checkpoint": _TEXT, "mitigation": _TEXT, "pair_id": _TEXT, "kind": _TEXT, "prompt": _TEXT,
    "repeats": _NUMBER, "duplicate_of": _TEXT, "truncated": pa.bool_(), "image_sha256": _TEXT,
    "attack": _TEXT, "init": _TEXT, "norm": _TEXT, "eps": _NUMBER, "steps": _WHOLE,
    "restart": _WHOLE, "status": _TEXT, "seed": _WHOLE, "descriptor": _TEXT,
    "threshold": _NUMBER, "diversity": _NUMBER, "lpips": _NUMBER, "alignment": _NUMBER,
    "loss_first": _NUMBER, "loss_last": _NUMBER, "displacement": _NUMBER, "stopped_at": _WHOLE,
    "first_success_steps": _WHOLE, "image": _TEXT, "original": _TEXT,
}  # fmt: skip
_REFERENCE_COLUMNS: dict[str, pa.DataType] = {
    "other_originals": pa.list_(_TEXT), "other_sha256": pa.list_(_TEXT), "reference": _TEXT,
}  # fmt: skip
"""Only where a pair has several reference images."""
_CUT_COLUMNS: dict[str, pa.DataType] = {"cut_by": pa.list_(_TEXT)}
"""Only where some text encoder cuts a prompt; it names those."""
_SIMILARITY = "similarity_"
_UNNAMED = ("the text encoder",)
"""What records of earlier versions say of who cut a prompt."""
_OF_PAIRS = ("kind", "prompt", "repeats", "duplicate_of", "truncated")
_OF_OUTCOMES = ("restart", "status", "diversity", "loss_first", "loss_last", "displacement",
                "stopped_at")  # fmt: skip


def pair_rows(report: AuditReport, folder: Path) -> list[dict[str, Any]]:
    """List every generated image of a report: pair x condition x restart x seed.

    Each descriptor has a column. Outcomes of the baseline carry the mitigation ``none``.
    ``first_success_steps`` is one number for an attack (pair x init x restart), in all of its
    rows: the fewest steps after which it reproduced the pair, null where it never did.
    ``stopped_at`` marks rows whose attack was stopped there, before the steps of the condition.

    Of a pair with several reference images, ``original`` is the one that attacks aim at, and
    ``reference`` the one that the row's image is closest to by the row's descriptor.

    Paths of images and originals are given relative to ``folder``.

    Raises:
        ValueError: An outcome has not as many similarities, or images, as seeds.
    """
    return [
        {"mitigation": mitigation, **row}
        for mitigation, outcomes in (
            (report.mitigation, report.outcomes), (BASELINE, report.baseline),
        )
        for outcome in outcomes
        for row in _image_rows(outcome, report, folder)
    ]  # fmt: skip


def _image_rows(outcome: Outcome, report: AuditReport, folder: Path) -> Iterator[dict[str, Any]]:
    pair, condition, count = outcome.pair, outcome.condition, len(outcome.seeds)
    measured = {f"{_SIMILARITY}{name}": v for name, v in outcome.similarity.items()}
    for name, values in measured.items():
        if len(values) != count:
            raise ValueError(
                f"pair {pair.id} has {count} seeds but {len(values)} similarities of "
                f"{name.removeprefix(_SIMILARITY)}"
            )
    if outcome.images and len(outcome.images) != count:
        raise ValueError(f"pair {pair.id} has {count} seeds but {len(outcome.images)} images")
    if outcome.lpips is not None:
        measured["lpips"] = outcome.lpips
    if outcome.alignment is not None:
        measured["alignment"] = outcome.alignment
    search = search_of(outcome)
    row = {
        "checkpoint": report.checkpoint,
        "pair_id": pair.id,
        "image_sha256": pair.sha256,
        "original": relative_to(pair.image, folder),
        "attack": condition.attack,
        "init": condition.init,
        **asdict(condition.budget),
        "descriptor": report.calibration.descriptor,
        "threshold": report.calibration.threshold,
        "first_success_steps": report.first_successes.get(search) if search else None,
        **{name: getattr(pair, name) for name in _OF_PAIRS},
        **{name: getattr(outcome, name) for name in _OF_OUTCOMES},
    }
    if pair.cut_by:
        row["cut_by"] = list(pair.cut_by)
    if pair.others:
        row["other_originals"] = [relative_to(own.image, folder) for own in pair.others]
        row["other_sha256"] = [own.sha256 for own in pair.others]
    closest = outcome.closest.get(report.calibration.descriptor)
    for place, seed in enumerate(outcome.seeds):
        if closest:
            row["reference"] = relative_to(closest[place].image, folder)
        yield {
            **row,
            "seed": seed,
            "image": relative_to(outcome.images[place], folder) if outcome.images else None,
            **{name: float(values[place]) for name, values in measured.items()},
        }


def read_record(folder: Path) -> AuditRecord:
    """Read a run folder's ``report.json``, of this or an earlier version.

    Raises:
        InputError: It is missing (the run has not finished, or this is no run folder), is not
            JSON, is of another schema version, or does not hold what an audit writes.
    """
    return cast(AuditRecord, stored(AuditRecord, folder / "report.json"))


@dataclass(frozen=True)
class EditRecord:
    """What ``edit.json`` says of the edit that an audit was made under.

    Attributes:
        identity: Hash of the edit's content; ``none`` for the checkpoint as it is.
        key: Where the cache of edits has it; None where it has not.
        made: Whether the run made it; otherwise it was read from the cache.
        cost: What finding it took, such as ``unet_evaluations`` and ``seconds``.
        changed_weights: Weights that have another value under it; None where it changes none by
            its nature, as a defence at inference does, or where that was not recorded.
    """

    identity: str
    key: str | None = None
    made: bool = False
    cost: dict[str, Any] = field(default_factory=dict)
    changed_weights: int | None = None


def read_edit_record(folder: Path) -> EditRecord | None:
    """Read a run folder's ``edit.json``; None where there is none.

    Raises:
        InputError: It is damaged.
    """
    path = folder / EDIT_FILE
    return cast(EditRecord, stored(EditRecord, path)) if path.is_file() else None


@dataclass(frozen=True)
class Run:
    """One finished audit in its run folder.

    Attributes:
        report: What it found; paths of images may name files that are gone.
        edit: The edit it was made under; None where that was not recorded.
    """

    folder: Path
    report: AuditReport
    edit: EditRecord | None = None

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint."""
        return self.report.checkpoint

    @property
    def mitigation(self) -> str:
        """Name of the mitigation."""
        return self.report.mitigation


def read_run(folder: Path) -> Run:
    """Read a finished run folder.

    Args:
        folder: Holds ``report.json`` and ``pairs.parquet``, perhaps ``edit.json``.

    Raises:
        InputError: A file is missing or damaged, or the two do not belong together.
    """
    record = read_record(folder)
    rows = read_rows(folder / "pairs.parquet")
    report = AuditReport(
        **{item.name: getattr(record, item.name) for item in fields(record)},
        outcomes=_outcomes(rows, record.mitigation, folder),
        baseline=_outcomes(rows, "none", folder) if record.mitigation != "none" else (),
    )
    _check_same_audit(report, folder)
    return Run(folder, report, read_edit_record(folder))


def _outcomes(
    rows: Sequence[Mapping[str, Any]], mitigation: str, folder: Path
) -> tuple[Outcome, ...]:
    """Join the rows of one image each to outcomes again, in the order of the file."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["mitigation"] == mitigation:
            names = ("pair_id", "attack", "init", "norm", "eps", "steps", "restart")
            groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return tuple(_outcome(group, folder) for group in groups.values())


def _outcome(group: Sequence[Mapping[str, Any]], folder: Path) -> Outcome:
    first = group[0]

    def numbers(name: str) -> np.ndarray:
        return np.array([_number(row[name]) for row in group], np.float64)

    def place(relative: str) -> Path:
        return Path(os.path.normpath(folder / relative))

    others = tuple(
        Reference(place(path), sha256)
        for path, sha256 in zip(
            first.get("other_originals") or (), first.get("other_sha256") or (), strict=True
        )
    )
    original = Reference(
        place(first["original"]) if first.get("original") else Path(), first["image_sha256"] or ""
    )
    by_path = {own.image: own for own in (original, *others)}
    closest = tuple(by_path[place(row["reference"])] for row in group if row.get("reference"))
    measured: dict[str, Any] = {
        **{name: first.get(name) for name in _OF_OUTCOMES},
        "diversity": _number(first["diversity"]),
        **{
            name: numbers(name)
            for name in ("lpips", "alignment")
            if any(row[name] is not None for row in group)
        },
    }
    return Outcome(
        pair=Pair(
            id=first["pair_id"],
            kind=first["kind"],
            prompt=first["prompt"],
            image=original.image,
            repeats=first["repeats"] or 0.0,
            sha256=original.sha256,
            others=others,
            duplicate_of=first["duplicate_of"],
            cut_by=tuple(first.get("cut_by") or _UNNAMED[: bool(first.get("truncated"))]),
        ),
        condition=Condition(
            first["attack"], first["init"], Budget(first["norm"], first["eps"], first["steps"])
        ),
        seeds=tuple(row["seed"] for row in group),
        similarity={
            name.removeprefix(_SIMILARITY): numbers(name)
            for name in first
            if name.startswith(_SIMILARITY)
        },
        images=tuple(place(row["image"]) for row in group if row["image"]),
        closest={first["descriptor"]: closest} if closest else {},
        **measured,
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _check_same_audit(report: AuditReport, folder: Path) -> None:
    """Count the outcomes anew under the run's own threshold: the record must say the same.

    Raises:
        InputError: It does not; the two files come from different audits.
    """
    counted = cells(
        report.outcomes,
        report.calibration,
        checkpoint=report.checkpoint,
        mitigation=report.mitigation,
    )
    now, then = (
        {(cell.condition, cell.kind): (cell.hits, cell.n) for cell in rows}
        for rows in (counted, report.own_cells)
    )
    if now != then:
        raise InputError(
            f"{folder}: report.json and pairs.parquet do not say the same, so they come from "
            f"different audits",
            fix="run the audit again: it rewrites both",
        )


def shown_report(run: Run) -> AuditReport:
    """A run's report for its page: images that are gone are ``NOT_KEPT`` or left out.

    Raises:
        InputError: The table of a mitigation's images is missing or damaged.
    """
    report, utility = run.report, run.report.utility
    if utility is not None:
        utility = replace(utility, picture_rows=tuple(_picture_rows(run.folder)))
    return replace(
        report,
        outcomes=with_files_that_exist(report.outcomes),
        baseline=with_files_that_exist(report.baseline),
        utility=utility,
    )


def _picture_rows(folder: Path) -> Iterator[PictureRow]:
    """Rows of ``utility_pictures.parquet`` whose images both exist."""
    for row in read_rows(folder / "utility_pictures.parquet"):
        images = {
            name: Path(os.path.normpath(folder / row[name]))
            for name in ("unmitigated", "mitigated")
        }
        if all(path.is_file() for path in images.values()):
            yield PictureRow(**{**row, "similarity": _number(row["similarity"]), **images})


def with_files_that_exist(outcomes: Iterable[Outcome]) -> tuple[Outcome, ...]:
    """Leave out images that are gone, and originals that are gone or have changed since."""
    originals: dict[Path, Path] = {}

    def known(own: Reference) -> Reference:
        path = own.image
        if path not in originals:
            same = path.is_file() and (
                not own.sha256 or hashlib.sha256(path.read_bytes()).hexdigest() == own.sha256
            )
            originals[path] = path if same else NOT_KEPT
        return replace(own, image=originals[path])

    kept = []
    for outcome in outcomes:
        original, *others = map(known, outcome.pair.references)
        kept.append(
            replace(
                outcome,
                pair=replace(outcome.pair, image=original.image, others=tuple(others)),
                images=outcome.images if all(path.is_file() for path in outcome.images) else (),
                closest={name: tuple(map(known, own)) for name, own in outcome.closest.items()},
            )
        )
    return tuple(kept)


def strictest(runs: Iterable[Run], chosen: Disclosure) -> Disclosure:
    """How images may be shown: as chosen, or as a run allows if that is less.

    A run that was told to keep images out of its page must not see them in another one.
    """
    allowed = [
        run.report.provenance.config.get("report", {}).get("images", "full") for run in runs
    ]
    return max((chosen, *allowed), key=get_args(Disclosure).index)


def is_locality(folder: Path) -> bool:
    """Whether a run folder holds the result of ``task=locality``."""
    return (folder / LOCALITY_FILE).is_file()


def is_certificate(folder: Path) -> bool:
    """Whether a run folder holds the result of ``task=certify``."""
    return (folder / CERTIFICATE_FILE).is_file()
