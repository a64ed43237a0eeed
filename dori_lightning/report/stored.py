"""Files of a run folder read back, or refused by name where they are damaged."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dori_lightning.types import InputError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["stored_json", "stored_rows"]


def stored_json(path: Path, *, mend: str, missing: str = "") -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        mend: End of the message, after what is wrong.
        missing: What it means that there is no such file; empty leaves that to the caller.

    Raises:
        InputError: It is not JSON, or is missing and ``missing`` says what that means.
        FileNotFoundError: It is missing and ``missing`` is empty.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not missing:
            raise
        raise InputError(f"{path} does not exist: {missing}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}){mend}") from None


def stored_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of an audit's parquet file.

    Raises:
        InputError: It is missing or damaged.
    """
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path} cannot be read ({error})\n  mend:  run the audit again: it rewrites the file"
        ) from None
    return rows
