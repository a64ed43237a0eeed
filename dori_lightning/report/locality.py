"""The record of a locality run: ``locality.json``, the contract with other tools."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from matplotlib.figure import Figure
from PIL import Image

from dori_lightning.locality.embeddings import EmbeddingFindings, Spread
from dori_lightning.locality.estimates import Estimate, Rate
from dori_lightning.locality.layers import (
    ActivationFindings,
    LayerActivation,
    LayerSelection,
    WeightFindings,
)
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
from dori_lightning.report.tables import TextTable
from dori_lightning.report.words import (
    METHOD_WORDS,
    START_WORDS,
    budget_words,
    escape,
    interval_words,
    number_words,
    percent_words,
)
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.runtime.redaction import redact
from dori_lightning.types import Budget, Init, InputError, Kind

if TYPE_CHECKING:
    from dori_lightning.locality.study import Transfers


# -------- record
# The record of a locality run: ``locality.json``, the contract with other tools.

LOCALITY_SCHEMA_VERSION = 1

_TOP_KEYS = (
    "schema_version", "checkpoint", "mitigation", "start", "restarts", "budget", "images",
    "embeddings", "activations", "weights", "at_large", "provenance",
    "figures", "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class StudiedImage:
    """One image that was attacked.

    Attributes:
        id: Pair id.
        kind: Kind of pair; ``control`` for controls.
        prompt: Its prompt.
        attacked: Start to attacks that stayed finite.
        working: Start to those whose end draws the image.
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
        descriptor: What judges pictures.
        threshold: Similarity above which an embedding draws the image.
        pictures_each: Pictures per embedding, of which the closest counts, or the median.
        images: Images under study, and controls.
        memorized_prompts: Ids of the other memorized images whose prompts are compared with.
        control_prompts: Ids of the controls whose prompts are compared with.
        embeddings: Where triggers lie; None where it was not asked.
        activations: What they activate.
        weights: Which weights methods select with them.
        at_large: How often they draw the image.
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
    at_large: Transfers | None
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


def write_locality(
    report: LocalityReport,
    folder: Path,
    *,
    figures: Sequence[Mapping[str, str]] = (),
    verdict: str = "",
) -> Path:
    """Write ``locality.json`` in one step and return its path.

    Args:
        report: What to write.
        folder: The run folder.
        figures: Of each figure: its ``file`` below the folder, ``title`` and ``caption``.
        verdict: The answer in a few sentences.

    Raises:
        TypeError: The report holds something that JSON cannot.
    """
    provenance = {**asdict(report.provenance), "config": redact(report.provenance.config)}
    document = plain_values(
        {**asdict(report), "provenance": provenance, "figures": figures, "verdict": verdict}
    )
    text = json.dumps(document, sort_keys=True, indent=1, allow_nan=False)
    return write_atomically(folder / "locality.json", (text + "\n").encode())


def read_locality_record(folder: Path) -> dict[str, Any]:
    """Read a run folder's ``locality.json`` back.

    Raises:
        InputError: It is missing, is not JSON, is of another schema version, or lacks a promised
            key.
    """
    path = folder / "locality.json"
    document = stored_json(
        path,
        fix=": run the task again to rewrite it",
        missing="the run has not finished, or this is no run of task=locality",
    )
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != LOCALITY_SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema_version {version!r}, this version reads "
            f"{LOCALITY_SCHEMA_VERSION}: run the task again"
        )
    missing = [key for key in _TOP_KEYS if key not in document]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}: run the task again to rewrite it")
    return dict(document)


# -------- section
# The page's section on locality: the figures that ``task=locality`` left in a run folder.

_WIDEST = 1600
"""Pixels; wider figures are made smaller, for the page's weight."""


def read_locality(folder: Path, *, disclosure: Disclosure) -> LocalitySection | None:
    """Read the section out of a run folder.

    Figures are ``figures/locality_*.png``; ``locality.json`` lists their titles and captions under
    ``figures`` and may give an answer under ``verdict``. A figure that it does not list is shown
    under its file's name.

    Args:
        folder: The run folder.
        disclosure: Figures that hold pictures (``shows_pictures``) need ``full``.

    Returns:
        The section, None where the folder holds no locality result.

    Raises:
        InputError: A file is damaged, or a listed figure is missing.
    """
    path = folder / LOCALITY_FILE
    if not path.is_file():
        return None
    document = stored_json(path, fix="\n  fix:   run task=locality again in this folder")
    listed = {str(entry.get("file")): entry for entry in _listed(document)}
    for file in sorted(folder.glob("figures/locality_*.png")):
        listed.setdefault(f"figures/{file.name}", {"title": _title(file.stem)})
    shown = {
        name: entry
        for name, entry in listed.items()
        if disclosure == "full" or not entry.get("shows_pictures")
    }
    return LocalitySection(
        name=folder.name,
        lead=str(document.get("verdict") or "") if isinstance(document, dict) else "",
        figures=tuple(_figure(folder, name, entry) for name, entry in shown.items()),
        withheld=len(listed) - len(shown),
    )


def _listed(document: Any) -> Iterator[Mapping[str, Any]]:
    held = document.get("figures") if isinstance(document, dict) else None
    for entry in held if isinstance(held, list) else []:
        if isinstance(entry, dict) and entry.get("file"):
            yield entry


def _title(stem: str) -> str:
    return stem.removeprefix("locality_").replace("_", " ").capitalize()


def _figure(folder: Path, name: str, entry: Mapping[str, Any]) -> LocalityFigure:
    """One figure; the list may be somebody else's, so it may name pictures of its folder only."""
    try:
        path = resolve_inside(folder, name)
        with Image.open(path, formats=("PNG",)) as opened:
            picture = opened.convert("RGB")
    except (*PARSER_ERRORS, Image.DecompressionBombError, ImageError) as error:
        raise InputError(
            f"cannot show {folder / name}: {error}\n"
            f"  fix:   run task=locality again in this folder"
        ) from None
    if picture.width > _WIDEST:
        height = round(picture.height * _WIDEST / picture.width)
        picture = picture.resize((_WIDEST, height), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    picture.save(sink, "PNG", optimize=True)
    return LocalityFigure(
        title=str(entry.get("title") or _title(path.stem)),
        caption=str(entry.get("caption") or ""),
        uri=png_uri(sink.getvalue()),
        width=picture.width,
        height=picture.height,
        pictures=bool(entry.get("shows_pictures")),
    )


# -------- words
# What the texts on locality share: an answer, and numbers as words.


@dataclass(frozen=True)
class Answer:
    """One question with its answer.

    Attributes:
        name: Stable name, also of its figure.
        question: The question.
        text: The answer in numbers, with its control.
        caption: How to read the figure.
    """

    name: str
    question: str
    text: str
    caption: str

    @property
    def label(self) -> str:
        """A word or two for the page's menu."""
        return _LABELS[self.name]


_LABELS = {
    "budget": "Budget",
    "spread": "Distances",
    "map": "Map",
    "activations": "Activations",
    "weights": "Weights",
    "methods": "NeMo and Wanda",
    "lines": "Lines",
    "transfer": "Transfer",
}


def estimate_words(estimate: Estimate, digits: int = 2) -> str:
    """Write a mean with its interval: ``1.23 [1.10, 1.31]``; ``n/a`` for NaN."""
    if math.isnan(estimate.value):
        return "n/a"
    if math.isnan(estimate.low):
        return f"{estimate.value:.{digits}f}"
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def rate_words(rate: Rate) -> str:
    """Write a rate: ``5 of 6 (83 %, interval 44 to 97 %)``."""
    if not rate.n:
        return "none asked"
    return (
        f"{rate.hits} of {rate.n} ({percent_words(rate.rate)}, interval "
        f"{interval_words(rate.ci95)})"
    )


def no_answer(name: str, question: str) -> Answer:
    """Say that nothing can be said."""
    return Answer(name, question, "Too few triggers worked to say.", "Nothing to show.")


# -------- layer_text
# Answers about layers: what triggers activate, and which weights methods select with them.


def activation_answer(found: ActivationFindings) -> Answer:
    """How differently triggers activate layers."""
    sentences = []
    for method, word in METHOD_WORDS.items():
        rows = [row for row in found.layers if row.method == method]
        ours = _by_layer(rows, "triggers")
        if not ours:
            return no_answer("activations", "Do triggers of one image activate a model alike?")
        prompts, starts = _by_layer(rows, "memorized_prompts"), _by_layer(rows, "starts")
        apart = sum(ours[k].distance.value > prompts[k].distance.value for k in ours)
        closer = sum(ours[k].relative.value < starts[k].relative.value for k in ours)
        own = sum(
            ours[k].relative.value < ours[k].relative_between.value
            for k in ours
            if ours[k].relative_between.count
        )
        sentences.append(
            f"{word}'s layers: triggers of one image are farther apart than prompts of different "
            f"memorized images in {apart} of {len(ours)}; relative to their size they are closer "
            f"than their starts in {closer}, and closer than triggers of different images in {own}"
        )
    return Answer(
        "activations",
        "Do triggers of one image activate a model alike?",
        ". ".join(sentences) + ".",
        f"Mean distance of two activations at one noise (seed {found.noise_seed}) and timestep "
        f"({found.timestep}), on the checkpoint as it is: outputs of the cross-attention value "
        f"layers (NeMo), inputs of the feed-forward output layers (Wanda). Second row: divided by "
        f"the activations' own size, so that long embeddings are not far apart for their length "
        f"alone; 1.41 where two are orthogonal. Bars are 95 % bootstrap intervals.",
    )


def _by_layer(rows: Sequence[LayerActivation], group: str) -> dict[str, LayerActivation]:
    return {row.layer: row for row in rows if row.group == group}


def weight_answer(found: WeightFindings) -> Answer:
    """Whether a method selects the same weights."""
    sentences = []
    for method, word in METHOD_WORDS.items():
        rows = [row for row in found.layers if row.method == method]
        ours = [row for row in rows if row.group == "triggers"]
        if not ours:
            return no_answer("weights", "Does a pruning method find the same weights?")
        others = {
            group: [row for row in rows if row.group == group]
            for group in ("starts", "memorized_prompts", "control_prompts")
        }
        empty, compared = sum(r.both_empty for r in ours), sum(r.compared for r in ours)
        sentences.append(
            f"{word}, mean over {number_words(len(ours), 'layer')}: triggers of one image agree "
            f"to {_mean(r.iou.value for r in ours)}, of different images to "
            f"{_mean(r.iou_between.value for r in ours)}, random selections of these sizes to "
            f"{_mean(r.chance for r in ours)}; their starts {_iou(others['starts'])}, memorized "
            f"prompts {_iou(others['memorized_prompts'])}, control prompts "
            f"{_iou(others['control_prompts'])}. Both selections were empty, which counts as 1, "
            f"in {empty} of {compared} comparisons of triggers; without those "
            f"{_mean(r.iou_nonempty for r in ours)}"
        )
        if method in found.memorized:
            asked = found.memorized[method]
            sentences.append(
                f"{word} takes "
                + ", ".join(
                    f"{own[0]} of {own[1]} {group.replace('_', ' ')}"
                    for group, own in asked.items()
                )
                + " for memorized and leaves the others alone"
            )
    return Answer(
        "weights",
        "Does a pruning method find the same weights whatever triggers the image?",
        ". ".join(sentences) + ".",
        "Intersection over union of what a method selects with two embeddings, by layer, on the "
        "checkpoint as it is; bars are 95 % bootstrap intervals. Open marks: triggers of two "
        "different images. Ticks: random selections of the same sizes. Below: mean size of a "
        "selection, as a share of what could be selected; two empty selections count as 1.",
    )


def _iou(rows: Sequence[LayerSelection]) -> str:
    return _mean(row.iou.value for row in rows)


def _mean(values: Iterable[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    return f"{sum(known) / len(known):.2f}" if known else "n/a"


def method_answer(found: WeightFindings) -> Answer:
    """Whether two methods select in the same place."""
    own = next((a for a in found.agreement if a.group == "triggers"), None)
    question = "Do NeMo and Wanda point to the same place?"
    if own is None or not own.overlap.count:
        return no_answer("methods", question)
    prompts = next((a for a in found.agreement if a.group == "memorized_prompts"), None)
    text = (
        f"{_shared(own.shared_parameters)}By transformer block, the shares of their selections "
        f"overlap to {estimate_words(own.overlap)} with the same trigger, and to "
        f"{estimate_words(own.overlap_other)} with two triggers"
        f"{' of different images' if own.overlap_other_images else ''}. The first would be higher "
        f"if both found where an image is."
    )
    if prompts is not None and prompts.overlap.count:
        text += (
            f" Memorized prompts: {estimate_words(prompts.overlap)} with the same prompt, "
            f"{estimate_words(prompts.overlap_other)} with two."
        )
    if own.undefined:
        text += f" Left out: {number_words(own.undefined, 'trigger')} with an empty selection."
    return Answer(
        "methods",
        question,
        text,
        "Share of each method's selection that lies in each transformer block that both look at, "
        "averaged over triggers. NeMo selects value neurons of cross-attention, Wanda single "
        "weights of the feed-forward layer beside it.",
    )


def _shared(parameters: int) -> str:
    if parameters:
        return f"There are {parameters} weight matrices in which both select. "
    return "They prune different layers, so no weight can be selected by both. "


def weight_sentence(found: WeightFindings) -> str:
    """The answer about weights in one sentence."""
    parts = []
    for method, word in METHOD_WORDS.items():
        ours = [r for r in found.layers if (r.method, r.group) == (method, "triggers")]
        if ours:
            parts.append(
                f"{word} {_mean(r.iou.value for r in ours)} with two triggers of one image, "
                f"{_mean(r.iou_between.value for r in ours)} with triggers of two images, "
                f"{_mean(r.chance for r in ours)} by chance"
            )
    if not parts:
        return ""
    return (
        f"Agreement of the weights that a method selects (1 is the same, 0 nothing in common, "
        f"mean over layers): {'; '.join(parts)}."
    )


# -------- tables
# The numbers of a locality run as tables of text.


def image_table(report: LocalityReport) -> TextTable:
    """How many attacks on each image worked."""
    starts: list[Init] = list(dict.fromkeys(s for image in report.images for s in image.attacked))
    return TextTable(
        "Images",
        "Attacks whose end draws the image, of those that stayed finite, by where they began.",
        ("image", "kind", "prompt", *(START_WORDS[start] for start in starts)),
        tuple(
            (
                image.id,
                image.kind,
                image.prompt,
                *(
                    f"{image.working[start]} of {image.attacked[start]}"
                    if start in image.attacked
                    else "-"
                    for start in starts
                ),
            )
            for image in report.images
        ),
        named=3,
    )


def number_tables(report: LocalityReport) -> tuple[TextTable, ...]:
    """Every number behind the figures, with its interval."""
    tables: list[TextTable] = []
    if report.at_large is not None:
        tables += _large(report.at_large)
    if report.embeddings is not None:
        tables += _embeddings(report.embeddings)
    if report.activations is not None:
        tables.append(_activations(report.activations))
    if report.weights is not None:
        tables.append(_weights(report.weights))
    return tuple(tables)


def _large(found: Transfers) -> list[TextTable]:
    header = ("n", "draw it", "rate", "95 % over triggers", "95 % over images")
    return [
        TextTable(
            "Success against budget",
            "Attacks that draw their image after some steps, on the model that was attacked.",
            ("images", "start", "steps", *header, "diverged"),
            tuple(
                (p.held, START_WORDS[p.start], str(p.steps), *_rate(p.rate), str(p.diverged))
                for p in found.budget
            ),
            named=3,
        ),
        TextTable(
            "Lines between embeddings",
            "Embeddings on straight lines from a trigger that draw its image.",
            ("towards", "share of the way", *header),
            tuple(
                (p.toward.replace("_", " "), f"{p.place:g}", *_rate(p.rate)) for p in found.lines
            ),
            named=2,
        ),
        TextTable(
            "Transfer",
            "Triggers that draw their image on each model; those of memorized images worked on "
            "the searched one.",
            ("model", "images", "start", *header),
            tuple(
                (
                    t.model + (" (searched)" if t.searched else ""),
                    t.held,
                    START_WORDS[t.start],
                    *_rate(t.rate),
                )
                for t in found.transfers
            ),
            named=3,
        ),
    ]


def _embeddings(found: EmbeddingFindings) -> list[TextTable]:
    return [
        TextTable(
            "Distances of embeddings",
            "Means over pairs of one image and of two images (prompts: over all pairs), with 95 % "
            "bootstrap intervals.",
            (
                "group", "start", "embeddings", "length", "distance", "of two images", "cosine",
                "of two images",
            ),
            tuple(
                (
                    s.group.replace("_", " "),
                    START_WORDS[s.start] if s.start is not None else "-",
                    str(s.count),
                    estimate_words(s.length, 1),
                    estimate_words(s.distance, 1),
                    estimate_words(s.distance_between, 1),
                    estimate_words(s.cosine),
                    estimate_words(s.cosine_between),
                )
                for s in found.spreads
            ),
            named=2,
        ),
        TextTable(
            "What the attack changes",
            "Displacement from start to end; share of the distance of two starts; cosine of two "
            "displacements; ends whose nearest start is their own.",
            (
                "images", "start", "displacement", "share", "cosine", "of two images",
                "own start nearest",
            ),
            tuple(
                (
                    m.held,
                    START_WORDS[m.start],
                    estimate_words(m.displacement, 1),
                    percent_words(m.share) if m.share is not None else "-",
                    estimate_words(m.cosine),
                    estimate_words(m.cosine_between),
                    _counts(m.own_start) if m.own_start is not None else "-",
                )
                for m in found.moves
            ),
            named=2,
        ),
        TextTable(
            "Nearest prompt",
            "Whose prompt is nearest: the image's own, another memorized image's, or a control's.",
            ("embeddings", "start", "by", "own", "memorized", "control", "own by chance"),
            tuple(
                (
                    n.what,
                    START_WORDS[n.start],
                    n.measure,
                    _counts(n.own),
                    _counts(n.memorized),
                    _counts(n.control),
                    percent_words(n.chance),
                )
                for n in found.nearest
            ),
            named=3,
        ),
    ]  # fmt: skip


def _activations(found: ActivationFindings) -> TextTable:
    return TextTable(
        "Activations",
        "Mean distances of activations within an image and between images, and the same relative "
        "to the activations' size, with 95 % bootstrap intervals.",
        (
            "method", "layer", "group", "n", "size", "distance", "of two images", "relative",
            "of two images",
        ),
        tuple(
            (
                METHOD_WORDS[row.method],
                short_layer(row.layer),
                row.group.replace("_", " "),
                str(row.count),
                estimate_words(row.length, 1),
                estimate_words(row.distance, 1),
                estimate_words(row.distance_between, 1),
                estimate_words(row.relative),
                estimate_words(row.relative_between),
            )
            for row in found.layers
        ),
        named=3,
    )  # fmt: skip


def _weights(found: WeightFindings) -> TextTable:
    return TextTable(
        "Selected weights",
        "Size of selections (mean, smallest to largest) and their intersection over union within "
        "an image and between images; without pairs that are both empty; by chance at these "
        "sizes; pairs that are both empty, of those compared.",
        (
            "method", "layer", "group", "n", "could be", "selected", "IoU", "of two images",
            "not both empty", "chance", "both empty",
        ),
        tuple(
            (
                METHOD_WORDS[row.method],
                short_layer(row.parameter),
                row.group.replace("_", " "),
                str(row.count),
                str(row.units),
                f"{row.size:.1f} ({row.smallest} to {row.largest})",
                estimate_words(row.iou),
                estimate_words(row.iou_between),
                _number(row.iou_nonempty),
                _number(row.chance),
                f"{row.both_empty} of {row.compared}",
            )
            for row in found.layers
        ),
        named=3,
    )  # fmt: skip


def _rate(rate: Rate) -> tuple[str, ...]:
    return (
        str(rate.n),
        str(rate.hits),
        percent_words(rate.rate),
        interval_words(rate.ci95),
        interval_words(rate.ci95_images),
    )


def _counts(rate: Rate) -> str:
    return f"{rate.hits} of {rate.n} ({interval_words(rate.ci95)})" if rate.n else "-"


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.2f}"


# -------- text
# What a locality run says, question by question: sentences made of its numbers, and captions.


def answers(report: LocalityReport) -> tuple[Answer, ...]:
    """Answer the questions that were asked, in the order of the page."""
    found: list[Answer] = []
    if report.at_large is not None:
        found.append(_budget(report, report.at_large))
    if report.embeddings is not None:
        found += [_spread(report, report.embeddings), _map(report.embeddings)]
    if report.activations is not None:
        found.append(activation_answer(report.activations))
    if report.weights is not None:
        found += [weight_answer(report.weights), method_answer(report.weights)]
    if report.at_large is not None:
        found += [_lines(report, report.at_large), _transfer(report, report.at_large)]
    return tuple(found)


def _budget(report: LocalityReport, found: Transfers) -> Answer:
    steps = report.budget.steps

    def at(held: Literal["memorized", "control"], start: str) -> str:
        rate = next(
            (p.rate for p in found.budget if (p.held, p.start, p.steps) == (held, start, steps)),
            None,
        )
        return rate_words(rate) if rate else "not attacked"

    others = [
        f"from {START_WORDS[start]} {at('memorized', start)}"
        for start in dict.fromkeys(point.start for point in found.budget)
        if start != report.start
    ]
    text = (
        f"After {budget_words(report.budget)}, {at('memorized', report.start)} attacks from "
        f"{START_WORDS[report.start]} draw their image"
        f"{'; ' + ', '.join(others) if others else ''}. Control images, which the checkpoint does "
        f"not hold: {at('control', report.start)}."
    )
    return Answer(
        "budget",
        "How often does an arbitrary embedding become a trigger?",
        text,
        f"Share of attacks from {START_WORDS[report.start]} whose pictures show their image, "
        f"against the attack's steps, on the model that is attacked ({report.mitigation}). Bands "
        f"are 95 % Wilson intervals over attacks. Controls must stay at 0, or the attack paints.",
    )


def _spread(report: LocalityReport, found: EmbeddingFindings) -> Answer:
    ends, begun = _spread_of(found, "triggers", report), _spread_of(found, "starts", report)
    if ends is None or begun is None:
        return no_answer("spread", "Do triggers of one image lie together?")
    move = next(m for m in found.moves if (m.held, m.start) == ("memorized", report.start))
    control = next(
        (m for m in found.moves if (m.held, m.start) == ("control", report.start)), None
    )
    nearest = {
        n.what: n for n in found.nearest if n.start == report.start and n.measure == "cosine"
    }
    text = (
        f"Triggers found from {START_WORDS[report.start]} are "
        f"{estimate_words(ends.distance, 1)} apart, their starts "
        f"{estimate_words(begun.distance, 1)}"
        f"{_expected(found) if report.start == 'random' else ''}. "
        f"{_same(ends, begun)}The attack moves an embedding by "
        f"{estimate_words(move.displacement, 1)}"
        f"{f', {percent_words(move.share)} of the distance of two starts' if move.share else ''}"
        f"{_own_start(move.own_start)}. Do these moves have a common direction? Their mean cosine "
        f"is {estimate_words(move.cosine)} within an image and "
        f"{estimate_words(move.cosine_between)} between images"
        f"{f'; on control images {estimate_words(control.cosine)}' if control else ''}."
    )
    if "triggers" in nearest:
        own = nearest["triggers"]
        text += (
            f" By cosine, the image's own prompt is the nearest of all prompts for "
            f"{rate_words(own.own)}, by chance {percent_words(own.chance)}"
        )
        if "starts" in nearest:
            text += f", before the attack {rate_words(nearest['starts'].own)}"
        text += "."
    return Answer(
        "spread",
        "Do triggers of one image lie together?",
        text,
        "Left: mean distance of two embeddings; middle: mean cosine; right: mean cosine of two "
        "moves (end minus start). Bars are 95 % bootstrap intervals over images and embeddings. "
        "The starts are the control: what triggers share with them is no finding.",
    )


def _spread_of(
    found: EmbeddingFindings, group: Literal["triggers", "starts"], report: LocalityReport
) -> Spread | None:
    return next((s for s in found.spreads if (s.group, s.start) == (group, report.start)), None)


def _same(ends: Spread, begun: Spread) -> str:
    """What it means that ends are as far apart as starts, where they are."""
    if begun.distance.value == 0 or abs(ends.distance.value / begun.distance.value - 1) > 0.1:
        return ""
    return "So these distances tell where the searches began, not where the image is. "


def _expected(found: EmbeddingFindings) -> str:
    return f" (independent normal embeddings: {found.random_distance:.1f})"


def _own_start(rate: Rate | None) -> str:
    return f", and {rate_words(rate)} ends are still nearest to their own start" if rate else ""


def _map(found: EmbeddingFindings) -> Answer:
    starts = sum(place.what == "start" for place in found.places)
    return Answer(
        "map",
        "What does that look like?",
        f"{number_words(starts, 'trigger')} with the starts they were found from, among "
        f"{sum('prompt' in place.what for place in found.places)} prompts.",
        "All embeddings in two dimensions: principal components (left), t-SNE (right). Small open "
        "marks are starts, filled ones of the same colour the triggers found from there; the star "
        "is the image's own prompt. Distances between clusters mean little in t-SNE.",
    )


def _lines(report: LocalityReport, found: Transfers) -> Answer:
    question = "Does the middle between two triggers trigger?"
    middle = {
        point.toward: point for point in sorted(found.lines, key=lambda p: -abs(p.place - 0.5))
    }
    if "same_image" not in middle:
        return no_answer("lines", question)
    own = middle["same_image"]
    text = (
        f"{percent_words(own.place)} of the way from one trigger of an image to another, "
        f"{rate_words(own.rate)} embeddings draw it"
    )
    for toward, words in (
        ("other_image", "towards a trigger of another image"),
        ("random", "towards a random embedding"),
    ):
        if toward in middle:
            text += f"; {words} {rate_words(middle[toward].rate)}"
    return Answer(
        "lines",
        question,
        text + ".",
        f"Share of embeddings on straight lines that draw the image of the line's beginning, on "
        f"the model that was attacked ({report.mitigation}). Lines towards another image's "
        f"trigger and towards a random embedding are the controls: they tell how much of a "
        f"trigger may be lost before it stops working. Bands are 95 % Wilson intervals.",
    )


def _transfer(report: LocalityReport, found: Transfers) -> Answer:
    question = "Do triggers work on other models?"
    if not found.transfers:
        return no_answer("transfer", question)
    sentences = []
    for model in dict.fromkeys(t.model for t in found.transfers):
        rows = {(t.held, t.start): t.rate for t in found.transfers if t.model == model}
        searched = model == report.mitigation
        name = "the checkpoint as it is" if model == "none" else model
        if ("memorized", report.start) not in rows:
            return no_answer("transfer", question)
        sentences.append(
            f"{name}{' (searched)' if searched else ''}: triggers "
            f"{rate_words(rows['memorized', report.start])}, prompts "
            f"{rate_words(rows['memorized', 'prompt_itself'])}"
        )
    return Answer(
        "transfer",
        question,
        f"Triggers found on {report.mitigation} from {START_WORDS[report.start]}. "
        + "; ".join(sentences)
        + ".",
        "Share of working triggers that draw their image on each model, by where their search "
        "began, beside the unattacked prompt. Open marks: attacks on control images. Bars are "
        "95 % Wilson intervals over triggers.",
    )


def verdict(report: LocalityReport) -> str:
    """What a reader should take away: a line for each of the questions asked."""
    sentences = []
    if report.at_large is not None:
        sentences.append(_budget(report, report.at_large).text)
    if report.embeddings is not None:
        ends = _spread_of(report.embeddings, "triggers", report)
        begun = _spread_of(report.embeddings, "starts", report)
        if ends is not None and begun is not None:
            sentences.append(
                f"Triggers of one image are {estimate_words(ends.distance, 1)} apart, their "
                f"starts {estimate_words(begun.distance, 1)}."
            )
    if report.weights is not None:
        sentences.append(weight_sentence(report.weights))
    return "\n".join(sentence for sentence in sentences if sentence)


# -------- page
# The files of a locality run for people: figures, Markdown summary, and a self-contained page.


def write_locality_files(report: LocalityReport, folder: Path) -> Path:
    """Write ``locality.json``, ``figures/*.png``, ``locality.md`` and ``locality.html``.

    Returns:
        Path of the page, which is written last.
    """
    figures = draw_locality(report)
    listed = []
    for answer in answers(report):
        if answer.name in figures:
            file = _file(answer)
            write_atomically(folder / file, png_bytes(figures[answer.name]))
            listed.append({"file": file, "title": answer.question, "caption": answer.caption})
    write_locality(report, folder, figures=listed, verdict=verdict(report))
    write_atomically(folder / "locality.md", locality_markdown(report).encode())
    return write_atomically(
        folder / "locality.html", render_locality_page(report, figures).encode()
    )


def _file(answer: Answer) -> str:
    return f"figures/locality_{answer.name}.png"


def render_locality_page(report: LocalityReport, figures: Mapping[str, Figure]) -> str:
    """Render the page; it loads nothing from anywhere and shows no picture of a pair."""
    config = redact(report.provenance.config)
    return rendered_page(
        "locality.html.j2",
        report=report,
        answers=answers(report),
        figures={name: svg_element(figure, name) for name, figure in figures.items()},
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


def draw_locality(report: LocalityReport) -> dict[str, Figure]:
    """Draw one figure per question that has something to show, by the question's name."""
    figures: dict[str, Figure | None] = {}
    large, places = report.at_large, report.embeddings
    active, selected = report.activations, report.weights
    if large is not None:
        figures["budget"] = locality_figures.budget(large, report.start)
        figures["lines"] = locality_figures.lines(large)
        figures["transfer"] = locality_figures.transfer(large)
    if places is not None:
        figures["spread"] = locality_figures.spread(places)
        figures["map"] = locality_figures.map_of(places)
    if active is not None:
        figures["activations"] = locality_figures.activations(active)
    if selected is not None:
        figures["weights"] = locality_figures.weights(selected)
        figures["methods"] = locality_figures.methods(selected)
    return {name: figure for name, figure in figures.items() if figure is not None}
