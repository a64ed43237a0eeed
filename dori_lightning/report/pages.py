"""One self-contained page for people: the verdict first, then the pictures, then the method."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from dori_lightning.metrics.replication import (
    Aggregation,
    PairResult,
    find_cell,
    pair_results,
    steps_by_pair,
)
from dori_lightning.metrics.utility import Comparison as UtilityComparison
from dori_lightning.metrics.utility import DenoisingLoss, PictureRow, Replicas, Utility
from dori_lightning.report.comparison import Comparison, Entry, HeadlineRow
from dori_lightning.report.figures import (
    audit_figures,
    svg_element,
    sweep_figures,
    write_figures,
)
from dori_lightning.report.images import THUMBNAIL, attack_grid, jpeg_uri, png_file, thumbnail
from dori_lightning.report.record import (
    NOT_KEPT,
    AuditReport,
    Disclosure,
    LocalitySection,
    strictest,
    with_files_that_exist,
)
from dori_lightning.report.tables import (
    cells_parquet,
    headline_parquet,
    headline_tables,
    remarks,
    tables_markdown,
)
from dori_lightning.report.verdict import (
    number_groups,
    plain_sweep,
    plain_verdict,
    short_answer,
    sweep_answer,
    sweep_sentences,
    sweep_tone,
)
from dori_lightning.report.words import (
    KIND_WORDS,
    STATUS_WORDS,
    condition_words,
    interval_words,
    number_words,
    percent_words,
)
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.runtime.redaction import redact
from dori_lightning.types import BASELINE, KINDS, Calibration, Condition, Kind, Outcome, Pair

# -------- cards
# The rows of the page's table of pairs: the original beside what came back.


@dataclass(frozen=True)
class Panel:
    """One picture of a pair's row.

    Attributes:
        name: ``before``, ``prompt`` or ``attack``.
        label: What the column is called.
        uri: ``data:`` address of the picture, None where none is shown.
        missing: Why there is no picture.
        alt: Alternative text.
        similarity: Similarity as text.
        sort: Number to sort by; -9 where there is none, so that it comes last.
        mark: What the similarity means, in words.
        tone: ``found``, ``clear`` or ``doubt``.
    """

    name: str
    label: str
    uri: str | None
    missing: str
    alt: str
    similarity: str
    sort: float
    mark: str
    tone: str


@dataclass(frozen=True)
class Card:
    """One pair with its pictures, and the word that the result filter looks for.

    Attributes:
        pair: The pair.
        kind: Its kind in words.
        original: ``data:`` address of the original, None where pictures are not shown.
        panels: Its pictures.
        outcome: ``prompt``, ``attack``, ``none`` or ``failed``.
    """

    pair: Pair
    kind: str
    original: str | None
    panels: tuple[Panel, ...]
    outcome: str


def choose_pairs(outcomes: Iterable[Outcome], *, max_pairs: int) -> tuple[list[Pair], int]:
    """Take the first pairs of each kind in turn, so that controls are seen beside suspects.

    Returns:
        The pairs to show, by kind and in list order, and how many there are in all.
    """
    pairs = list({outcome.pair.id: outcome.pair for outcome in outcomes}.values())
    queues = [[pair for pair in pairs if pair.kind == kind] for kind in KINDS]
    turns = [pair for turn in zip_longest(*queues) for pair in turn if pair is not None]
    chosen = {pair.id for pair in turns[:max_pairs]}
    return [pair for queue in queues for pair in queue if pair.id in chosen], len(pairs)


def panel_names(report: AuditReport) -> list[tuple[str, str]]:
    """Name the columns of pictures; a baseline adds the prompt's picture before the mitigation."""
    if not report.baseline:
        return [("prompt", "From its prompt"), ("attack", "From the attack")]
    return [
        ("before", "Prompt, before mitigation"),
        ("prompt", "Prompt, after mitigation"),
        ("attack", "Attack, after mitigation"),
    ]


def pair_cards(
    report: AuditReport, pairs: Sequence[Pair], *, disclosure: Disclosure
) -> list[Card]:
    """Build the rows of some pairs.

    Raises:
        InputError: A picture to be shown is gone or unreadable.
    """
    after: dict[tuple[str, Condition | None], PairResult] = {
        (r.pair.id, r.condition): r for r in report.pair_results
    }
    before = {r.pair.id: r for r in report.baseline_results}
    cards = []
    first = _first_steps(report, report.headline_condition)
    for pair in pairs:
        found: dict[str, PairResult | None] = {
            "before": before.get(pair.id),
            "prompt": after.get((pair.id, report.prompt_condition)),
            "attack": after.get((pair.id, report.headline_condition)),
        }
        shown = thumbnail(pair.image, disclosure)
        panels = tuple(
            picture_panel(
                pair, name, label, found[name],
                disclosure=disclosure, aggregation=report.aggregation,
            )
            for name, label in panel_names(report)
        )  # fmt: skip
        if pair.id in first:
            words = f", first after {number_words(first[pair.id], 'step')}"
            panels = (*panels[:-1], replace(panels[-1], mark=panels[-1].mark + words))
        kind = KIND_WORDS[pair.kind]
        original = jpeg_uri(shown) if shown is not None else None
        cards.append(Card(pair, kind, original, panels, _outcome(found)))
    return cards


def _first_steps(report: AuditReport, attack: Condition | None) -> dict[str, int]:
    """Pair id to its first success on the way to the attack shown, where steps were looked at."""
    if attack is None:
        return {}
    looked_at = {
        own.budget.steps
        for own in (outcome.condition for outcome in report.outcomes)
        if replace(own, budget=replace(own.budget, steps=attack.budget.steps)) == attack
        and own.budget.steps <= attack.budget.steps
    }
    if len(looked_at) < 2:
        return {}
    return steps_by_pair(attack, report.first_successes)


def _outcome(found: dict[str, PairResult | None]) -> str:
    prompt, attack = found["prompt"], found["attack"]
    if prompt is not None and prompt.reproduced:
        return "prompt"
    if attack is not None and attack.reproduced:
        return "attack"
    # One failed run leaves the question open even where the other one found nothing.
    runs = [result for result in (prompt, attack) if result is not None]
    return "failed" if any(result.status != "ok" for result in runs) else "none"


def picture_panel(
    pair: Pair,
    name: str,
    label: str,
    result: PairResult | None,
    *,
    disclosure: Disclosure,
    aggregation: Aggregation = "max",
    side: int = THUMBNAIL,
) -> Panel:
    """Show what one condition made of a pair.

    Args:
        pair: The pair.
        name: Key of the column.
        label: Name of the column.
        result: What came of it, None where it was not run.
        disclosure: How pictures may be shown.
        aggregation: How a pair's pictures become one number.
        side: Pixels a side at most.

    Raises:
        InputError: The picture is gone or unreadable.
    """
    if result is None:
        return Panel(name, label, None, "not run", "", "", -9.0, "not run", "doubt")
    if result.reproduced is None:
        why = STATUS_WORDS[result.status]
        return Panel(name, label, None, why, "", "", -9.0, f"{why}: no result", "doubt")
    shown = None
    if result.picture is not None:
        shown = thumbnail(result.picture, disclosure, side=side)
    mark = "not reproduced"
    if result.reproduced:
        mark = "false alarm" if pair.kind == "control" else "reproduced"
    similarity = f"{result.best:.2f}"
    if aggregation == "median" and not math.isclose(result.best, result.statistic):
        similarity = f"best {result.best:.2f}, median {result.statistic:.2f}"
    blurred = " (blurred)" if disclosure == "blurred" else ""
    return Panel(
        name=name,
        label=label,
        uri=jpeg_uri(shown) if shown is not None else None,
        missing="not shown" if disclosure == "none" else "not kept",
        alt=f"{label}: closest picture of {pair.id}{blurred}, similarity {similarity}, {mark}",
        similarity=similarity,
        sort=result.statistic,
        mark=mark,
        tone="found" if result.reproduced else "clear",
    )


# -------- sweep_pairs
# The pairs of a comparison: every original beside what each mitigation left of it.

SIDE = 112
"""Pixels a side of a picture; there are many of them on the page."""

MOST_PICTURES = 700
"""Pictures on the page; fewer pairs are shown where there are many mitigations."""


@dataclass(frozen=True)
class Stack:
    """What one mitigation left of one pair.

    Attributes:
        key: Key of the column.
        label: Name of the mitigation.
        prompt: Closest picture from the prompt.
        attack: Closest picture from the attack.
        sort: Number to sort by, of the attack where it was run.
    """

    key: str
    label: str
    prompt: Panel
    attack: Panel
    sort: float


@dataclass(frozen=True)
class SweepCard:
    """One pair under every mitigation.

    Attributes:
        pair: The pair.
        kind: Its kind in words.
        original: ``data:`` address of the original, None where there is none to show.
        stacks: What each mitigation left of it.
        outcome: Keys of the mitigations under which it came back, or ``gone``.
    """

    pair: Pair
    kind: str
    original: str | None
    stacks: tuple[Stack, ...]
    outcome: str


@dataclass(frozen=True)
class SweepBlock:
    """The pairs of one checkpoint.

    Attributes:
        checkpoint: Its name.
        threshold: Similarity above which a picture counts as reproduced.
        columns: Key and label of each mitigation.
        cards: The pairs shown.
        total: How many there are.
        lost: Pictures that are no longer where the runs left them.
        repeats: Whether multiplicities are known.
    """

    checkpoint: str
    threshold: float
    columns: tuple[tuple[str, str], ...]
    cards: tuple[SweepCard, ...]
    total: int
    lost: int
    repeats: bool

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """Kinds of pair that are shown, for the filter."""
        present = {card.pair.kind for card in self.cards}
        return [(kind, KIND_WORDS[kind]) for kind in KINDS if kind in present]

    @property
    def outcomes(self) -> list[tuple[str, str]]:
        """What can be asked of the result, for the filter."""
        found = [(key, f"reproduced under {label}") for key, label in self.columns]
        return [*found, ("gone", "not reproduced under any mitigation")]


def sweep_blocks(
    comparison: Comparison, *, disclosure: Disclosure, max_pairs: int
) -> tuple[SweepBlock, ...]:
    """Put the pictures of every checkpoint's pairs together.

    Args:
        comparison: Audits that belong together.
        disclosure: How pictures may be shown.
        max_pairs: Most pairs to show for each checkpoint; they are the first of each kind.
    """
    return tuple(
        _block(
            checkpoint,
            [entry for entry in comparison.entries if entry.checkpoint == checkpoint],
            rule,
            disclosure=disclosure,
            max_pairs=min(max_pairs, max(1, MOST_PICTURES // (1 + 2 * len(comparison.entries)))),
        )
        for checkpoint, rule in comparison.calibrations.items()
    )


def _aggregation(entry: Entry) -> Aggregation:
    return entry.cells[0].aggregation if entry.cells else "max"


def _block(
    checkpoint: str,
    entries: Sequence[Entry],
    rule: Calibration,
    *,
    disclosure: Disclosure,
    max_pairs: int,
) -> SweepBlock:
    base = next(entry for entry in entries if entry.mitigation == BASELINE)
    shown, total = choose_pairs(base.outcomes, max_pairs=max_pairs)
    wanted = {pair.id for pair in shown}
    stacks: dict[str, list[Stack]] = {pair.id: [] for pair in shown}
    references: dict[str, Pair] = {}
    lost = 0
    for place, entry in enumerate(entries):
        kept = with_files_that_exist(o for o in entry.outcomes if o.pair.id in wanted)
        lost += sum(not outcome.images for outcome in kept if outcome.status == "ok")
        references |= {o.pair.id: o.pair for o in kept if o.pair.image != NOT_KEPT}
        results = pair_results(
            kept,
            descriptor=rule.descriptor,
            threshold=rule.threshold,
            aggregation=_aggregation(entry),
        )
        spoken = (entry.prompt_condition, entry.headline_condition)
        found = {(result.pair.id, result.condition): result for result in results}
        for pair in shown:
            own = tuple(found.get((pair.id, condition)) for condition in spoken if condition)
            stacks[pair.id].append(_stack(pair, f"m{place}", entry, own, disclosure))
    lost += len(wanted - references.keys())
    return SweepBlock(
        checkpoint=checkpoint,
        threshold=rule.threshold,
        columns=tuple((f"m{place}", entry.label) for place, entry in enumerate(entries)),
        cards=tuple(
            _card(
                references.get(pair.id) or replace(pair, image=NOT_KEPT),
                stacks[pair.id],
                disclosure,
            )
            for pair in shown
        ),
        total=total,
        lost=lost if disclosure != "none" else 0,
        repeats=any(pair.repeats > 0 for pair in shown),
    )


def _stack(
    pair: Pair,
    key: str,
    entry: Entry,
    results: Sequence[PairResult | None],
    disclosure: Disclosure,
) -> Stack:
    panels = {}
    for name, label in (("prompt", "from its prompt"), ("attack", "by the attack")):
        panels[name] = picture_panel(
            pair,
            name,
            f"{entry.label}, {label}",
            next((r for r in results if r and _name(r) == name), None),
            disclosure=disclosure,
            aggregation=_aggregation(entry),
            side=SIDE,
        )
    prompt, attack = panels["prompt"], panels["attack"]
    sort = attack.sort if attack.missing != "not run" else prompt.sort
    return Stack(key, entry.label, prompt, attack, sort)


def _name(result: PairResult) -> str:
    return "prompt" if result.condition.attack == "prompt" else "attack"


def _card(pair: Pair, stacks: Sequence[Stack], disclosure: Disclosure) -> SweepCard:
    shown = thumbnail(pair.image, disclosure, side=SIDE)
    back = [s for s in stacks if "found" in (s.prompt.tone, s.attack.tone)]
    gone = not any(stack.label != BASELINE for stack in back)
    return SweepCard(
        pair=pair,
        kind=KIND_WORDS[pair.kind],
        original=jpeg_uri(shown) if shown is not None else None,
        stacks=tuple(stacks),
        outcome=" ".join([*(stack.key for stack in back), *(["gone"] if gone else [])]),
    )


# -------- templating
# How both pages are rendered: one environment, and what keeps numbers in one piece.

_LOOSE = re.compile(r"(?<=\d) (?=%)|(?<=\d) (?=of \d)|(?<=\d of) (?=\d)")


def rendered_page(template: str, **values: Any) -> str:
    """Render a template of the package with everything escaped."""
    environment = Environment(
        loader=PackageLoader("dori_lightning.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["firm"] = _firm
    environment.filters["breakable"] = _breakable
    return environment.get_template(template).render(**values).lstrip()


def _firm(text: str) -> Markup:
    """Keep "95 %" and "4 of 8" on one line: broken they are hard to read."""
    return Markup(_LOOSE.sub("\u00a0", escape(text)))


def _breakable(name: str) -> Markup:
    """Let a long name break behind its underscores."""
    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


# -------- sweep_page
# The table of a sweep as files: parquet, Markdown, and one self-contained page for people.


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
        figures=_figures(comparison, rows),
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
        origin = run.report.provenance
        found.append(
            _Source(
                name=run.folder.name,
                link="" if below.startswith("..") else quote(below),
                checkpoint=run.checkpoint,
                mitigation=entry.label,
                finished=origin.finished.isoformat(timespec="seconds"),
                git_sha=origin.git_sha or "not from a checkout",
                device=origin.device,
            )
        )
    return found


def _figures(comparison: Comparison, rows: Sequence[HeadlineRow]) -> dict[str, Markup]:
    # one checkpoint's threshold would be a lie in another one's panels
    single = len(comparison.calibrations) == 1
    rule = next(iter(comparison.calibrations.values()))
    repeats = {}
    for entry in comparison.entries if single else ():
        spoken = (entry.prompt_condition, entry.headline_condition)
        repeats[entry.label] = (entry.pair_results, [c for c in spoken if c])
    return _elements(sweep_figures(rows, comparison.cells, repeats, threshold=rule.threshold))


def _elements(figures: Mapping[str, Figure]) -> dict[str, Markup]:
    return {name: svg_element(figure, name) for name, figure in figures.items()}


# -------- utility_section
# The page's section on what the mitigation costs: numbers, and both models' pictures.

MOST_SHOWN = 12
"""Prompts of each kind whose pictures are shown."""

_NAMES = {
    "denoising_loss": "Denoising loss",
    "ordinary": "Pictures of ordinary prompts",
    "kid": "KID of ordinary prompts",
    "fid": "FID of ordinary prompts",
    "alignment": "Prompt alignment of ordinary prompts",
    "neighbours": "Pictures of neighbour prompts",
    "neighbours of some pairs": "Neighbour prompts of some pairs",
    "neighbours.kid": "KID of neighbour prompts",
    "neighbours.fid": "FID of neighbour prompts",
    "neighbours.alignment": "Prompt alignment of neighbour prompts",
}

_ORDINARY = "Pictures of ordinary prompts"
_NEAR = "Pictures of prompts near the suspected ones"


@dataclass(frozen=True)
class CostRow:
    """One measure as text.

    Attributes:
        label: Its name.
        unmitigated: The unmitigated model's value.
        mitigated: The mitigated model's.
        change: How they differ, with its interval.
        note: What it is, and on how much it rests.
        first: Whether a group of rows begins here.
    """

    label: str
    unmitigated: str
    mitigated: str
    change: str
    note: str
    first: bool = False


@dataclass(frozen=True)
class Twin:
    """Both models' pictures of one prompt and seed.

    Attributes:
        prompt: The prompt.
        unmitigated: ``data:`` address of the unmitigated model's picture.
        mitigated: That of the mitigated model's.
        note: How close they are, in words.
    """

    prompt: str
    unmitigated: str
    mitigated: str
    note: str


@dataclass(frozen=True)
class CostSection:
    """Everything that the section shows.

    Attributes:
        lead: The answer in one or two sentences.
        rows: The table.
        left_out: What was not measured, in words, with the reason.
        grids: Title, explanation and pictures of each kind of prompt; empty where pictures are
            not to be shown.
    """

    lead: str
    rows: tuple[CostRow, ...]
    left_out: tuple[tuple[str, str], ...]
    grids: tuple[tuple[str, str, tuple[Twin, ...]], ...]


def utility_section(utility: Utility, *, disclosure: Disclosure) -> CostSection:
    """Put the section together.

    Raises:
        InputError: A picture to be shown is gone or unreadable.
    """
    loss, near = utility.denoising_loss, utility.neighbours
    rows: list[CostRow] = [] if loss is None else [_loss_row(loss)]
    if utility.ordinary is not None:
        rows += _picture_rows(utility.ordinary, utility.descriptor, "ordinary prompts")
    if utility.replicas is not None:
        rows.append(_replica_row(utility.replicas))
    if near is not None:
        rows += _picture_rows(
            near,
            utility.descriptor,
            "neighbour prompts that did not replicate before",
            first=utility.replicas is None,
        )
    return CostSection(
        lead=_lead(utility),
        rows=tuple(rows),
        left_out=tuple((_NAMES.get(k, k), why) for k, why in utility.left_out.items()),
        grids=tuple(_grids(utility, disclosure)),
    )


def _lead(utility: Utility) -> str:
    """Answer in counts and ratios; nothing here calls a cost small or large."""
    loss, replicas = utility.denoising_loss, utility.replicas
    sentences = []
    if loss is not None and math.isnan(loss.ratio):
        sentences.append(
            "With the mitigation the denoising loss is no finite number: the model is broken."
        )
    elif loss is not None:
        sentences.append(
            f"On {number_words(loss.examples, 'ordinary picture')} the denoising loss with the "
            f"mitigation is {loss.ratio:.3f} times the loss without it (95 % interval "
            f"{_span(loss.ratio_ci95, 3)})."
        )
    if replicas is not None:
        sentences.append(
            f"Of {number_words(replicas.prompts, 'prompt')} near the suspected ones, "
            f"{replicas.unmitigated} brought the original back without the mitigation, "
            f"{replicas.mitigated} with it."
        )
    return " ".join(sentences) or "Pictures of the model with the mitigation and without it."


def _loss_row(loss: DenoisingLoss) -> CostRow:
    change = (
        "not finite"
        if math.isnan(loss.ratio)
        else f"× {loss.ratio:.3f} ({_span(loss.ratio_ci95, 3)})"
    )
    note = (
        f"mean squared error of the predicted noise, "
        f"{number_words(loss.examples, 'ordinary picture')} × {number_words(loss.draws, 'draw')}"
    )
    return CostRow(
        "Denoising loss", _number(loss.unmitigated, 4), _number(loss.mitigated, 4), change, note,
        first=True,
    )  # fmt: skip


def _picture_rows(
    sets: UtilityComparison, descriptor: str, which: str, *, first: bool = True
) -> Iterator[CostRow]:
    count = (
        f"{number_words(sets.prompts, 'prompt')} × {number_words(sets.pictures_each, 'picture')}"
    )
    note = f"same prompt, same seed, by {descriptor}; median over prompts; {count}"
    yield CostRow(
        f"Similarity of the two models' pictures, {which}", "", "",
        f"{sets.similarity:.2f} ({_span(sets.similarity_ci95, 2)})", note, first=first,
    )  # fmt: skip
    if sets.kid is not None:
        yield CostRow(
            f"KID, {which}", "", "", f"{sets.kid.mean:.4f} ± {sets.kid.std:.4f}",
            f"distance of the two sets of pictures, 0 for equal ones; {sets.features}; over "
            f"random halves of {number_words(sets.kid.groups, 'group')}",
        )  # fmt: skip
    if sets.fid is not None:
        yield CostRow(
            f"FID, {which}", "", "", f"{sets.fid:.3f}",
            f"distance of the two sets of pictures, 0 for equal ones; {sets.features}",
        )  # fmt: skip
    if sets.alignment is not None:
        found = sets.alignment
        yield CostRow(
            f"Prompt alignment, {which}",
            f"{found.unmitigated:.3f}",
            f"{found.mitigated:.3f}",
            f"{found.change:+.3f} ({_span(found.change_ci95, 3, signed=True)})",
            "CLIP score of pictures with their prompts, median over prompts; difference: mean",
        )


def _replica_row(replicas: Replicas) -> CostRow:
    def rate(count: int, interval: tuple[float, float]) -> str:
        return f"{count} of {replicas.prompts} ({interval_words(interval)})"

    return CostRow(
        "Neighbour prompts that bring the original back",
        rate(replicas.unmitigated, replicas.unmitigated_ci95),
        rate(replicas.mitigated, replicas.mitigated_ci95),
        "",
        "prompts near a suspected one whose pictures exceed the threshold",
        first=True,
    )


def _grids(
    utility: Utility, disclosure: Disclosure
) -> Iterator[tuple[str, str, tuple[Twin, ...]]]:
    if disclosure == "none":
        return
    for title, kind in ((_ORDINARY, "ordinary"), (_NEAR, "neighbour")):
        rows = [row for row in utility.picture_rows if row.kind == kind]
        chosen = _chosen(rows)
        if not chosen:
            continue
        prompts = len({row.id for row in rows})
        words = f"Without and with the mitigation, from the same seed. Shown are {len(chosen)}"
        words += f" of {number_words(prompts, 'prompt')}, the first ones, not chosen by result."
        yield title, words, tuple(_twin(row, disclosure) for row in chosen)


def _chosen(rows: Iterable[PictureRow]) -> list[PictureRow]:
    """First seed of the first prompts: one of each group, then the second of each."""
    first = {row.id: row for row in reversed(list(rows))}
    waiting = list(reversed(first.values()))
    chosen: list[PictureRow] = []
    while waiting and len(chosen) < MOST_SHOWN:
        turn = list({row.group: row for row in reversed(waiting)}.values())[::-1]
        chosen += turn
        waiting = [row for row in waiting if row not in turn]
    return chosen[:MOST_SHOWN]


def _twin(row: PictureRow, disclosure: Disclosure) -> Twin:
    note = f"similarity {row.similarity:.2f}"
    if row.original_unmitigated is not None and row.original_mitigated is not None:
        note += (
            f"; with the original {row.original_unmitigated:.2f} without, "
            f"{row.original_mitigated:.2f} with"
        )
    return Twin(
        row.prompt, _uri(row.unmitigated, disclosure), _uri(row.mitigated, disclosure), note
    )


def _uri(path: Path, disclosure: Disclosure) -> str:
    shown = thumbnail(path, disclosure)
    assert shown is not None, "nothing is built where pictures are not shown"
    return jpeg_uri(shown)


def _number(value: float, digits: int) -> str:
    return "not finite" if math.isnan(value) else f"{value:.{digits}f}"


def _span(interval: tuple[float, float], digits: int, *, signed: bool = False) -> str:
    low, high = (f"{value:{'+' if signed else ''}.{digits}f}" for value in interval)
    return f"{low} to {high}"


# -------- page


@dataclass(frozen=True)
class _Tile:
    """One key number; rate and interval in percent, None where there is no rate."""

    label: str
    value: str
    note: str
    rate: float | None = None
    low: float = 0.0
    high: float = 0.0


def render_page(
    report: AuditReport,
    *,
    images: Disclosure = "full",
    max_pairs: int = 40,
    locality: Sequence[LocalitySection] = (),
    figures: Mapping[str, Figure] | None = None,
) -> str:
    """Render the page; it loads nothing from anywhere.

    Args:
        report: The report.
        images: ``full``; ``blurred`` throws the pixels away before embedding, since memorized
            pictures are the leaked data; ``none`` embeds no picture.
        max_pairs: Most pairs to show; they are the first of each kind, never chosen by result.
        locality: What locality runs found on the same checkpoint.
        figures: Figures of the report where they are drawn already.

    Returns:
        HTML.

    Raises:
        InputError: A picture to be shown is gone or unreadable.
    """
    shown, total = choose_pairs(report.outcomes, max_pairs=max_pairs)
    config = json.dumps(redact(report.provenance.config), indent=2, sort_keys=True, default=str)
    return rendered_page(
        "report.html.j2",
        report=report,
        images=images,
        side=THUMBNAIL,
        answer=short_answer(
            report.cells, mitigation=report.mitigation, invalid=bool(report.invalid)
        ),
        plain=plain_verdict(
            report.cells, mitigation=report.mitigation, invalid=bool(report.invalid)
        ),
        tone="invalid" if report.invalid else _tone(report),
        tiles=_tiles(report),
        pairs=pair_cards(report, shown, disclosure=images),
        panel_names=panel_names(report),
        total=total,
        kinds=[(kind, KIND_WORDS[kind]) for kind in KINDS if any(p.kind == kind for p in shown)],
        repeats=any(pair.repeats > 0 for pair in shown),
        numbers=number_groups(report),
        cost=utility_section(report.utility, disclosure=images) if report.utility else None,
        locality=locality,
        figures=_elements(audit_figures(report) if figures is None else figures),
        conditions=list(dict.fromkeys(condition_words(c.condition) for c in report.cells)),
        pictures_each=max((len(o.seeds) for o in report.outcomes), default=0),
        restarts=max((o.restart + 1 for o in report.outcomes), default=0),
        config=config,
    )


def write_page(
    report: AuditReport,
    folder: Path,
    *,
    images: Disclosure = "full",
    max_pairs: int = 40,
    locality: Sequence[LocalitySection] = (),
    figures: Mapping[str, Figure] | None = None,
) -> Path:
    """Write ``report.html`` into the run folder in one step and return its path."""
    page = render_page(
        report, images=images, max_pairs=max_pairs, locality=locality, figures=figures
    )
    folder.mkdir(parents=True, exist_ok=True)
    return write_atomically(folder / "report.html", page.encode())


def write_audit_page(
    report: AuditReport, folder: Path, *, images: Disclosure = "full", max_pairs: int = 40
) -> Path:
    """Write an audit's page, its figures and the grid of its images as files; return the page."""
    figures = audit_figures(report)
    write_figures(figures, folder)
    grid = attack_grid(report, report.headline_condition, images=images)
    if grid is not None:
        write_atomically(folder / "figures" / "picture_grid.png", png_file(grid))
    return write_page(report, folder, images=images, max_pairs=max_pairs, figures=figures)


def _tone(report: AuditReport) -> str:
    """Choose the verdict's colour; ``doubt`` where the controls fail or are missing."""
    suspected = [cell for cell in report.own_cells if cell.kind == "vm" and cell.n > 0]
    if not suspected or report.trust in ("paints", "unchecked"):
        return "doubt"
    speaking = (report.prompt_condition, report.headline_condition)
    return "found" if any(c.hits for c in suspected if c.condition in speaking) else "clear"


def _tiles(report: AuditReport) -> list[_Tile]:
    prompts, attack = report.prompt_condition, report.headline_condition

    def tile(label: str, kind: Kind, condition: Condition | None, note: str) -> _Tile:
        cell = find_cell(report.own_cells, kind=kind, condition=condition) if condition else None
        if cell is None or cell.n == 0:
            return _Tile(label, "not measured", note)
        low, high = cell.mr_ci95
        text = f"{percent_words(cell.mr)}, 95 % interval {interval_words(cell.mr_ci95)}"
        left_out = f"; {cell.failed} failed" if cell.failed else ""
        return _Tile(
            label, f"{cell.hits} of {cell.n}", f"{text}{left_out}. {note}",
            100 * cell.mr, 100 * low, 100 * high,
        )  # fmt: skip

    budget = report.recommended_budget
    words = condition_words(attack).removeprefix("attack ") if attack else "No attack was run"
    return [
        tile("Suspected images, from their prompts", "vm", prompts, "The prompts as they are."),
        tile("Suspected images, by the attack", "vm", attack, f"{_capital(words)}."),
        tile("Controls, same attack: false alarms", "control", attack, "Should be none."),
        _Tile(
            "Largest budget that leaves the controls alone",
            number_words(budget.steps, "step") if budget else "none",
            "Fewer than 5 % of the controls come back up to there."
            if budget
            else "No measured budget keeps the controls under 5 %, or none was attacked.",
        ),
    ]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
