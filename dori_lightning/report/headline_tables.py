"""The headline as three small tables of text: what comes back, checks and price, paired tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.markup import escape as plain_text
from rich.table import Table

from dori_lightning.markdown import escape
from dori_lightning.report.published import SOURCES
from dori_lightning.report.summary import percent_words
from dori_lightning.types import INITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dori_lightning.report.aggregate import Comparison
    from dori_lightning.report.comparisons import Paired
    from dori_lightning.report.headline import Attacked, HeadlineRow
    from dori_lightning.report.published import Figure
    from dori_lightning.types import Cell, Init, Kind

__all__ = ["TextTable", "headline_tables", "remarks", "rich_table", "tables_markdown"]

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
        "denoising loss": lambda r: _ratio(r.price.loss_ratio, r.price.loss_ratio_ci95),
        "KID": lambda r: _plain(r.price.kid, ".4f"),
        "UNet evaluations": lambda r: _plain(r.price.unet_evaluations, ",.0f"),
        "seconds": lambda r: _plain(r.price.seconds, ",.0f"),
        "weights changed": lambda r: _plain(r.price.changed, ",.0f"),
    }
    tests: dict[str, Callable[[HeadlineRow], str]] = {
        "prompt, against none": lambda r: _test(r.against_none, r.against_none_holm)
    }
    for init in inits:
        tests[f"{_INIT_WORDS[init]}, against none"] = _of_attack(
            init, lambda a: _test(a.against_none, a.against_none_holm)
        )
        tests[f"{_INIT_WORDS[init]}, against its prompt"] = _of_attack(
            init, lambda a: _test(a.against_prompt, math.nan)
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
            "Checks and price",
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
        f"there says nothing. {' '.join(flag['text'] for flag in entry.invalid)}"
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


def _test(test: Paired | None, corrected: float) -> str:
    if test is None:
        return NOTHING
    p = test.p if math.isnan(corrected) else corrected
    return f"-{test.lost} +{test.gained}  p {_p(p)}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _cells(line: Sequence[str], named: int) -> list[str]:
    """A line's cells; names come from other people's runs, numbers do not."""
    return [escape(text) if place < named else text for place, text in enumerate(line)]
