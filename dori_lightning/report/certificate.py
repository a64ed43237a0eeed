"""The certificate: which doors are open, after how much work, and what that is worth."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dori_lightning.certify.cascade import AttackFindings, work_until_back
from dori_lightning.certify.survival import Survival, logrank_p, survival
from dori_lightning.certify.traces import Trace
from dori_lightning.report.record import Disclosure, Provenance
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.runtime.documents import json_bytes
from dori_lightning.types import Calibration, Number, Pair


@dataclass(frozen=True)
class Certificate:
    """What a cascade of attacks found."""

    checkpoint: str
    mitigation: str
    reference: str
    attacks: tuple[AttackFindings, ...]
    survivals: tuple[Survival, ...]
    logrank: Number
    traces: tuple[Trace, ...]
    first_work: int | None
    verdict: str


def make_certificate(
    *,
    checkpoint: str,
    mitigation: str,
    reference: str,
    found: Sequence[AttackFindings],
    suspects: Sequence[Pair],
    calibration: Calibration,
    traces: Sequence[Trace],
    planted: int | None,
    provenance: Provenance,
) -> Certificate:
    """Judge what was found."""
    works = {
        group: work_until_back(found, group)
        for group in ("suspects", "controls", "reference", "planted")
    }
    survivals = {group: survival(group, work) for group, work in works.items() if work}
    own = survivals.get("suspects")
    lines = []
    for findings in found:
        counts = {g: findings.count(g) for g in ("suspects", "controls", "reference", "planted")}
        lines.append(f"{findings.attack}: {len(findings.convicted)} convicted {counts}")
        for level in findings.levels:
            lines.append(f"    {level.name}: {level.back} sound {level.sound}")
    return Certificate(
        checkpoint=checkpoint,
        mitigation=mitigation,
        reference=reference,
        attacks=tuple(found),
        survivals=tuple(survivals.values()),
        logrank=logrank_p(works["suspects"], works["controls"]),
        traces=tuple(traces),
        first_work=own.first if own else None,
        verdict="\n".join(lines),
    )


def write_certificate(certificate: Certificate, folder: Path, *, images: Disclosure) -> Path:
    """Write ``certificate.json``."""
    return write_atomically(folder / "certificate.json", json_bytes(asdict(certificate), indent=1))
