"""Documents of a run folder: JSON and parquet files, written whole and checked when read."""

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from dori_lightning.types import InputError

AGAIN = "run the audit's command again: it writes the file; or use the version that wrote it"


def json_bytes(document: Any, *, indent: int = 2) -> bytes:
    """Serialise a document; equal ones give equal bytes.

    Raises:
        TypeError: It holds something that JSON cannot.
    """
    text = json.dumps(plain_values(document), sort_keys=True, indent=indent, allow_nan=False)
    return (text + "\n").encode()


def plain_values(value: Any) -> Any:
    """Turn a value into what JSON has; NaN and infinities become null.

    Raises:
        TypeError: JSON has nothing for it; writing its ``repr`` would hide that.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.bool_ | np.integer):
        return value.item()
    if isinstance(value, Mapping):
        return {str(name): plain_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain_values(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    raise TypeError(f"report.json cannot hold a {type(value).__name__}: {value!r}")


def parquet_bytes(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, pa.DataType]) -> bytes:
    """Serialise rows; a column keeps its type also where it holds no value.

    NaN becomes null, since NaN would take part in means, and a path becomes text.

    Raises:
        ValueError: A row has a name that the columns lack.
    """
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
    table = pa.Table.from_pylist(plain, schema=pa.schema(list(columns.items())))
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def stored(kind: Any, path: Path, *, fix: str = AGAIN) -> Any:
    """Read a JSON file as a type, and check that it fits.

    Args:
        kind: The type, as pydantic reads it.
        path: The file.
        fix: What to do where it is missing or does not fit.

    Raises:
        InputError: It is missing, is not JSON, or does not fit; names the first keys that do not.
    """
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", fix=fix) from None
    except ValidationError as error:
        problems = "".join(
            f"\n  {'.'.join(map(str, problem['loc'])) or 'all of it'}: {problem['msg']}"
            for problem in error.errors(include_url=False)[:5]
        )
        raise InputError(f"{path} does not hold what it should:{problems}", fix=fix) from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a parquet file.

    Raises:
        InputError: It is missing or damaged.
    """
    try:
        return list(pq.read_table(path).to_pylist())
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read ({error})", fix=AGAIN) from None


def relative_to(path: Path, folder: Path) -> str:
    """Write a path as a run folder keeps it: seen from there, with slashes."""
    return os.path.relpath(path, folder).replace(os.sep, "/")
