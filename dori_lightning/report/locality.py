"""What a locality run found: ``locality.json``, figures and a page."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dori_lightning.locality.embeddings import EmbeddingFindings, GroupName, Move, Place, Spread
from dori_lightning.locality.estimates import Estimate, Rate
from dori_lightning.locality.layers import (
    GROUPS,
    METHODS,
    ActivationFindings,
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
    rate_curves,
    styled,
    svg_element,
    under_legend,
    write_figures,
)
from dori_lightning.report.pages import rendered_page
from dori_lightning.report.record import LOCALITY_FILE, Provenance
from dori_lightning.report.tables import TextTable, text_table
from dori_lightning.report.words import (
    METHOD_WORDS,
    NOTHING,
    START_WORDS,
    budget_words,
    estimate_words,
    interval_words,
    mean_words,
    rate_words,
    text_macro,
)
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.runtime.documents import json_bytes
from dori_lightning.runtime.redaction import redact
from dori_lightning.types import Budget, Init, Kind

LOCALITY_SCHEMA_VERSION = 1

_TEMPLATE = "locality.txt.j2"

_QUESTIONS = ("budget", "spread", "map", "activations", "weights", "lines", "transfer")
"""What is asked, in the order of the page; the names are those of figures and macros."""


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
        pictures_each: Images per embedding, of which the closest counts.
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


def write_locality_files(report: LocalityReport, folder: Path) -> Path:
    """Write ``locality.json``, ``figures/*.png`` and ``locality.html``.

    Returns:
        Path of the page, which is written last.

    Raises:
        TypeError: The report holds something that JSON cannot.
    """
    figures = draw_locality(report)
    write_figures(figures, folder, prefix="locality_")
    document = asdict(report)
    document["at_large"] = document.pop("transfer")
    document["provenance"]["config"] = redact(report.provenance.config)
    document["answers"] = {answer.name: answer.text for answer in answers(report)}
    write_atomically(folder / LOCALITY_FILE, json_bytes(document, indent=1))
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
    return {name: figure for name, figure in figures.items() if figure is not None}


def answers(report: LocalityReport) -> tuple[Answer, ...]:
    """Answer the questions that were asked, in the order of the page."""
    found = findings(report)
    said = []
    for name in _QUESTIONS:
        if name in found:
            label, _, question = text_macro(_TEMPLATE, f"{name}_question").partition(": ")
            macro = name if found[name] is not None else "too_few"
            text, caption = (
                text_macro(_TEMPLATE, part, report, found[name])
                for part in (macro, f"{macro}_caption")
            )
            said.append(Answer(name, label, question, text, caption))
    return tuple(said)


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
        found["activations"] = _by_method(report.activations.layers, _activations)
    if report.weights is not None:
        found["weights"] = _by_method(report.weights.layers, _weights)
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
    nearest = {near.what: near for near in found.nearest if near.start == report.start}
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


Groups = Mapping[str, Sequence[Any]]
"""Group of embeddings to a method's rows of layers."""


def _by_method(
    layers: Iterable[Any], numbers: Callable[[Groups], dict[str, Any]]
) -> dict[str, Any] | None:
    """The numbers of each method's layers; None where no triggers were compared."""
    methods: dict[str, dict[str, list[Any]]] = {}
    for row in layers:
        methods.setdefault(row.method, {}).setdefault(row.group, []).append(row)
    if not all("triggers" in groups for groups in methods.values()):
        return None
    return {"methods": {method: numbers(groups) for method, groups in methods.items()}}


def _activations(groups: Groups) -> dict[str, Any]:
    ours = groups["triggers"]
    beside = list(zip(ours, groups["memorized_prompts"], groups["starts"], strict=True))
    return {
        "layers": len(ours),
        "apart": sum(own.distance.value > prompt.distance.value for own, prompt, _ in beside),
        "closer": sum(own.relative.value < start.relative.value for own, _, start in beside),
        # false where no two images are compared: NaN
        "closer_within": sum(own.relative.value < own.relative_between.value for own in ours),
    }


def _weights(groups: Groups) -> dict[str, Any]:
    ours = groups["triggers"]
    return {
        "layers": len(ours),
        "iou_between": _mean(row.iou_between.value for row in ours),
        "iou_nonempty": _mean(row.iou_nonempty for row in ours),
        "chance": _mean(row.chance for row in ours),
        "both_empty": sum(row.both_empty for row in ours),
        "compared": sum(row.compared for row in ours),
        "iou": {name: _mean(row.iou.value for row in rows) for name, rows in groups.items()},
    }


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
    "weights.agreement",
)  # fmt: skip
"""Rows of a report's findings; the template has the title and the caption of their tables."""


def number_tables(report: LocalityReport) -> Iterator[TextTable]:
    """Every number behind the figures, with its interval; a column for each field of the rows."""
    for part, kind in (path.split(".") for path in _TABLES):
        rows: Sequence[Any] = getattr(getattr(report, part), kind, ())
        if rows:
            title, _, caption = text_macro(_TEMPLATE, f"{part}_{kind}").partition(": ")
            names = [item.name for item in fields(rows[0])]
            columns = [(_heading(name), partial(_words, name)) for name in names]
            # the fields that name a row come first
            values = (getattr(rows[0], name) for name in names)
            named = next(k for k, v in enumerate(values) if not isinstance(v, str | bool | None))
            yield text_table(title, caption, rows, dict(columns[:named]), dict(columns[named:]))


def _heading(name: str) -> str:
    return name.replace("_between", ", two images").replace("held", "images").replace("_", " ")


def _words(name: str, row: Any) -> str:
    """One field of a row as text."""
    value = getattr(row, name)
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


_HELD_LOOK: dict[str, dict[str, Any]] = {
    "memorized images": {"color": KIND_LOOK["vm"][0], "marker": KIND_LOOK["vm"][1]},
    "control images": {"color": KIND_LOOK["control"][0], "marker": KIND_LOOK["control"][1]},
}


def _draw_budget(found: TransferFindings, start: str) -> Figure | None:
    """Draw success against steps for memorized and control images."""
    points = [
        RatePoint("", f"{p.held} images", p.steps, p.rate.rate, p.rate.ci95)
        for p in found.budget
        if p.start == start
    ]
    xlabel = f"attack steps from {START_WORDS[start]}"
    return rate_curves(points, _HELD_LOOK, "draw their image", xlabel, logarithmic=True)


def _draw_lines(found: TransferFindings) -> Figure | None:
    """Draw success along lines from triggers."""
    words = {"same_image": "to the same image", "other_image": "to another image",
             "random": "to a random embedding"}  # fmt: skip
    groups = ("triggers", "memorized_prompts", "starts")
    looks = {
        name: {"color": _GROUP_LOOK[group][0], "marker": _GROUP_LOOK[group][1]}
        for name, group in zip(words.values(), groups, strict=True)
    }
    points = [
        RatePoint("", words[p.toward], p.place, p.rate.rate, p.rate.ci95) for p in found.lines
    ]
    xlabel = "share of the way; the trigger is at 0"
    return rate_curves(points, looks, "draw their image", xlabel)


def _draw_transfer(found: TransferFindings) -> Figure | None:
    """Draw success on each model, with a panel for where the search began."""
    models = {t.model: "checkpoint" if t.model == "none" else t.model for t in found.transfers}
    models |= {t.model: f"{models[t.model]}\n(searched)" for t in found.transfers if t.searched}
    places = list(models)
    points = []
    for t in found.transfers:
        if t.rate.n:
            words = START_WORDS[t.start]
            panel = words if t.start == "prompt_itself" else f"attacked from {words}"
            place = places.index(t.model)
            points.append(RatePoint(panel, f"{t.held} images", place, t.rate.rate, t.rate.ci95))
    looks = {name: {**look, "linestyle": "none"} for name, look in _HELD_LOOK.items()}
    return rate_curves(
        points, looks, "draw their image", "", words=lambda place: models[places[int(place)]]
    )


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
    spread = np.clip([[estimate.value - estimate.low], [estimate.high - estimate.value]], 0, None)
    x, y = (place, estimate.value) if upright else (estimate.value, place)
    axes.errorbar(
        x, y, xerr=None if upright else spread, yerr=spread if upright and filled else None,
        color=colour, marker=marker, markersize=6, elinewidth=1.6, linestyle="none",
        markerfacecolor=colour if filled else GROUND, clip_on=False, **style,
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

    def points(chosen: Iterable[Any], colour: str, marker: str, **style: Any) -> None:
        for at in chosen:
            axes.plot(*at, linestyle="none", color=colour, marker=marker, **style)

    for what, label, marker, colour in (
        ("control_prompt", "control prompts", "x", CALM),
        ("memorized_prompt", "other memorized prompts", "+", TEXT),
    ):
        chosen = [getattr(place, kind) for place in places if place.what == what]
        points(chosen, colour, marker, label=label, markersize=6, alpha=0.75)
    for place in places:
        at, colour = getattr(place, kind), colours.get(place.pair, CALM)
        if place.what == "own_prompt":
            style: dict[str, Any] = {"markersize": 15, "markeredgecolor": GROUND, "zorder": 5}
            points([at], colour, "*", label=f"{place.pair}: its prompt", **style)
        elif place.what == "end":
            start, marker = starts[place.pair, place.start, place.restart], str(place.start)
            axes.plot(*zip(start, at, strict=True), color=colour, linewidth=0.8, alpha=0.5)
            points([start], colour, _START_MARKERS[marker], markerfacecolor=GROUND, markersize=4.5)
            points([at], colour, _START_MARKERS[marker], markersize=6.5, zorder=4)
    for init in dict.fromkeys(str(init) for _, init, _ in starts):
        label = f"trigger found from {START_WORDS[init]}"
        points([([], [])], TEXT, _START_MARKERS[init], label=label)


def _short_layer(name: str) -> str:
    """A layer's place in the network: ``down 1.0``, ``mid 0``."""
    stage, *parts = block_of(name).split(".")
    return f"{stage.split('_')[0]} {'.'.join(part for part in parts if part.isdigit())}"


@styled()
def _draw_activations(found: ActivationFindings) -> Figure | None:
    """Draw mean distances of activations by layer and group, for each method's layers."""
    if not found.layers:
        return None
    named = [(row.method, row.layer) for row in found.layers]
    figure, panels = _layer_panels(named, "mean distance", "relative to size")
    for row in found.layers:
        upper, lower, place = panels[row.method, row.layer]
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
    named = [(row.method, row.parameter) for row in found.layers]
    figure, panels = _layer_panels(named, "intersection over union", "selected, % of layer")
    for row in found.layers:
        upper, lower, place = panels[row.method, row.parameter]
        _draw_group(upper, row.iou, row.iou_between, place, row.group)
        at = place + _shift(row.group)
        if not math.isnan(row.chance):
            style: dict[str, Any] = {"color": TEXT, "markersize": 9, "linestyle": "none"}
            upper.plot(at, row.chance, marker="_", label="random selections", **style)
        lower.bar(at, 100 * row.size / row.units, width=0.17, color=_GROUP_LOOK[row.group][0])
        upper.set_ylim(-0.03, 1.05)
        lower.set_ylim(bottom=0)
    under_legend(figure, *figure.axes)
    return figure


def _layer_panels(
    named: Iterable[tuple[Method, str]], upper_label: str, lower_label: str
) -> tuple[Figure, dict[tuple[Method, str], tuple[Axes, Axes, int]]]:
    """A figure with two panels above each other per method; methods beside each other.

    Args:
        named: Methods and their layers, which may come several times.
        upper_label: What the upper panels show.
        lower_label: What the lower panels show.

    Returns:
        The figure; and method and layer to its panels and its place on their horizontal axis.
    """
    known = list(dict.fromkeys(named))
    layers = {m: [layer for own, layer in known if own == m] for m in METHODS if m in dict(known)}
    widths = [len(own) for own in layers.values()]
    figure = new_figure(2.0 + 0.48 * sum(widths), 6.4)
    grid = figure.subplots(2, len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
    grid[0, 0].set_ylabel(upper_label)
    grid[1, 0].set_ylabel(lower_label)
    panels: dict[tuple[Method, str], tuple[Axes, Axes, int]] = {}
    for (upper, lower), (method, own) in zip(grid.T, layers.items(), strict=True):
        plain_axes(upper)
        plain_axes(lower)
        upper.set_title(METHOD_WORDS[method])
        upper.set_xticks([])
        lower.set_xticks(
            range(len(own)), [_short_layer(name) for name in own],
            rotation=60, fontsize=9, ha="right", rotation_mode="anchor",
        )  # fmt: skip
        panels |= {(method, layer): (upper, lower, k) for k, layer in enumerate(own)}
    return figure, panels


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
