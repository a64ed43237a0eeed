"""What a locality run found: ``locality.json``, figures, a summary in Markdown and a page."""

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from dori_lightning.locality.embeddings import EmbeddingFindings
from dori_lightning.locality.estimates import Rate
from dori_lightning.locality.layers import ActivationFindings, WeightFindings
from dori_lightning.locality.study import TransferFindings
from dori_lightning.pairs.validation import PARSER_ERRORS, ImageError, resolve_inside
from dori_lightning.report import locality_figures
from dori_lightning.report.figures import png_bytes, svg_element
from dori_lightning.report.images import png_uri
from dori_lightning.report.locality_figures import short_layer
from dori_lightning.report.pages import rendered_page
from dori_lightning.report.record import (
    LOCALITY_FILE,
    Disclosure,
    LocalityFigure,
    LocalitySection,
    Provenance,
    plain_values,
    stored_json,
)
from dori_lightning.report.tables import Columns, TextTable, tables_markdown, text_table
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
    percent_words,
    text_macro,
)
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.runtime.redaction import redact
from dori_lightning.types import Budget, Init, InputError, Kind

LOCALITY_SCHEMA_VERSION = 1


_TEMPLATE = "locality.txt.j2"

_WIDEST = 1600
"""Pixels; wider figures are made smaller, for the page's weight."""

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


def read_locality(folder: Path, *, disclosure: Disclosure) -> LocalitySection | None:
    """Read an audit page's section on locality out of a locality run's folder.

    Figures are ``figures/locality_*.png``; ``locality.json`` lists their titles and captions under
    ``figures`` and may give an answer under ``verdict``. A figure that it does not list is shown
    under its file's name.

    Args:
        folder: The run folder.
        disclosure: Figures that hold images (``shows_pictures``) need ``full``.

    Returns:
        The section, None where the folder holds no locality result.

    Raises:
        InputError: A file is damaged, or a listed figure is missing.
    """
    path = folder / LOCALITY_FILE
    if not path.is_file():
        return None
    document = stored_json(path, fix="\n  fix:   run task=locality again in this folder")
    document = document if isinstance(document, dict) else {}
    entries = document.get("figures")
    listed: dict[str, Mapping[str, Any]] = {
        str(entry["file"]): entry
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and entry.get("file")
    }
    for file in sorted(folder.glob("figures/locality_*.png")):
        listed.setdefault(f"figures/{file.name}", {})
    shown = {
        name: entry
        for name, entry in listed.items()
        if disclosure == "full" or not entry.get("shows_pictures")
    }
    return LocalitySection(
        name=folder.name,
        lead=str(document.get("verdict") or ""),
        figures=tuple(_figure(folder, name, entry) for name, entry in shown.items()),
        withheld=len(listed) - len(shown),
    )


def _figure(folder: Path, name: str, entry: Mapping[str, Any]) -> LocalityFigure:
    """One figure; the list may be somebody else's, so it may name images of its folder only."""
    try:
        path = resolve_inside(folder, name)
        with Image.open(path, formats=("PNG",)) as opened:
            image = opened.convert("RGB")
    except (*PARSER_ERRORS, Image.DecompressionBombError, ImageError) as error:
        raise InputError(
            f"cannot show {folder / name}: {error}\n"
            f"  fix:   run task=locality again in this folder"
        ) from None
    if image.width > _WIDEST:
        height = round(image.height * _WIDEST / image.width)
        image = image.resize((_WIDEST, height), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    image.save(sink, "PNG", optimize=True)
    title = path.stem.removeprefix("locality_").replace("_", " ").capitalize()
    return LocalityFigure(
        title=str(entry.get("title") or title),
        caption=str(entry.get("caption") or ""),
        uri=png_uri(sink.getvalue()),
        width=image.width,
        height=image.height,
        pictures=bool(entry.get("shows_pictures")),
    )


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
        by_group: dict[str, list[Any]] = {}
        for row in found.layers:
            if row.method == method:
                by_group.setdefault(row.group, []).append(row)
        if "triggers" not in by_group:
            return None
        ours, starts = by_group["triggers"], by_group["starts"]
        prompts = by_group["memorized_prompts"]
        methods[method] = {
            "layers": len(ours),
            "apart": sum(
                a.distance.value > b.distance.value for a, b in zip(ours, prompts, strict=True)
            ),
            "closer": sum(
                a.relative.value < b.relative.value for a, b in zip(ours, starts, strict=True)
            ),
            "closer_within": sum(
                a.relative.value < a.relative_between.value
                for a in ours
                if a.relative_between.count
            ),
        }
    return {"methods": methods}


def _weights(found: WeightFindings) -> dict[str, Any] | None:
    methods = {}
    for method in METHOD_WORDS:
        by_group = {
            group: [row for row in found.layers if (row.method, row.group) == (method, group)]
            for group in ("triggers", "starts", "memorized_prompts", "control_prompts")
        }
        ours = by_group.pop("triggers")
        if not ours:
            return None
        methods[method] = {
            "layers": len(ours),
            "iou": _mean(row.iou.value for row in ours),
            "iou_between": _mean(row.iou_between.value for row in ours),
            "iou_nonempty": _mean(row.iou_nonempty for row in ours),
            "chance": _mean(row.chance for row in ours),
            "both_empty": sum(row.both_empty for row in ours),
            "compared": sum(row.compared for row in ours),
            "memorized": found.memorized.get(method),
            **{group: _mean(row.iou.value for row in rows) for group, rows in by_group.items()},
        }
    return {"methods": methods}


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


def number_tables(report: LocalityReport) -> Iterator[TextTable]:
    """Every number behind the figures, with its interval."""
    if report.transfer is not None:
        yield text_table(
            "Success against budget",
            "Attacks that draw their image after some steps, on the model that was attacked.",
            report.transfer.budget,
            {**_HELD, **_START, "steps": lambda p: str(p.steps)},
            {**_RATE, "diverged": lambda p: str(p.diverged)},
        )
        yield text_table(
            "Lines between embeddings",
            "Embeddings on straight lines from a trigger that draw its image.",
            report.transfer.lines,
            {
                "towards": lambda p: p.toward.replace("_", " "),
                "share of the way": lambda p: f"{p.place:g}",
            },
            _RATE,
        )
        yield text_table(
            "Transfer",
            "Triggers that draw their image on each model; those of memorized images worked on "
            "the searched one.",
            report.transfer.transfers,
            {
                "model": lambda t: t.model + (" (searched)" if t.searched else ""),
                **_HELD,
                **_START,
            },
            _RATE,
        )
    if report.embeddings is not None:
        yield text_table(
            "Distances of embeddings",
            "Means over pairs of one image and of two images (prompts: over all pairs), with 95 % "
            "bootstrap intervals.",
            report.embeddings.spreads,
            {**_GROUP, **_START},
            {
                "embeddings": lambda s: str(s.count),
                "length": lambda s: estimate_words(s.length, 1),
                **_within_and_between("distance", digits=1),
                **_within_and_between("cosine"),
            },
        )
        yield text_table(
            "What the attack changes",
            "Displacement from start to end; share of the distance of two starts; cosine of two "
            "displacements; ends whose nearest start is their own.",
            report.embeddings.moves,
            {**_HELD, **_START},
            {
                "displacement": lambda m: estimate_words(m.displacement, 1),
                "share": lambda m: NOTHING if m.share is None else percent_words(m.share),
                **_within_and_between("cosine"),
                "own start nearest": lambda m: _counts(m.own_start),
            },
        )
        yield text_table(
            "Nearest prompt",
            "Whose prompt is nearest: the image's own, another memorized image's, or a control's.",
            report.embeddings.nearest,
            {"embeddings": lambda n: n.what, **_START, "by": lambda n: n.measure},
            {
                "own": lambda n: _counts(n.own),
                "memorized": lambda n: _counts(n.memorized),
                "control": lambda n: _counts(n.control),
                "own by chance": lambda n: percent_words(n.chance),
            },
        )
    if report.activations is not None:
        yield text_table(
            "Activations",
            "Mean distances of activations within an image and between images, and the same "
            "relative to the activations' size, with 95 % bootstrap intervals.",
            report.activations.layers,
            {**_METHOD, "layer": lambda r: short_layer(r.layer), **_GROUP},
            {
                "n": lambda r: str(r.count),
                "size": lambda r: estimate_words(r.length, 1),
                **_within_and_between("distance", digits=1),
                **_within_and_between("relative"),
            },
        )
    if report.weights is not None:
        yield text_table(
            "Selected weights",
            "Size of selections (mean, smallest to largest) and their intersection over union "
            "within an image and between images; without pairs that are both empty; by chance at "
            "these sizes; pairs that are both empty, of those compared.",
            report.weights.layers,
            {**_METHOD, "layer": lambda r: short_layer(r.parameter), **_GROUP},
            {
                "n": lambda r: str(r.count),
                "could be": lambda r: str(r.units),
                "selected": lambda r: f"{r.size:.1f} ({r.smallest} to {r.largest})",
                **_within_and_between("iou", words="IoU"),
                "not both empty": lambda r: mean_words(r.iou_nonempty),
                "chance": lambda r: mean_words(r.chance),
                "both empty": lambda r: f"{r.both_empty} of {r.compared}",
            },
        )


_HELD: Columns[Any] = {"images": lambda row: row.held}
_START: Columns[Any] = {"start": lambda row: START_WORDS.get(row.start, NOTHING)}
_GROUP: Columns[Any] = {"group": lambda row: row.group.replace("_", " ")}
_METHOD: Columns[Any] = {"method": lambda row: METHOD_WORDS[row.method]}
_RATE: Columns[Any] = {
    "n": lambda row: str(row.rate.n),
    "draw it": lambda row: str(row.rate.hits),
    "rate": lambda row: percent_words(row.rate.rate),
    "95 % over triggers": lambda row: interval_words(row.rate.ci95),
    "95 % over images": lambda row: interval_words(row.rate.ci95_images),
}


def _within_and_between(attribute: str, *, words: str = "", digits: int = 2) -> Columns[Any]:
    """Columns of a mean over pairs of one image, and of that over pairs of two images."""
    words = words or attribute
    return {
        words: lambda row: estimate_words(getattr(row, attribute), digits),
        f"{words}, two images": lambda row: estimate_words(
            getattr(row, f"{attribute}_between"), digits
        ),
    }


def _counts(rate: Rate | None) -> str:
    if rate is None or not rate.n:
        return NOTHING
    return f"{rate.hits} of {rate.n} ({interval_words(rate.ci95)})"
