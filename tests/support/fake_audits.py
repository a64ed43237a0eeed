"""Run folders of audits that never ran, written as a real audit writes its own."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dori_lightning.metrics.replication import cells as cells_of
from dori_lightning.metrics.utility import DenoisingLoss, Utility
from dori_lightning.report.findings import make_report
from dori_lightning.report.record import write_report
from dori_lightning.types import Calibration, Condition, Kind, Outcome, Pair
from support.fake_reports import PROMPT, provenance

SIZES: dict[Kind, int] = {"vm": 4, "tm": 1, "control": 3}
SETTINGS = {
    "seed": 0,
    "checkpoint": {"name": "tiny", "precision": "auto", "resolution": None},
    "sampling": {"sampler": "ddim", "steps": 5, "guidance": 2.0, "images_per_pair": 2, "seed": 2},
    "attack": {"lr": 0.1, "noise_batch": 8, "restarts": 1},
    "metrics": {
        "decider": "ncc",
        "descriptors": {"ncc": {"_target_": "x.NCC", "threshold": None}, "ssim": {}},
    },
}


def pairs(sizes: Mapping[Kind, int] = SIZES) -> list[Pair]:
    return [
        Pair(f"{kind}{k}", kind, f"caption {kind} {k}", Path("x.png"), sha256=f"{kind}{k}")
        for kind, count in sizes.items()
        for k in range(count)
    ]


def loss_cost(ratio: float, low: float, high: float, **more: Any) -> Utility:
    """A mitigation's cost in denoising loss alone."""
    loss = DenoisingLoss(0.1, 0.1 * ratio, ratio, (low, high), 4, 1)
    return Utility("ncc", loss, None, None, None, {}, **more)


def write_audit(
    folder: Path,
    mitigation: str = "none",
    *,
    checkpoint: str = "tiny",
    reproduced: Mapping[Condition, Mapping[Kind, Sequence[float] | float]] | None = None,
    threshold: float = 0.5,
    sizes: Mapping[Kind, int] = SIZES,
    config: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    fingerprint: str = "f" * 16,
    utility: Utility | None = None,
    edit: Mapping[str, Any] | None = None,
    prompts: Mapping[str, str] | None = None,
) -> Path:
    """Write ``report.json``, ``pairs.parquet`` and perhaps ``edit.json``.

    Args:
        folder: Run folder.
        mitigation: Name of the mitigation.
        checkpoint: Name of the checkpoint.
        reproduced: Condition to kind to similarity, one for all pairs or one each; NaN diverged.
            Kinds that are not named get 0.1.
        threshold: What the run calibrated for itself.
        sizes: Pairs of each kind.
        config: Sections that replace those of ``SETTINGS``.
        settings: Settings of the mitigation.
        fingerprint: Of the checkpoint.
        utility: What the mitigation costs.
        edit: Content of ``edit.json``.
        prompts: Pair id to another prompt than it has.
    """
    outcomes = []
    for condition, values in (reproduced or {PROMPT: {"vm": 0.9}}).items():
        of_kind: dict[str, list[float]] = {}
        for kind, count in sizes.items():
            given = values.get(kind, 0.1)
            of_kind[kind] = (
                [float(given)] * count if isinstance(given, int | float) else list(given)
            )
        outcomes += [
            _outcome(pair, condition, of_kind[pair.kind].pop(0), prompts=prompts or {})
            for pair in pairs(sizes)
        ]
    rule = Calibration("ncc", threshold, "calibrated", (0.1,), (0.9,), 1.0, ())
    cells = cells_of(outcomes, rule, checkpoint=checkpoint, mitigation=mitigation)
    own = {"_target_": f"x.{mitigation}", **(settings or {})}
    record = make_report(
        checkpoint=checkpoint,
        mitigation=mitigation,
        cells=tuple(cells),
        calibration=rule,
        outcomes=tuple(outcomes),
        provenance=replace(
            provenance({**SETTINGS, "mitigation": own, **(config or {})}),
            checkpoint=checkpoint,
            fingerprint=fingerprint,
            image_hashes={pair.id: pair.sha256 for pair in pairs(sizes)},
        ),
    )
    write_report(replace(record, utility=utility), folder)
    if edit is not None:
        (folder / "edit.json").write_text(json.dumps(edit))
    return folder


def _outcome(
    pair: Pair, condition: Condition, value: float, *, prompts: Mapping[str, str]
) -> Outcome:
    lost = math.isnan(value)
    similarity = np.array([value, value - 0.1])
    return Outcome(
        pair=Pair(pair.id, pair.kind, prompts.get(pair.id, pair.prompt), pair.image,
                  sha256=pair.sha256),
        condition=condition,
        restart=0,
        status="diverged" if lost else "ok",
        seeds=(2, 3),
        similarity={"ncc": similarity, "ssim": similarity * 0.9},
        diversity=0.3,
    )  # fmt: skip


def write_sweep(folder: Path, **audits: Mapping[str, Any]) -> Path:
    """Write an audit for each mitigation, in a folder of its name."""
    for name, arguments in audits.items():
        write_audit(folder / name, name, **arguments)
    return folder
