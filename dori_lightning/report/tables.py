"""Tables of cells and of mitigations: as text for console, Markdown and pages, and as parquet."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import pyarrow as pa
from rich.table import Table

from dori_lightning.metrics.statistics import Paired
from dori_lightning.report.claims import Checked
from dori_lightning.report.comparison import (
    OTHERS,
    SOURCES,
    Comparison,
    Figure,
    HeadlineRow,
    Other,
)
from dori_lightning.report.words import (
    NOTHING,
    counts_words,
    escape,
    interval_words,
    number_words,
    percent_words,
    similarity_words,
)
from dori_lightning.runtime.documents import parquet_bytes
from dori_lightning.types import INITS, KINDS, Cell, Init, Kind

_INIT_WORDS: dict[Init, str] = {
    "prompt": "+ DoRI",
    "random": "+ DoRI, random start",
    "control_prompt": "+ DoRI, unrelated start",
}


@dataclass(frozen=True)
class TextTable:
    """A table of text. Pages render it by the macro ``text_table`` of ``parts.html.j2``.

    Attributes:
        header: Column names; the first ``named`` ones name the row.
        rows: As many texts each.
        named: Columns that name the row; the others hold numbers.
    """

    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    named: int


R = TypeVar("R")
Columns = Mapping[str, Callable[[R], str]]
"""Name of each column to what it says of a row."""


def text_table(
    title: str,
    caption: str,
    rows: Sequence[R],
    names: Columns[R],
    values: Columns[R],
    *,
    empty: bool = True,
) -> TextTable:
    """Write rows as text.

    ``names`` are the columns that name a row. ``empty`` keeps those of the ``values`` that hold
    nothing in any row.
    """
    named = {name: [write(row) for row in rows] for name, write in names.items()}
    others = {name: [write(row) for row in rows] for name, write in values.items()}
    kept = {name: texts for name, texts in others.items() if empty or set(texts) != {NOTHING}}
    columns = {**named, **kept}
    lines = tuple(zip(*columns.values(), strict=True))
    return TextTable(title, caption, tuple(columns), lines, named=len(named))


_NARROWEST = 8
"""Characters that a column keeps, however narrow the console."""


def rich_table(table: TextTable) -> Table:
    """Build a table for the console."""
    made = Table(title=table.title or None, title_justify="left", caption=table.caption or None)
    made.caption_justify = "left"
    for place, name in enumerate(table.header):
        widest = max(len(text) for text in (name, *(row[place] for row in table.rows)))
        # a row whose name is cut cannot be told from another: a long one goes on in the next line
        made.add_column(
            name,
            justify="left" if place < table.named else "right",
            overflow="fold",
            min_width=min(widest, _NARROWEST),
        )
    for row in table.rows:
        made.add_row(*row)
    return made


def markdown_table(table: TextTable) -> str:
    """Write the rows of a table as Markdown."""

    def line(texts: Sequence[str]) -> str:
        # names come from other people's runs, numbers do not
        cells = [
            escape(text) if place < table.named and text != NOTHING else text
            for place, text in enumerate(texts)
        ]
        return f"| {' | '.join(cells)} |\n"

    rule = ["---" if place < table.named else "---:" for place in range(len(table.header))]
    return "".join(
        [line(table.header), f"| {' | '.join(rule)} |\n", *(line(row) for row in table.rows)]
    )


def tables_markdown(tables: Iterable[TextTable], said: Iterable[str]) -> str:
    """Write tables with their titles and captions, and remarks, as Markdown."""
    parts = [f"### {t.title}\n\n{markdown_table(t)}\n{t.caption}\n" for t in tables]
    listed = "".join(f"- {escape(text)}\n" for text in said)
    return "\n".join([*parts, listed] if listed else parts)


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


def cells_table(cells: Sequence[Cell], *, title: str = "") -> TextTable:
    """Write an audit's cells, one a row, in the order of ``ranked_cells``.

    The column ``mitigation`` appears only where the cells differ in it. ``hits/n`` names failed
    pairs beside the denominator. ``similarity`` is the median over pairs with its median absolute
    deviation.
    """
    names: dict[str, Callable[[Cell], str]] = {
        "kind": lambda c: c.kind,
        "attack": lambda c: c.condition.attack,
        "init": lambda c: c.condition.init or NOTHING,
        "budget": _spent,
    }
    if len({cell.mitigation for cell in cells}) > 1:
        names = {"mitigation": lambda c: c.mitigation, **names}
    values: dict[str, Callable[[Cell], str]] = {
        "hits/n": counts_words,
        "MR (95 % interval)": lambda c: (
            percent_words(c.mr) + (f" ({interval_words(c.mr_ci95)})" if c.n else "")
        ),
        "similarity": similarity_words,
        "threshold": lambda c: f"{c.threshold:.2f}",
    }
    return text_table(title, "", ranked_cells(cells), names, values)


def _spent(cell: Cell) -> str:
    budget = cell.condition.budget
    if cell.condition.attack != "dori":
        return NOTHING
    radius = "" if budget.norm == "none" else f", {budget.norm} {budget.eps:g}"
    up_to = "up to " if cell.counted == "up_to_budget" else ""
    return f"{up_to}{number_words(budget.steps, 'step')}{radius}"


_UNSAID = (None, "none")


def claims_table(checked: Sequence[Checked]) -> TextTable:
    """Write each recorded claim beside what was measured."""
    return text_table(
        "Recorded claims",
        "",
        checked,
        {"claim": lambda c: ", ".join(str(v) for _, v in c.claim.cell if v not in _UNSAID)},
        {
            "metric": lambda c: c.claim.metric,
            "recorded": lambda c: f"{c.claim.value:g} ± {c.claim.tol:g}",
            "measured": lambda c: (
                "not measured" if math.isnan(c.measured) else f"{c.measured:.4g}"
            ),
            "holds": lambda c: "yes" if c.holds else "NO",
        },
    )


def ball_words(row: HeadlineRow) -> str:
    """Write the attack's budget: ``50 steps`` or ``50 steps, l2 3.2``."""
    if not row.inits:
        return "no attack"
    radius = "" if row.norm == "none" else f", {row.norm} {row.eps:.3g}"
    return f"{number_words(row.steps, 'step')}{radius}"


_Column = Callable[[HeadlineRow], str]


def headline_tables(rows: Sequence[HeadlineRow]) -> tuple[TextTable, ...]:
    """Write the rows as four tables; columns that hold nothing in any row are left out."""
    names: dict[str, _Column] = {}
    if len({row.checkpoint for row in rows}) > 1:
        names["checkpoint"] = lambda r: r.checkpoint
    names["mitigation"] = lambda r: r.mitigation + (" (INVALID)" if r.invalid else "")
    if len({ball_words(row) for row in rows}) > 1:
        names["attack"] = ball_words
    back: dict[str, _Column] = {"prompt": _back(None)}
    tests: dict[str, _Column] = {"prompt, against none": _test(None, "none")}
    for init, name in _INIT_WORDS.items():
        back[name] = _back(init)
        tests[f"{name}, against none"] = _test(init, "none")
        tests[f"{name}, against its prompt"] = _test(init, "prompt")
    back["paper: prompt"] = lambda r: _figure(r.published.prompt if r.published else None)
    back["paper: + DoRI"] = lambda r: _figure(r.published.attacked if r.published else None)
    checks: dict[str, _Column] = {
        "similarity": lambda r: _both(r, "vm", _median),
        "templates": lambda r: _both(r, "tm", counts_words),
        "controls": lambda r: _both(r, "control", counts_words),
        "denoising loss": lambda r: _ratio(r.loss_ratio, r.loss_ratio_ci95),
        "KID": lambda r: _number(r.kid, ".4f"),
        "UNet evaluations": lambda r: _number(r.unet_evaluations, ",.0f"),
        "seconds": lambda r: _number(r.seconds, ",.0f"),
        "weights changed": lambda r: _number(r.weights_changed, ",.0f"),
    }
    work: dict[str, _Column] = {
        "UNet evaluations": _work("unet_evaluations"),
        "prompts encoded": _work("prompts"),
        "images encoded": _work("encoded"),
        "images decoded": _work("decoded"),
    }
    made = (
        text_table(
            "What comes back",
            "Suspected images (vm) reproduced, of those measured: share and 95 % Wilson "
            "interval. Paper: Stable Diffusion, other images, another descriptor; a direction, "
            "no target.",
            rows, names, back, empty=False,
        ),
        text_table(
            "Checks and cost",
            "From prompts → by the attack. Similarity: median over suspected images. Controls "
            "must stay at 0, or the attack paints. Denoising loss: on ordinary prompts, times "
            "that of the unmitigated model. UNet evaluations and seconds: to find the edit.",
            rows, names, checks, empty=False,
        ),
        text_table(
            "Paired tests",
            "Suspected images lost and gained against the compared condition, and the exact "
            "McNemar p-value; that against none is corrected for the rows of the checkpoint "
            "(Holm).",
            rows, names, tests, empty=False,
        ),
        text_table(
            "Work",
            "Rows through each part of the model in all, to find the edit and to audit it. What "
            "jobs of a sweep share is counted in the first that needed it.",
            rows, names, work, empty=False,
        ),
    )  # fmt: skip
    return tuple(table for table in made if len(table.header) > table.named)


def _back(init: Init | None) -> _Column:
    return lambda row: _rate(row.cells.get(("vm", init)))


def _test(init: Init | None, other: Other) -> _Column:
    return lambda row: _test_words(row.tests.get((init, other)))


def _work(name: str) -> _Column:
    return lambda row: _number(row.work.get(name, math.nan), ",.0f")


def _both(row: HeadlineRow, kind: Kind, write: Callable[[Cell | None], str]) -> str:
    """A kind's cell from its prompts, and under the row's main attack."""
    before, after = write(row.prompted(kind)), write(row.attacked(kind))
    return NOTHING if before == after == NOTHING else f"{before} → {after}"


def _rate(cell: Cell | None) -> str:
    """Counts with rate and interval: ``3/16  19 % [7, 43]``."""
    if cell is None or cell.n == 0:
        return counts_words(cell)
    low, high = (percent_words(bound).removesuffix(" %") for bound in cell.mr_ci95)
    return f"{counts_words(cell)}  {percent_words(cell.mr)} [{low}, {high}]"


def _median(cell: Cell | None) -> str:
    return NOTHING if cell is None else _number(cell.similarity_median, ".2f")


def _figure(figure: Figure | None) -> str:
    return NOTHING if figure is None else f"{percent_words(figure.rate)} {figure.source}"


def _ratio(value: float, interval: tuple[float, float]) -> str:
    if math.isnan(value):
        return NOTHING
    known = not any(math.isnan(bound) for bound in interval)
    bounds = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if known else ""
    return f"× {value:.3f}{bounds}"


def _number(value: float, form: str) -> str:
    return NOTHING if math.isnan(value) else format(value, form)


def _test_words(test: Paired | None) -> str:
    if test is None:
        return NOTHING
    p = test.p if math.isnan(test.p_holm) else test.p_holm
    return f"-{test.lost} +{test.gained}  p {'< 0.001' if p < 0.001 else f'{p:.3f}'}"


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
    published = [row.published for row in rows if row.published]
    figures = [figure for row in published for figure in (row.prompt, row.attacked) if figure]
    if figures:
        models = ", ".join(dict.fromkeys(row.model for row in published))
        sources = dict.fromkeys(figure.source for figure in figures)
        listed = "; ".join(f"{source}: {SOURCES[source]}" for source in sources)
        said.append(f"The paper's numbers are of {models}. {listed}.")
    return tuple(said)


_TEXTS = {
    "checkpoint", "mitigation", "kind", "attack", "init", "norm", "invalid", "descriptor",
    "aggregation",
}  # fmt: skip
_WORK = ("unet_evaluations", "prompts", "encoded", "decoded")
_WHOLE = {"steps", "hits", "n", "failed", "lost", "gained"}


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Serialise rows of the same columns; a column's type follows from its name."""

    def type_of(name: str) -> pa.DataType:
        if name in _TEXTS or name.endswith("_source"):
            return pa.string()
        return pa.int64() if name.rpartition("_")[2] in _WHOLE else pa.float64()

    return parquet_bytes(rows, {name: type_of(name) for row in rows[:1] for name in row})


def cells_parquet(comparison: Comparison) -> bytes:
    """Serialise every cell under its checkpoint's one threshold, one row each."""
    return _parquet(
        [
            {name: getattr(cell, name) for name in ("checkpoint", "mitigation", "kind")}
            | {"attack": cell.condition.attack, "init": cell.condition.init}
            | asdict(cell.condition.budget)
            | _cell_values("", cell)
            | {name: getattr(cell, name) for name in ("descriptor", "threshold", "aggregation")}
            for cell in comparison.cells
        ]
    )


def headline_parquet(rows: Sequence[HeadlineRow]) -> bytes:
    """Serialise the table, one row for one mitigation within one radius.

    Columns of a cell are ``{kind}_{prompt or dori_INIT}_{hits, n, failed, mr, mr_low, ...}``,
    those of the suspected images' tests ``{condition}_vs_{none or prompt}_{lost, gained, p}``,
    with ``p_holm`` against none. ``invalid`` names what makes a row's audits invalid.
    Null: not measured, or not published.
    """
    return _parquet([_headline_values(row) for row in rows])


def _headline_values(row: HeadlineRow) -> dict[str, Any]:
    names = ("checkpoint", "mitigation", "norm", "eps", "steps")
    values = {name: getattr(row, name) for name in names}
    values["invalid"] = ", ".join(row.invalid) or None
    starts: dict[Init | None, str] = {None: "prompt"}
    starts |= {init: f"dori_{init}" for init in INITS}
    for kind in KINDS:
        for init, start in starts.items():
            values |= _cell_values(f"{kind}_{start}_", row.cells.get((kind, init)))
    for init, start in starts.items():
        for other in OTHERS[: 1 if init is None else 2]:
            test = row.tests.get((init, other))
            numbers = ("lost", "gained", "p", *(("p_holm",) if other == "none" else ()))
            values |= {f"{start}_vs_{other}_{name}": _get(test, name) for name in numbers}
    values["loss_ratio"] = row.loss_ratio
    values["loss_ratio_low"], values["loss_ratio_high"] = row.loss_ratio_ci95
    costs = ("kid", "kid_std", "unet_evaluations", "seconds", "weights_changed")
    values |= {name: getattr(row, name) for name in costs}
    values |= {f"work_{name}": row.work.get(name) for name in _WORK}
    for name in ("prompt", "attacked"):
        figure = _get(row.published, name)
        values[f"published_{name}_mr"] = _get(figure, "rate")
        values[f"published_{name}_source"] = _get(figure, "source")
    return values


def _cell_values(prefix: str, cell: Cell | None) -> dict[str, Any]:
    low, high = (None, None) if cell is None else cell.mr_ci95
    names = ("hits", "n", "failed", "mr", "similarity_median", "similarity_mad")
    values = {name: _get(cell, name) for name in names} | {"mr_low": low, "mr_high": high}
    return {f"{prefix}{name}": value for name, value in values.items()}


def _get(thing: object, name: str) -> Any:
    """A field of what was measured; None where nothing was."""
    return None if thing is None else getattr(thing, name)
