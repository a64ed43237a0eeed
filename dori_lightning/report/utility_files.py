"""What a mitigation costs, as files: the numbers, and the rows behind them."""

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
from dori_lightning.report.document import plain_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dori_lightning.metrics.utility import LossRow, PictureRow, Utility

__all__ = ["write_utility"]

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
