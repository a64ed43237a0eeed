"""Frozen dataclasses that travel between the stages of a task, and the errors that end a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np


class _NullIsNaN:
    """Lets pydantic read the null of a JSON file, which has no NaN, as NaN."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema  # only what reads records needs it

        return core_schema.no_info_before_validator_function(
            lambda value: float("nan") if value is None else value, handler(source)
        )


Number = Annotated[float, _NullIsNaN()]
"""A number that may be NaN; files of records have null for it."""

BASELINE = "none"
"""Name of the mitigation that does nothing: the row that the others are compared with."""

Kind = Literal["vm", "tm", "control"]
KINDS: tuple[Kind, ...] = ("vm", "tm", "control")
Init = Literal["prompt", "random", "control_prompt"]
INITS: tuple[Init, ...] = ("prompt", "random", "control_prompt")
Norm = Literal["none", "l2", "linf"]
Status = Literal["ok", "diverged", "no_gradient", "not_auditable"]
Counted = Literal["at_budget", "up_to_budget"]


class InputError(Exception):
    """Bad input that the user can fix; ends the program with exit code 2.

    Args:
        what: What is wrong.
        where: The file, key or argument; may be part of ``what``.
        fix: What to do; may be part of ``what``.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        parts = [what, where and f"  where: {where}", fix and f"  fix:   {fix}"]
        super().__init__("\n".join(part for part in parts if part))


class ClaimsFailedError(Exception):
    """A recorded claim does not hold: nothing is wrong with the input, the numbers differ."""


def require(good: bool, rule: str, got: object) -> None:
    """Refuse a setting that breaks a rule.

    Args:
        good: Whether it keeps the rule.
        rule: Such as ``attack.lr must be a positive number``.
        got: The setting, for the message.

    Raises:
        InputError: States the rule and the setting.
    """
    if not good:
        raise InputError(f"{rule}, got {got}")


def require_at_least_one(settings: object, *names: str, within: str) -> None:
    """Refuse settings below 1; ``within`` names what holds them, with a dot."""
    for name in names:
        value = getattr(settings, name)
        require(value >= 1, f"{within}{name} must be >= 1", value)


def require_choices(settings: object, *, within: str, **choices: Any) -> None:
    """Refuse settings that are none of a ``Literal``'s values; see `require_at_least_one`."""
    for name, literal in choices.items():
        value, known = getattr(settings, name), get_args(literal)
        require(value in known, f"{within}{name} must be one of {', '.join(known)}", repr(value))


def first_line(error: BaseException) -> str:
    """First line of an error's message; its class where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


@dataclass(frozen=True)
class Reference:
    """One training image of a pair.

    Attributes:
        image: Path of the image.
        sha256: Hash of the image's file.
    """

    image: Path
    sha256: str = ""


@dataclass(frozen=True)
class Pair:
    """A prompt and the image that it is suspected to reproduce, or any of several.

    Several training images often share a prompt. A generated image is then compared with all of
    them and the closest counts; attacks and mitigations aim at ``image`` alone.

    Attributes:
        id: Unique name, ``[A-Za-z0-9._-]{1,128}``.
        kind: ``vm`` verbatim memorized, ``tm`` template memorized, ``control`` not memorized.
        prompt: Caption.
        image: Path of the image, of several the one that is aimed at.
        subject: What generic captions call it; for neighbour prompts and planting.
        repeats: Relative multiplicity in a planted training stream; 0 where it is never shown.
        role: ``audit`` pairs are audited; ``training`` ones are only shown when planting
            (variants of a template).
        sha256: Hash of the image's file.
        others: The further reference images.
        duplicate_of: Id of an earlier pair that shares an image file, which breaks independence.
        cut_by: Text encoders that cut the prompt's end, since it has more tokens than they take;
            known once the checkpoint is loaded.
        copy_of: Id of the suspect whose altered copy this control is (``pairs.self_controls``);
            None for the pairs of a list.
        alteration: How that copy was altered; None as well.
    """

    id: str
    kind: Kind
    prompt: str
    image: Path
    subject: str | None = None
    repeats: float = 0.0
    role: Literal["audit", "training"] = "audit"
    sha256: str = ""
    others: tuple[Reference, ...] = ()
    duplicate_of: str | None = None
    cut_by: tuple[str, ...] = ()
    copy_of: str | None = None
    alteration: str | None = None

    @property
    def truncated(self) -> bool:
        """Whether some text encoder does not see the prompt's end."""
        return bool(self.cut_by)

    @property
    def references(self) -> tuple[Reference, ...]:
        """All reference images, the one that is aimed at first."""
        return (Reference(self.image, self.sha256), *self.others)

    def aimed_at(self, reference: Reference) -> Pair:
        """The pair with another of its reference images to aim at."""
        others = tuple(own for own in self.references if own != reference)
        return replace(self, image=reference.image, sha256=reference.sha256, others=others)


@dataclass(frozen=True)
class Skipped:
    """What was left out of a list because an image is missing or damaged.

    Attributes:
        id: The row's.
        where: List and row.
        why: What is wrong with the image.
        what: Whether the whole ``pair`` is left out, or one ``image`` of several.
    """

    id: str
    where: str
    why: str
    what: Literal["pair", "image"] = "pair"


class Pairs(tuple[Pair, ...]):
    """The pairs of a list, and what of it was left out because an image cannot be used.

    Attributes:
        skipped: Pairs that were left out, which are in no rate, and images.
    """

    skipped: tuple[Skipped, ...]

    def __new__(cls, pairs: Iterable[Pair], *, skipped: Iterable[Skipped] = ()) -> Pairs:
        """Make the tuple and remember the skipped rows."""
        made = super().__new__(cls, tuple(pairs))
        made.skipped = tuple(skipped)
        return made

    @property
    def skipped_ids(self) -> tuple[str, ...]:
        """Ids of the pairs that were left out."""
        return tuple(dict.fromkeys(own.id for own in self.skipped if own.what == "pair"))


@dataclass
class CoderRows:
    """Rows that went through what stands around a model's denoiser, counted while it is used.

    Attributes:
        prompts: Prompts through the text encoder.
        encoded: Images through the autoencoder's encoder.
        decoded: Latents through its decoder.
    """

    prompts: int = 0
    encoded: int = 0
    decoded: int = 0


@dataclass(frozen=True)
class ReplacedPart:
    """A part of the checkpoint whose weights are not, or not all, those of the base.

    Attributes:
        part: ``unet``, ``vae`` or ``text_encoder``.
        source: Name of the file or folder that the tensors are from, without its place.
        files: Name of each weight file to its SHA-256.
        replaced: Tensors from there; the others are the base's.
        changed: Of these, tensors with other values than the base's.
        total: Tensors of the part.
    """

    part: str
    source: str
    files: dict[str, str]
    replaced: int
    changed: int
    total: int


@dataclass(frozen=True)
class FusedLora:
    """A LoRA that was added to the checkpoint's weights.

    Attributes:
        source: Name of its file, without its place.
        sha256: Of the file.
        scale: Factor of its change.
        layers: Component to the number of its layers whose weights changed.
    """

    source: str
    sha256: str
    scale: float
    layers: dict[str, int]


@dataclass(frozen=True)
class Budget:
    """What an attack may spend and how far it may go from the initial embedding.

    Attributes:
        norm: ``none`` limits the steps alone (the paper's budget), ``l2`` and ``linf`` also
            project.
        eps: Radius in units of the text embedding (CLIP units); None where ``norm`` is ``none``.
        steps: Gradient steps; 0 means no attack.
    """

    norm: Norm = "none"
    eps: float | None = None
    steps: int = 50


@dataclass(frozen=True)
class Condition:
    """How a pair's embedding was made: from its prompt, or by an attack.

    Attributes:
        attack: ``prompt`` or ``dori``.
        init: Where the attack began; None for ``prompt``.
        budget: The attack's budget; zero steps for ``prompt``.
    """

    attack: Literal["prompt", "dori"]
    init: Init | None = None
    budget: Budget = field(default_factory=lambda: Budget(steps=0))


@dataclass(frozen=True)
class Outcome:
    """Scores of the K generated images of one pair under one condition.

    K is smaller where the first image was enough (``attack.one_image``).

    Attributes:
        pair: The pair.
        condition: How it was prompted.
        restart: Which restart of the attack; 0 for ``prompt``.
        status: ``diverged`` where the attack's loss or gradient stopped being finite,
            ``no_gradient`` where its first gradient was exactly zero, so that it could not
            search; neither is ever counted as safe.
        seeds: Generation seeds, length K.
        similarity: Descriptor name to (K,) similarities with the original, of several with the
            closest one, higher is closer; NaN where the attack failed.
        diversity: Mean pairwise similarity of the K images by the deciding descriptor; lower is
            more diverse.
        lpips: (K,) LPIPS distances to the original, or None where no weights are given.
        alignment: (K,) CLIP scores with the prompt, or None where no weights are given.
        loss_first: Attack loss of the first step; None for ``prompt``.
        loss_last: Mean attack loss of the last five steps; None for ``prompt``.
        displacement: Euclidean distance between final and initial embedding; None for ``prompt``.
        images: Paths of the K generated images, or empty where none are stored.
        stopped_at: Steps after which the attack was stopped, because its images were replicas
            (``attack.early_stop``), fewer than the condition's; images and numbers are those of
            that step. 0 where it never began, because its prompt says enough or it would be futile
            (``attack.futility``). None where all steps were taken, and for ``prompt``.
        closest: Descriptor name to the reference image that each of the K images is closest to;
            empty where the pair has one, or the attack failed.
    """

    pair: Pair
    condition: Condition
    restart: int
    status: Status
    seeds: tuple[int, ...]
    similarity: dict[str, np.ndarray]
    diversity: float
    lpips: np.ndarray | None = None
    alignment: np.ndarray | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    displacement: float | None = None
    images: tuple[Path, ...] = ()
    stopped_at: int | None = None
    closest: Mapping[str, tuple[Reference, ...]] = field(default_factory=dict)


MARGIN = 0.15
"""An image can be audited where its ceiling clears its null by at least this similarity."""


@dataclass(frozen=True)
class Scale:
    """What similarity means for one original and descriptor.

    A score is comparable between images, a similarity is not: a blurry autoencoder lowers what a
    copy can reach, a plain image raises what anything reaches.

    Attributes:
        null: Highest similarity that images of ordinary prompts reach against the original.
        ceiling: Similarity of its own autoencoder reconstruction: the best a model can do.
    """

    null: Number
    ceiling: Number

    @property
    def auditable(self) -> bool:
        """Whether the descriptor can tell copies of this image from other images."""
        return self.ceiling - self.null >= MARGIN  # also false where a number is missing

    @property
    def threshold(self) -> float:
        """Similarity above which an image is a copy: midway; NaN where it is not auditable."""
        return (self.null + self.ceiling) / 2 if self.auditable else math.nan

    def score(self, similarity: float) -> float:
        """A similarity as share of the way from null to ceiling; NaN if it is not auditable.

        Above 0.5 is a copy; below 0 and above 1 are possible.
        """
        if not self.auditable:
            return math.nan
        return (similarity - self.null) / (self.ceiling - self.null)


@dataclass(frozen=True)
class Calibration:
    """How the replication thresholds were set and how well the descriptor separates.

    Attributes:
        descriptor: Name of the deciding descriptor.
        threshold: Similarity above which a generated image counts as a replica: the same for all
            images where it is fixed, else the median of theirs.
        rule: ``fixed`` (the descriptor's published value or the user's) or ``calibrated``.
        null: Similarities of images that are not replicas: those of ordinary prompts against each
            original, best of K.
        ceiling: Similarities of each original with its own autoencoder reconstruction: the best a
            model can do.
        auc: Area under the ROC of vm prompts against control prompts, NaN where either is missing.
        roc: (false positive rate, true positive rate, threshold) points, sorted by rate.
        scales: Pair id to what similarity means for its image; empty where it was not measured, as
            in records of earlier versions.
    """

    descriptor: str
    threshold: float
    rule: Literal["fixed", "calibrated"]
    null: tuple[Number, ...]
    ceiling: tuple[Number, ...]
    auc: Number
    roc: tuple[tuple[float, float, float], ...]
    scales: dict[str, Scale] = field(default_factory=dict)

    def threshold_of(self, pair_id: str) -> float:
        """Similarity above which an image is a copy of this pair's; NaN: it cannot be audited.

        A fixed threshold is taken as it is, for all images.
        """
        scale = self.scales.get(pair_id)
        if scale is None or self.rule == "fixed":
            return self.threshold
        return scale.threshold

    @property
    def not_auditable(self) -> tuple[str, ...]:
        """Ids of pairs whose copies the descriptor cannot tell from other images."""
        return tuple(name for name in self.scales if math.isnan(self.threshold_of(name)))


@dataclass(frozen=True)
class FirstSuccess:
    """How many pairs an attack reproduced at any evaluated step, up to a budget.

    Cumulative, so the same whether the attack was stopped early or not; see
    ``metrics.replication``.

    Attributes:
        pairs: Pairs reproduced at some evaluated step, up to the budget.
        n: Pairs that count.
        mr: Cumulative memorization rate ``pairs / n``, NaN where n is 0.
        median_steps: Median over those pairs of the fewest evaluated steps after which a restart
            reproduced them; NaN where there is none.
    """

    pairs: int
    n: int
    mr: Number
    median_steps: Number


@dataclass(frozen=True)
class Cell:
    """One row of the answer: a checkpoint under a mitigation and a condition, one kind of pair.

    Attributes:
        checkpoint: Name of the checkpoint.
        mitigation: Name of the mitigation.
        condition: Attack, init and budget.
        kind: Which pairs.
        n: Pairs that count (the denominator).
        failed: Pairs that were left out because the attack on them diverged or had no gradient;
            reported, never counted as safe.
        hits: Pairs reproduced.
        mr: Memorization rate ``hits / n``, NaN where n is 0.
        mr_ci95: Wilson interval of the rate.
        similarity_median: Median over pairs of the per-pair statistic.
        similarity_mad: Median absolute deviation over pairs.
        descriptor: Deciding descriptor.
        threshold: Its threshold.
        aggregation: How the scores of K images become one number: the closest image's.
        counted: What ``hits``, ``n`` and ``mr`` say: ``at_budget`` counts pairs reproduced after
            exactly the budget's steps; ``up_to_budget`` also those reproduced at an earlier
            evaluated step, where the attack was stopped. Only the latter can be known of a
            stopped attack.
        first_success: The cumulative count, whatever ``counted`` says; None for ``prompt``.
    """

    checkpoint: str
    mitigation: str
    condition: Condition
    kind: Kind
    n: int
    failed: int
    hits: int
    mr: Number
    mr_ci95: tuple[Number, Number]
    similarity_median: Number
    similarity_mad: Number
    descriptor: str
    threshold: float
    aggregation: Literal["max"] = "max"
    counted: Counted = "at_budget"
    first_success: FirstSuccess | None = None
