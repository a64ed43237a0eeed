"""Self-contained pages for people: the verdict first, then the images, then the method.

The page of an audit and the page of a comparison share one table of pairs and one renderer. Python
chooses what is shown and reads the images; the words are in the templates.
"""

import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from markupsafe import Markup, escape
from matplotlib.figure import Figure

from dori_lightning.metrics.evidence import null_scores
from dori_lightning.metrics.replication import PairResult, steps_by_pair
from dori_lightning.metrics.utility import PictureRow, PromptKind, Utility
from dori_lightning.report.comparison import Comparison, Entry, HeadlineRow
from dori_lightning.report.figures import audit_figures, svg_element, sweep_figures, write_figures
from dori_lightning.report.findings import audit_findings, audit_verdict, sweep_verdict
from dori_lightning.report.images import (
    THUMBNAIL,
    attack_grid,
    results_by_condition,
    thumbnail_uri,
)
from dori_lightning.report.record import (
    NOT_KEPT,
    AuditReport,
    Disclosure,
    Run,
    strictest,
    with_files_that_exist,
)
from dori_lightning.report.tables import (
    cells_parquet,
    headline_parquet,
    headline_tables,
    ranked_cells,
    remarks,
    tables_markdown,
)
from dori_lightning.report.words import claims_words, environment
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.runtime.documents import relative_to
from dori_lightning.runtime.logging import with_progress
from dori_lightning.runtime.redaction import redact
from dori_lightning.types import BASELINE, KINDS, Calibration, Condition, Kind, Outcome, Pair

SWEEP_SIDE = 112
"""Pixels a side of an image on a comparison's page; there are many of them."""

MOST_IMAGES = 700
"""Images on a comparison's page; fewer pairs are shown where there are many mitigations."""

MOST_PROMPTS = 12
"""Prompts of each kind whose images are shown with a mitigation and without."""

T = TypeVar("T")

# "95 %", "4 of 8": broken into two lines they are hard to read
_LOOSE = re.compile(r"(?<=\d) (?=%)|(?<=\d) (?=of \d)|(?<=\d of) (?=\d)")


@dataclass(frozen=True)
class Shot:
    """The closest image to a pair's original under one condition.

    Attributes:
        name: ``before`` (the prompt before the mitigation), ``prompt`` or ``attack``.
        result: The pair's result under that condition, None where it was not run.
        uri: ``data:`` address of the image, None where none is shown.
        first: Fewest steps after which the attack brought the original back, where known.
    """

    name: str
    result: PairResult | None
    uri: str | None
    first: int | None = None

    @property
    def tone(self) -> str:
        """``found``, ``clear``, or ``doubt`` where there is no result."""
        if self.result is None or self.result.reproduced is None:
            return "doubt"
        return "found" if self.result.reproduced else "clear"

    @property
    def sort(self) -> float:
        """Similarity to sort by; pairs without a result come last."""
        return -9.0 if self.result is None or self.tone == "doubt" else self.result.statistic


@dataclass(frozen=True)
class PairRow:
    """One pair and its images, a tuple of shots for each column of the table.

    Attributes:
        original: ``data:`` address of the original, None where it is not shown.
        columns: Shots, by column.
        outcome: Words that the result filter looks for.
        reference: Which reference image the original is, where the pair has several: the one that
            came back, or else the one that the attack aims at.
    """

    pair: Pair
    original: str | None
    columns: tuple[tuple[Shot, ...], ...]
    outcome: str
    reference: str = ""

    def sort(self, place: int) -> float:
        """Number to sort a column by: the similarity under its last condition that was run."""
        shots = [shot for shot in self.columns[place] if shot.result is not None]
        return shots[-1].sort if shots else -9.0


@dataclass(frozen=True)
class PairTable:
    """The table of pairs of one checkpoint.

    Attributes:
        title: Name of the checkpoint.
        threshold: Similarity above which an image is a replica.
        columns: Key and label of each column of images.
        rows: The pairs shown.
        total: How many pairs there are.
        side: Pixels a side of an image.
        lost: Images that are no longer where the runs left them.
    """

    title: str
    threshold: float
    columns: Sequence[tuple[str, str]]
    rows: Sequence[PairRow]
    total: int
    side: int = THUMBNAIL
    lost: int = 0

    @property
    def kinds(self) -> list[Kind]:
        """Kinds of pair that are shown."""
        return [kind for kind in KINDS if any(row.pair.kind == kind for row in self.rows)]

    @property
    def repeats(self) -> bool:
        """Whether numbers of repetitions are known."""
        return any(row.pair.repeats > 0 for row in self.rows)


@dataclass(frozen=True)
class Twins:
    """Images of the same prompts and seeds without and with a mitigation.

    Attributes:
        kind: ``ordinary`` or ``neighbour``.
        prompts: How many prompts there are.
        shown: Row and the two ``data:`` addresses of each prompt that is shown.
    """

    kind: PromptKind
    prompts: int
    shown: Sequence[tuple[PictureRow, str | None, str | None]]


def write_audit_page(
    report: AuditReport, folder: Path, *, images: Disclosure = "full", max_pairs: int = 40
) -> Path:
    """Write an audit's page, its figures and the grid of its images as files; return the page."""
    figures = audit_figures(report)
    write_figures(figures, folder)
    grid = attack_grid(report, audit_findings(report).condition, images=images)
    if grid is not None:
        sink = io.BytesIO()
        grid.save(sink, "PNG")
        write_atomically(folder / "figures" / "picture_grid.png", sink.getvalue())
    return write_page(report, folder, images=images, max_pairs=max_pairs, figures=figures)


def write_page(report: AuditReport, folder: Path, **options: Any) -> Path:
    """Write ``report.html`` in one step and return its path; options of ``render_page``."""
    page = render_page(report, **options)
    folder.mkdir(parents=True, exist_ok=True)
    return write_atomically(folder / "report.html", page.encode())


def render_page(
    report: AuditReport,
    *,
    images: Disclosure = "full",
    max_pairs: int = 40,
    figures: Mapping[str, Figure] | None = None,
) -> str:
    """Render the page of an audit; it loads nothing from anywhere.

    Blurring throws the pixels away before embedding, since memorized images are the leaked data.
    At most ``max_pairs`` are shown, the first of each kind, never chosen by result. Figures that
    are drawn already are not drawn again.

    Returns:
        HTML.

    Raises:
        InputError: An image to be shown is gone or unreadable.
    """
    found = audit_findings(report)
    spoken = (report.prompt_condition, found.condition)
    config = json.dumps(redact(report.provenance.config), indent=2, sort_keys=True, default=str)
    return rendered_page(
        "report.html.j2",
        report=report,
        images=images,
        verdict=audit_verdict(report),
        claims=_claims(report),
        base={row.id: row for row in report.base.images} if report.base else {},
        found=found,
        spoken=[condition for condition in spoken if condition is not None],
        table=audit_pairs(report, disclosure=images, max_pairs=max_pairs),
        cells=ranked_cells(report.cells),
        twins=utility_twins(report.utility, images) if report.utility else (),
        figures=_elements(audit_figures(report) if figures is None else figures),
        images_each=max((len(o.seeds) for o in report.outcomes), default=0),
        restarts=max((o.restart + 1 for o in report.outcomes), default=0),
        config=config,
    )


def _claims(report: AuditReport) -> str:
    """What an audit's controls can show; empty where the record does not know them."""
    suspects = sum(not math.isnan(row.score) for row in report.images)
    if not suspects or math.isnan(report.false_discovery_rate):
        return ""
    nulls = len(null_scores(report.unseen))
    return claims_words(suspects, nulls, report.false_discovery_rate)


def write_table(
    comparison: Comparison, rows: Sequence[HeadlineRow], folder: Path, **options: Any
) -> tuple[Path, ...]:
    """Write ``table.parquet``, ``cells.parquet``, ``table.md`` and ``report.html``.

    Returns:
        Their paths, the page last; options of ``render_sweep_page``.
    """
    markdown = tables_markdown(headline_tables(rows), remarks(comparison, rows))
    contents = {
        "table.parquet": headline_parquet(rows),
        "cells.parquet": cells_parquet(comparison),
        "table.md": markdown.encode(),
        "report.html": render_sweep_page(comparison, rows, folder, **options).encode(),
    }
    return tuple(write_atomically(folder / name, data) for name, data in contents.items())


def render_sweep_page(
    comparison: Comparison,
    rows: Sequence[HeadlineRow],
    folder: Path,
    *,
    images: Disclosure = "full",
    max_pairs: int = 40,
) -> str:
    """Render the page of a comparison; it loads nothing from anywhere.

    Runs below ``folder``, where the page will lie, are linked. A run that allowed less than
    ``images`` decides how images are shown. At most ``max_pairs`` are shown for each checkpoint.

    Raises:
        InputError: An image to be shown is unreadable.
    """
    incomplete = bool(comparison.unfinished or comparison.missing)
    runs = [run for entry in comparison.entries for run in entry.runs]
    shown = strictest(runs, images)
    max_pairs = min(max_pairs, max(1, MOST_IMAGES // (1 + 2 * len(comparison.entries))))
    links = _links(runs, folder)
    verdict = sweep_verdict(rows)
    return rendered_page(
        "sweep.html.j2",
        comparison=comparison,
        verdict=verdict,
        headlines=headline_tables(rows),
        remarks=remarks(comparison, rows),
        incomplete=incomplete,
        tone="doubt" if incomplete else verdict.tone,
        figures=_elements(sweep_figures(rows, comparison.cells)),
        images=shown,
        tables=[
            sweep_pairs(
                [entry for entry in comparison.entries if entry.checkpoint == checkpoint],
                rule,
                disclosure=shown,
                max_pairs=max_pairs,
            )
            for checkpoint, rule in comparison.calibrations.items()
        ],
        links=links,
    )


def write_list(
    runs: Sequence[Run], folder: Path, *, unfinished: Sequence[str], reason: str
) -> Path:
    """Write ``report.html`` for audits that make no table, and return its path.

    It lists the answer of each and links its page.

    Args:
        runs: Finished audits.
        folder: Where the page lies; runs below are linked.
        unfinished: Names of runs without a result.
        reason: Why there is no table.
    """
    page = rendered_page(
        "runs.html.j2",
        runs=[(run, audit_verdict(run.report).answer) for run in runs],
        links=_links(runs, folder),
        unfinished=unfinished,
        reason=reason,
    )
    return write_atomically(folder / "report.html", page.encode())


def _links(runs: Iterable[Run], folder: Path) -> dict[Path, str]:
    """Address of each run's page, seen from a folder; empty where it is not below."""
    links = {}
    for run in runs:
        link = relative_to(run.folder / "report.html", folder)
        links[run.folder] = "" if link.startswith("..") else quote(link)
    return links


def rendered_page(template: str, **values: Any) -> str:
    """Render a template of the package with everything escaped."""
    templates = environment(html=True)
    templates.filters |= {
        "firm": lambda text: Markup(_LOOSE.sub("\u00a0", escape(text))),
        # a long name breaks behind its underscores
        "breakable": lambda name: Markup("_<wbr>").join(escape(p) for p in name.split("_")),
    }
    return templates.get_template(template).render(**values).lstrip()


def audit_pairs(report: AuditReport, *, disclosure: Disclosure, max_pairs: int) -> PairTable:
    """Put the images of an audit's pairs together: original, prompt, attack.

    A baseline adds a column, the prompt's image before the mitigation.

    Raises:
        InputError: An image to be shown is gone or unreadable.
    """
    pairs, total = _first_pairs(report.outcomes, max_pairs=max_pairs)
    prompt, attack = report.prompt_condition, audit_findings(report).condition
    after = results_by_condition(report.pair_results)
    columns = [
        ("prompt", "From its prompt", after, prompt),
        ("attack", "From the attack", after, attack),
    ]
    if report.baseline:
        before = results_by_condition(report.baseline_results)
        columns = [
            ("before", "Prompt, before mitigation", before, Condition("prompt")),
            ("prompt", "Prompt, after mitigation", after, prompt),
            ("attack", "Attack, after mitigation", after, attack),
        ]
    firsts = _first_steps(report, attack)
    rows = []
    for pair in with_progress("page: images", pairs):
        shots = [
            _shot(name, results.get((pair.id, condition)), disclosure)
            for name, _, results, condition in columns
        ]
        shots[-1] = replace(shots[-1], first=firsts.get(pair.id))
        back = next((shot.name for shot in shots[-2:] if shot.tone == "found"), None)
        # one failed run leaves the question open even where the other one found nothing
        failed = any(shot.result and shot.result.status != "ok" for shot in shots[-2:])
        outcome = back or ("failed" if failed else "none")
        closest = [s.result.reference for s in shots if s.result and s.tone == "found"]
        reference = next(filter(None, closest[::-1]), pair.references[0])
        original = thumbnail_uri(reference.image, disclosure)
        count = len(pair.references)
        name = f"{reference.image.name}, of {count} reference images" if count > 1 else ""
        rows.append(PairRow(pair, original, tuple((s,) for s in shots), outcome, name.strip(" ,")))
    labels = [(name, label) for name, label, _, _ in columns]
    return PairTable(report.checkpoint, report.calibration.threshold, labels, rows, total)


def sweep_pairs(
    entries: Sequence[Entry], rule: Calibration, *, disclosure: Disclosure, max_pairs: int
) -> PairTable:
    """Put the images of one checkpoint's pairs together, a column for each mitigation.

    At most ``max_pairs`` are shown, the first of each kind.
    """
    base = next(entry for entry in entries if entry.mitigation == BASELINE)
    shown, total = _first_pairs(base.outcomes, max_pairs=max_pairs)
    columns: dict[str, list[tuple[Shot, ...]]] = {pair.id: [] for pair in shown}
    originals: dict[str, Path] = {}
    lost = 0
    for entry in with_progress("page: images", entries):
        outcomes = with_files_that_exist(o for o in entry.outcomes if o.pair.id in columns)
        originals |= {o.pair.id: o.pair.image for o in outcomes if o.pair.image != NOT_KEPT}
        results = results_by_condition(entry.pair_results)
        for pair in shown:
            shots = []
            for name, condition in zip(("prompt", "attack"), entry.spoken, strict=True):
                result = results.get((pair.id, condition))
                kept = result is None or (result.picture is not None and result.picture.is_file())
                if result is not None and result.status == "ok" and not kept:
                    result = replace(result, picture=None)
                    lost += 1
                shots.append(_shot(name, result, disclosure, side=SWEEP_SIDE))
            columns[pair.id].append(tuple(shots))
    rows = []
    for pair in shown:
        stacks = dict(enumerate(columns[pair.id]))
        back = [m for m, shots in stacks.items() if any(shot.tone == "found" for shot in shots)]
        gone = ["gone"] if all(entries[place].label == BASELINE for place in back) else []
        original = thumbnail_uri(originals.get(pair.id, NOT_KEPT), disclosure, side=SWEEP_SIDE)
        outcome = " ".join([*(f"m{place}" for place in back), *gone])
        rows.append(PairRow(pair, original, tuple(columns[pair.id]), outcome))
    return PairTable(
        entries[0].checkpoint,
        rule.threshold,
        [(f"m{place}", entry.label) for place, entry in enumerate(entries)],
        rows,
        total,
        side=SWEEP_SIDE,
        lost=lost + len(columns.keys() - originals.keys()) if disclosure != "none" else 0,
    )


def utility_twins(utility: Utility, disclosure: Disclosure) -> list[Twins]:
    """Choose and read the images of both models; none where images are not shown.

    Raises:
        InputError: An image to be shown is gone or unreadable.
    """
    found = []
    kinds: tuple[PromptKind, ...] = ("ordinary", "neighbour")
    for kind in kinds if disclosure != "none" else ():
        rows = [row for row in utility.picture_rows if row.kind == kind]
        # the first seed of the first prompts: one of each group, then the second of each
        first = {row.id: row for row in reversed(rows)}
        groups: dict[str, list[PictureRow]] = {}
        for row in reversed(first.values()):
            groups.setdefault(row.group, []).append(row)
        if groups:
            shown = tuple(
                (
                    row,
                    thumbnail_uri(row.unmitigated, disclosure),
                    thumbnail_uri(row.mitigated, disclosure),
                )
                for row in _in_turn(groups.values())[:MOST_PROMPTS]
            )
            found.append(Twins(kind, len(first), shown))
    return found


def _elements(figures: Mapping[str, Figure]) -> dict[str, Markup]:
    return {name: svg_element(figure, name) for name, figure in figures.items()}


def _in_turn(groups: Iterable[Iterable[T]]) -> list[T]:
    """The first of each group, then the second of each, and so on."""
    return [item for turn in zip_longest(*groups) for item in turn if item is not None]


def _first_pairs(outcomes: Iterable[Outcome], *, max_pairs: int) -> tuple[list[Pair], int]:
    """The first pairs of each kind in turn, by kind and in list order, and how many there are."""
    pairs = list({outcome.pair.id: outcome.pair for outcome in outcomes}.values())
    queues = [[pair for pair in pairs if pair.kind == kind] for kind in KINDS]
    chosen = {pair.id for pair in _in_turn(queues)[:max_pairs]}
    return [pair for queue in queues for pair in queue if pair.id in chosen], len(pairs)


def _first_steps(report: AuditReport, attack: Condition | None) -> dict[str, int]:
    """Pair id to its first success on the way to the attack, where that has snapshots."""
    if attack is None:
        return {}
    evaluated = {
        own.budget.steps
        for own in (outcome.condition for outcome in report.outcomes)
        if replace(own, budget=replace(own.budget, steps=attack.budget.steps)) == attack
        and own.budget.steps <= attack.budget.steps
    }
    if len(evaluated) < 2:
        return {}
    return steps_by_pair(attack, report.first_successes)


def _shot(
    name: str, result: PairResult | None, disclosure: Disclosure, *, side: int = THUMBNAIL
) -> Shot:
    picture = result.picture if result is not None else None
    uri = thumbnail_uri(picture, disclosure, side=side) if picture is not None else None
    return Shot(name, result, uri)
