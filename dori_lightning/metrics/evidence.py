"""How sure an audit is of one image: p-values from images that the model cannot hold.

A score says how far an image came back, between what unrelated images reach against it (0) and
what its own autoencoder reconstruction reaches (1); scores of different images can be compared,
similarities cannot. The scores of *nulls*, images that the model cannot hold (controls, the
suspects' own altered copies, a reference model that never saw them), give a p-value that holds
for any distribution of scores as long as nulls and suspects are exchangeable.

References: Vovk et al., "Algorithmic Learning in a Random World", 2005; Bates et al., "Testing for
outliers with conformal p-values", 2023, https://arxiv.org/abs/2104.08279 (with Benjamini and
Hochberg over images the false discovery rate stays at its level).
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import false_discovery_control

from dori_lightning.metrics.replication import PairResult
from dori_lightning.types import (
    Calibration,
    Cell,
    Condition,
    InputError,
    Kind,
    Number,
    Scale,
    require,
)

USUAL_RATE = 0.05
"""False discovery rate where none was asked for."""


@dataclass(frozen=True)
class EvidenceSettings:
    """How sure an audit has to be.

    Attributes:
        false_discovery_rate: Expected share of images that the model does not hold among those
            that the verdict names, in (0, 1). ``auto`` is 5 %, and a list too small for that is
            audited all the same: its copies are answered ``copy_few_nulls``. A number is a claim
            to be made, and refused where no result could support it.
        losses: Whether images are also compared with their altered copies by denoising loss.
    """

    false_discovery_rate: float | Literal["auto"] = "auto"
    losses: bool = True

    def __post_init__(self) -> None:
        asked = self.false_discovery_rate
        require(
            asked == "auto" if isinstance(asked, str) else 0 < asked < 1,
            "evidence.false_discovery_rate must lie between 0 and 1, or be auto",
            asked,
        )

    @property
    def rate(self) -> float:
        """The false discovery rate as a number."""
        asked = self.false_discovery_rate
        return USUAL_RATE if isinstance(asked, str) else asked

    def check_nulls(self, counts: Mapping[Kind, int], *, reference: bool) -> None:
        """Refuse an error rate that was asked for and that no result could ever support.

        Args:
            counts: As of `nulls_among`.
            reference: The same.

        Raises:
            InputError: Says how many images that the model cannot hold are needed.
        """
        nulls = nulls_among(counts, reference=reference)
        suspects = sum(counts.values()) - counts.get("control", 0)
        needed = nulls_needed(suspects, self.rate) if suspects else 0
        if self.false_discovery_rate == "auto" or nulls >= needed:
            return
        raise InputError(
            f"a false discovery rate of {self.rate:g} needs at least {needed} attacked images "
            f"that the model cannot hold, this audit has {nulls}: no p-value can fall below "
            f"1/{nulls + 1}",
            where="evidence.false_discovery_rate",
            fix=f"add {needed - nulls} pairs of kind control, have the suspects' own altered "
            f"copies attacked (pairs.self_controls=[mirrored,turned,shifted]), ask for a rate of "
            f"{math.ceil(1000 / (nulls + 1)) / 1000:g} or more, or leave it at auto",
        )


def conformal_p_values(scores: ArrayLike, nulls: ArrayLike) -> np.ndarray:
    """Chance that an image which the model cannot hold scores at least as high.

    Args:
        scores: (N,) scores of suspects; NaN stays NaN.
        nulls: (M,) scores of images that the model cannot hold; NaN is left out.

    Returns:
        (N,) p-values in [1 / (M + 1), 1]: ties count against the suspect.
    """
    suspects = np.asarray(scores, np.float64).ravel()
    others = np.asarray(nulls, np.float64).ravel()
    others = np.sort(others[~np.isnan(others)])
    as_high = len(others) - np.searchsorted(others, suspects, side="left")
    return np.where(np.isnan(suspects), np.nan, (1 + as_high) / (1 + len(others)))


def find_futile(
    ratios: Mapping[str, float], controls: Collection[str], share: float
) -> frozenset[str]:
    """Images of which nothing says that a search for them is worth its steps.

    A conformal test: an image is searched where at most a share of the controls is denoised as
    much better than its own altered copies. Of images that the model does not hold, that share is
    searched, on average, if they and the controls are exchangeable. How many *memorized* images
    go unsearched is bounded by nothing that controls can say; of planted images it stands in
    ``experiments/011-sequential``. One control that does as well is no reason, for it may be an
    oddity.

    Controls are chosen by the same rule, each against the others, so that p-values by image stay
    valid.

    Args:
        ratios: Pair id to its loss ratio (``LossEvidence``); NaN is searched.
        controls: Ids of images that the model cannot hold; without any, none is futile.
        share: Share of those that are searched all the same, in (0, 1).

    Returns:
        Ids of images, controls among them, that are not worth a search.
    """
    nulls = [(name, ratios[name]) for name in controls if name in ratios]
    share = max(share, 2 / (1 + len(nulls)))

    def p_value(name: str) -> float:
        as_low = sum(ratio <= ratios[name] for other, ratio in nulls if other != name)
        return (1 + as_low) / (1 + len(nulls))

    return frozenset(name for name in ratios if p_value(name) > share)


def discoveries(p_values: ArrayLike, rate: float) -> np.ndarray:
    """Which images stand out, at a false discovery rate over all of them.

    Args:
        p_values: (N,) p-values; NaN (no result) is never a discovery and no part of the family.
        rate: Expected share of false discoveries among all, in (0, 1).

    Returns:
        (N,) bool.

    Reference: Benjamini and Hochberg, "Controlling the false discovery rate", 1995.
    """
    values = np.asarray(p_values, np.float64).ravel()
    found, known = np.zeros(len(values), bool), ~np.isnan(values)
    if known.any():
        found[known] = false_discovery_control(values[known]) <= rate
    return found


def nulls_needed(suspects: int, rate: float, *, found: int | None = None) -> int:
    """Fewest nulls with which ``found`` of the suspects can be discoveries at all.

    Args:
        suspects: N, images under suspicion.
        rate: False discovery rate in (0, 1).
        found: How many stand out with the smallest possible p-value; all N without it. One image
            alone among many needs the most nulls.

    Raises:
        ValueError: Counts or rate out of range.
    """
    found = suspects if found is None else found
    if not 0 < rate < 1 or not 1 <= found <= suspects:
        raise ValueError(f"need 0 < rate < 1 and 1 <= found <= suspects, got {rate}, {found}")
    # the smallest p-value, 1 / (M + 1), has to be at most rate * found / suspects
    return math.ceil(suspects / (rate * found) - 1 - 1e-9)


def fewest_together(suspects: int, nulls: int, rate: float) -> int | None:
    """Fewest suspects that can be discoveries, all with the smallest p-value.

    Args:
        suspects: N, at least 1.
        nulls: M, images that the model cannot hold.
        rate: False discovery rate in (0, 1).

    Returns:
        Their number, None where even all suspects cannot.
    """
    fewest = math.ceil(suspects / (rate * (nulls + 1)) - 1e-9)
    return fewest if fewest <= suspects else None


def nulls_among(counts: Mapping[Kind, int], *, reference: bool) -> int:
    """Count attacked images that the model cannot hold.

    Args:
        counts: Attacked pairs by kind, altered copies among the controls.
        reference: Whether all are also attacked on a model that never saw them.
    """
    return counts.get("control", 0) + (sum(counts.values()) if reference else 0)


COPY = 0.5
"""Score above which an image is a copy: the image's own threshold."""

Answer = Literal["yes", "dormant", "no", "cannot_tell"]
"""Whether the model can reproduce an image: it does; it holds the image, which no input tried
brings back; neither shows; nothing can be said."""

Reason = Literal[
    "copy",
    "copy_few_nulls",
    "held_by_loss",
    "loss_few_nulls",
    "nothing_came_back",
    "not_seen",
    "not_auditable",
    "no_result",
    "painted",
    "not_above_nulls",
]
"""What an answer rests on; in words on the page of an audit. ``copy_few_nulls``: it is a copy and
beats every null, but they are too few to support the error rate asked for. ``loss_few_nulls``: it
did not come back, and its loss beats every null, but they are too few as well. ``not_seen``: it
did not come back, and the audit could not have seen it."""


@dataclass(frozen=True)
class LossEvidence:
    """How much better an image is denoised than its own altered copies.

    Attributes:
        ratio: Denoising loss of the image, times that of its most favourable altered copy under
            the same noise and conditioning: 1 for an image never seen, smaller for one that is
            held.
        conditioning: The conditioning under which it is smallest: ``empty``, ``own prompt``, or
            an attack's initial point.
    """

    ratio: float
    conditioning: str

    @property
    def score(self) -> float:
        """Higher is more like an image that is held: minus the logarithm of the ratio."""
        return -math.log(self.ratio)


@dataclass(frozen=True)
class ImageEvidence:
    """What an audit knows of one suspected image.

    Attributes:
        id: The pair's.
        kind: The pair's.
        answer: Whether the model can reproduce it.
        reason: What the answer rests on.
        similarity: Of its closest image under any condition whose nulls were attacked.
        condition: That condition; None without a result.
        scale: What similarity means for it.
        score: The similarity on that scale.
        p_image: Chance that an image the model cannot hold comes as close; NaN without a result.
        p_loss: Chance that one is denoised as much better than its altered copies; NaN where it
            was not measured.
        loss_ratio: Denoising loss, times that of the most favourable altered copy; NaN if not
            measured.
        reference_similarity: Of the closest image of the reference model; NaN without one.
    """

    id: str
    kind: Kind
    answer: Answer
    reason: Reason
    similarity: Number
    condition: Condition | None
    scale: Scale
    score: Number
    p_image: Number
    p_loss: Number = math.nan
    loss_ratio: Number = math.nan
    reference_similarity: Number = math.nan


Origin = Literal["base", "tuning", "neither", "cannot_tell"]
"""Where an image in a fine-tuned model is from: its base holds it already, it came with the
fine-tuning, neither model holds it, or nothing can be said."""


def origin_of(answer: Answer, base: Answer) -> Origin:
    """Where an image is from, by the answers for the fine-tuned model and for its base."""
    held = ("yes", "dormant")
    if base in held:
        return "base"
    if base == "no" and answer != "cannot_tell":
        return "tuning" if answer in held else "neither"
    return "cannot_tell"


@dataclass(frozen=True)
class BaseEvidence:
    """What the same attacks find in the checkpoint that the one under audit was tuned from.

    Attributes:
        checkpoint: Its name.
        fingerprint: Hash of everything of it that decides results.
        cells: Its rows of the answer.
        images: One row for each suspected image, judged as those of the checkpoint under audit.
    """

    checkpoint: str
    fingerprint: str
    cells: tuple[Cell, ...]
    images: tuple[ImageEvidence, ...]


Unseen = Literal["control", "altered_copy", "reference"]
"""Why a model cannot hold an image: the list says so, it is a suspect's altered copy, or the model
is another one, which never saw it."""


@dataclass(frozen=True)
class UnseenImage:
    """How far an image came back that the model cannot hold.

    Attributes:
        id: The pair's.
        group: Why the model cannot hold it.
        score: The highest under ``tried_conditions``.
        loss_ratio: Denoising loss, times that of the most favourable altered copy; NaN if not
            measured.
    """

    id: str
    group: Unseen
    score: Number
    loss_ratio: Number = math.nan


ENOUGH_POWER = 0.5
"""An attack whose power may be below this could not have seen an image."""


@dataclass(frozen=True)
class Power:
    """How many planted images the attack found.

    Attributes:
        planted: Images whose prompts reproduce them after planting.
        tried: Images that were to be planted.
        found: Planted images that the attack reproduces from random embeddings.
        interval: 95 % Wilson interval of ``found / planted``.
        steps: Optimizer steps that planting took.
        scores: Id of each planted image to the highest score that the attack reached on it; NaN
            without a result. Empty in records of earlier versions.
    """

    planted: int
    tried: int
    found: int
    interval: tuple[Number, Number]
    steps: int
    scores: dict[str, Number] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the planted images that the attack found; NaN where none was planted."""
        return self.found / self.planted if self.planted else math.nan

    @property
    def suffices(self) -> bool:
        """Whether an image that does not come back says something: power above a half, surely."""
        return self.interval[0] > ENOUGH_POWER


def attacked_scores(
    results: Iterable[PairResult], rule: Calibration, conditions: Collection[Condition]
) -> dict[str, tuple[float, PairResult]]:
    """Pair id to its highest score under some conditions, with the result that has it."""
    best: dict[str, tuple[float, PairResult]] = {}
    for result in results:
        scale = rule.scales.get(result.pair.id)
        if result.condition not in conditions or scale is None or math.isnan(result.statistic):
            continue
        score = scale.score(result.statistic)
        if not math.isnan(score) and score > best.get(result.pair.id, (-math.inf,))[0]:
            best[result.pair.id] = (score, result)
    return best


def tried_conditions(results: Iterable[PairResult]) -> set[Condition]:
    """Conditions under which an image can be judged: those that controls were tried under.

    An image that had more tries than its nulls stands out by that alone. Without controls, only
    the prompts.
    """
    known = list(results)
    tried = {r.condition for r in known if r.pair.kind == "control" and r.status == "ok"}
    return tried or {r.condition for r in known if r.condition.attack == "prompt"}


def unseen_images(
    results: Sequence[PairResult],
    rule: Calibration,
    *,
    reference: Sequence[PairResult] = (),
    losses: Mapping[str, LossEvidence] = MappingProxyType({}),
    reference_losses: Mapping[str, LossEvidence] = MappingProxyType({}),
) -> tuple[UnseenImage, ...]:
    """How far images came back that the model cannot hold; those without a score are left out.

    Args:
        results: One for each pair and condition, controls included.
        rule: Descriptor, and what similarity means for each image.
        reference: The same from a model that never saw the images.
        losses: Pair id to the evidence by loss, controls included; empty where not measured.
        reference_losses: The same of the reference model, which are nulls.
    """
    tried = tried_conditions(results)

    def rows(
        found: Sequence[PairResult], ratios: Mapping[str, LossEvidence], group: Unseen | None
    ) -> Iterator[UnseenImage]:
        for name, (score, result) in attacked_scores(found, rule, tried).items():
            kind = group or ("altered_copy" if result.pair.copy_of else "control")
            ratio = ratios[name].ratio if name in ratios else math.nan
            yield UnseenImage(name, kind, score, ratio)

    controls = [result for result in results if result.pair.kind == "control"]
    return (*rows(controls, losses, None), *rows(reference, reference_losses, "reference"))


def painted_images(unseen: Iterable[UnseenImage]) -> frozenset[str]:
    """Ids of images that the attack paints: it brings them back from the reference model."""
    return frozenset(
        image.id for image in unseen if image.group == "reference" and image.score > COPY
    )


def null_scores(unseen: Sequence[UnseenImage]) -> list[float]:
    """The scores that p-values rest on: those of images that the attack does not paint."""
    painted = painted_images(unseen)
    return [image.score for image in unseen if image.id not in painted]


@dataclass(frozen=True)
class Judged:
    """The answer for one image, with its p-values (``ImageEvidence``)."""

    answer: Answer
    reason: Reason
    p_image: float
    p_loss: float


def judge(
    scores: Sequence[float],
    ratios: Sequence[float],
    unseen: Sequence[UnseenImage],
    *,
    rate: float,
    auditable: Sequence[bool] | None = None,
    painted: Sequence[bool] | None = None,
) -> list[Judged]:
    """Answer for each of N suspects, from scores and loss ratios alone.

    An image is reproduced (``yes``) where it is a copy by its own threshold *and* stands out from
    what images that the model cannot hold reach: at a false discovery rate over all images, or,
    where nulls are too few for that, above every one of them (``copy_few_nulls``). The threshold
    alone knows no error rate, a p-value alone calls anything unusual a copy. An image
    that the reference model reproduces as well proves nothing (``cannot_tell``): the attack
    paints it. It, and only it: as a null it counts for no other image. Where nothing comes back,
    an image whose loss stands out from every null is held (``dormant``) if the nulls suffice for
    the rate, and ``cannot_tell`` if they do not: it is never answered ``no``.

    Args:
        scores: Highest score of each; NaN without a result.
        ratios: Smallest loss ratio of each (``LossEvidence``); NaN if not measured.
        unseen: Images that the model cannot hold.
        rate: False discovery rate over the images, in (0, 1).
        auditable: Whether the descriptor can judge each; None for all.
        painted: Whether the reference model reproduces each; None for none.
    """
    fit = np.ones(len(scores), bool) if auditable is None else np.asarray(auditable, bool)
    paints = np.zeros(len(scores), bool) if painted is None else np.asarray(painted, bool)
    nulls = null_scores(unseen)
    by_image = conformal_p_values(scores, nulls)
    lost = np.log([image.loss_ratio for image in unseen])
    by_loss = conformal_p_values(-np.log(np.asarray(ratios, np.float64)), -lost)
    compared = int((~np.isnan(lost)).sum())
    # an image that this descriptor cannot judge has its p-value by loss, but is no part of the
    # family and no null: it may move no other image's answer
    dormant = discoveries(np.where(fit, by_loss, math.nan), rate) | (~fit & (by_loss <= rate))
    copies = discoveries(by_image, rate)
    found = []
    for k, score in enumerate(scores):
        answer, reason = _answer(
            score,
            by_image=copies[k],
            # a discovery, or as small a p-value as the nulls allow
            beats_all=copies[k] or by_image[k] * (1 + len(nulls)) < 1.5,
            by_loss=dormant[k],
            lowest_loss=compared > 0 and by_loss[k] * (1 + compared) < 1.5,
            auditable=fit[k],
            painted=paints[k],
        )
        found.append(Judged(answer, reason, float(by_image[k]), float(by_loss[k])))
    return found


def image_evidence(
    results: Sequence[PairResult],
    rule: Calibration,
    unseen: Sequence[UnseenImage],
    *,
    rate: float,
    reference: Sequence[PairResult] = (),
    losses: Mapping[str, LossEvidence] = MappingProxyType({}),
) -> tuple[ImageEvidence, ...]:
    """Judge every suspected image, with its own error bound (``judge``).

    Only ``tried_conditions`` count.

    Args:
        results: One for each pair and condition, controls included.
        rule: Descriptor, and what similarity means for each image.
        unseen: How far images came back that the model cannot hold (`unseen_images`).
        rate: False discovery rate over the images, in (0, 1).
        reference: The results of a model that never saw the images.
        losses: Pair id to the evidence by loss; empty where not measured.

    Returns:
        One row for each pair that is no control, in order of appearance.
    """
    tried = tried_conditions(results)
    own, other = attacked_scores(results, rule, tried), attacked_scores(reference, rule, tried)
    suspects = {r.pair.id: r.pair for r in results if r.pair.kind != "control"}
    scores = [own[name][0] if name in own else math.nan for name in suspects]
    ratios = [losses[name].ratio if name in losses else math.nan for name in suspects]
    painted = painted_images(unseen)
    judged = judge(
        scores,
        ratios,
        unseen,
        rate=rate,
        auditable=[name not in rule.not_auditable for name in suspects],
        painted=[name in painted for name in suspects],
    )
    rows = []
    for (name, pair), score, ratio, found in zip(
        suspects.items(), scores, ratios, judged, strict=True
    ):
        result = own[name][1] if name in own else None
        rows.append(
            ImageEvidence(
                id=name,
                kind=pair.kind,
                **vars(found),
                similarity=math.nan if result is None else result.statistic,
                condition=None if result is None else result.condition,
                scale=rule.scales.get(name, Scale(math.nan, math.nan)),
                score=score,
                loss_ratio=ratio,
                reference_similarity=other[name][1].statistic if name in other else math.nan,
            )
        )
    return tuple(rows)


def _answer(
    score: float,
    *,
    by_image: bool,
    beats_all: bool,
    by_loss: bool,
    lowest_loss: bool,
    auditable: bool,
    painted: bool,
) -> tuple[Answer, Reason]:
    if score > COPY and beats_all and not painted:
        return "yes", "copy" if by_image else "copy_few_nulls"
    if by_loss:
        return "dormant", "held_by_loss"
    if not auditable:
        return "cannot_tell", "not_auditable"
    if math.isnan(score):
        return "cannot_tell", "no_result"
    if score > COPY:
        return "cannot_tell", "painted" if painted else "not_above_nulls"
    if lowest_loss:
        return "cannot_tell", "loss_few_nulls"
    return "no", "nothing_came_back"
