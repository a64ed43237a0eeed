"""The certificate: which doors into a model are open, after how much work, and what that is worth.

The record is ``certificate.json``, the page ``certificate.html``; the words are in the template
``certificate.txt.j2``.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from dori_lightning.certify.cascade import (
    PROTOCOL,
    AttackFindings,
    Group,
    Level,
    Tried,
    work_until_back,
)
from dori_lightning.certify.survival import Survival, logrank_p, survival
from dori_lightning.certify.traces import Trace
from dori_lightning.metrics.statistics import wilson_interval
from dori_lightning.report.figures import (
    KIND_LOOK,
    SERIES,
    new_figure,
    plain_axes,
    share_axis,
    styled,
    svg_element,
    under_legend,
    write_figures,
)
from dori_lightning.report.images import thumbnail_uri
from dori_lightning.report.pages import rendered_page
from dori_lightning.report.record import (
    CERTIFICATE_FILE,
    Disclosure,
    Flag,
    Provenance,
    Severity,
)
from dori_lightning.report.tables import TextTable, text_table
from dori_lightning.report.words import NOTHING, mean_words, text_macro
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.runtime.documents import json_bytes, stored
from dori_lightning.runtime.redaction import redact
from dori_lightning.types import InputError, Number, Pair

POWER = 0.5
"""Share of the planted images to be found where "nothing came back" is to mean anything."""

_TEMPLATE = "certificate.txt.j2"

_LOOKS: dict[Group, tuple[str, str, str]] = {
    "suspects": ("suspected images", KIND_LOOK["vm"][0], "-"),
    "controls": ("controls", KIND_LOOK["control"][0], ":"),
    "reference": ("suspects, on the reference", SERIES[5], "--"),
    "planted": ("planted images", SERIES[2], "-."),
}
"""Label, colour and line of each group of images."""

Answer = Literal["open", "held", "blind", "certified", "unchecked"]
"""``open``: suspects come back; ``held``: none does, but losses say that some are still held;
``blind``: none does, and most planted images were not found either; ``unchecked``: none does, and
nothing was planted; ``certified``: none does, and planted images were found."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a cascade of attacks found.

    Attributes:
        schema_version: Version of the layout of ``certificate.json``.
        protocol: Name and version of the list of attacks.
        checkpoint: Name of the checkpoint.
        mitigation: What was done to it.
        reference: Name of the model that never saw the images; empty without one.
        attacks: What each attack found, in their order.
        left_out: Name to why an attack of the protocol means nothing here.
        suspects: Ids of the suspected pairs that can be told from other images, in their order.
        not_auditable: Ids of suspected pairs that cannot: nothing is certified of them.
        survivals: How images survive work, by group.
        logrank: Two-sided p-value that suspects and controls survive alike (log-rank test); NaN
            where nothing came back.
        traces: What the losses of suspects say beside the reference; empty without one.
        planted: Positive controls that were planted, None where none were.
        provenance: Where the numbers come from.
    """

    schema_version: Literal[1] = 1
    protocol: str = PROTOCOL
    checkpoint: str
    mitigation: str
    reference: str
    attacks: tuple[AttackFindings, ...]
    left_out: Mapping[str, str]
    suspects: tuple[str, ...]
    not_auditable: tuple[str, ...]
    survivals: tuple[Survival, ...]
    logrank: Number
    traces: tuple[Trace, ...]
    planted: int | None
    provenance: Provenance

    @cached_property
    def opened(self) -> dict[str, AttackFindings]:
        """Suspect that came back to the first attack that brought it back."""
        found: dict[str, AttackFindings] = {}
        for findings in self.attacks:
            for name in findings.convicted:
                found.setdefault(name, findings)
        return found

    @cached_property
    def by_group(self) -> dict[Group, Survival]:
        """Survival by group."""
        return {own.group: own for own in self.survivals}

    @property
    def first_work(self) -> int | None:
        """Work at which the first suspect came back; None where none did."""
        own = self.by_group.get("suspects")
        return own.first if own else None

    @property
    def most_work(self) -> int:
        """The most work that was spent on a suspect that did not come back."""
        own = self.by_group.get("suspects")
        return own.censored if own else 0

    @cached_property
    def planted_found(self) -> int:
        """Positive controls that some attack brought back at a level that counts."""
        return len(
            {
                one.pair
                for findings in self.attacks
                for one in findings.of("planted")
                if one.back_at is not None and findings.is_sound(one.level)
            }
        )

    @property
    def held(self) -> tuple[str, ...]:
        """Suspects that the model still denoises better than one that never saw them."""
        return tuple(own.pair for own in self.traces if own.below)

    @property
    def betrayed(self) -> tuple[str, ...]:
        """Suspects whose removal shows: denoised worse than by a model that never saw them."""
        return tuple(own.pair for own in self.traces if own.above)

    @property
    def masked(self) -> tuple[str, ...]:
        """Suspects that an attack without gradients brought back, and one with them did not."""
        without = {name for own in self.attacks if own.transfers for name in own.convicted}
        found: dict[str, bool] = {}
        for own in self.attacks:
            if own.holds == "embedding" and not own.transfers:
                for one in own.of("suspects"):
                    if one.pair in without:
                        found[one.pair] = found.get(one.pair, False) or one.back_at is not None
        return tuple(name for name, back in found.items() if not back)

    @property
    def answer(self) -> Answer:
        """What the certificate says."""
        if self.opened:
            return "open"
        if self.held:
            return "held"
        if not self.planted:
            return "unchecked"
        return "certified" if self.planted_found / self.planted >= POWER else "blind"

    @property
    def tone(self) -> Literal["found", "doubt", "clear"]:
        """Colour of the verdict."""
        if self.answer == "open":
            return "found"
        return "clear" if self.answer == "certified" else "doubt"

    @cached_property
    def headline(self) -> str:
        """The answer in a sentence."""
        return text_macro(_TEMPLATE, "headline", self)

    @cached_property
    def verdict(self) -> str:
        """The answer in words, for a reader who is not an engineer."""
        return text_macro(_TEMPLATE, "plain", self)

    @cached_property
    def flags(self) -> tuple[Flag, ...]:
        """What limits the meaning of the numbers, gravest first."""
        return tuple(_flags(self))


def make_certificate(
    *,
    checkpoint: str,
    mitigation: str,
    reference: str,
    found: Sequence[AttackFindings],
    suspects: Sequence[str],
    not_auditable: Sequence[str],
    left_out: Mapping[str, str],
    traces: Sequence[Trace],
    planted: int | None,
    provenance: Provenance,
) -> Certificate:
    """Put together what a cascade found; arguments are the record's fields."""
    works = {group: work_until_back(found, group) for group in _LOOKS}
    return Certificate(
        checkpoint=checkpoint,
        mitigation=mitigation,
        reference=reference,
        attacks=tuple(found),
        left_out=dict(left_out),
        suspects=tuple(suspects),
        not_auditable=tuple(not_auditable),
        survivals=tuple(survival(group, work) for group, work in works.items() if work),
        logrank=logrank_p(works["suspects"], works["controls"]),
        traces=tuple(traces),
        planted=planted,
        provenance=provenance,
    )


def _flags(certificate: Certificate) -> Iterator[Flag]:
    """Flags of a certificate, gravest first."""

    def flag(name: str, severity: Severity, *values: object) -> Flag:
        return Flag(name, severity, text_macro(_TEMPLATE, name, *values))

    closed = [own.attack for own in certificate.attacks if own.levels and not own.sound]
    controls = certificate.by_group.get("controls")
    if not certificate.planted:
        yield flag("no_planted", "warning")
    elif certificate.planted_found / certificate.planted < POWER:
        yield flag("blind", "critical", certificate)
    if certificate.masked:
        yield flag("masked", "critical", certificate.masked)
    if closed:
        yield flag("closed", "warning", closed)
    if controls is None:
        yield flag("no_controls", "warning")
    else:
        _, high = wilson_interval(0, controls.n)
        yield flag("few_controls", "info", controls.n, high)
    if not certificate.reference:
        yield flag("no_reference", "info")
    if certificate.betrayed:
        yield flag("betrayed", "warning", certificate.betrayed, certificate.reference)
    if certificate.not_auditable:
        yield flag("not_auditable", "warning", certificate.not_auditable)


def write_certificate(
    certificate: Certificate,
    folder: Path,
    *,
    pairs: Sequence[Pair],
    images: Disclosure = "full",
    max_pairs: int = 60,
) -> Path:
    """Write ``certificate.json``, ``figures/work.png`` and ``certificate.html``.

    Args:
        certificate: What was found.
        folder: Run folder.
        pairs: The suspects, for their images.
        images: How images are shown.
        max_pairs: Suspects that are shown with their images.

    Returns:
        Path of the page, which is written last.
    """
    figures = {"work": draw_work(certificate)}
    write_figures(figures, folder, prefix="certificate_")
    document = asdict(certificate)
    document["provenance"]["config"] = redact(certificate.provenance.config)
    document |= {
        "answer": certificate.answer,
        "verdict": certificate.verdict,
        "flags": [asdict(flag) for flag in certificate.flags],
        "first_open": {name: own.attack for name, own in certificate.opened.items()},
        "first_work": {group: own.first for group, own in certificate.by_group.items()},
    }
    write_atomically(folder / CERTIFICATE_FILE, json_bytes(document, indent=1))
    page = rendered_page(
        "certificate.html.j2",
        report=certificate,
        images=images,
        doors=door_table(certificate),
        levels=level_table(certificate),
        rows=image_rows(certificate, folder, pairs[:max_pairs], images),
        traces=trace_table(certificate),
        figures={name: svg_element(figure, name) for name, figure in figures.items()},
        config=json.dumps(
            redact(certificate.provenance.config), indent=2, sort_keys=True, default=str
        ),
    )
    return write_atomically(folder / "certificate.html", page.encode())


@styled()
def draw_work(certificate: Certificate) -> Figure:
    """Draw the share of each group that has not come back against the work spent on an image."""
    figure = new_figure(7.2, 3.6)
    axes = figure.subplots()
    begin = min((own.first for own in certificate.survivals if own.first), default=10)
    begin = max(1, begin // 2)
    for group, (label, colour, line) in _LOOKS.items():
        own = certificate.by_group.get(group)
        if own is None:
            continue
        end = max([*own.work, own.censored])
        places = [begin, *own.work, end]
        shares = [1.0, *own.share, own.share[-1] if own.share else 1.0]
        axes.step(
            places,
            shares,
            where="post",
            color=colour,
            linestyle=line,
            linewidth=1.8,
            label=f"{label} (n = {own.n})",
        )
        if group == "suspects" and own.share:
            axes.fill_between(
                places,
                np.nan_to_num([1.0, *own.low, own.low[-1]], nan=0.0),
                np.nan_to_num([1.0, *own.high, own.high[-1]], nan=1.0),
                step="post",
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
        if own.back < own.n:
            axes.plot([end], [shares[-1]], marker="|", markersize=9, color=colour)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("work spent on an image: rows through the denoiser")
    axes.set_ylabel("images that are not back")
    share_axis(axes)
    plain_axes(axes)
    under_legend(figure, axes, columns=2)
    return figure


def door_table(certificate: Certificate) -> TextTable:
    """One row for each attack: what its adversary holds, and who came back."""
    counts: dict[str, Callable[[AttackFindings], str]] = {
        look[0]: partial(_count, group) for group, look in _LOOKS.items()
    }
    return text_table(
        "Doors",
        text_macro(_TEMPLATE, "doors_caption"),
        certificate.attacks,
        {
            "attack": lambda own: own.attack,
            "its adversary holds": lambda own: text_macro(_TEMPLATE, "holds", own.holds),
        },
        {
            **counts,
            "most work": lambda own: f"{max((o.spent for o in own.tried), default=0):,}",
            "counts": lambda own: (
                NOTHING if not own.levels else f"up to {own.last_sound}" if own.sound else "no"
            ),
        },
    )


def _count(group: Group, own: AttackFindings) -> str:
    """How many of a group an attack brought back at levels that count."""
    back, tried = own.count(group)
    return f"{back} of {tried}" if tried else NOTHING


@dataclass(frozen=True)
class _LevelRow:
    attack: str
    level: Level


def level_table(certificate: Certificate) -> TextTable:
    """One row for each level of each attack."""
    rows = [_LevelRow(own.attack, level) for own in certificate.attacks for level in own.levels]
    counts: dict[str, Callable[[_LevelRow], str]] = {
        look[0]: partial(_level_count, group) for group, look in _LOOKS.items()
    }
    return text_table(
        "Levels",
        text_macro(_TEMPLATE, "levels_caption"),
        rows,
        {"attack": lambda row: row.attack, "what was done": lambda row: row.level.name},
        {**counts, "counts": lambda row: "yes" if row.level.sound else "no"},
    )


def _level_count(group: Group, row: _LevelRow) -> str:
    """How many of a group came back at a level or before it."""
    tried = row.level.tried.get(group)
    return f"{row.level.back[group]} of {tried}" if tried else NOTHING


@dataclass(frozen=True)
class ImageRow:
    """One suspect and how it came back.

    Attributes:
        pair: The pair.
        original: ``data:`` address of its image.
        closest: ``data:`` address of the closest image that any attack drew.
        door: Attack that brought it back first; empty where none did.
        level: What that attack did.
        work: Work until then, or all that was spent.
        similarity: Of the closest image; NaN where none was drawn.
        threshold: Similarity above which an image is a copy.
        note: What the attack says of it, such as the words that it found.
        trace: Its loss beside the reference's.
    """

    pair: Pair
    original: str | None
    closest: str | None
    door: str
    level: str
    work: int
    similarity: float
    threshold: float
    note: str
    trace: Trace | None


def image_rows(
    certificate: Certificate, folder: Path, pairs: Sequence[Pair], images: Disclosure
) -> list[ImageRow]:
    """Put together what is shown of suspects: those that can be judged."""
    works = work_until_back(certificate.attacks, "suspects")
    traces = {own.pair: own for own in certificate.traces}
    rows = []
    for pair in pairs:
        if pair.id not in works:
            continue
        tried = [
            one
            for own in certificate.attacks
            for one in own.of("suspects")
            if one.pair == pair.id and one.image
        ]
        door = certificate.opened.get(pair.id)
        back = next((o for o in door.of("suspects") if o.pair == pair.id), None) if door else None
        shown = back or max(tried, key=_similarity, default=None)
        rows.append(
            ImageRow(
                pair=pair,
                original=thumbnail_uri(pair.image, images),
                closest=thumbnail_uri(folder / shown.image, images) if shown else None,
                door=door.attack if door else "",
                level=back.level if back else "",
                work=works[pair.id][0],
                similarity=shown.best if shown else math.nan,
                threshold=shown.threshold if shown else math.nan,
                note=back.note if back else "",
                trace=traces.get(pair.id),
            )
        )
    return rows


def _similarity(one: Tried) -> float:
    return -math.inf if math.isnan(one.best) else one.best


def trace_table(certificate: Certificate) -> TextTable | None:
    """Losses of suspects beside the reference's; None without a reference."""
    if not certificate.traces:
        return None

    def says(own: Trace) -> str:
        return "still held" if own.below else "removed, and it shows" if own.above else "nothing"

    return text_table(
        "Losses beside the reference",
        text_macro(_TEMPLATE, "traces_caption", certificate.reference),
        certificate.traces,
        {"image": lambda own: own.pair},
        {"loss, times the reference's": lambda own: mean_words(own.ratio), "says": says},
    )


def read_certificate(folder: Path) -> Certificate:
    """Read a finished certificate.

    Raises:
        InputError: It is missing or damaged.
    """
    found: Certificate = stored(Certificate, folder / CERTIFICATE_FILE)
    return found


def ranking(certificates: Sequence[Certificate]) -> TextTable:
    """Certificates side by side, those whose first door takes least work first.

    Raises:
        InputError: They are of several checkpoints or protocols, whose work cannot be compared.
    """
    kinds = {(own.checkpoint, own.protocol) for own in certificates}
    if len(kinds) > 1:
        raise InputError(
            "certificates of several checkpoints or protocols make no ranking: "
            + ", ".join(f"{checkpoint} ({protocol})" for checkpoint, protocol in sorted(kinds)),
            where="task.runs",
            fix="one checkpoint and one protocol at a time",
        )
    attacks = list(dict.fromkeys(one.attack for own in certificates for one in own.attacks))

    def order(own: Certificate) -> tuple[float, int]:
        first = own.first_work
        return (math.inf if first is None else first, own.most_work)

    counts: dict[str, Callable[[Certificate], str]] = {
        f"+ {name}" if place else name: partial(_convicted, name)
        for place, name in enumerate(attacks)
    }
    return text_table(
        f"Certificates of {certificates[0].checkpoint}, {certificates[0].protocol}",
        text_macro(_TEMPLATE, "ranking_caption"),
        sorted(certificates, key=order),
        {"mitigation": lambda own: own.mitigation},
        {
            **counts,
            "back": lambda own: f"{len(own.opened)}/{len(own.suspects)}",
            "held by loss": lambda own: str(len(own.held)) if own.traces else NOTHING,
            "first back": lambda own: _work_words(own.first_work, own.most_work),
            "first control": lambda own: _work_of(own, "controls"),
            "answer": lambda own: own.answer,
        },
    )


def _convicted(name: str, own: Certificate) -> str:
    """How many suspects one attack brought back first, of those that it was tried on."""
    for findings in own.attacks:
        if findings.attack == name:
            if not findings.sound:
                return "unsound" if findings.levels else NOTHING
            tried = findings.of("suspects")
            return f"{len(findings.convicted)}/{len(tried)}" if tried else NOTHING
    return NOTHING


def _work_words(first: int | None, most: int) -> str:
    return f"> {most:,}" if first is None else f"{first:,}"


def _work_of(own: Certificate, group: Group) -> str:
    found = own.by_group.get(group)
    return _work_words(found.first, found.censored) if found else NOTHING


def doors_of(certificates: Sequence[Certificate]) -> dict[tuple[str, str, str], AttackFindings]:
    """What each attack found, by checkpoint, mitigation and name."""
    return {
        (own.checkpoint, own.mitigation, findings.attack): findings
        for own in certificates
        for findings in own.attacks
    }
