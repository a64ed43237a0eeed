"""The table of a sweep as files: parquet, Markdown, and one self-contained page for people."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from dori_lightning.files import write_atomically
from dori_lightning.report.headline_files import cells_parquet, headline_parquet
from dori_lightning.report.headline_tables import headline_tables, remarks, tables_markdown
from dori_lightning.report.plain_words import plain_sweep
from dori_lightning.report.plots import drawn_for_page
from dori_lightning.report.price_figure import removal_against_price
from dori_lightning.report.read_back import strictest
from dori_lightning.report.repeats import repeats_by_mitigation
from dori_lightning.report.summary import condition_words
from dori_lightning.report.sweep_figures import (
    before_and_after,
    rate_against_radius,
    rates_against_steps,
)
from dori_lightning.report.sweep_pairs import SIDE, results_by_entry, sweep_blocks
from dori_lightning.report.sweep_verdict import sweep_answer, sweep_sentences, sweep_tone
from dori_lightning.report.templating import rendered_page

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dori_lightning.report.aggregate import Comparison
    from dori_lightning.report.entries import Entry
    from dori_lightning.report.headline import HeadlineRow
    from dori_lightning.report.locality.section import LocalitySection
    from dori_lightning.report.pictures import Disclosure
    from dori_lightning.report.plots import Plot

__all__ = ["render_sweep_page", "write_table"]

_TEXTS = {
    "before_and_after": (
        "From the prompts, and by the attack",
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
    "repeats_by_mitigation": (
        "Repetition and memorization under each mitigation",
        "Similarity of the pictures against how often each image was repeated in training; known "
        "here because the images were planted. Filled: from the prompts; open: by the attack; a "
        "dash is the median.",
    ),
    "removal_against_price": (
        "What removal costs",
        "Suspected images that the attack still finds, against the change of the denoising loss "
        "on ordinary pictures, both with 95 % intervals. Good is the lower left.",
    ),
}


@dataclass(frozen=True)
class _Source:
    """One run folder behind the table; a link where it lies below the page."""

    name: str
    link: str
    checkpoint: str
    mitigation: str
    finished: str
    git_sha: str
    device: str


def write_table(
    comparison: Comparison,
    rows: Sequence[HeadlineRow],
    folder: Path,
    *,
    images: Disclosure = "full",
    max_pairs: int = 40,
    locality: Sequence[LocalitySection] = (),
) -> tuple[Path, ...]:
    """Write ``table.parquet``, ``cells.parquet``, ``table.md`` and ``report.html``.

    Returns:
        Their paths, the page last.
    """
    tables, said = headline_tables(rows), remarks(comparison, rows)
    page = render_sweep_page(
        comparison, rows, folder, images=images, max_pairs=max_pairs, locality=locality
    )
    contents = {
        "table.parquet": headline_parquet(rows),
        "cells.parquet": cells_parquet(comparison),
        "table.md": tables_markdown(tables, said).encode(),
        "report.html": page.encode(),
    }
    return tuple(write_atomically(folder / name, data) for name, data in contents.items())


def render_sweep_page(
    comparison: Comparison,
    rows: Sequence[HeadlineRow],
    folder: Path,
    *,
    images: Disclosure = "full",
    max_pairs: int = 40,
    locality: Sequence[LocalitySection] = (),
) -> str:
    """Render the page; it loads nothing from anywhere.

    Args:
        comparison: Audits that belong together.
        rows: Their table.
        folder: Where the page will lie; runs below it are linked.
        images: How pictures may be shown; a run that allowed less than that decides.
        max_pairs: Most pairs to show for each checkpoint.
        locality: What locality runs found.

    Raises:
        InputError: A picture to be shown is unreadable.
    """
    incomplete = bool(comparison.unfinished or comparison.missing)
    runs = [run for entry in comparison.entries for run in entry.runs]
    shown = strictest(runs, images)
    return rendered_page(
        "sweep.html.j2",
        checkpoints=list(comparison.calibrations),
        rules=list(comparison.calibrations.items()),
        answer=sweep_answer(rows),
        plain=plain_sweep(rows),
        verdict=" ".join(sweep_sentences(rows)),
        tables=headline_tables(rows),
        remarks=remarks(comparison, rows),
        incomplete=incomplete,
        tone="doubt" if incomplete else sweep_tone(rows),
        plots=_plots(comparison, rows),
        images=shown,
        side=SIDE,
        blocks=sweep_blocks(comparison, disclosure=shown, max_pairs=max_pairs),
        locality=locality,
        conditions=list(dict.fromkeys(condition_words(c.condition) for c in comparison.cells)),
        sources=[s for entry in comparison.entries for s in _sources(entry, folder)],
    )


def _sources(entry: Entry, folder: Path) -> list[_Source]:
    found = []
    for run in entry.runs:
        below = os.path.relpath(run.folder / "report.html", folder).replace(os.sep, "/")
        origin = run.document["provenance"]
        found.append(
            _Source(
                name=run.folder.name,
                link="" if below.startswith("..") else quote(below),
                checkpoint=run.checkpoint,
                mitigation=entry.label,
                finished=str(origin.get("finished", "")),
                git_sha=str(origin.get("git_sha") or "not from a checkout"),
                device=str(origin.get("device", "")),
            )
        )
    return found


def _plots(comparison: Comparison, rows: Sequence[HeadlineRow]) -> dict[str, Plot | None]:
    # one checkpoint's threshold would be a lie in another one's panels
    single = len(comparison.calibrations) == 1
    rule = next(iter(comparison.calibrations.values()))
    held = {}
    for entry in comparison.entries if single else ():
        results, spoken = results_by_entry(entry, entry.outcomes, rule)
        held[entry.label] = (results, [condition for condition in spoken if condition])
    return drawn_for_page(
        {
            "before_and_after": lambda ink: before_and_after(rows, ink),
            "rates_against_steps": lambda ink: rates_against_steps(rows, comparison.cells, ink),
            "rate_against_radius": lambda ink: rate_against_radius(rows, ink),
            "repeats_by_mitigation": lambda ink: repeats_by_mitigation(
                held, ink, threshold=rule.threshold
            ),
            "removal_against_price": lambda ink: removal_against_price(rows, ink),
        },
        _TEXTS,
    )
