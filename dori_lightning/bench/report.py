"""What a measurement of speed says, as it is written to ``bench.json`` and read back."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter, StrMethodFormatter
from rich.markup import escape
from rich.table import Table

from dori_lightning.bench.measure import Timed
from dori_lightning.report.figures import (
    CALM,
    GROUND,
    KIND_LOOK,
    TEXT,
    new_figure,
    plain_axes,
    png_bytes,
    styled,
)
from dori_lightning.types import InputError

# -------- figure
# The figure of a measurement of speed: the ladder, the other parts, and growth.

_LADDERS = {"attack": "attack", "sd14": "attack, SD 1.4's shape"}
_PARTS = {
    "sampling": "drawing",
    "nemo": "NeMo",
    "wanda": "Wanda",
    "finetuning": "tuning epoch",
}


def speed_figure(families: Mapping[str, Family]) -> bytes | None:
    """Draw what was measured; None where there is nothing to draw.

    Args:
        families: By name.
    """
    panels: list[tuple[str, Callable[[Axes], None]]] = []
    for name, title in _LADDERS.items():
        family = families.get(name)
        if family is not None and any(row.seconds for row in family.rows):
            panels.append((f"{title}: seconds per pair", _ladder(family)))
            if family.limits is not None:
                panels.append((f"{title}: share of the limits", _shares(family)))
    parts = [families[name] for name in _PARTS if name in families]
    if any(row.seconds for family in parts for row in family.rows):
        panels.append(("other parts: times as fast as the first way", _ratios(parts)))
    growth = families.get("scaling")
    if growth is not None:
        panels.append(("growth: cost per pair", _growth(growth)))
    if not panels:
        return None
    with styled():
        columns = min(len(panels), 2)
        lines = -(-len(panels) // columns)
        figure = new_figure(10.4, 2.9 * lines)
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, draw) in zip(grid.flat, panels, strict=False):
            plain_axes(axes)
            draw(axes)
            axes.set_title(title)
        return png_bytes(figure)


def _measured(family: Family) -> list[Row]:
    return [row for row in family.rows if row.seconds]


def _colour(row: Row) -> str:
    return KIND_LOOK["vm"][0] if row.name == "ours" else CALM


def _ladder(family: Family) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for place, row in enumerate(_measured(family)):
            low, high = (f(row.seconds) / row.pairs for f in (min, max))
            axes.bar(place, row.per_pair, width=0.62, color=_colour(row))
            axes.plot([place, place], [low, high], color=TEXT, linewidth=1.4)
            axes.annotate(
                f"{row.per_pair:.3g}", (place, high), xytext=(0, 3), ha="center",
                textcoords="offset points", fontsize=9,
            )  # fmt: skip
        _name(axes, family)
        axes.margins(y=0.15)

    return draw


def _shares(family: Family) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for place, row in enumerate(_measured(family)):
            for share, marker, filled in (
                (row.peak_share, "o", True), (row.alone_share, "s", False),
            ):  # fmt: skip
                if share is not None:
                    axes.plot(
                        place, share, marker=marker, linestyle="none", markersize=7,
                        color=_colour(row), clip_on=False,
                        markerfacecolor=_colour(row) if filled else GROUND,
                    )  # fmt: skip
        axes.axhline(1.0, color=CALM, linewidth=0.8, linestyle=":")
        axes.set_ylim(0, None)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("filled: one large product; open: its own layers alone", fontsize=9)
        _name(axes, family)

    return draw


def _name(axes: Axes, family: Family) -> None:
    names = [row.name for row in _measured(family)]
    axes.set_xticks(range(len(names)), names)


def _ratios(parts: list[Family]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        labels: list[str] = []
        for family in parts:
            rows = _measured(family)
            for row in rows[1:]:
                place = len(labels)
                ratio = rows[0].per_pair / row.per_pair
                axes.bar(place, ratio, width=0.62, color=KIND_LOOK["vm"][0])
                axes.annotate(
                    f"{ratio:.3g}", (place, ratio), xytext=(0, 3), ha="center",
                    textcoords="offset points", fontsize=9,
                )  # fmt: skip
                labels.append(f"{_PARTS[family.name]}\n{row.name}")
        axes.axhline(1.0, color=CALM, linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(labels)), labels, fontsize=9)
        axes.margins(y=0.18)

    return draw


def _growth(family: Family) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        ticks: set[int] = set()
        for word, marker, colour in (
            ("pairs", "o", KIND_LOOK["vm"][0]),
            ("budget", "s", KIND_LOOK["tm"][0]),
        ):
            points = [
                (int(row.name.split()[0]), row.per_pair)
                for row in _measured(family)
                if row.name.split()[1].startswith(word)
            ]
            if points:
                first = points[0][1]
                axes.plot(
                    [n for n, _ in points], [cost / first for _, cost in points],
                    marker=marker, color=colour, label=f"number of {word.rstrip('s')}s",
                )  # fmt: skip
                ticks.update(n for n, _ in points)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axes.set_ylim(0, None)
        axes.set_ylabel("times the first")
        axes.legend(loc="lower right")

    return draw


# -------- record


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
            f"{path} cannot be read: {error!r}\n  fix:   remove it, and it is measured again"
        ) from error


# -------- settings
# What a measurement of speed measures, and at which sizes.

FAMILIES = (
    "attack",
    "sampling",
    "nemo",
    "wanda",
    "finetuning",
    "audit",
    "startup",
    "scaling",
    "sd14",
)


@dataclass(frozen=True)
class ShapeSettings:
    """The attack on Stable Diffusion 1.4's architecture with random weights.

    Attributes:
        latent: Side of a latent; 64 is the checkpoint's own, 512 pixels.
        pairs: Pairs attacked.
        steps: Steps of the attack.
        noise_batch: Noise samples of a step.
        repeats: Timed rounds.
        dtype: ``bf16``: weights in it. ``fp32``: weights in it, autocast to bf16 where there is a
            GPU, as a loaded checkpoint has them.
        compile: Whether the compiled row is among them: minutes of warm-up on a CPU.
    """

    latent: int = 64
    pairs: int = 8
    steps: int = 1
    noise_batch: int = 8
    repeats: int = 3
    dtype: str = "bf16"
    compile: bool = False

    def __post_init__(self) -> None:
        _at_least_one(self, "task.sd14", "pairs", "steps", "noise_batch", "repeats")
        if self.latent < 8 or self.latent % 8:
            raise InputError(f"task.sd14.latent must be a multiple of 8, got {self.latent}")
        if self.dtype not in ("bf16", "fp32"):
            raise InputError(f"task.sd14.dtype must be bf16 or fp32, got {self.dtype!r}")


@dataclass(frozen=True)
class BenchSettings:
    """What is measured, and how often.

    Attributes:
        rows: Families to measure, in this order.
        repeats: Timed rounds of the families that are short; the others say their own number.
        pairs: Pairs that are attacked.
        steps: Steps of an attack that is timed; its time is the same at every step.
        noise_batch: Noise samples of a step.
        quality_pairs: Of these, how many are attacked once more with each way for
            ``quality_steps`` steps, untimed, and drawn from: loss and memorization rate. 0: none.
        quality_steps: See there.
        threshold: Similarity by the deciding descriptor above which a picture is a copy.
        compile: Whether the compiled rows are among them.
        sampling_pairs: Pairs that pictures are drawn of.
        nemo_pairs: Pairs that NeMo searches neurons for.
        nemo_repeats: Timed rounds of that.
        wanda_pairs: Pairs that Wanda makes masks for.
        finetuning_pairs: Pairs that an epoch of adversarial fine-tuning forgets.
        finetuning_updates: Optimizer steps that are timed; the epoch's time is made from them.
        audit_pairs: Pairs of the whole audit.
        audit_steps: Its attack's steps.
        startup_repeats: Starts of a program that are timed.
        scaling_pairs: Numbers of pairs that are attacked at once.
        scaling_budgets: Numbers of budgets that are read off one attack.
        scaling_steps: Steps of these attacks.
        scaling_repeats: Timed rounds of these.
        sd14: The attack on Stable Diffusion 1.4's architecture.
    """

    rows: tuple[str, ...] = FAMILIES
    repeats: int = 5
    pairs: int = 16
    steps: int = 4
    noise_batch: int = 8
    quality_pairs: int = 8
    quality_steps: int = 50
    threshold: float = 0.62
    compile: bool = True
    sampling_pairs: int = 8
    nemo_pairs: int = 16
    nemo_repeats: int = 3
    wanda_pairs: int = 8
    finetuning_pairs: int = 8
    finetuning_updates: int = 10
    audit_pairs: int = 8
    audit_steps: int = 10
    startup_repeats: int = 3
    scaling_pairs: tuple[int, ...] = (4, 8, 16, 32, 64)
    scaling_budgets: tuple[int, ...] = (1, 2, 4, 8)
    scaling_steps: int = 8
    scaling_repeats: int = 3
    sd14: ShapeSettings = field(default_factory=ShapeSettings)

    def __post_init__(self) -> None:
        for name in ("rows", "scaling_pairs", "scaling_budgets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        unknown = [name for name in self.rows if name not in FAMILIES]
        if unknown or not self.rows or len(set(self.rows)) != len(self.rows):
            raise InputError(
                f"task.rows must be different ones of {', '.join(FAMILIES)}, "
                f"got {', '.join(map(str, self.rows)) or 'none'}"
            )
        _at_least_one(
            self, "task", "repeats", "pairs", "steps", "noise_batch", "quality_steps",
            "sampling_pairs", "nemo_pairs", "nemo_repeats", "wanda_pairs", "finetuning_pairs",
            "finetuning_updates", "audit_pairs", "audit_steps", "startup_repeats",
            "scaling_steps", "scaling_repeats",
        )  # fmt: skip
        if not 0 <= self.quality_pairs <= self.pairs:
            raise InputError(
                f"task.quality_pairs must be in 0..task.pairs, got {self.quality_pairs}"
            )
        for name in ("scaling_pairs", "scaling_budgets"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise InputError(f"task.{name} must be numbers >= 1, got {getattr(self, name)}")
        if "scaling" in self.rows and max(self.scaling_budgets) > self.scaling_steps:
            raise InputError(
                f"task.scaling_budgets are snapshots of one attack: at most task.scaling_steps="
                f"{self.scaling_steps} of them, got {max(self.scaling_budgets)}"
            )


def _at_least_one(settings: Any, where: str, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise InputError(f"{where}.{name} must be >= 1, got {getattr(settings, name)}")


# -------- tables
# The table of a measurement of speed, for the console and for a record.


def _spread(row: Row) -> str:
    low, high = min(row.seconds), max(row.seconds)
    return f"{row.per_pair:.4g} [{low / row.pairs:.4g}, {high / row.pairs:.4g}]"


def _ratio(row: Row, first: Row | None) -> str:
    return f"{first.per_pair / row.per_pair:.2f}" if first is not None and row.per_pair else "-"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _memory(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f}"


def _values(row: Row) -> str:
    parts = []
    for name, value in row.values.items():
        if name == "memorization":
            low, high = value["ci95"]
            parts.append(f"MR {value['hits']}/{value['n']} [{low:.0%}, {high:.0%}]")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            parts.append(f"{name.replace('_', ' ')} {shown}")
    return "; ".join(parts)


_COLUMNS: tuple[tuple[str, Callable[[Row, Row | None], str]], ...] = (
    ("way", lambda row, _: row.name),
    ("s per unit, median [min, max]", lambda row, _: _spread(row)),
    ("times as fast", _ratio),
    ("samples/s", lambda row, _: _number(row.samples_per_second)),
    ("GFLOP", lambda row, _: _number(row.gflop)),
    ("of peak", lambda row, _: _share(row.peak_share)),
    ("of layers alone", lambda row, _: _share(row.alone_share)),
    ("MiB", lambda row, _: _memory(row.peak_bytes)),
    ("warm-up s", lambda row, _: f"{row.warm_up:.3g}" if row.warm_up else "-"),
    ("found", lambda row, _: _values(row)),
)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


def _cells(family: Family) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the columns that say anything."""
    # speed-ups are against the fair loop; only fine-tuning has no such, and two methods of its own
    first = family.row("B1") or family.row("paper")
    rows = [
        [column(row, first) for _, column in _COLUMNS]
        if row.seconds
        else [row.name, f"not measured: {row.skipped}", *["-"] * (len(_COLUMNS) - 2)]
        for row in family.rows
    ]
    kept = [
        k for k in range(len(_COLUMNS)) if k < 2 or any(row[k] not in ("-", "") for row in rows)
    ]
    return [_COLUMNS[k][0] for k in kept], [[row[k] for k in kept] for row in rows]


def family_table(family: Family) -> Table:
    """Table for the console."""
    table = Table(title=family.title, title_justify="left")
    headings, rows = _cells(family)
    for heading in headings:
        left = heading in (_COLUMNS[0][0], _COLUMNS[-1][0])
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for cells in rows:
        table.add_row(*map(escape, cells))
    return table


def markdown(families: list[Family]) -> str:
    """The same tables as Markdown, a heading each."""
    parts = []
    for family in families:
        headings, cells = _cells(family)
        head, rule = " | ".join(headings), " | ".join("---" for _ in headings)
        rows = "\n".join(f"| {' | '.join(own)} |" for own in cells)
        ways = "\n".join(f"- {row.name}: {row.what}" for row in family.rows)
        parts.append(f"## {family.title}\n\n| {head} |\n| {rule} |\n{rows}\n\n{ways}\n")
    return "\n".join(parts)
