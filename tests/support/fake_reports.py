"""Reports of invented audits, with their images."""

import io
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dori_lightning.metrics.evidence import (
    Answer,
    BaseEvidence,
    ImageEvidence,
    Power,
    Unseen,
    UnseenImage,
)
from dori_lightning.report.findings import Circumstances, make_report
from dori_lightning.report.record import AuditReport, Provenance
from dori_lightning.types import (
    Budget,
    Calibration,
    Cell,
    CoderRows,
    Condition,
    Kind,
    Outcome,
    Pair,
    Scale,
)

PROMPT = Condition("prompt")
THRESHOLD = 0.7
SEEDS = (11, 12, 13)


def dori(steps: int = 50, init: str = "prompt", **budget: Any) -> Condition:
    return Condition("dori", init, Budget(steps=steps, **budget))


def wilson(hits: int, n: int) -> tuple[float, float]:
    if n == 0:
        return math.nan, math.nan
    z, p = 1.959964, hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def cell(
    kind: Kind,
    condition: Condition,
    hits: int,
    n: int,
    *,
    failed: int = 0,
    mitigation: str = "none",
    median: float = 0.5,
) -> Cell:
    return Cell(
        checkpoint="dori_tiny",
        mitigation=mitigation,
        condition=condition,
        kind=kind,
        n=n,
        failed=failed,
        hits=hits,
        mr=hits / n if n else math.nan,
        mr_ci95=wilson(hits, n),
        similarity_median=median if n else math.nan,
        similarity_mad=0.04 if n else math.nan,
        descriptor="ncc",
        threshold=THRESHOLD,
    )


def provenance(config: dict[str, Any] | None = None) -> Provenance:
    start = datetime(2026, 11, 24, 8, 0, tzinfo=UTC)
    return Provenance(
        git_sha="0123456789abcdef0123456789abcdef01234567",
        packages={"torch": "2.13.0", "diffusers": "0.42.1", "lightning": "2.6.6"},
        python="3.11.9",
        platform="Linux x86_64",
        device="cpu, 2 threads",
        seed=7,
        config=config or {"attack": {"steps": 50, "lr": 0.1}, "checkpoint": {"name": "dori_tiny"}},
        checkpoint="dori_tiny",
        fingerprint="f" * 16,
        image_hashes={"cat": "a" * 64},
        started=start,
        finished=start + timedelta(seconds=184),
        unet_evaluations=123_456,
        wall_seconds=184.2,
        coder_rows=CoderRows(prompts=1_021, encoded=72, decoded=312),
    )


def outcome(
    pair: Pair,
    condition: Condition,
    similarity: Sequence[float],
    *,
    restart: int = 0,
    status: str = "ok",
    images: Sequence[Path] = (),
) -> Outcome:
    attacked = condition.attack == "dori"
    return Outcome(
        pair=pair,
        condition=condition,
        restart=restart,
        status=status,
        seeds=SEEDS[: len(similarity)],
        similarity={"ncc": np.array(similarity), "ssim": np.array(similarity) * 0.9},
        diversity=0.3,
        loss_first=0.9 if attacked else None,
        loss_last=0.2 if attacked else None,
        displacement=4.2 if attacked else None,
        images=tuple(images),
    )


def calibration() -> Calibration:
    return Calibration(
        descriptor="ncc",
        threshold=THRESHOLD,
        rule="calibrated",
        null=(0.1, 0.2, 0.3, 0.35),
        ceiling=(0.95, 0.97),
        auc=0.98,
        roc=((0.0, 0.0, math.inf), (0.0, 0.9, 0.72), (0.1, 1.0, 0.4), (1.0, 1.0, -1.0)),
    )


def with_base(report: AuditReport, answers: Sequence[Answer]) -> AuditReport:
    """The audit, which has evidence, with the answers for its images in the base."""
    rows = zip(report.images, answers, strict=True)
    images = tuple(replace(row, answer=answer, similarity=0.25) for row, answer in rows)
    cells = (cell("vm", PROMPT, 1, len(images)),)
    return replace(report, base=BaseEvidence("sd14", "b" * 16, cells, images))


def picture(path: Path, seed: int, *, noise: float = 0.0) -> Path:
    """Write a smooth random picture; equal seeds give equal pictures, up to noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_drawn(seed, noise))
    return path


@cache
def _drawn(seed: int, noise: float) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    values = np.asarray(coarse.resize((96, 96), Image.Resampling.BICUBIC), np.float64)
    values += noise * np.random.default_rng(seed + 999).normal(size=values.shape)
    sink = io.BytesIO()
    Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def measured(cells: Sequence[Cell], *, mitigation: str = "none", **more: Any) -> AuditReport:
    """An audit with these cells, and with the flags and the verdict they call for."""
    names = {item.name for item in fields(Circumstances)} & more.keys()
    circumstances = Circumstances(**{name: more.pop(name) for name in names})
    return make_report(
        circumstances,
        checkpoint="dori_tiny",
        mitigation=mitigation,
        cells=tuple(cells),
        calibration=calibration(),
        provenance=provenance(),
        **{"outcomes": (), **more},
    )


def with_evidence(
    report: AuditReport, *, controls: int = 4, copies: int = 4, reference: int = 4
) -> AuditReport:
    """The audit with an answer for each suspect, and so many images that no model holds."""
    pairs = {o.pair.id: o.pair for o in report.outcomes if o.pair.kind != "control"}.values()
    scale = Scale(0.2, 0.9)
    images = tuple(
        ImageEvidence(
            id=pair.id,
            kind=pair.kind,
            answer="no" if place % 4 == 3 else "yes",
            reason="nothing_came_back" if place % 4 == 3 else "copy",
            similarity=0.3 if place % 4 == 3 else 0.85,
            condition=dori(),
            scale=scale,
            score=scale.score(0.3 if place % 4 == 3 else 0.85 - 0.01 * place),
            p_image=0.05,
            p_loss=0.1,
            loss_ratio=0.4,
            reference_similarity=0.2,
        )
        for place, pair in enumerate(pairs)
    )
    sizes: dict[Unseen, int] = {
        "control": controls, "altered_copy": copies, "reference": reference
    }  # fmt: skip
    unseen = tuple(
        UnseenImage(f"{group}{k}", group, 0.4 * k / size - 0.1, 0.9)
        for group, size in sizes.items()
        for k in range(size)
    )
    power = Power(3, 4, 2, wilson(2, 3), 100, {"positive_00": 0.9, "positive_01": 0.7, "p": 0.1})
    return replace(report, images=images, unseen=unseen, power=power, false_discovery_rate=0.05)


def report(
    folder: Path,
    *,
    vm: int = 4,
    control: int = 4,
    prompts: Sequence[str] = (),
    config: dict[str, Any] | None = None,
) -> AuditReport:
    """Invent an audit: half of ``vm`` comes back from its prompt, all of it from the attack."""
    outcomes: list[Outcome] = []
    for place in range(vm + control):
        kind: Kind = "vm" if place < vm else "control"
        name = f"{kind}_{place:02d}"
        pair = Pair(
            id=name,
            kind=kind,
            prompt=prompts[place] if place < len(prompts) else f"caption number {place}",
            image=picture(folder / "references" / f"{name}.png", place),
            repeats=1.0 + 0.5 * (place % 3) if kind == "vm" else 0.0,
            sha256=f"{place:064x}",
        )
        for condition, top in (
            (PROMPT, 0.9 if place < vm // 2 else 0.3),
            (dori(10), 0.8 if kind == "vm" else 0.3),
            (dori(50), 0.95 - 0.01 * place if kind == "vm" else 0.35),
        ):
            stem = f"{name}_{condition.attack}_{condition.budget.steps}"
            shots = [
                picture(folder / "pictures" / f"{stem}_{k}.png", place, noise=200 * (1 - top))
                for k in range(len(SEEDS))
            ]
            outcomes.append(outcome(pair, condition, (top - 0.1, top, top - 0.2), images=shots))
    cells = [
        cell("vm", PROMPT, vm // 2, vm),
        cell("vm", dori(10), vm, vm),
        cell("vm", dori(50), vm, vm),
        cell("control", PROMPT, 0, control),
        cell("control", dori(10), 0, control),
        cell("control", dori(50), 0, control),
    ]
    return make_report(
        checkpoint="dori_tiny",
        mitigation="none",
        cells=tuple(c for c in cells if c.n),
        calibration=calibration(),
        outcomes=tuple(outcomes),
        provenance=provenance(config),
    )
