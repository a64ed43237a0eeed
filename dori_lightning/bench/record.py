"""What a measurement of speed says, as it is written to ``bench.json`` and read back."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dori_lightning.bench.timing import Timed

__all__ = ["Family", "Limits", "Row", "family_of", "row_of"]


@dataclass(frozen=True)
class Limits:
    """How fast the machine is at this model's work, measured in the same run.

    Attributes:
        peak: Floating-point operations per second of one large matrix product.
        peak_dtype: Type of its factors.
        gflop_needed: 1e9 operations per pair that the task needs: frozen weights, nothing twice.
        seconds_alone: Seconds per pair of the same operations, each of their shapes alone.
    """

    peak: float
    peak_dtype: str
    gflop_needed: float
    seconds_alone: float


@dataclass(frozen=True)
class Row:
    """One way of doing something, measured.

    Attributes:
        name: Short name: B0, B1, B2, ours, ...
        what: What it is, in a line.
        pairs: Pairs (or pictures, or epochs: see ``unit``) that were done.
        unit: What ``pairs`` counts.
        seconds: Of each repeat.
        warm_up: Seconds of the first run, not among them.
        peak_bytes: Most memory held beyond what was held before: by the allocator on a GPU, in
            tensors of one step elsewhere; None where not known.
        samples: Rows through the denoiser.
        gflop: 1e9 floating-point operations per pair as this way does it; None where not counted.
        peak_share: Operations that the task needs, over what the measured peak would do in the
            time it took; so a way that does needless work gets no credit for it.
        alone_share: Time that the operations take alone over the time it took.
        values: Further results, by name.
        skipped: Why it was not measured; empty where it was.
    """

    name: str
    what: str
    pairs: int = 0
    unit: str = "pair"
    seconds: tuple[float, ...] = ()
    warm_up: float = 0.0
    peak_bytes: int | None = None
    samples: int = 0
    gflop: float | None = None
    peak_share: float | None = None
    alone_share: float | None = None
    values: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""

    @property
    def median(self) -> float:
        """Median seconds of a repeat; NaN without any."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    @property
    def per_pair(self) -> float:
        """Median seconds per pair."""
        return self.median / max(self.pairs, 1)

    @property
    def samples_per_second(self) -> float | None:
        """Rows through the denoiser per second; None where they were not counted."""
        return self.samples / self.median if self.samples and self.seconds else None


@dataclass(frozen=True)
class Family:
    """Ways of doing one thing, measured in turn in one process.

    Attributes:
        name: ``attack``, ``sampling``, ...
        title: What is compared, in a line.
        rows: The ways, the reference first.
        settings: What was measured at: pairs, steps, repeats.
        limits: What the machine could do; None where that was not measured.
        load: Load average of the machine before and after, of the last minute: above the threads
            that are used, others were at work and the seconds are no figures.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    limits: Limits | None = None
    load: tuple[float, float] = (0.0, 0.0)

    def row(self, name: str) -> Row | None:
        """The row of a name that was measured, if there is one."""
        return next((row for row in self.rows if row.name == name and row.seconds), None)

    def as_json(self) -> dict[str, Any]:
        """As plain containers, with medians and ratios for readers of the file."""
        reference = next((row for row in self.rows if row.seconds), None)
        rows = []
        for row in self.rows:
            derived: dict[str, Any] = {}
            if row.seconds:
                derived = {
                    "median_seconds": row.median,
                    "seconds_per_pair": row.per_pair,
                    "samples_per_second": row.samples_per_second,
                    "times_as_fast_as_first": (
                        reference.per_pair / row.per_pair if reference and row.per_pair else None
                    ),
                }
            rows.append({**asdict(row), **derived})
        return {**asdict(self), "rows": rows}


def row_of(name: str, what: str, timed: Timed, **more: Any) -> Row:
    """A row from what was timed.

    Args:
        name: Short name.
        what: What it is.
        timed: What it took.
        **more: Further fields.
    """
    return Row(
        name,
        what,
        seconds=timed.seconds,
        warm_up=timed.warm_up,
        peak_bytes=timed.peak_bytes,
        **more,
    )


_DERIVED = ("median_seconds", "seconds_per_pair", "samples_per_second", "times_as_fast_as_first")


def family_of(path: Path) -> Family:
    """Read what ``Family.as_json`` gave.

    Raises:
        InputError: The file is no such.
    """
    try:
        held: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
        rows = tuple(
            Row(
                **{
                    **{key: value for key, value in row.items() if key not in _DERIVED},
                    "seconds": tuple(row["seconds"]),
                }
            )
            for row in held["rows"]
        )
        limits = Limits(**held["limits"]) if held["limits"] else None
        load = (float(held["load"][0]), float(held["load"][1]))
        return Family(held["name"], held["title"], rows, held["settings"], limits, load)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read: {error!r}\n  mend:  remove it, and it is measured again"
        ) from error
