"""Say what a run folder is for, so that the same command resumes and another one is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dori_lightning.files import write_atomically
from dori_lightning.redaction import redact
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["check_folder", "claim_folder", "without"]

_FILE = "method.json"


def without(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Settings without those that change speed or memory but no result."""
    return {key: value for key, value in settings.items() if key not in names}


def claim_folder(folder: Path, method: Mapping[str, Any]) -> None:
    """Write down what decides the results in ``folder``, or check that it is the same as before.

    Args:
        folder: Run folder; made if needed.
        method: Whatever decides the results, as plain containers.

    Raises:
        InputError: The folder holds results of another method; names every setting that differs.
    """
    if not check_folder(folder, method):
        record = json.dumps(redact(method), indent=2, sort_keys=True) + "\n"
        write_atomically(folder / _FILE, record.encode())


def check_folder(folder: Path, method: Mapping[str, Any]) -> bool:
    """Check that ``folder`` holds results of ``method`` or none; writes nothing.

    Returns:
        Whether somebody claimed it already.

    Raises:
        InputError: The folder holds results of another method; names every setting that differs.
    """
    wanted = dict(_flat(json.loads(json.dumps(redact(method)))))
    place = folder / _FILE
    if place.is_file():
        found = dict(_flat(json.loads(place.read_text(encoding="utf-8"))))
        differing = sorted(
            k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k)
        )
        if differing:
            changes = "\n".join(
                f"  {k}: {found.get(k)!r} there, {wanted.get(k)!r} now" for k in differing
            )
            raise InputError(
                f"{folder} holds results of other settings:\n{changes}\n"
                f"  mend:  give this run a folder of its own with name=NAME, or remove that one"
            )
        return True
    return False


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested containers by dotted name."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
