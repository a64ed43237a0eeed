"""What a locality run found: ``locality.json``, figures, a summary in Markdown and a page."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dori_lightning.locality.embeddings import EmbeddingFindings
from dori_lightning.locality.estimates import Estimate, Rate
from dori_lightning.locality.layers import ActivationFindings, WeightFindings
from dori_lightning.locality.study import TransferFindings
from dori_lightning.report import locality_figures
from dori_lightning.report.figures import png_bytes, svg_element
from dori_lightning.report.locality_figures import short_layer
from dori_lightning.report.pages import rendered_page
from dori_lightning.report.record import LOCALITY_FILE, Provenance, plain_values
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
    text = json.dumps(plain_values(document), sort_keys=True, indent=1, allow_nan=False)
    write_atomically(folder / LOCALITY_FILE, (text + "\n").encode())
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
        figures["budget"] = locality_figures.budget(report.transfer, report.start)
        figures["lines"] = locality_figures.lines(report.transfer)
        figures["transfer"] = locality_figures.transfer(report.transfer)
    if report.embeddings is not None:
        figures["spread"] = locality_figures.spread(report.embeddings)
        figures["map"] = locality_figures.map_of(report.embeddings)
    if report.activations is not None:
        figures["activations"] = locality_figures.activations(report.activations)
    if report.weights is not None:
        figures["weights"] = locality_figures.weights(report.weights)
        figures["methods"] = locality_figures.methods(report.weights)
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
    (
        "transfer", "budget", "Success against budget",
        "Attacks that draw their image after some steps, on the model that was attacked.",
    ),
    (
        "transfer", "lines", "Lines between embeddings",
        "Embeddings on straight lines from a trigger that draw its image; place: the share of "
        "the way.",
    ),
    (
        "transfer", "transfers", "Transfer",
        "Triggers that draw their image on each model; those of memorized images worked on the "
        "searched one.",
    ),
    (
        "embeddings", "spreads", "Distances of embeddings",
        "Means over pairs of one image and of two images (prompts: over all pairs), with 95 % "
        "bootstrap intervals.",
    ),
    (
        "embeddings", "moves", "What the attack changes",
        "Displacement from start to end; share of the distance of two starts; cosine of two "
        "displacements; ends whose nearest start is their own.",
    ),
    (
        "embeddings", "nearest", "Nearest prompt",
        "Whose prompt is nearest: the image's own, another memorized image's, or a control's; "
        "chance: its own by chance.",
    ),
    (
        "activations", "layers", "Activations",
        "Mean distances of activations within an image and between images, and the same relative "
        "to the activations' length, with 95 % bootstrap intervals.",
    ),
    (
        "weights", "layers", "Selected weights",
        "Size of selections out of all units (mean, smallest, largest) and their intersection "
        "over union (iou) within an image and between images; without pairs that are both empty; "
        "by chance at these sizes; how many pairs were compared and were both empty.",
    ),
)  # fmt: skip
"""Findings of a report, name of the rows in them, and the title and caption of their table."""


def number_tables(report: LocalityReport) -> Iterator[TextTable]:
    """Every number behind the figures, with its interval; a column for each field of the rows."""
    for part, name, title, caption in _TABLES:
        rows: Sequence[Any] = getattr(getattr(report, part), name, ())
        if rows:
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
            return short_layer(value)
        case str() if name != "model":
            return {**METHOD_WORDS, **START_WORDS}.get(value, value.replace("_", " "))
    return str(value)
