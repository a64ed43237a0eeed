"""What every reader of pairs shares: the options, and columns that have several names."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, get_args

from dori_lightning.pairs.manifest import OnMissing, validate_rows
from dori_lightning.pairs.problems import Problem, quote
from dori_lightning.pairs.rows import RawRow
from dori_lightning.types import KINDS, InputError, Kind, Pair

__all__ = [
    "EXPECTED",
    "PROMPT_NAMES",
    "PairsReader",
    "ReaderOptions",
    "Selection",
    "known_kind",
    "metadata_row",
    "picture_folder",
]

logger = logging.getLogger(__name__)

PROMPT_NAMES = ("prompt", "text", "caption")
COLUMNS = ("file_name", *PROMPT_NAMES, "id", "kind", "subject", "repeats", "role")
EXPECTED = "file_name,prompt[,id,kind,subject,repeats,role]"
"""Header of a ``metadata.csv``, for messages."""


class PairsReader(Protocol):
    """Anything that can be given as ``pairs``."""

    def read(self) -> tuple[Pair, ...]:
        """Return validated pairs, audit and training, with unique ids.

        Raises:
            InputError: The list or a picture is unusable.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which pairs of a list to take.

    Attributes:
        kinds: Kinds to take; rows of other kinds are left out unchecked.
        limit: Most audit pairs of each kind, the first of the list; None takes all. Training pairs
            are never cut.
    """

    kinds: Sequence[Kind] = KINDS
    limit: int | None = None

    def check_options(self) -> None:
        """Refuse impossible options.

        Called by ``read``, not by the constructor: Hydra would wrap the error in its own.

        Raises:
            InputError: Unknown or no kinds, or a limit below 1.
        """
        if not self.kinds or any(kind not in KINDS for kind in self.kinds):
            raise InputError(f"pairs.kinds must be some of {list(KINDS)}, got {list(self.kinds)}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"pairs.limit must be at least 1 or null, got {self.limit}")


@dataclass(frozen=True, kw_only=True)
class ReaderOptions(Selection):
    """Options of every reader of a file.

    Attributes:
        on_missing: ``error`` refuses a list with missing pictures; ``skip`` drops those rows and
            logs their ids. Damaged pictures are always refused.
    """

    on_missing: OnMissing = "error"

    def check_options(self) -> None:
        """Refuse impossible options, as ``Selection`` does, and an unknown ``on_missing``."""
        super().check_options()
        if self.on_missing not in get_args(OnMissing):
            raise InputError(f"pairs.on_missing must be error or skip, got {self.on_missing!r}")

    def validate(
        self,
        rows: Sequence[RawRow],
        *,
        root: Path,
        source: str,
        names: Mapping[str, str] | None = None,
    ) -> tuple[Pair, ...]:
        """Validate rows under these options; see ``manifest.validate_rows``."""
        return validate_rows(
            rows,
            root=root,
            source=source,
            names=names,
            kinds=tuple(self.kinds),
            limit=self.limit,
            on_missing=self.on_missing,
        )


def known_kind(kind: str) -> Kind:
    """Require that a constructor's kind is one.

    Raises:
        InputError: It is not.
    """
    for known in KINDS:
        if kind == known:
            return known
    raise InputError(f"pairs.kind must be one of {list(KINDS)}, got {kind!r}")


def picture_folder(path: Path | str, option: str) -> Path:
    """Require a folder.

    Raises:
        InputError: There is none, or it is a file; names the option to mend.
    """
    folder = Path(path)
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{option} must be a folder, but {folder} {state}")
    return folder


def prompt_name(header: Sequence[str], source: str) -> str:
    """Choose the caption's column: ``prompt``, or else the only alias there is.

    Raises:
        InputError: There are two aliases and no ``prompt``.
    """
    found = [name for name in PROMPT_NAMES if name in header]
    if "prompt" not in found and len(found) > 1:
        raise InputError(
            f"{source} has columns {' and '.join(found)}; rename the right one prompt"
        )
    ignored = [quote(name) for name in header if name not in COLUMNS and name != "image"]
    if ignored:
        logger.info("%s: columns that are not used: %s", source, ", ".join(ignored))
    return found[0]


def metadata_row(
    values: Mapping[str, object],
    *,
    where: str,
    kind: Kind,
    prompt: str,
    problems: tuple[Problem, ...] = (),
) -> RawRow:
    """Turn a record with the columns of a ``metadata.csv`` into a raw row.

    Args:
        values: Column to value.
        where: The record's place in its file.
        kind: Kind of records that name none.
        prompt: Column that holds the caption.
        problems: What kept the record from being taken apart.
    """
    return RawRow(
        where=where,
        id=values.get("id"),
        kind=kind if values.get("kind") in (None, "") else values["kind"],
        prompt=values.get(prompt),
        image=values.get("file_name"),
        subject=values.get("subject"),
        repeats=values.get("repeats"),
        role=values.get("role"),
        problems=problems,
    )
