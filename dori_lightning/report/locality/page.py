"""The files of a locality run for people: figures, Markdown summary, and a self-contained page."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dori_lightning.files import write_atomically
from dori_lightning.markdown import escape
from dori_lightning.redaction import redact
from dori_lightning.report.locality import figures, layers, rates
from dori_lightning.report.locality.record import write_locality
from dori_lightning.report.locality.tables import image_table, number_tables
from dori_lightning.report.locality.text import answers, verdict
from dori_lightning.report.plots import drawn_for_page
from dori_lightning.report.style import Ink
from dori_lightning.report.summary import budget_words, number_words
from dori_lightning.report.templating import rendered_page

if TYPE_CHECKING:
    from pathlib import Path

    from dori_lightning.report.locality.record import LocalityReport
    from dori_lightning.report.locality.words import Answer
    from dori_lightning.report.plots import Drawing, Plot

__all__ = ["locality_plots", "render_locality_page", "write_locality_files"]


def write_locality_files(report: LocalityReport, folder: Path) -> Path:
    """Write ``locality.json``, ``figures/*.png``, ``locality.md`` and ``locality.html``.

    Returns:
        Path of the page, which is written last.
    """
    listed = []
    drawings = _drawings(report)
    for answer in answers(report):
        data = drawings[answer.name](Ink())
        if data is not None:
            file = _file(answer)
            write_atomically(folder / file, data)
            listed.append({"file": file, "title": answer.question, "caption": answer.caption})
    write_locality(report, folder, figures=listed, verdict=verdict(report))
    write_atomically(folder / "locality.md", locality_markdown(report).encode())
    return write_atomically(folder / "locality.html", render_locality_page(report).encode())


def locality_plots(report: LocalityReport) -> dict[str, Plot | None]:
    """Figures by the name of the question they answer; None where one has nothing to show."""
    texts = {answer.name: (answer.label, answer.caption) for answer in answers(report)}
    return drawn_for_page(_drawings(report), texts)


def _file(answer: Answer) -> str:
    return f"figures/locality_{answer.name}.png"


def render_locality_page(report: LocalityReport) -> str:
    """Render the page; it loads nothing from anywhere and shows no picture of a pair."""
    config = redact(report.provenance.config)
    return rendered_page(
        "locality.html.j2",
        report=report,
        answers=answers(report),
        plots=locality_plots(report),
        budget=budget_words(report.budget),
        images=image_table(report),
        tables=number_tables(report),
        config=json.dumps(config, indent=2, sort_keys=True, default=str),
    )


def locality_markdown(report: LocalityReport) -> str:
    """Questions, answers and numbers as Markdown."""
    lines = [
        f"# Locality: {escape(report.checkpoint)}, triggers searched on "
        f"{escape(report.mitigation)}",
        "",
        f"{report.restarts} attacks per image and start, {budget_words(report.budget)}; "
        f"{number_words(len(report.studied), 'memorized image')}, "
        f"{number_words(len(report.controls), 'control image')}.",
    ]
    for answer in answers(report):
        lines += ["", f"## {answer.question}", "", escape(answer.text)]
        lines += ["", f"![{answer.question}]({_file(answer)})"]
    for table in (image_table(report), *number_tables(report)):
        lines += ["", f"## {table.title}", "", table.caption, ""]
        lines.append("| " + " | ".join(map(escape, table.header)) + " |")
        rules = ["---" if k < table.named else "---:" for k in range(len(table.header))]
        lines.append("| " + " | ".join(rules) + " |")
        lines += ["| " + " | ".join(map(escape, row)) + " |" for row in table.rows]
    return "\n".join(lines) + "\n"


def _drawings(report: LocalityReport) -> dict[str, Drawing]:
    """One drawing per question, of those that were asked."""
    found: dict[str, Drawing] = {}
    large, places = report.at_large, report.embeddings
    active, selected = report.activations, report.weights
    if large is not None:
        found["budget"] = lambda ink: rates.budget(large, report.start, ink)
        found["lines"] = lambda ink: rates.lines(large, ink)
        found["transfer"] = lambda ink: rates.transfer(large, ink)
    if places is not None:
        found["spread"] = lambda ink: figures.spread(places, ink)
        found["map"] = lambda ink: figures.map_of(places, ink)
    if active is not None:
        found["activations"] = lambda ink: layers.activations(active, ink)
    if selected is not None:
        found["weights"] = lambda ink: layers.weights(selected, ink)
        found["methods"] = lambda ink: layers.methods(selected, ink)
    return found
