"""What a model card says of an audit, read from the audit's record: counts, never pictures."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from dori_lightning.report.record import Flag, read_report
from dori_lightning.types import INITS, KINDS, Budget, Cell, Condition, InputError, Norm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["AuditedThing", "CardAudit", "audited_thing", "card_audit"]

_SEVERITIES = ("invalid", "critical", "warning", "info")


@dataclass(frozen=True)
class AuditedThing:
    """What an audit looked at.

    Attributes:
        fingerprint: Of the checkpoint.
        edit: Identity of the edit it carried; ``none`` for the checkpoint as it is.
    """

    fingerprint: str
    edit: str


@dataclass(frozen=True)
class CardAudit:
    """An audit, as a model card shows it.

    Attributes:
        verdict: Its paragraph.
        cells: Its rows, with those of the checkpoint before the mitigation where there are any.
        flags: What limits the numbers' meaning, gravest first.
        descriptor: Which descriptor decided.
        threshold: Similarity above which a picture counted as a copy.
        rule: ``fixed`` or ``calibrated``.
        recommended: Largest attack that leaves the controls alone, None where there is none.
        loss: Denoising loss on ordinary pictures over that before the mitigation, with its 95 %
            interval; None where it was not measured.
        finished: When, ISO 8601.
        git_sha: Commit of the code, None outside a checkout.
    """

    verdict: str
    cells: tuple[Cell, ...]
    flags: tuple[Flag, ...]
    descriptor: str
    threshold: float
    rule: str
    recommended: Budget | None
    loss: tuple[float, float, float] | None
    finished: str
    git_sha: str | None


def audited_thing(folder: Path, document: Mapping[str, Any]) -> AuditedThing:
    """Tell which weights an audit's run folder speaks of.

    Args:
        folder: The run folder; its ``edit.json`` names the edit.
        document: Its ``report.json``.

    Raises:
        InputError: ``edit.json`` is missing or damaged, or the record names no checkpoint.
    """
    path = folder / "edit.json"
    try:
        identity = json.loads(path.read_text("utf-8"))["identity"]
        return AuditedThing(str(document["provenance"]["fingerprint"]), str(identity))
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist, so it is unknown which edit was audited\n"
            f"  mend:  run the audit's command again; it finishes what is missing"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder} does not say what was audited ({error!r})\n"
            f"  mend:  run the audit's command again; it rewrites its record"
        ) from None


def card_audit(folder: Path) -> CardAudit:
    """Read what a card shows of an audit.

    Raises:
        InputError: The record is missing or not as an audit writes it.
    """
    document = read_report(folder)
    try:
        rule = document["calibration"]
        budget = document["recommended_budget"]
        return CardAudit(
            verdict=str(document["verdict"]),
            cells=tuple(_cell(row) for row in document["cells"]),
            flags=_flags(document["flags"]),
            descriptor=str(rule["descriptor"]),
            threshold=float(rule["threshold"]),
            rule=_one_of(rule["rule"], ("fixed", "calibrated")),
            recommended=None if budget is None else _budget(budget),
            loss=_loss(document.get("utility")),
            finished=str(document["provenance"]["finished"]),
            git_sha=document["provenance"]["git_sha"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder / 'report.json'} is not as an audit writes it ({error!r})\n"
            f"  mend:  run the audit's command again; it rewrites its record"
        ) from None


def _cell(row: Mapping[str, Any]) -> Cell:
    attack: Literal["prompt", "dori"] = _one_of(row["attack"], ("prompt", "dori"))
    init = None if row["init"] is None else _one_of(row["init"], INITS)
    low, high = row["mr_ci95"]
    return Cell(
        checkpoint=str(row["checkpoint"]),
        mitigation=str(row["mitigation"]),
        condition=Condition(attack, init, _budget(row["budget"])),
        kind=_one_of(row["kind"], KINDS),
        n=int(row["n"]),
        failed=int(row["failed"]),
        hits=int(row["hits"]),
        mr=_number(row["mr"]),
        mr_ci95=(_number(low), _number(high)),
        similarity_median=_number(row["similarity"]["median"]),
        similarity_mad=_number(row["similarity"]["mad"]),
        descriptor=str(row["descriptor"]),
        threshold=float(row["threshold"]),
        aggregation=_one_of(row["aggregation"], ("max", "median")),
    )


def _budget(row: Mapping[str, Any]) -> Budget:
    eps = None if row["eps"] is None else float(row["eps"])
    return Budget(_one_of(row["norm"], get_args(Norm)), eps, int(row["steps"]))


def _flags(rows: Sequence[Mapping[str, Any]]) -> tuple[Flag, ...]:
    flags = [
        Flag(str(row["name"]), _one_of(row["severity"], _SEVERITIES), str(row["text"]))
        for row in rows
    ]
    return tuple(sorted(flags, key=lambda flag: _SEVERITIES.index(flag.severity)))


def _loss(utility: Mapping[str, Any] | None) -> tuple[float, float, float] | None:
    loss = (utility or {}).get("denoising_loss")
    if loss is None:
        return None
    low, high = loss["ratio_ci95"]
    return _number(loss["ratio"]), _number(low), _number(high)


def _number(value: float | None) -> float:
    """A number of the record, which has null for NaN."""
    return math.nan if value is None else float(value)


def _one_of(value: Any, known: Sequence[Any]) -> Any:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return value
