"""The numbers of a locality run as tables of text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dori_lightning.report.headline_tables import TextTable
from dori_lightning.report.locality.layers import short_layer
from dori_lightning.report.locality.words import METHOD_WORDS, START_WORDS, estimate_words
from dori_lightning.report.summary import interval_words, percent_words

if TYPE_CHECKING:
    from dori_lightning.locality.activations import ActivationFindings
    from dori_lightning.locality.embeddings import EmbeddingFindings
    from dori_lightning.locality.estimates import Rate
    from dori_lightning.locality.large import AtLarge
    from dori_lightning.locality.weights import WeightFindings
    from dori_lightning.report.locality.record import LocalityReport
    from dori_lightning.types import Init

__all__ = ["image_table", "number_tables"]


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


def _large(found: AtLarge) -> list[TextTable]:
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
