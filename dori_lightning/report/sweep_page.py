"""The table of a sweep as files: parquet, Markdown, and one self-contained page for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from dori_lightning.files import write_atomically
from dori_lightning.report.headline_files import cells_parquet, headline_parquet
from dori_lightning.report.headline_tables import headline_tables, remarks, tables_markdown
from dori_lightning.report.pictures import png_uri
from dori_lightning.report.plots import Plot
from dori_lightning.report.summary import condition_words
from dori_lightning.report.sweep_figures import (
    before_and_after,
    rate_against_radius,
    rates_against_steps,
)
from dori_lightning.report.sweep_verdict import sweep_answer, sweep_sentences, sweep_tone

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from dori_lightning.report.aggregate import Comparison
    from dori_lightning.report.headline import HeadlineRow

__all__ = ["render_sweep_page", "write_table"]

_TEXTS = {
    "before_and_after": (
        "Hidden or gone",
        "Share of suspected images that come back from their prompts (open) and by the attack "
        "(filled), with 95 % intervals. A long bar is a mitigation that hides images and leaves "
        "them in the weights. Small marks below a row: the paper's numbers, on Stable Diffusion.",
    ),
    "rates_against_steps": (
        "What the attack may spend: steps",
        "Share of suspected images that come back, against the attack's steps.",
    ),
    "rate_against_radius": (
        "What the attack may spend: distance from where it begins",
        "Share of suspected images that come back, against the radius that the attack is kept "
        "within, at its full number of steps.",
    ),
}


@dataclass(frozen=True)
class _Source:
    """One run folder behind the table."""

    name: str
    checkpoint: str
    mitigation: str
    finished: str
    git_sha: str
    device: str


def write_table(
    comparison: Comparison, rows: Sequence[HeadlineRow], folder: Path
) -> tuple[Path, ...]:
    """Write ``table.parquet``, ``cells.parquet``, ``table.md`` and ``table.html``.

    Returns:
        Their paths, the page last.
    """
    tables, said = headline_tables(rows), remarks(comparison, rows)
    contents = {
        "table.parquet": headline_parquet(rows),
        "cells.parquet": cells_parquet(comparison),
        "table.md": tables_markdown(tables, said).encode(),
        "table.html": render_sweep_page(comparison, rows).encode(),
    }
    return tuple(write_atomically(folder / name, data) for name, data in contents.items())


def render_sweep_page(comparison: Comparison, rows: Sequence[HeadlineRow]) -> str:
    """Render the page; it loads nothing from anywhere and shows no picture of a pair."""
    environment = Environment(
        loader=PackageLoader("dori_lightning.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    incomplete = bool(comparison.unfinished or comparison.missing)
    return environment.get_template("sweep.html.j2").render(
        checkpoints=list(comparison.calibrations),
        answer=sweep_answer(rows),
        verdict=" ".join(sweep_sentences(rows)),
        tables=headline_tables(rows),
        remarks=remarks(comparison, rows),
        incomplete=incomplete,
        tone="doubt" if incomplete else sweep_tone(rows),
        plots=_plots(comparison, rows),
        conditions=list(dict.fromkeys(condition_words(c.condition) for c in comparison.cells)),
        sources=[
            _Source(
                name=run.folder.name,
                checkpoint=run.checkpoint,
                mitigation=entry.label,
                finished=str(run.document["provenance"].get("finished", "")),
                git_sha=str(run.document["provenance"].get("git_sha") or "not from a checkout"),
                device=str(run.document["provenance"].get("device", "")),
            )
            for entry in comparison.entries
            for run in entry.runs
        ],
    )


def _plots(comparison: Comparison, rows: Sequence[HeadlineRow]) -> list[Plot]:
    drawings: dict[str, Callable[[bool], bytes | None]] = {
        "before_and_after": lambda dark: before_and_after(rows, dark=dark),
        "rates_against_steps": lambda dark: rates_against_steps(rows, comparison.cells, dark=dark),
        "rate_against_radius": lambda dark: rate_against_radius(rows, dark=dark),
    }
    plots = []
    for name, draw in drawings.items():
        light, dark = draw(False), draw(True)
        if light is not None and dark is not None:
            title, caption = _TEXTS[name]
            plots.append(Plot(name, title, caption, png_uri(light), png_uri(dark)))
    return plots
