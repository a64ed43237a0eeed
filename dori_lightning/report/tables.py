"""The cells as a table, for the console and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from rich.markup import escape as plain_text
from rich.table import Table

from dori_lightning.report.comparison import SOURCES, Attacked, Comparison, Figure, HeadlineRow
from dori_lightning.report.findings import Paired
from dori_lightning.report.record import parquet_bytes
from dori_lightning.report.words import escape, interval_words, percent_words
from dori_lightning.types import INITS, KINDS, Cell, Init, Kind

# -------- headline_files
# The headline and its cells as parquet, for whoever computes on.

_CELL = ("hits", "n", "failed")
_CELL_NUMBERS = ("mr", "mr_low", "mr_high", "similarity_median", "similarity_mad")
_TEST = ("lost", "gained")
_PRICE = ("loss_ratio", "loss_ratio_low", "loss_ratio_high", "kid", "kid_std",
          "unet_evaluations", "seconds", "weights_changed")  # fmt: skip
_PUBLISHED = ("prompt", "attacked", "control_prompt", "control_attacked")


def headline_parquet(rows: Sequence[HeadlineRow]) -> bytes:
    """Serialise the table, one row for one mitigation within one ball.

    Columns of a cell are ``{kind}_{prompt or dori_INIT}_{hits, n, failed, mr, mr_low, ...}``,
    those of the suspected images' tests ``{condition}_vs_{none or prompt}_{lost, gained, p}``,
    with ``p_holm`` against none. ``invalid`` names what makes a row's audits invalid.
    Null: not measured, or not published.
    """
    return parquet_bytes([_headline(row) for row in rows], _headline_schema())


def cells_parquet(comparison: Comparison) -> bytes:
    """Serialise every cell under its checkpoint's one threshold, one row each."""
    columns: dict[str, pa.DataType] = {
        **dict.fromkeys(
            ("checkpoint", "mitigation", "kind", "attack", "init", "norm"), pa.string()
        ),
        "eps": pa.float64(),
        "steps": pa.int64(),
        **dict.fromkeys(_CELL, pa.int64()),
        **dict.fromkeys(_CELL_NUMBERS, pa.float64()),
        "descriptor": pa.string(),
        "threshold": pa.float64(),
        "aggregation": pa.string(),
    }
    rows = [
        {
            "checkpoint": cell.checkpoint,
            "mitigation": cell.mitigation,
            "kind": cell.kind,
            "attack": cell.condition.attack,
            "init": cell.condition.init,
            "norm": cell.condition.budget.norm,
            "eps": cell.condition.budget.eps,
            "steps": cell.condition.budget.steps,
            **_cell("", cell),
            "descriptor": cell.descriptor,
            "threshold": cell.threshold,
            "aggregation": cell.aggregation,
        }
        for cell in comparison.cells
    ]
    return parquet_bytes(rows, columns)


def _headline(row: HeadlineRow) -> dict[str, Any]:
    cost = row.cost
    values: dict[str, Any] = {
        "checkpoint": row.checkpoint,
        "mitigation": row.mitigation,
        "norm": row.norm,
        "eps": row.eps,
        "steps": row.steps,
        "invalid": ", ".join(row.invalid) or None,
        **_cell("vm_prompt_", row.prompt_vm),
        **_cell("tm_prompt_", row.prompt_tm),
        **_cell("control_prompt_", row.prompt_control),
        **_test("prompt_vs_none_", row.against_none),
        "prompt_vs_none_p_holm": row.against_none_holm,
        **dict(
            zip(
                _PRICE,
                (cost.loss_ratio, *cost.loss_ratio_ci95, cost.kid, cost.kid_std,
                 cost.unet_evaluations, cost.seconds, cost.changed),
                strict=True,
            )
        ),
    }  # fmt: skip
    for attack in row.attacks:
        name = f"dori_{attack.init}"
        for kind in KINDS:
            values |= _cell(f"{kind}_{name}_", getattr(attack, kind))
        values |= _test(f"{name}_vs_none_", attack.against_none)
        values[f"{name}_vs_none_p_holm"] = attack.against_none_holm
        values |= _test(f"{name}_vs_prompt_", attack.against_prompt)
    if row.published is not None:
        values |= {"published_row": row.published.row, "published_model": row.published.model}
        for name in _PUBLISHED:
            figure = getattr(row.published, name)
            if figure is not None:
                values |= {
                    f"published_{name}_mr": figure.rate,
                    f"published_{name}_similarity": figure.similarity,
                    f"published_{name}_source": figure.source,
                }
    return values


def _headline_schema() -> dict[str, pa.DataType]:
    columns: dict[str, pa.DataType] = {
        **dict.fromkeys(("checkpoint", "mitigation", "norm"), pa.string()),
        "eps": pa.float64(),
        "steps": pa.int64(),
        "invalid": pa.string(),
    }
    conditions = ("prompt", *(f"dori_{init}" for init in INITS))
    for kind in KINDS:
        for condition in conditions:
            columns |= {f"{kind}_{condition}_{name}": pa.int64() for name in _CELL}
            columns |= {f"{kind}_{condition}_{name}": pa.float64() for name in _CELL_NUMBERS}
    for condition in conditions:
        for other in ("none", "prompt"):
            if condition != other:
                columns |= {f"{condition}_vs_{other}_{name}": pa.int64() for name in _TEST}
                columns[f"{condition}_vs_{other}_p"] = pa.float64()
        columns[f"{condition}_vs_none_p_holm"] = pa.float64()
    columns |= dict.fromkeys(_PRICE, pa.float64())
    columns |= {"published_row": pa.string(), "published_model": pa.string()}
    for name in _PUBLISHED:
        columns |= {f"published_{name}_{n}": pa.float64() for n in ("mr", "similarity")}
        columns[f"published_{name}_source"] = pa.string()
    return columns


def _cell(prefix: str, cell: Cell | None) -> dict[str, Any]:
    if cell is None:
        return {}
    low, high = cell.mr_ci95
    values = (cell.hits, cell.n, cell.failed, cell.mr, low, high,
              cell.similarity_median, cell.similarity_mad)  # fmt: skip
    names = (*_CELL, *_CELL_NUMBERS)
    return {f"{prefix}{name}": value for name, value in zip(names, values, strict=True)}


def _test(prefix: str, test: Paired | None) -> dict[str, Any]:
    if test is None:
        return {}
    return {f"{prefix}lost": test.lost, f"{prefix}gained": test.gained, f"{prefix}p": test.p}


# -------- headline_tables
# The headline as three small tables of text: what comes back, checks and cost, paired tests.

NOTHING = "-"
_INIT_WORDS: dict[Init, str] = {
    "prompt": "+ DoRI",
    "random": "+ DoRI, random start",
    "control_prompt": "+ DoRI, unrelated start",
}


@dataclass(frozen=True)
class TextTable:
    """A table of text.

    Attributes:
        title: What it shows.
        caption: How to read it.
        header: Column names; the first ``named`` ones name the row.
        rows: As many texts each.
        named: Columns that name the row; the others hold numbers.
    """

    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    named: int


def headline_tables(rows: Sequence[HeadlineRow]) -> tuple[TextTable, ...]:
    """Write the rows as text; columns that hold nothing in any row are left out."""
    names = _name_columns(rows)
    inits = [i for i in INITS if any(a.init == i for row in rows for a in row.attacks)]
    back: dict[str, Callable[[HeadlineRow], str]] = {"prompt": lambda r: cell_words(r.prompt_vm)}
    for init in inits:
        back[_INIT_WORDS[init]] = _of_attack(init, lambda a: cell_words(a.vm))
    back["paper: prompt"] = lambda r: _figure(r.published.prompt if r.published else None)
    back["paper: + DoRI"] = lambda r: _figure(r.published.attacked if r.published else None)

    checks: dict[str, Callable[[HeadlineRow], str]] = {
        "similarity": lambda r: _pair(_similarity(r.prompt_vm), _main(r, "vm", _similarity)),
        "templates": lambda r: _pair(short_words(r.prompt_tm), _main(r, "tm", short_words)),
        "controls": lambda r: _pair(
            short_words(r.prompt_control), _main(r, "control", short_words)
        ),
        "denoising loss": lambda r: _ratio(r.cost.loss_ratio, r.cost.loss_ratio_ci95),
        "KID": lambda r: _plain(r.cost.kid, ".4f"),
        "UNet evaluations": lambda r: _plain(r.cost.unet_evaluations, ",.0f"),
        "seconds": lambda r: _plain(r.cost.seconds, ",.0f"),
        "weights changed": lambda r: _plain(r.cost.changed, ",.0f"),
    }
    tests: dict[str, Callable[[HeadlineRow], str]] = {
        "prompt, against none": lambda r: _test_headline_tables(
            r.against_none, r.against_none_holm
        )
    }
    for init in inits:
        tests[f"{_INIT_WORDS[init]}, against none"] = _of_attack(
            init, lambda a: _test_headline_tables(a.against_none, a.against_none_holm)
        )
        tests[f"{_INIT_WORDS[init]}, against its prompt"] = _of_attack(
            init, lambda a: _test_headline_tables(a.against_prompt, math.nan)
        )
    made = (
        _table(
            "What comes back",
            "Suspected images (vm) reproduced, of those measured: share and 95 % Wilson "
            "interval. Paper: Stable Diffusion, other images, another descriptor; a direction, "
            "no target.",
            names, back, rows,
        ),
        _table(
            "Checks and cost",
            "From prompts → by the attack. Similarity: median over suspected images. Controls "
            "must stay at 0, or the attack paints. Denoising loss: on ordinary prompts, times "
            "that of the unmitigated model. UNet evaluations and seconds: to find the edit.",
            names, checks, rows,
        ),
        _table(
            "Paired tests",
            "Suspected images lost and gained against the compared condition, and the exact "
            "McNemar p-value; that against none is corrected for the rows of the checkpoint "
            "(Holm).",
            names, tests, rows,
        ),
    )  # fmt: skip
    return tuple(table for table in made if len(table.header) > table.named)


def remarks(comparison: Comparison, rows: Sequence[HeadlineRow]) -> tuple[str, ...]:
    """Say what the tables do not: what is missing, how runs were joined, whose numbers it has."""
    said = [f"Without a result: {name}." for name in comparison.unfinished]
    said += [f"Missing: {text}." for text in comparison.missing]
    said += [
        f"INVALID: the audit of {entry.label} on {entry.checkpoint}, so what did not come back "
        f"there says nothing. {' '.join(flag.text for flag in entry.invalid)}"
        for entry in comparison.entries
        if entry.invalid
    ]
    said += comparison.notes
    if comparison.prunings is not None:
        p = comparison.prunings
        said.append(
            f"Edits: {p.made} made, {p.reused} read from the cache, {p.distinct} different ones."
        )
    sources = dict.fromkeys(
        figure.source
        for row in rows
        if row.published
        for figure in (row.published.prompt, row.published.attacked)
        if figure
    )
    if sources:
        models = dict.fromkeys(row.published.model for row in rows if row.published)
        listed = "; ".join(f"{source}: {SOURCES[source]}" for source in sources)
        said.append(f"The paper's numbers are of {', '.join(models)}. {listed}.")
    return tuple(said)


def rich_table(table: TextTable) -> Table:
    """Build a table for the console."""
    made = Table(title=table.title, title_justify="left", caption=table.caption)
    made.caption_justify = "left"
    for place, name in enumerate(table.header):
        if place < table.named:  # a row whose name is cut cannot be told from another
            widest = max(len(text) for text in (name, *(row[place] for row in table.rows)))
            made.add_column(name, min_width=widest)
        else:
            made.add_column(name, justify="right")
    for row in table.rows:
        made.add_row(*map(plain_text, row))
    return made


def tables_markdown(tables: Iterable[TextTable], said: Iterable[str]) -> str:
    """Write tables and remarks as Markdown."""
    parts = []
    for table in tables:
        rule = ["---" if place < table.named else "---:" for place in range(len(table.header))]
        rows = [_cells(row, table.named) for row in table.rows]
        lines = [_cells(table.header, table.named), rule, *rows]
        body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        parts.append(f"### {table.title}\n\n{body}\n{table.caption}\n")
    listed = "".join(f"- {escape(text)}\n" for text in said)
    return "\n".join([*parts, listed] if listed else parts)


def cell_words(cell: Cell | None) -> str:
    """Write a cell with its interval: ``3/16  19 % [7, 43]``, and what failed."""
    if cell is None:
        return NOTHING
    if cell.n == 0:
        return f"0/0 +{cell.failed} failed"
    low, high = (percent_words(bound).removesuffix(" %") for bound in cell.mr_ci95)
    failed = f" +{cell.failed} failed" if cell.failed else ""
    return f"{cell.hits}/{cell.n}{failed}  {percent_words(cell.mr)} [{low}, {high}]"


def short_words(cell: Cell | None) -> str:
    """Write a cell's counts: ``3/16``, and what failed."""
    if cell is None:
        return NOTHING
    return f"{cell.hits}/{cell.n}" + (f" +{cell.failed} failed" if cell.failed else "")


def ball_words(row: HeadlineRow) -> str:
    """Write the attack's budget: ``50 steps`` or ``50 steps, l2 3.2``."""
    if not row.attacks:
        return "no attack"
    radius = "" if row.norm == "none" else f", {row.norm} {row.eps:.3g}"
    return f"{row.steps} step{'' if row.steps == 1 else 's'}{radius}"


def _name_columns(rows: Sequence[HeadlineRow]) -> dict[str, Callable[[HeadlineRow], str]]:
    columns: dict[str, Callable[[HeadlineRow], str]] = {}
    if len({row.checkpoint for row in rows}) > 1:
        columns["checkpoint"] = lambda r: r.checkpoint
    columns["mitigation"] = lambda r: r.mitigation + (" (INVALID)" if r.invalid else "")
    if len({ball_words(row) for row in rows}) > 1:
        columns["attack"] = ball_words
    return columns


def _table(
    title: str,
    caption: str,
    names: dict[str, Callable[[HeadlineRow], str]],
    columns: dict[str, Callable[[HeadlineRow], str]],
    rows: Sequence[HeadlineRow],
) -> TextTable:
    written = {name: [write(row) for row in rows] for name, write in columns.items()}
    filled = {name: texts for name, texts in written.items() if set(texts) != {NOTHING}}
    named = {name: [write(row) for row in rows] for name, write in names.items()}
    everything = {**named, **filled}
    return TextTable(
        title,
        caption,
        tuple(everything),
        tuple(zip(*everything.values(), strict=True)),
        len(names),
    )


def _of_attack(init: Init, write: Callable[[Attacked], str]) -> Callable[[HeadlineRow], str]:
    def text(row: HeadlineRow) -> str:
        attack = next((a for a in row.attacks if a.init == init), None)
        return NOTHING if attack is None else write(attack)

    return text


def _main(row: HeadlineRow, kind: Kind, write: Callable[[Cell | None], str]) -> str:
    """Write a kind's cell under the row's main attack."""
    return NOTHING if row.main is None else write(getattr(row.main, kind))


def _pair(before: str, after: str) -> str:
    return NOTHING if before == after == NOTHING else f"{before} → {after}"


def _similarity(cell: Cell | None) -> str:
    if cell is None or math.isnan(cell.similarity_median):
        return NOTHING
    return f"{cell.similarity_median:.2f}"


def _figure(figure: Figure | None) -> str:
    return NOTHING if figure is None else f"{percent_words(figure.rate)} {figure.source}"


def _ratio(value: float, interval: tuple[float, float]) -> str:
    if math.isnan(value):
        return NOTHING
    known = not any(math.isnan(bound) for bound in interval)
    bounds = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if known else ""
    return f"× {value:.3f}{bounds}"


def _plain(value: float, form: str) -> str:
    return NOTHING if math.isnan(value) else format(value, form)


def _test_headline_tables(test: Paired | None, corrected: float) -> str:
    if test is None:
        return NOTHING
    p = test.p if math.isnan(corrected) else corrected
    return f"-{test.lost} +{test.gained}  p {_p(p)}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _cells(line: Sequence[str], named: int) -> list[str]:
    """A line's cells; names come from other people's runs, numbers do not."""
    return [escape(text) if place < named else text for place, text in enumerate(line)]


# -------- tables

_HEADER = (
    "kind",
    "attack",
    "init",
    "budget",
    "n",
    "MR (95 % interval)",
    "similarity",
    "threshold",
)
_NUMERIC = {"n", "MR (95 % interval)", "similarity", "threshold"}


def ranked_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Sort cells by mitigation as they come, then by kind, attack and budget."""
    order = list(dict.fromkeys(cell.mitigation for cell in cells))
    return sorted(
        cells,
        key=lambda cell: (
            order.index(cell.mitigation),
            KINDS.index(cell.kind),
            cell.condition.attack == "dori",
            cell.condition.init or "",
            cell.condition.budget.norm,
            cell.condition.budget.eps or 0.0,
            cell.condition.budget.steps,
        ),
    )


def cell_rows(cells: Sequence[Cell]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Format cells as text: the header, and one row per cell in the order of ``ranked_cells``.

    The column ``mitigation`` appears only where the cells differ in it. ``n`` names failed pairs
    beside the denominator. ``similarity`` is the median over pairs with its median absolute
    deviation.
    """
    ranked = ranked_cells(cells)
    rows = [_row(cell) for cell in ranked]
    if len({cell.mitigation for cell in cells}) < 2:
        return _HEADER, rows
    named = zip(ranked, rows, strict=True)
    return ("mitigation", *_HEADER), [(cell.mitigation, *row) for cell, row in named]


def _row(cell: Cell) -> tuple[str, ...]:
    budget = cell.condition.budget
    radius = "" if budget.norm == "none" else f", {budget.norm} {budget.eps:g}"
    steps = f"{budget.steps} step{'' if budget.steps == 1 else 's'}"
    if cell.counted == "up_to_budget":
        steps = f"up to {steps}"
    similarity = (
        "n/a"
        if math.isnan(cell.similarity_median)
        else f"{cell.similarity_median:.2f} ± {cell.similarity_mad:.2f}"
    )
    interval = "" if cell.n == 0 else f" ({interval_words(cell.mr_ci95)})"
    return (
        cell.kind,
        cell.condition.attack,
        cell.condition.init or "-",
        f"{steps}{radius}" if cell.condition.attack == "dori" else "-",
        f"{cell.hits}/{cell.n}" + (f" +{cell.failed} failed" if cell.failed else ""),
        f"{percent_words(cell.mr)}{interval}",
        similarity,
        f"{cell.threshold:.2f}",
    )


def cells_table(cells: Sequence[Cell], *, title: str | None = None) -> Table:
    """Build the one table that the console shows at the end."""
    header, rows = cell_rows(cells)
    table = Table(title=title, title_justify="left")
    for name in header:
        label = "hits/n" if name == "n" else name
        table.add_column(
            label, justify="right" if name in _NUMERIC else "left", no_wrap=name != "budget"
        )
    for row in rows:
        table.add_row(*map(plain_text, row))
    return table


def cells_markdown(cells: Sequence[Cell]) -> str:
    """Build the same table as Markdown."""
    header, rows = cell_rows(cells)
    labels = ["hits/n" if name == "n" else name for name in header]
    rule = ["---:" if name in _NUMERIC else "---" for name in header]
    lines = [labels, rule, *([text.replace("|", "\\|") for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
