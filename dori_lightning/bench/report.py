"""The table and the figure of a measurement of speed."""

from collections.abc import Sequence

from dori_lightning.bench.attack import ALONE
from dori_lightning.bench.measure import Family, Row
from dori_lightning.report.figures import (
    CALM,
    KIND_LOOK,
    new_figure,
    plain_axes,
    png_bytes,
    styled,
)
from dori_lightning.report.tables import TextTable, markdown_table

_COLUMNS = (
    "part", "way", "s per pair, median [min, max]", "times as fast as B1", "of layers alone",
    "of peak", "samples/s", "MiB", "MiB planned", "warm-up s", "result",
)  # fmt: skip


def markdown(families: Sequence[Family]) -> str:
    """All families in one Markdown table, with what each way is below it."""
    rows = tuple(_cells(family, row) for family in families for row in family.rows)
    lines = [markdown_table(TextTable("", "", _COLUMNS, rows, named=2))]
    for family in families:
        peak = f"; peak {family.peak / 1e12:.3g} TFLOP/s" if family.peak else ""
        lines.append(f"- **{family.name}**: {family.title}{peak}")
        lines += [f"  - {row.name}: {row.what}" for row in family.rows]
    return "\n".join([*lines, ""])


def _cells(family: Family, row: Row) -> tuple[str, ...]:
    if not row.seconds:
        empty = ("",) * (len(_COLUMNS) - 3)
        return (family.name, row.name, f"not measured: {row.skipped}", *empty)
    low, high = min(row.seconds) / row.pairs, max(row.seconds) / row.pairs
    rate = row.samples / (row.per_pair * row.pairs) if row.samples else None
    return (
        family.name,
        row.name,
        f"{row.per_pair:.4g} [{low:.4g}, {high:.4g}]",
        _number(family.ratio("B1", row), ".2f"),
        _number(family.ratio(ALONE, row), ".0%"),
        _number(family.of_peak(row), ".1%"),
        _number(rate, ",.4g"),
        _number(row.peak_bytes and row.peak_bytes / 2**20, ",.0f"),
        _number(row.planned_bytes and row.planned_bytes / 2**20, ",.0f"),
        _number(row.warm_up or None, ".3g"),
        "; ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in row.values.items()),
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


@styled()
def speed_figure(families: Sequence[Family]) -> bytes | None:
    """Bars of how many times as fast as B1 each way is, as PNG; None where there is none."""
    bars = [
        (f"{family.name}\n{row.name}", ratio, row.name)
        for family in families
        for row in family.measured
        if (ratio := family.ratio("B1", row)) is not None
    ]
    if not bars:
        return None
    labels, ratios, names = zip(*bars, strict=True)
    figure = new_figure(max(4.0, 0.9 * len(bars)), 3.2)
    axes = figure.subplots()
    plain_axes(axes)
    colours = [KIND_LOOK["vm"][0] if name == "ours" else CALM for name in names]
    axes.bar_label(axes.bar(labels, ratios, color=colours), fmt="%.3g", padding=2, fontsize=9)
    axes.axhline(1.0, color=CALM, linewidth=0.8, linestyle=":")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title("times as fast as the fair loop (B1)")
    axes.margins(y=0.15)
    return png_bytes(figure)
