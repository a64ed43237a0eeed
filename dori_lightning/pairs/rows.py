"""Raw rows of a list of pairs, and the checks of one row."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from dori_lightning.pairs.pictures import PictureError, check_picture, resolve_inside
from dori_lightning.pairs.problems import Problem, quote
from dori_lightning.types import KINDS, Kind, Pair

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["RawRow", "check_row", "default_id"]

Role = Literal["audit", "training"]
ROLES: tuple[Role, ...] = ("audit", "training")
ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True)
class RawRow:
    """One row as its file has it, nothing checked; None or ``""`` where the file says nothing.

    Attributes:
        where: Row as its file counts it, such as ``line 3``.
        id: Name; by default made of the picture's file name.
        kind: One of ``KINDS``.
        prompt: Caption.
        image: Picture, relative to the list's folder.
        subject: What generic captions call it.
        repeats: Multiplicity in a planted stream; by default 1, and 0 for controls.
        role: ``audit`` or ``training``; by default ``audit``.
        looked_for: What a reader searched in vain, where it looks for pictures itself.
        problems: What kept the reader from taking the row apart; it is not checked further then.
    """

    where: str
    id: object = None
    kind: object = None
    prompt: object = None
    image: object = None
    subject: object = None
    repeats: object = None
    role: object = None
    looked_for: str = ""
    problems: tuple[Problem, ...] = ()


def default_id(file_name: str) -> str:
    """Make a pair's id of a file's stem: characters that ids cannot have become ``_``."""
    name = file_name.replace("\\", "/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name.rpartition(".")[0] or name)[:128]


class _RowCheck:
    """Check one row's columns and remember what is wrong with them."""

    def __init__(self, row: RawRow, names: Mapping[str, str]) -> None:
        self.row, self.names, self.problems = row, names, list(row.problems)

    def _say(self, column: str, what: str, mend: str, *, missing: bool = False) -> None:
        name = self.names.get(column, column)
        self.problems.append(Problem(self.row.where, name, what, mend, missing))

    def id(self, taken: dict[str, str]) -> str:
        value = self.row.id
        if value in (None, ""):
            if not self.row.image:
                return ""  # the picture is what the row lacks, and image() says so
            value = default_id(str(self.row.image))
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not ID.fullmatch(value) or not value.strip("."):
            self._say(
                "id",
                f"{quote(value)} is no id",
                "use 1 to 128 of A-Z a-z 0-9 . _ - (and not only dots)",
            )
        elif value in taken:
            self._say(
                "id", f"{value!r} is already the id of {taken[value]}", "give each row its own id"
            )
        else:
            taken[value] = self.row.where
        return str(value)

    def kind(self) -> Kind:
        for kind in KINDS:
            if self.row.kind == kind:
                return kind
        self._say("kind", f"{quote(self.row.kind)} is no kind", f"write {', '.join(KINDS)}")
        return "vm"

    def prompt(self) -> str:
        value = self.row.prompt
        if value is not None and not isinstance(value, str):
            self._say("prompt", f"{quote(value)} is not text", "write the caption as text")
        elif not (value or "").strip():
            self._say("prompt", "empty", "write the caption that leads to the picture")
        return str(value)

    def subject(self) -> str | None:
        value = self.row.subject
        if value is not None and not isinstance(value, str):
            self._say("subject", f"{quote(value)} is not text", "write it as text or leave it out")
        return str(value) if value else None

    def repeats(self, kind: Kind) -> float:
        value = self.row.repeats
        if value in (None, ""):
            return 0.0 if kind == "control" else 1.0
        number = math.nan
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            with suppress(OverflowError, ValueError):  # said below, like all that is no number
                number = float(value)
        if not math.isfinite(number) or number < 0:
            self._say(
                "repeats",
                f"{quote(value)} is no finite number of at least 0",
                "write a number, or nothing for the default",
            )
        return number

    def role(self) -> Role:
        for role in ROLES:
            if self.row.role == role:
                return role
        if self.row.role not in (None, ""):
            self._say("role", f"{quote(self.row.role)} is no role", f"write {' or '.join(ROLES)}")
        return "audit"

    def image(self, root: Path) -> tuple[Path, str]:
        value = self.row.image
        if value in (None, "") and self.row.looked_for:
            mend = "add the file, or drop such rows: pairs.on_missing=skip"
            self._say("image", f"found no {self.row.looked_for}", mend, missing=True)
        elif not isinstance(value, str) or not value:
            self._say("image", f"{quote(value)} is no path", f"write a path relative to {root}")
        else:
            try:
                path = resolve_inside(root, value)
                return path, check_picture(path)
            except PictureError as error:
                what = error.what if str(value) in error.what else f"{value}: {error.what}"
                self._say("image", what, error.mend, missing=error.missing)
        return root, ""


def check_row(
    row: RawRow, *, root: Path, names: Mapping[str, str], taken: dict[str, str]
) -> tuple[Pair, list[Problem]]:
    """Check one row; the pair is of use only where there is no problem."""
    check = _RowCheck(row, names)
    kind = check.kind()
    pair = Pair(
        id=check.id(taken),
        kind=kind,
        prompt=check.prompt(),
        image=root,
        subject=check.subject(),
        repeats=check.repeats(kind),
        role=check.role(),
    )
    path, sha256 = check.image(root)
    return replace(pair, image=path, sha256=sha256), check.problems
