"""Who a run is to its loggers: the same one again when its folder is resumed."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from dori_lightning.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["RunIdentity", "kept_id"]

_FILE = "tracking.json"


@dataclass(frozen=True)
class RunIdentity:
    """What a logger says of a run before it begins.

    Attributes:
        id: Unique name that a resumed run has again.
        name: Readable name.
        group: What the jobs of a sweep have in common; None for a run on its own.
        job_type: The task.
        tags: Checkpoint, mitigation, version: what runs are filtered by.
        config: Resolved configuration and provenance, without secrets.
    """

    id: str
    name: str
    group: str | None
    job_type: str
    tags: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


def kept_id(folder: Path, purpose: str, *, prefix: str = "") -> str:
    """The id that ``folder`` keeps for a purpose; whoever asks first makes it.

    Args:
        folder: Run folder or sweep folder, shared by everybody who must agree on the id.
        purpose: What the id is for.
        prefix: What a new id begins with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _FILE
    with FileLock(folder / f".{_FILE}.lock"):
        held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if purpose not in held:
            held[purpose] = f"{prefix}{secrets.token_hex(4)}"
            write_atomically(path, (json.dumps(held, indent=2, sort_keys=True) + "\n").encode())
        return str(held[purpose])
