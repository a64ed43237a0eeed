"""What a locality run found: ``locality.json``, figures, a summary in Markdown and a page."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dori_lightning.locality.embeddings import EmbeddingFindings, Move, Place, Spread
from dori_lightning.locality.estimates import Estimate, Rate
from dori_lightning.locality.layers import (
    GROUPS,
    METHODS,
    ActivationFindings,
    GroupName,
    Method,
    WeightFindings,
    block_of,
)
from dori_lightning.locality.study import TransferFindings
from dori_lightning.report.figures import (
    ALARM,
    CALM,
    GROUND,
    KIND_LOOK,
    SERIES,
    TEXT,
    RatePoint,
    new_figure,
    plain_axes,
    png_bytes,
    rate_curves,
    styled,
    svg_element,
    under_legend,
)
from dori_lightning.report.pages import rendered_page
from dori_lightning.report.record import LOCALITY_FILE, Provenance
from dori_lightning.report.tables import TextTable, tables_markdown, text_table
from dori_lightning.report.words import (
    METHOD_WORDS,
    NOTHING,
    START_WORDS,
    budget_words,
    escape,
    estimate_words,
    interval_words,
    mean_words,
    number_words,
    rate_words,
    text_macro,
)
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.runtime.documents import json_bytes
from dori_lightning.runtime.redaction import redact
from dori_lightning.types import Budget, Init, Kind

LOCALITY_SCHEMA_VERSION = 1

_TEMPLATE = "locality.txt.j2"

_QUESTIONS = {
    "budget": ("Budget", "How often does an arbitrary embedding become a trigger?"),
    "spread": ("Distances", "Do triggers of one image lie together?"),
    "map": ("Map", "What does that look like?"),
    "activations": ("Activations", "Do triggers of one image activate a model alike?"),
    "weights": (
        "Weights",
        "Does a pruning method find the same weights whatever triggers the image?",
    ),
    "methods": ("NeMo and Wanda", "Do NeMo and Wanda point to the same place?"),
    "lines": ("Lines", "Does the middle between two triggers trigger?"),
    "transfer": ("Transfer", "Do triggers work on other models?"),
}
"""Name of each question, also of its figure, to a word for the page's menu and the question."""


@dataclass(frozen=True)
class StudiedImage:
    """One image that was attacked.

    Attributes:
        id: Pair id.
        kind: Kind of pair; ``control`` for controls.
        prompt: Its prompt.
        attacked: Start to attacks that stayed finite.
        working: Start to those whose end replicates the image.
    """

    id: str
    kind: Kind
    prompt: str
    attacked: dict[Init, int]
    working: dict[Init, int]


@dataclass(frozen=True)
class LocalityReport:
    """Everything that a locality run found.

    Attributes:
        checkpoint: Name of the checkpoint.
        mitigation: Whose model the triggers were searched on; ``none`` for the checkpoint.
        start: Whose triggers are traced through layers, weights, budgets and lines.
        restarts: Attacks per image and start.
        budget: What each of them may spend.
        descriptor: What decides whether an image is a replica.
        threshold: Similarity above which an embedding replicates its image.
        pictures_each: Images per embedding, of which the closest counts, or the median.
        images: Images under study, and controls.
        memorized_prompts: Ids of the other memorized images whose prompts are compared with.
        control_prompts: Ids of the controls whose prompts are compared with.
        embeddings: Where triggers lie; None where it was not asked.
        activations: What they activate.
        weights: Which weights methods select with them.
        transfer: How often they replicate the image; ``at_large`` in ``locality.json``.
        provenance: Where the numbers come from.
        schema_version: Version of the layout of ``locality.json``.
    """

    checkpoint: str
    mitigation: str
    start: Init
    restarts: int
    budget: Budget
    descriptor: str
    threshold: float
    pictures_each: int
    images: tuple[StudiedImage, ...]
    memorized_prompts: tuple[str, ...]
    control_prompts: tuple[str, ...]
    embeddings: EmbeddingFindings | None
    activations: ActivationFindings | None
    weights: WeightFindings | None
    transfer: TransferFindings | None
    provenance: Provenance
    schema_version: int = LOCALITY_SCHEMA_VERSION

    @property
    def studied(self) -> tuple[StudiedImage, ...]:
        """Memorized images."""
        return tuple(image for image in self.images if image.kind != "control")

    @property
    def controls(self) -> tuple[StudiedImage, ...]:
        """Control images that were attacked."""
        return tuple(image for image in self.images if image.kind == "control")


@dataclass(frozen=True)
class Answer:
    """One question with its answer.

    Attributes:
        name: Stable name, also of its figure.
        label: A word or two for the page's menu.
        question: The question.
        text: The answer in numbers, with its control.
        caption: How to read the figure.
    """

    name: str
    label: str
    question: str
    text: str
    caption: str

    @property
    def file(self) -> str:
        """Where the figure lies below the run folder."""
        return f"figures/locality_{self.name}.png"


def write_locality_files(report: LocalityReport, folder: Path) -> Path:
    """Write ``locality.json``, ``figures/*.png``, ``locality.md`` and ``locality.html``.

    Returns:
        Path of the page, which is written last.

    Raises:
        TypeError: The report holds something that JSON cannot.
    """
    figures, listed = draw_locality(report), []
    for answer in answers(report):
        if answer.name in figures:
            write_atomically(folder / answer.file, png_bytes(figures[answer.name]))
            listed.append(
                {"file": answer.file, "title": answer.question, "caption": answer.caption}
            )
    document = asdict(report)
    document["at_large"] = document.pop("transfer")
    document["provenance"]["config"] = redact(report.provenance.config)
    document |= {"figures": listed, "verdict": verdict(report)}
    write_atomically(folder / LOCALITY_FILE, json_bytes(document, indent=1))
    write_atomically(folder / "locality.md", locality_markdown(report).encode())
    page = render_locality_page(report, figures)
    return write_atomically(folder / "locality.html", page.encode())


def render_locality_page(report: LocalityReport, figures: Mapping[str, Figure]) -> str:
    """Render the page; it loads nothing from anywhere and shows no image of a pair."""
    config = redact(report.provenance.config)
    return rendered_page(
        "locality.html.j2",
        report=report,
        answers=answers(report),
        figures={name: svg_element(figure, name) for name, figure in figures.items()},
        budget=budget_words(report.budget),
        images=image_table(report),
        tables=list(number_tables(report)),
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
        lines += ["", f"![{answer.question}]({answer.file})"]
    tables = tables_markdown((image_table(report), *number_tables(report)), ())
    return "\n".join([*lines, "", "## Numbers", "", tables])


def draw_locality(report: LocalityReport) -> dict[str, Figure]:
    """Draw one figure per question that has something to show, by the question's name."""
    figures: dict[str, Figure | None] = {}
    if report.transfer is not None:
        figures["budget"] = _draw_budget(report.transfer, report.start)
        figures["lines"] = _draw_lines(report.transfer)
        figures["transfer"] = _draw_transfer(report.transfer)
    if report.embeddings is not None:
        figures["spread"] = _draw_spread(report.embeddings)
        figures["map"] = _draw_map(report.embeddings)
    if report.activations is not None:
        figures["activations"] = _draw_activations(report.activations)
    if report.weights is not None:
        figures["weights"] = _draw_weights(report.weights)
        figures["methods"] = _draw_methods(report.weights)
    return {name: figure for name, figure in figures.items() if figure is not None}


def answers(report: LocalityReport) -> tuple[Answer, ...]:
    """Answer the questions that were asked, in the order of the page."""
    found = findings(report)
    said = []
    for name, (label, question) in _QUESTIONS.items():
        if name in found:
            macro = name if found[name] is not None else "too_few"
            text, caption = (
                text_macro(_TEMPLATE, part, report, found[name])
                for part in (macro, f"{macro}_caption")
            )
            said.append(Answer(name, label, question, text, caption))
    return tuple(said)


def verdict(report: LocalityReport) -> str:
    """What a reader should take away: a line for each of the questions asked."""
    found = findings(report)
    macros = {"budget": "budget", "spread": "spread_verdict", "weights": "weights_verdict"}
    return "\n".join(
        text_macro(_TEMPLATE, macro, report, found[name])
        for name, macro in macros.items()
        if found.get(name) is not None
    )


def findings(report: LocalityReport) -> dict[str, dict[str, Any] | None]:
    """The numbers that answer each question asked; None where too few triggers worked."""
    found: dict[str, dict[str, Any] | None] = {}
    if report.transfer is not None:
        found["budget"] = _budget(report, report.transfer)
        # the place nearest to the middle of the way
        nearest = sorted(report.transfer.lines, key=lambda point: -abs(point.place - 0.5))
        middle: dict[str, Any] = {point.toward: point for point in nearest}
        controls = {"other_image": None, "random": None}
        found["lines"] = {**controls, **middle} if "same_image" in middle else None
        found["transfer"] = _transfer(report, report.transfer)
    if report.embeddings is not None:
        kinds = [place.what for place in report.embeddings.places]
        found["spread"] = _spread(report, report.embeddings)
        found["map"] = {
            "triggers": kinds.count("start"),
            "prompts": sum("prompt" in kind for kind in kinds),
        }
    if report.activations is not None:
        found["activations"] = _activations(report.activations)
    if report.weights is not None:
        found["weights"] = _weights(report.weights)
        by_group = {own.group: own for own in report.weights.agreement}
        own, prompts = by_group.get("triggers"), by_group.get("memorized_prompts")
        known = own is not None and own.overlap.count
        found["methods"] = {"triggers": own, "prompts": prompts} if known else None
    return found


def _budget(report: LocalityReport, found: TransferFindings) -> dict[str, Any]:
    rates = {
        (point.held, point.start): point.rate
        for point in found.budget
        if point.steps == report.budget.steps
    }
    others = dict.fromkeys(p.start for p in found.budget if p.start != report.start)
    return {
        "memorized": rates.get(("memorized", report.start)),
        "control": rates.get(("control", report.start)),
        "others": {start: rates.get(("memorized", start)) for start in others},
    }


def _spread(report: LocalityReport, found: EmbeddingFindings) -> dict[str, Any] | None:
    spreads = {s.group: s for s in found.spreads if s.start == report.start}
    if not {"triggers", "starts"} <= spreads.keys():
        return None
    ends, starts = spreads["triggers"], spreads["starts"]
    moves = {move.held: move for move in found.moves if move.start == report.start}
    nearest = {
        n.what: n for n in found.nearest if n.start == report.start and n.measure == "cosine"
    }
    apart = starts.distance.value
    return {
        "ends": ends,
        "starts": starts,
        "starts_explain": apart != 0 and abs(ends.distance.value / apart - 1) <= 0.1,
        "random_distance": found.random_distance,
        "move": moves["memorized"],
        "control": moves.get("control"),
        "nearest": {"triggers": None, "starts": None, **nearest},
    }


def _activations(found: ActivationFindings) -> dict[str, Any] | None:
    methods = {}
    for method in METHOD_WORDS:
        by_group = _by_group(found.layers, method)
        if "triggers" not in by_group:
            return None
        ours = by_group["triggers"]
        beside = list(zip(ours, by_group["memorized_prompts"], by_group["starts"], strict=True))
        methods[method] = {
            "layers": len(ours),
            "apart": sum(own.distance.value > prompt.distance.value for own, prompt, _ in beside),
            "closer": sum(own.relative.value < start.relative.value for own, _, start in beside),
            "closer_within": sum(  # false where no two images are compared: NaN
                own.relative.value < own.relative_between.value for own in ours
            ),
        }
    return {"methods": methods}


def _weights(found: WeightFindings) -> dict[str, Any] | None:
    methods = {}
    for method in METHOD_WORDS:
        by_group = _by_group(found.layers, method)
        if "triggers" not in by_group:
            return None
        ours = by_group["triggers"]
        methods[method] = {
            "layers": len(ours),
            "iou": _mean(row.iou.value for row in ours),
            "iou_between": _mean(row.iou_between.value for row in ours),
            "iou_nonempty": _mean(row.iou_nonempty for row in ours),
            "chance": _mean(row.chance for row in ours),
            "both_empty": sum(row.both_empty for row in ours),
            "compared": sum(row.compared for row in ours),
            "memorized": found.memorized.get(method),
            **{
                group: _mean(row.iou.value for row in by_group.get(group, ()))
                for group in ("starts", "memorized_prompts", "control_prompts")
            },
        }
    return {"methods": methods}


def _by_group(layers: Iterable[Any], method: str) -> dict[str, list[Any]]:
    """A method's rows of layers, by group of embeddings."""
    groups: dict[str, list[Any]] = {}
    for row in layers:
        if row.method == method:
            groups.setdefault(row.group, []).append(row)
    return groups


def _transfer(report: LocalityReport, found: TransferFindings) -> dict[str, Any] | None:
    models = {}
    for model in dict.fromkeys(row.model for row in found.transfers):
        rates = {(t.held, t.start): t.rate for t in found.transfers if t.model == model}
        if ("memorized", report.start) not in rates:
            return None
        models[model] = {
            "triggers": rates["memorized", report.start],
            "prompts": rates["memorized", "prompt_itself"],
        }
    return {"models": models} if models else None


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def image_table(report: LocalityReport) -> TextTable:
    """How many attacks on each image worked."""
    starts: list[Init] = list(dict.fromkeys(s for image in report.images for s in image.attacked))

    def worked(start: Init) -> Callable[[Any], str]:
        return lambda image: (
            f"{image.working[start]} of {image.attacked[start]}"
            if start in image.attacked
            else NOTHING
        )

    return text_table(
        "Images",
        "Attacks whose end draws the image, of those that stayed finite, by where they began.",
        report.images,
        {"image": lambda i: i.id, "kind": lambda i: i.kind, "prompt": lambda i: i.prompt},
        {START_WORDS[start]: worked(start) for start in starts},
    )


_TABLES = (
    "transfer.budget", "transfer.lines", "transfer.transfers", "embeddings.spreads",
    "embeddings.moves", "embeddings.nearest", "activations.layers", "weights.layers",
)  # fmt: skip
"""Rows of a report's findings; the template has the title and the caption of their tables."""


def number_tables(report: LocalityReport) -> Iterator[TextTable]:
    """Every number behind the figures, with its interval; a column for each field of the rows."""
    for part, name in (path.split(".") for path in _TABLES):
        rows: Sequence[Any] = getattr(getattr(report, part), name, ())
        if rows:
            title, _, caption = text_macro(_TEMPLATE, f"{part}_{name}").partition(": ")
            columns = {item.name: _column(item.name) for item in fields(rows[0])}
            # the fields that name a row come first
            values = (getattr(rows[0], name) for name in columns)
            named = next(k for k, v in enumerate(values) if not isinstance(v, str | bool | None))
            yield text_table(
                title,
                caption,
                rows,
                {_heading(name): columns[name] for name in list(columns)[:named]},
                {_heading(name): columns[name] for name in list(columns)[named:]},
            )


def _heading(name: str) -> str:
    return name.replace("_between", ", two images").replace("held", "images").replace("_", " ")


def _column(name: str) -> Callable[[Any], str]:
    return lambda row: _words(name, getattr(row, name))


def _words(name: str, value: Any) -> str:
    """One field of a row as text."""
    match value:
        case None:
            return NOTHING
        case Rate():
            over_images = f"; over images {interval_words(value.ci95_images)}" if value.n else ""
            return rate_words(value) + over_images
        case Estimate():
            return estimate_words(value)
        case bool():
            return "yes" if value else "no"
        case float():
            return mean_words(value)
        case str() if name in ("layer", "parameter"):
            return _short_layer(value)
        case str() if name != "model":
            return {**METHOD_WORDS, **START_WORDS}.get(value, value.replace("_", " "))
    return str(value)


_GROUP_LOOK: dict[str, tuple[str, str, str]] = {
    "triggers": (SERIES[1], "o", "triggers of one image"),
    "starts": (KIND_LOOK["control"][0], "s", "their starts"),
    "control_ends": (SERIES[3], "v", "attacks on controls"),
    "memorized_prompts": (SERIES[0], "D", "memorized prompts"),
    "control_prompts": (SERIES[2], "^", "control prompts"),
}
"""Colour, marker and words of each group of embeddings."""

_SHORT_START = {"random": "random", "prompt": "own prompt", "control_prompt": "other prompt"}
_START_MARKERS = {"random": "o", "prompt": "s", "control_prompt": "^"}


def _draw_budget(found: TransferFindings, start: str) -> Figure | None:
    """Draw success against steps for memorized and control images."""
    looks = {
        f"{held} images": {"color": colour, "marker": marker}
        for held, (colour, marker, _) in (
            ("memorized", KIND_LOOK["vm"]), ("control", KIND_LOOK["control"]),
        )
    }  # fmt: skip
    points = [
        RatePoint("", f"{p.held} images", p.steps, p.rate.rate, p.rate.ci95)
        for p in found.budget
        if p.start == start
    ]
    xlabel = f"attack steps from {START_WORDS[start]}"
    return rate_curves(points, looks, "draw their image", xlabel, logarithmic=True)


def _draw_lines(found: TransferFindings) -> Figure | None:
    """Draw success along lines from triggers."""
    names = {
        "same_image": ("to the same image", "triggers"),
        "other_image": ("to another image", "memorized_prompts"),
        "random": ("to a random embedding", "starts"),
    }
    looks = {
        name: dict(zip(("color", "marker"), _GROUP_LOOK[group], strict=False))
        for name, group in names.values()
    }
    points = [
        RatePoint("", names[p.toward][0], p.place, p.rate.rate, p.rate.ci95) for p in found.lines
    ]
    xlabel = "share of the way; the trigger is at 0"
    return rate_curves(points, looks, "draw their image", xlabel)


@styled()
def _draw_transfer(found: TransferFindings) -> Figure | None:
    """Draw success on each model by where the search began."""
    if not found.transfers:
        return None
    models = list(dict.fromkeys(t.model for t in found.transfers))
    starts = list(dict.fromkeys(t.start for t in found.transfers))
    figure = new_figure(8.0, 0.85 * len(models) + 1.7)
    axes = figure.subplots()
    plain_axes(axes, grid="x")
    width = 0.76 / len(starts)
    for t in found.transfers:
        if not t.rate.n:
            continue
        row, k, memorized = models.index(t.model), starts.index(t.start), t.held == "memorized"
        colour = SERIES[k % len(SERIES)]
        place = row - 0.38 + width * (k + 0.5) + (0 if memorized else 0.06)
        words = START_WORDS[t.start]
        label = words if t.start == "prompt_itself" else f"attacked from {words}"
        alpha = 1.0 if memorized else 0.45
        axes.plot(t.rate.ci95, [place] * 2, color=colour, linewidth=1.6, alpha=alpha)
        axes.plot(
            t.rate.rate, place, linestyle="none", color=colour, clip_on=False,
            marker="o" if memorized else "^", markersize=8 if memorized else 6,
            markerfacecolor=colour if memorized else GROUND, label=label if memorized else None,
        )  # fmt: skip
    searched = {t.model for t in found.transfers if t.searched}
    names = [
        ("checkpoint\nas it is" if model == "none" else model)
        + ("\n(searched)" if model in searched else "")
        for model in models
    ]
    axes.set_yticks(range(len(models)), names)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("embeddings that draw their image; open triangles: control images")
    under_legend(figure, axes, columns=2)
    return figure


@styled()
def _draw_spread(found: EmbeddingFindings) -> Figure:
    """Draw how far embeddings of each group are apart, and whether attacks move alike."""
    rows = [(row.group, row.start, row) for row in found.spreads]
    moves = [
        ("triggers" if move.held == "memorized" else "control_ends", move.start, move)
        for move in found.moves
    ]
    figure = new_figure(11.4, 0.42 * max(len(rows), 6) + 1.3)
    left, middle, right = figure.subplots(1, 3)
    _bars(left, rows, "distance", "mean distance of two")
    _bars(middle, rows, "cosine", "mean cosine of two")
    _bars(right, moves, "cosine", "mean cosine of two moves")
    left.axvline(found.random_distance, color=ALARM, linestyle="--", linewidth=1.2)
    left.set_xlim(left=0)
    left.set_xlabel("dashed: random embeddings")
    middle.set_xlabel("filled: one image; open: two images")
    middle.set_yticklabels([])
    right.axvline(0, color=CALM, linewidth=0.8)
    return figure


def _bars(
    axes: Axes, rows: Sequence[tuple[str, str | None, Spread | Move]], name: str, title: str
) -> None:
    """Draw one mean a row, within an image (filled) and between images (open)."""
    plain_axes(axes, grid="x")
    for place, (group, _, row) in enumerate(rows):
        for shift, suffix in ((-0.12, ""), (0.2, "_between")):
            _draw_mean(axes, getattr(row, name + suffix), place + shift, group, filled=not suffix)
    names = [
        _GROUP_LOOK[group][2] + ("" if start is None else f"\n(from {_SHORT_START[start]})")
        for group, start, _ in rows
    ]
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.6)
    axes.set_title(title)


def _draw_mean(
    axes: Axes,
    estimate: Estimate,
    place: float,
    group: str,
    *,
    filled: bool = True,
    upright: bool = False,
    **style: Any,
) -> None:
    """Draw a mean with its interval, lying or upright."""
    if math.isnan(estimate.value):
        return
    colour, marker, _ = _GROUP_LOOK[group]
    interval, centre = ([estimate.low, estimate.high], [place] * 2), (estimate.value, place)
    if not math.isnan(estimate.low) and (filled or not upright):
        axes.plot(*(interval[::-1] if upright else interval), color=colour, linewidth=1.6)
    axes.plot(
        *(centre[::-1] if upright else centre), marker=marker, color=colour, markersize=6,
        linestyle="none", markerfacecolor=colour if filled else GROUND, clip_on=False, **style,
    )  # fmt: skip


@styled()
def _draw_map(found: EmbeddingFindings) -> Figure | None:
    """Draw embeddings in two dimensions; None where there are too few."""
    if not found.places:
        return None
    figure = new_figure(11.0, 5.4)
    grid = figure.subplots(1, 2)
    for axes, kind in zip(grid, ("pca", "tsne"), strict=True):
        _scatter(axes, found.places, kind)
        axes.set(xticks=[], yticks=[])
    grid[0].set_title("principal components")
    grid[1].set_title("t-SNE")
    under_legend(figure, grid[0], columns=3)
    return figure


def _scatter(axes: Axes, places: Sequence[Place], kind: str) -> None:
    """Draw prompts, starts and the triggers found from there."""
    images = list(dict.fromkeys(p.pair for p in places if p.what == "own_prompt"))
    colours = {image: SERIES[k % len(SERIES)] for k, image in enumerate(images)}
    starts = {(p.pair, p.start, p.restart): getattr(p, kind) for p in places if p.what == "start"}

    def point(at: tuple[float, float], colour: str, marker: str, **style: Any) -> None:
        axes.plot(*at, linestyle="none", color=colour, marker=marker, **style)

    for what, label, marker, colour in (
        ("control_prompt", "control prompts", "x", CALM),
        ("memorized_prompt", "other memorized prompts", "+", TEXT),
    ):
        for place in places:
            if place.what == what:
                at = getattr(place, kind)
                point(at, colour, marker, label=label, markersize=6, alpha=0.75)
    for place in places:
        at, colour = getattr(place, kind), colours.get(place.pair, CALM)
        if place.what == "own_prompt":
            style: dict[str, Any] = {"markersize": 15, "markeredgecolor": GROUND, "zorder": 5}
            point(at, colour, "*", label=f"{place.pair}: its prompt", **style)
        elif place.what == "end":
            start, marker = starts[place.pair, place.start, place.restart], str(place.start)
            axes.plot(*zip(start, at, strict=True), color=colour, linewidth=0.8, alpha=0.5)
            point(start, colour, _START_MARKERS[marker], markerfacecolor=GROUND, markersize=4.5)
            point(at, colour, _START_MARKERS[marker], markersize=6.5, zorder=4)
    for start in dict.fromkeys(str(start) for _, start, _ in starts):
        label = f"trigger found from {START_WORDS[start]}"
        axes.plot([], [], linestyle="none", marker=_START_MARKERS[start], color=TEXT, label=label)


def _short_layer(name: str) -> str:
    """A layer's place in the network: ``down 1.0``, ``mid 0``."""
    parts = block_of(name).split(".")
    stage = parts[0].split("_")[0]
    return f"{stage} {'.'.join(part for part in parts[1:] if part.isdigit())}"


@styled()
def _draw_activations(found: ActivationFindings) -> Figure | None:
    """Draw mean distances of activations by layer and group, for each method's layers."""
    if not found.layers:
        return None
    places = _layer_places((row.method, row.layer) for row in found.layers)
    figure, panels = _layer_panels(places, "mean distance", "relative to size")
    for row in found.layers:
        upper, lower = panels[row.method]
        place = places[row.method].index(row.layer)
        _draw_group(upper, row.distance, row.distance_between, place, row.group)
        _draw_group(lower, row.relative, row.relative_between, place, row.group)
    for axes in figure.axes:
        axes.set_ylim(bottom=0)
    under_legend(figure, *figure.axes)
    return figure


@styled()
def _draw_weights(found: WeightFindings) -> Figure | None:
    """Draw agreement of selections by layer and group, with their sizes, for each method."""
    if not found.layers:
        return None
    places = _layer_places((row.method, row.parameter) for row in found.layers)
    figure, panels = _layer_panels(places, "intersection over union", "selected, % of layer")
    for row in found.layers:
        upper, lower = panels[row.method]
        place = places[row.method].index(row.parameter)
        _draw_group(upper, row.iou, row.iou_between, place, row.group)
        at = place + _shift(row.group)
        if not math.isnan(row.chance):
            style: dict[str, Any] = {"color": TEXT, "markersize": 9, "linestyle": "none"}
            upper.plot(at, row.chance, marker="_", label="random selections", **style)
        lower.bar(at, 100 * row.size / row.units, width=0.17, color=_GROUP_LOOK[row.group][0])
    for upper, lower in panels.values():
        upper.set_ylim(-0.03, 1.05)
        lower.set_ylim(bottom=0)
    under_legend(figure, *figure.axes)
    return figure


@styled()
def _draw_methods(found: WeightFindings) -> Figure | None:
    """Draw in which blocks the two methods select with triggers."""
    own = next((a for a in found.agreement if a.group == "triggers" and a.nemo), None)
    if own is None:
        return None
    figure = new_figure(8.0, 3.8)
    axes = figure.subplots()
    places = np.arange(len(own.blocks))
    for shift, values, group, label in (
        (-0.2, own.nemo, "triggers", "NeMo: value neurons"),
        (0.2, own.wanda, "memorized_prompts", "Wanda: feed-forward weights"),
    ):
        shares = [100 * value for value in values]
        axes.bar(places + shift, shares, width=0.38, label=label, color=_GROUP_LOOK[group][0])
    _layer_axis(axes, own.blocks)
    axes.set_ylabel("% of the selection")
    under_legend(figure, axes, columns=2)
    return figure


def _layer_places(layers: Iterable[tuple[Method, str]]) -> dict[Method, list[str]]:
    """Layers of each method, in the order of its panels."""
    named = list(dict.fromkeys(layers))
    of = {method: [layer for own, layer in named if own == method] for method in METHODS}
    return {method: own for method, own in of.items() if own}


def _layer_panels(
    layers: Mapping[Method, Sequence[str]], upper_label: str, lower_label: str
) -> tuple[Figure, dict[Method, tuple[Axes, Axes]]]:
    """A figure with two panels above each other per method; methods beside each other."""
    widths = [len(own) for own in layers.values()]
    figure = new_figure(2.0 + 0.48 * sum(widths), 6.4)
    grid = figure.subplots(2, len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
    for (upper, lower), (method, own) in zip(grid.T, layers.items(), strict=True):
        _layer_axis(upper, [])
        _layer_axis(lower, own)
        upper.set_title(METHOD_WORDS[method])
    grid[0, 0].set_ylabel(upper_label)
    grid[1, 0].set_ylabel(lower_label)
    return figure, dict(zip(layers, map(tuple, grid.T), strict=True))


def _layer_axis(axes: Axes, layers: Sequence[str]) -> None:
    plain_axes(axes)
    axes.set_xticks(
        range(len(layers)), [_short_layer(name) for name in layers],
        rotation=60, fontsize=9, ha="right", rotation_mode="anchor",
    )  # fmt: skip


def _shift(group: GroupName) -> float:
    """Place of a group's mark beside the middle of its layer."""
    return 0.19 * (GROUPS.index(group) - (len(GROUPS) - 1) / 2)


def _draw_group(
    axes: Axes, within: Estimate, between: Estimate, layer: int, group: GroupName
) -> None:
    """Draw a layer's mean of one group; of triggers also that between images."""
    at = layer + _shift(group)
    _draw_mean(axes, within, at, group, upright=True, label=_GROUP_LOOK[group][2])
    if group == "triggers":
        words = "triggers of two images"
        _draw_mean(axes, between, at + 0.07, group, upright=True, filled=False, label=words)
