"""What a mitigation costs, as files: the numbers, and the rows behind them; written and read."""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dori_lightning.files import write_atomically
from dori_lightning.metrics.feature_distance import KernelDistance
from dori_lightning.metrics.utility import (
    Alignment,
    Comparison,
    DenoisingLoss,
    PictureRow,
    Replicas,
    Utility,
)
from dori_lightning.report.document import plain_values
from dori_lightning.report.stored import stored_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dori_lightning.metrics.utility import LossRow

__all__ = ["read_utility", "write_utility"]

_LOSSES = pa.schema(
    {
        "id": pa.string(),
        "prompt": pa.string(),
        "draw": pa.int64(),
        "timestep": pa.int64(),
        "unmitigated": pa.float64(),
        "mitigated": pa.float64(),
    }
)
_PICTURES = pa.schema(
    {
        "kind": pa.string(),
        "id": pa.string(),
        "group": pa.string(),
        "prompt": pa.string(),
        "seed": pa.int64(),
        "similarity": pa.float64(),
        "original_unmitigated": pa.float64(),
        "original_mitigated": pa.float64(),
        "alignment_unmitigated": pa.float64(),
        "alignment_mitigated": pa.float64(),
        "unmitigated": pa.string(),
        "mitigated": pa.string(),
    }
)


def write_utility(utility: Utility, folder: Path) -> Path:
    """Write ``utility_losses.parquet``, ``utility_pictures.parquet`` and ``utility.json``.

    The JSON file comes last: where it is new, the tables belong to it.

    Args:
        utility: What was measured.
        folder: The run folder. Picture paths are stored relative to it.

    Returns:
        Path of ``utility.json``.
    """
    document = json.dumps(
        plain_values(utility.to_dict()), sort_keys=True, indent=2, allow_nan=False
    )
    losses = _parquet(utility.loss_rows, _LOSSES, folder)
    pictures = _parquet(utility.picture_rows, _PICTURES, folder)
    write_atomically(folder / "utility_losses.parquet", losses)
    write_atomically(folder / "utility_pictures.parquet", pictures)
    return write_atomically(folder / "utility.json", (document + "\n").encode())


def read_utility(folder: Path, held: Mapping[str, Any]) -> Utility:
    """Read back what a mitigation costs; pictures that are gone are left out.

    Args:
        folder: The run folder, with ``utility_pictures.parquet``.
        held: What ``report.json`` keeps of it.

    Raises:
        InputError: The pictures' table is missing or damaged.
        KeyError: ``held`` lacks a promised key.
    """
    near, loss = held["neighbours"], held["denoising_loss"]
    replicas = near["replicating"] if near else None
    return Utility(
        descriptor=held["descriptor"],
        denoising_loss=DenoisingLoss(**_numbers(loss)) if loss else None,
        ordinary=_comparison(held) if held["prompts"] is not None else None,
        neighbours=_comparison(near) if near and near["prompts"] is not None else None,
        replicas=Replicas(**_numbers(replicas)) if replicas else None,
        left_out=held["left_out"],
        picture_rows=tuple(_picture_rows(folder)),
    )


def _comparison(held: Mapping[str, Any]) -> Comparison:
    kid, alignment = held["kid"], held["alignment"]
    known = _numbers(held)
    return Comparison(
        prompts=held["prompts"],
        pictures_each=held["pictures_each"],
        kid=KernelDistance(**_numbers({k: v for k, v in kid.items() if k != "features"}))
        if kid
        else None,
        fid=held["fid"],
        features=held["features"],
        similarity=known["similarity_to_unmitigated"],
        similarity_mad=known["similarity_to_unmitigated_mad"],
        similarity_ci95=known["similarity_to_unmitigated_ci95"],
        alignment=Alignment(**_numbers(alignment)) if alignment else None,
    )


def _numbers(held: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and intervals as they were before JSON, which writes NaN as null."""
    return {
        name: tuple(map(_finite, value)) if isinstance(value, list) else _finite(value)
        for name, value in held.items()
    }


def _finite(value: Any) -> Any:
    return math.nan if value is None else value


def _picture_rows(folder: Path) -> list[PictureRow]:
    rows = stored_rows(folder / "utility_pictures.parquet")
    places = ("unmitigated", "mitigated")
    found = [
        PictureRow(
            **{
                **row,
                "similarity": _finite(row["similarity"]),
                **{name: Path(os.path.normpath(folder / row[name])) for name in places},
            }
        )
        for row in rows
    ]
    return [row for row in found if row.unmitigated.is_file() and row.mitigated.is_file()]


def _parquet(rows: Sequence[LossRow | PictureRow], schema: pa.Schema, folder: Path) -> bytes:
    plain = [{name: _cell(item, folder) for name, item in asdict(row).items()} for row in rows]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(plain, schema=schema), sink, compression="zstd")
    return sink.getvalue()


def _cell(value: Any, folder: Path) -> Any:
    if isinstance(value, Path):
        return os.path.relpath(value, folder).replace(os.sep, "/")
    # parquet has a null of its own; NaN there would take part in means
    return None if isinstance(value, float) and math.isnan(value) else value
