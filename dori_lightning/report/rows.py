"""The long table behind the report: one row for every generated picture."""

from __future__ import annotations

import io
import math
import os
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dori_lightning.metrics.first_success import first_successes, search_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np

    from dori_lightning.report.record import AuditReport
    from dori_lightning.types import Outcome

__all__ = ["pair_rows", "parquet_bytes"]

_COLUMNS: dict[str, pa.DataType] = {
    "checkpoint": pa.string(),
    "mitigation": pa.string(),
    "pair_id": pa.string(),
    "kind": pa.string(),
    "prompt": pa.string(),
    "repeats": pa.float64(),
    "duplicate_of": pa.string(),
    "truncated": pa.bool_(),
    "image_sha256": pa.string(),
    "attack": pa.string(),
    "init": pa.string(),
    "norm": pa.string(),
    "eps": pa.float64(),
    "steps": pa.int64(),
    "restart": pa.int64(),
    "status": pa.string(),
    "seed": pa.int64(),
    "descriptor": pa.string(),
    "threshold": pa.float64(),
    "diversity": pa.float64(),
    "lpips": pa.float64(),
    "alignment": pa.float64(),
    "loss_first": pa.float64(),
    "loss_last": pa.float64(),
    "displacement": pa.float64(),
    "stopped_at": pa.int64(),
    "first_success_steps": pa.int64(),
    "image": pa.string(),
    "original": pa.string(),
}


def pair_rows(report: AuditReport, folder: Path) -> list[dict[str, Any]]:
    """List every generated picture of a report: pair x condition x restart x seed.

    Each descriptor has a column. Outcomes of the baseline carry the mitigation ``none``.
    ``first_success_steps`` is one number for an attack (pair x init x restart), in all of its
    rows: the fewest steps looked at after which it reproduced the pair, null where it never did.
    ``stopped_at`` marks rows whose attack was stopped there, before the steps of the condition.

    Args:
        report: The report.
        folder: Paths of pictures and originals are given relative to it.

    Raises:
        ValueError: An outcome has not as many similarities, or pictures, as seeds.
    """
    firsts = first_successes(report.outcomes, report.calibration, report.aggregation)
    return [
        *(
            {**row, "first_success_steps": firsts.get(search) if search else None}
            for outcome in report.outcomes
            for search in [search_of(outcome)]
            for row in _rows(outcome, report, report.mitigation, folder)
        ),
        *(r for o in report.baseline for r in _rows(o, report, "none", folder)),
    ]


def parquet_bytes(rows: Sequence[dict[str, Any]]) -> bytes:
    """Serialise rows of ``pair_rows``; a column keeps its type also where it holds no value."""
    names = sorted({name for row in rows for name in row if name.startswith("similarity_")})
    schema = pa.schema([*_COLUMNS.items(), *((name, pa.float64()) for name in names)])
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink, compression="zstd")
    return sink.getvalue()


def _rows(
    outcome: Outcome, report: AuditReport, mitigation: str, folder: Path
) -> Iterator[dict[str, Any]]:
    pair, condition = outcome.pair, outcome.condition
    count = len(outcome.seeds)
    for name, values in outcome.similarity.items():
        if len(values) != count:
            raise ValueError(
                f"pair {pair.id} has {count} seeds but {len(values)} similarities of {name}"
            )
    if outcome.images and len(outcome.images) != count:
        raise ValueError(f"pair {pair.id} has {count} seeds but {len(outcome.images)} pictures")
    for place, seed in enumerate(outcome.seeds):
        yield {
            "checkpoint": report.checkpoint,
            "mitigation": mitigation,
            "pair_id": pair.id,
            "kind": pair.kind,
            "prompt": pair.prompt,
            "repeats": pair.repeats,
            "duplicate_of": pair.duplicate_of,
            "truncated": pair.truncated,
            "image_sha256": pair.sha256,
            "attack": condition.attack,
            "init": condition.init,
            "norm": condition.budget.norm,
            "eps": condition.budget.eps,
            "steps": condition.budget.steps,
            "restart": outcome.restart,
            "status": outcome.status,
            "seed": seed,
            "descriptor": report.calibration.descriptor,
            "threshold": report.calibration.threshold,
            "diversity": _number(outcome.diversity),
            "lpips": _item(outcome.lpips, place),
            "alignment": _item(outcome.alignment, place),
            "loss_first": _number(outcome.loss_first),
            "loss_last": _number(outcome.loss_last),
            "displacement": _number(outcome.displacement),
            "stopped_at": outcome.stopped_at,
            "image": _relative(outcome.images[place], folder) if outcome.images else None,
            "original": _relative(pair.image, folder),
            **{
                f"similarity_{name}": _number(values[place])
                for name, values in outcome.similarity.items()
            },
        }


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path, folder).replace(os.sep, "/")


def _item(values: np.ndarray | None, place: int) -> float | None:
    return None if values is None else _number(values[place])


def _number(value: float | None) -> float | None:
    """Parquet has a null of its own; NaN there would take part in means."""
    return None if value is None or math.isnan(value) else float(value)
