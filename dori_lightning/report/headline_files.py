"""The headline and its cells as parquet, for whoever computes on."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dori_lightning.types import INITS, KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dori_lightning.report.aggregate import Comparison
    from dori_lightning.report.comparisons import Paired
    from dori_lightning.report.headline import HeadlineRow
    from dori_lightning.types import Cell

__all__ = ["cells_parquet", "headline_parquet"]

_CELL = ("hits", "n", "failed")
_CELL_NUMBERS = ("mr", "mr_low", "mr_high", "similarity_median", "similarity_mad")
_TEST = ("lost", "gained")
_PRICE = ("loss_ratio", "loss_ratio_low", "loss_ratio_high", "kid", "kid_std",
          "unet_evaluations", "seconds", "weights_changed")  # fmt: skip
_PUBLISHED = ("prompt", "attacked", "control_prompt", "control_attacked")


def headline_parquet(rows: Sequence[HeadlineRow]) -> bytes:
    """Serialise the table, one row for one mitigation within one ball.

    Columns of a cell are ``{kind}_{prompt or dori_INIT}_{hits, n, failed, mr, mr_low, ...}``,
    those of the suspected images' tests ``{condition}_vs_{none or prompt}_{lost, gained, p}``,
    with ``p_holm`` against none. ``invalid`` names what makes a row's audits invalid.
    Null: not measured, or not published.
    """
    return _bytes([_headline(row) for row in rows], _headline_schema())


def cells_parquet(comparison: Comparison) -> bytes:
    """Serialise every cell under its checkpoint's one threshold, one row each."""
    columns: dict[str, pa.DataType] = {
        **dict.fromkeys(
            ("checkpoint", "mitigation", "kind", "attack", "init", "norm"), pa.string()
        ),
        "eps": pa.float64(),
        "steps": pa.int64(),
        **dict.fromkeys(_CELL, pa.int64()),
        **dict.fromkeys(_CELL_NUMBERS, pa.float64()),
        "descriptor": pa.string(),
        "threshold": pa.float64(),
        "aggregation": pa.string(),
    }
    rows = [
        {
            "checkpoint": cell.checkpoint,
            "mitigation": cell.mitigation,
            "kind": cell.kind,
            "attack": cell.condition.attack,
            "init": cell.condition.init,
            "norm": cell.condition.budget.norm,
            "eps": cell.condition.budget.eps,
            "steps": cell.condition.budget.steps,
            **_cell("", cell),
            "descriptor": cell.descriptor,
            "threshold": cell.threshold,
            "aggregation": cell.aggregation,
        }
        for cell in comparison.cells
    ]
    return _bytes(rows, columns)


def _headline(row: HeadlineRow) -> dict[str, Any]:
    price = row.price
    values: dict[str, Any] = {
        "checkpoint": row.checkpoint,
        "mitigation": row.mitigation,
        "norm": row.norm,
        "eps": row.eps,
        "steps": row.steps,
        "invalid": ", ".join(row.invalid) or None,
        **_cell("vm_prompt_", row.prompt_vm),
        **_cell("tm_prompt_", row.prompt_tm),
        **_cell("control_prompt_", row.prompt_control),
        **_test("prompt_vs_none_", row.against_none),
        "prompt_vs_none_p_holm": row.against_none_holm,
        **dict(
            zip(
                _PRICE,
                (price.loss_ratio, *price.loss_ratio_ci95, price.kid, price.kid_std,
                 price.unet_evaluations, price.seconds, price.changed),
                strict=True,
            )
        ),
    }  # fmt: skip
    for attack in row.attacks:
        name = f"dori_{attack.init}"
        for kind in KINDS:
            values |= _cell(f"{kind}_{name}_", getattr(attack, kind))
        values |= _test(f"{name}_vs_none_", attack.against_none)
        values[f"{name}_vs_none_p_holm"] = attack.against_none_holm
        values |= _test(f"{name}_vs_prompt_", attack.against_prompt)
    if row.published is not None:
        values |= {"published_row": row.published.row, "published_model": row.published.model}
        for name in _PUBLISHED:
            figure = getattr(row.published, name)
            if figure is not None:
                values |= {
                    f"published_{name}_mr": figure.rate,
                    f"published_{name}_similarity": figure.similarity,
                    f"published_{name}_source": figure.source,
                }
    return values


def _headline_schema() -> dict[str, pa.DataType]:
    columns: dict[str, pa.DataType] = {
        **dict.fromkeys(("checkpoint", "mitigation", "norm"), pa.string()),
        "eps": pa.float64(),
        "steps": pa.int64(),
        "invalid": pa.string(),
    }
    conditions = ("prompt", *(f"dori_{init}" for init in INITS))
    for kind in KINDS:
        for condition in conditions:
            columns |= {f"{kind}_{condition}_{name}": pa.int64() for name in _CELL}
            columns |= {f"{kind}_{condition}_{name}": pa.float64() for name in _CELL_NUMBERS}
    for condition in conditions:
        for other in ("none", "prompt"):
            if condition != other:
                columns |= {f"{condition}_vs_{other}_{name}": pa.int64() for name in _TEST}
                columns[f"{condition}_vs_{other}_p"] = pa.float64()
        columns[f"{condition}_vs_none_p_holm"] = pa.float64()
    columns |= dict.fromkeys(_PRICE, pa.float64())
    columns |= {"published_row": pa.string(), "published_model": pa.string()}
    for name in _PUBLISHED:
        columns |= {f"published_{name}_{n}": pa.float64() for n in ("mr", "similarity")}
        columns[f"published_{name}_source"] = pa.string()
    return columns


def _cell(prefix: str, cell: Cell | None) -> dict[str, Any]:
    if cell is None:
        return {}
    low, high = cell.mr_ci95
    values = (cell.hits, cell.n, cell.failed, cell.mr, low, high,
              cell.similarity_median, cell.similarity_mad)  # fmt: skip
    names = (*_CELL, *_CELL_NUMBERS)
    return {f"{prefix}{name}": value for name, value in zip(names, values, strict=True)}


def _test(prefix: str, test: Paired | None) -> dict[str, Any]:
    if test is None:
        return {}
    return {f"{prefix}lost": test.lost, f"{prefix}gained": test.gained, f"{prefix}p": test.p}


def _bytes(rows: Sequence[dict[str, Any]], columns: dict[str, pa.DataType]) -> bytes:
    """Serialise rows; a name that the columns lack is a mistake, NaN becomes null."""
    stray = {name for row in rows for name in row} - columns.keys()
    if stray:
        raise ValueError(f"no column for {', '.join(sorted(stray))}")
    plain = [
        {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in row.items()
        }
        for row in rows
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(plain, schema=pa.schema(list(columns.items()))), sink)
    return sink.getvalue()
