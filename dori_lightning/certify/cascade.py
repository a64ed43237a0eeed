"""The cascade: attacks one after the other, cheapest first, as AutoAttack runs them.

Only suspects that nothing has brought back go on to the next attack. Controls, the model that
never saw the images (the reference) and planted images (the positive controls) run through every
one, and before the suspects do: a level at which images come back that the model cannot hold
decides nothing, and the attack ends there. An image that the reference draws at a level as well
was painted, and is not counted against the model.

Work is counted in rows through the denoiser, of one image, over everything that was tried on it so
far (*Adversarial Work Criterion*).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter

from dori_lightning.certify.base import Attack, Holds, Plan, Role, Subject
from dori_lightning.metrics.replication import FALSE_POSITIVE_LIMIT
from dori_lightning.mitigations.base import settings_fingerprint
from dori_lightning.models.generation import PNG
from dori_lightning.runtime import distributed
from dori_lightning.runtime.artifacts import content_hash
from dori_lightning.runtime.cache import JSON, Cache, Codec
from dori_lightning.runtime.documents import plain_values
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.types import InputError, Kind, Number, Pair, first_line

log = logging.getLogger(__name__)

Group = Literal["suspects", "controls", "reference", "planted"]
"""Which images: on the audited model those that it may hold and those that it cannot, the suspects
on the model that never saw them, and images that were planted into a copy of the audited one."""

PROTOCOL = "certify-1"
"""Name and version of the list of attacks and of their budgets; another list is another one."""


@dataclass(frozen=True)
class CertifySettings:
    """How a model is certified.

    Attributes:
        attacks: Name to attack.
        protocol: All attacks of the protocol in their order, names of ``attacks``.
        paths: Those that are run, in their order; None for all of the protocol that mean something
            on what is attacked.
        max_false_positive: Share of images that the model cannot hold up to which a level counts.
        group: Images that are attacked side by side and kept together: what an interrupted run
            does not repeat.
    """

    attacks: Mapping[str, Attack]
    protocol: tuple[str, ...] = ()
    paths: tuple[str, ...] | None = None
    max_false_positive: float = FALSE_POSITIVE_LIMIT
    group: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "protocol", tuple(self.protocol))
        if self.paths is not None:
            object.__setattr__(self, "paths", tuple(self.paths))
        paths = self.protocol if self.paths is None else self.paths
        known = [name for name, attack in self.attacks.items() if attack]
        twice = [name for name in dict.fromkeys(paths) if paths.count(name) > 1]
        if twice:
            raise InputError(
                f"certify.paths names {', '.join(twice)} twice",
                where="certify.paths",
                fix="name each attack once; settings of it are certify.attacks."
                f"{twice[0]}.SETTING",
            )
        stray = [name for name in paths if name not in known]
        if stray:
            raise InputError(
                f"certify.paths has no attack {', '.join(stray)}",
                where="certify.paths",
                fix=f"some of {', '.join(known)}; one of your own is added with "
                f"+attack@certify.attacks.NAME=NAME",
            )
        if not paths:
            raise InputError("certify.paths is empty", where="certify.paths", fix="name an attack")
        if not 0 <= self.max_false_positive < 1:
            raise InputError(
                f"certify.max_false_positive must be in [0, 1), got {self.max_false_positive}"
            )
        if self.group < 1:
            raise InputError(f"certify.group must be >= 1, got {self.group}")

    def choose(self, plan: Plan) -> Chosen:
        """The attacks that are run on what is attacked, before anything is loaded.

        Raises:
            InputError: One that was asked for by name means nothing there.
        """
        if self.paths is not None:
            for name in self.paths:
                self.attacks[name].check(plan)
            return Chosen(tuple(self.attacks[name] for name in self.paths), {})
        found, left_out = list[Attack](), dict[str, str]()
        for name in self.protocol:
            try:
                self.attacks[name].check(plan)
            except InputError as error:
                left_out[name] = first_line(error)
            else:
                found.append(self.attacks[name])
        return Chosen(tuple(found), left_out)


@dataclass(frozen=True)
class Chosen:
    """The attacks of a cascade.

    Attributes:
        attacks: In their order.
        left_out: Name to why an attack of the protocol means nothing here.
    """

    attacks: tuple[Attack, ...]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Tried:
    """What came of one attack on one image.

    Attributes:
        pair: Pair id.
        kind: Which kind of pair.
        role: Whose model was attacked.
        attack: Name of the attack.
        levels: Levels that were tried, in order.
        rows: Rows spent up to each level's images.
        similarities: Of the closest image of each level with the pair's.
        threshold: Similarity above which an image is a copy.
        back_at: Place of the level at which the image came back; None where it did not.
        spent: Rows spent in all.
        image: File of the closest image, relative to the run folder; empty where none was drawn.
        note: What the attack says of it, such as the words that it found.
    """

    pair: str
    kind: Kind
    role: Role
    attack: str
    levels: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    similarities: tuple[Number, ...] = ()
    threshold: Number = math.nan
    back_at: int | None = None
    spent: int = 0
    image: str = ""
    note: str = ""

    @property
    def level(self) -> str:
        """Level at which it came back; empty where it did not."""
        return "" if self.back_at is None else self.levels[self.back_at]

    @property
    def work(self) -> int:
        """Rows until it came back, or all that were spent."""
        return self.spent if self.back_at is None else self.rows[self.back_at]

    @property
    def best(self) -> float:
        """The highest similarity; NaN where none was measured."""
        known = [value for value in self.similarities if not math.isnan(value)]
        return max(known, default=math.nan)


@dataclass(frozen=True)
class Level:
    """What images did at one level of an attack.

    Attributes:
        name: What was done.
        back: Role or kind to the images that came back at this level or before: ``suspects``,
            ``controls``, ``reference``, ``planted``.
        tried: The same names to the images that were tried.
        sound: Whether it counts: few enough images came back that the model cannot hold.
    """

    name: str
    back: Mapping[str, int]
    tried: Mapping[str, int]
    sound: bool


@dataclass(frozen=True)
class AttackFindings:
    """What one attack of a cascade found.

    Attributes:
        attack: Its name.
        holds: What its adversary holds.
        levels: Its levels in the order they were tried, weakest first.
        tried: What came of it, for each image and subject.
        painted: Suspects that came back here on the reference as well, at no later a level: they
            are not counted.
        convicted: Suspects that it brought back soundly.
        transfers: Whether it takes embeddings from elsewhere, without a gradient of this model.
    """

    attack: str
    holds: Holds
    levels: tuple[Level, ...]
    tried: tuple[Tried, ...]
    painted: tuple[str, ...]
    convicted: tuple[str, ...]

    transfers: bool = False

    @property
    def sound(self) -> bool:
        """Whether any of its levels counts."""
        return any(level.sound for level in self.levels)

    @property
    def last_sound(self) -> str:
        """The strongest level that counts; empty where none does."""
        return next((level.name for level in reversed(self.levels) if level.sound), "")

    def is_sound(self, level: str) -> bool:
        """Whether a level counts."""
        return any(own.sound for own in self.levels if own.name == level)

    def of(self, group: Group) -> tuple[Tried, ...]:
        """What came of it for a group of images."""
        return tuple(one for one in self.tried if group_of(one) == group)

    def count(self, group: Group) -> tuple[int, int]:
        """Images of a group that came back at sound levels, and how many were tried."""
        own = self.of(group)
        return sum(self.is_sound(one.level) for one in own), len(own)


class Recorder:
    """The `Attempt` of a group of pairs: scores images, and remembers who is left."""

    def __init__(
        self,
        subject: Subject,
        attack: Attack,
        pairs: Sequence[Pair],
        *,
        closed: frozenset[str],
        folder: Path,
        advance: Callable[[int], None],
    ) -> None:
        """Begin with every pair of this process's share.

        Args:
            subject: The model.
            attack: The attack.
            pairs: The group, all of it.
            closed: Levels that are not to be tried.
            folder: Run folder, below which the closest images are kept.
            advance: Called with the rows that were spent.
        """
        own = pairs[distributed.rank() :: distributed.world_size()]
        self.subject, self.attack, self.closed = subject, attack, closed
        self.folder, self.advance = folder, advance
        self.pairs = {pair.id: pair for pair in own}
        self.tried = {
            pair.id: Tried(
                pair.id, pair.kind, subject.role, attack.name, threshold=subject.threshold(pair)
            )
            for pair in own
        }

    def left(self, level: str) -> list[Pair]:
        """Pairs that are to be tried at a level."""
        if level in self.closed:
            return []
        return [self.pairs[name] for name, own in self.tried.items() if own.back_at is None]

    def add(
        self,
        level: str,
        images: Mapping[str, torch.Tensor],
        *,
        rows: int,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Score images, and keep the closest one."""
        for name, own in images.items():
            pair, before = self.pairs[name], self.tried[name]
            similarity, closest = self.subject.closest(pair, own)
            image, note = before.image, before.note
            if not similarity <= before.best:
                place = f"images/{self.subject.role}/{self.attack.name}/{name}"
                Cache(self.folder).write(place, own[closest], {}, PNG)
                image, note = f"{place}.png", (notes or {}).get(name, "")
            copy = similarity > before.threshold
            if copy and note:
                log.info("%s comes back from: %s", name, note)
            self.tried[name] = replace(
                before,
                levels=(*before.levels, level),
                rows=(*before.rows, before.spent + rows),
                similarities=(*before.similarities, similarity),
                back_at=len(before.levels) if copy else None,
                spent=before.spent + rows,
                image=image,
                note=note,
            )
        self.advance(rows * len(images))


TRIED: Codec[list[Tried]] = JSON.mapped(
    lambda tried: plain_values([asdict(own) for own in tried]),
    TypeAdapter(list[Tried]).validate_python,
)
"""What came of an attack on a group of images."""


@dataclass(frozen=True)
class Cascade:
    """Attacks on a model, with everything that says whether they mean something.

    Attributes:
        settings: What counts, and how images are grouped.
        attacks: The attacks, in their order.
        plan: What is known before anything is loaded.
        audited: The model under audit.
        suspects: Pairs that it may hold.
        controls: Pairs that it cannot hold.
        reference: A model that never saw the suspects; None without one.
        planted: A copy of the model with planted images; None without one.
        folder: Run folder.
    """

    settings: CertifySettings
    attacks: Sequence[Attack]
    plan: Plan
    audited: Subject
    suspects: Sequence[Pair]
    controls: Sequence[Pair]
    reference: Subject | None
    planted: Subject | None
    folder: Path
    found: list[AttackFindings] = field(default_factory=list)

    def run(self) -> list[AttackFindings]:
        """Run every attack; what an interrupted run has finished is read."""
        left, transferred = list(self.suspects), list[Pair]()
        for place, attack in enumerate(self.attacks, 1):
            log.info(
                "attack %d of %d: %s, %d of %d suspects left",
                place,
                len(self.attacks),
                attack.name,
                len(left),
                len(self.suspects),
            )
            # does a search find what triggers from elsewhere bring back?
            again = transferred if attack.holds == "embedding" else []
            findings = self._attack(attack, [*left, *again])
            self.found.append(findings)
            if findings.transfers:
                transferred += [pair for pair in left if pair.id in findings.convicted]
            left = [pair for pair in left if pair.id not in findings.convicted]
        return self.found

    def _attack(self, attack: Attack, left: Sequence[Pair]) -> AttackFindings:
        """One attack: first on what the model cannot hold, then on the suspects that are left."""
        unheld = self._try(attack, self.audited, self.controls)
        if self.reference is not None:
            closed = self._closed(unheld)
            unheld += self._try(attack, self.reference, self.suspects, closed=closed)
        closed, planted = self._closed(unheld), list[Tried]()
        if self.planted is not None:
            pairs = self.planted.context.pairs
            planted = self._try(attack, self.planted, pairs, closed=closed)
        own = self._try(attack, self.audited, left, closed=closed)
        tried = [*own, *unheld, *planted]
        levels = self._levels(tried)
        sound = {level.name for level in levels if level.sound}
        places = {level.name: place for place, level in enumerate(levels)}
        painted_at = {
            one.pair: places[one.level]
            for one in unheld
            if one.role == "reference" and one.back_at is not None
        }
        back = [one for one in own if one.level in sound and one.back_at is not None]
        painted = [
            one.pair for one in back if painted_at.get(one.pair, math.inf) <= places[one.level]
        ]
        return AttackFindings(
            attack=attack.name,
            holds=attack.holds,
            levels=tuple(levels),
            tried=tuple(tried),
            painted=tuple(painted),
            convicted=tuple(one.pair for one in back if one.pair not in painted),
            transfers=_transfers(attack),
        )

    def _closed(self, tried: Sequence[Tried], count: int = 0) -> frozenset[str]:
        """Levels that do not count.

        Args:
            tried: Images that the model cannot hold.
            count: How many there are, where not all were tried yet.
        """
        levels = self._levels(tried, at_least=count)
        return frozenset(level.name for level in levels if not level.sound)

    def _levels(self, tried: Iterable[Tried], *, at_least: int = 0) -> list[Level]:
        """What happened at each level, weakest first, and whether it counts."""
        groups: dict[str, list[Tried]] = {}
        for one in tried:
            groups.setdefault(group_of(one), []).append(one)
        names = level_order(one.levels for own in groups.values() for one in own)
        found, closed = [], False
        for place, name in enumerate(names):
            upto = set(names[: place + 1])
            back = {group: sum(o.level in upto for o in own) for group, own in groups.items()}
            counts = {group: len(own) for group, own in groups.items()}
            for group in ("controls", "reference"):
                n = max(counts.get(group, 0), at_least)
                closed |= group in back and back[group] / n > self.settings.max_false_positive
            found.append(Level(name, back, counts, sound=not closed))
        return found

    def _try(
        self,
        attack: Attack,
        subject: Subject,
        pairs: Sequence[Pair],
        *,
        closed: frozenset[str] = frozenset(),
    ) -> list[Tried]:
        """Attack pairs in groups, or read what came of it."""
        if not attack.applies(subject):
            return []
        pairs = [pair for pair in pairs if not math.isnan(subject.threshold(pair))]
        found: list[Tried] = []
        title = f"{attack.name} ({subject.role})"
        total = attack.rows(self.plan) * len(pairs)
        cache = Cache(self.folder / "attempts" / subject.role)
        with progress_bar(title, total) as advance:
            for start in range(0, len(pairs), self.settings.group):
                group = pairs[start : start + self.settings.group]
                if subject.role == "reference" or group[0].kind == "control":
                    closed |= self._closed(found, len(pairs))
                if attack.timed:
                    closed = frozenset()
                key = self._key(attack, subject, group, closed)
                name = f"{attack.name}/{group[0].kind}-{content_hash(key)[:16]}"
                known = cache.read(name, key, TRIED) if distributed.is_first() else None
                known = distributed.broadcast_object(known)
                if known is None:
                    recorder = Recorder(
                        subject, attack, group, closed=closed, folder=self.folder, advance=advance
                    )
                    attack.run(subject, group, recorder)
                    gathered = distributed.all_gather_dict(recorder.tried)
                    known = [gathered[pair.id] for pair in group]
                    if distributed.is_first():
                        cache.write(name, known, key, TRIED)
                else:
                    advance(attack.rows(self.plan) * len(group))
                found += known
        return found

    def _key(
        self, attack: Attack, subject: Subject, pairs: Sequence[Pair], closed: frozenset[str]
    ) -> dict[str, str]:
        """Everything that the outcome depends on."""
        context, rule = subject.context, subject.calibration
        inputs = hashlib.sha256()
        for pair in pairs:
            threshold = subject.threshold(pair)
            inputs.update(f"{pair.id}\0{pair.prompt}\0{pair.sha256}\0{threshold}\0".encode())
        return {
            "protocol": PROTOCOL,
            "attack": content_hash(settings_fingerprint(attack)),
            "checkpoint": context.model.fingerprint,
            "machine": context.machine,
            "edit": subject.edit.identity,
            "pairs": inputs.hexdigest(),
            "closed": content_hash(sorted(closed)),
            "sampling": f"{context.sampling.method}|{context.sampling.images_per_pair}",
            "seed": str(context.seed),
            "descriptor": rule.descriptor,
        }


def group_of(one: Tried) -> Group:
    """Which images one belongs to."""
    if one.role != "audited":
        return one.role
    return "controls" if one.kind == "control" else "suspects"


def level_order(sequences: Iterable[Sequence[str]]) -> list[str]:
    """Levels in the order they were tried; a sequence leaves out what its image did not need."""
    order: list[str] = []
    for levels in sorted(sequences, key=len, reverse=True):
        place = 0
        for level in levels:
            if level in order:
                place = order.index(level) + 1
            else:
                order.insert(place, level)
                place += 1
    return order


def _transfers(attack: Attack) -> bool:
    return attack.holds == "embedding" and attack.gradient_free


def work_until_back(found: Sequence[AttackFindings], group: Group) -> dict[str, tuple[int, bool]]:
    """Pair id to the work over all attacks until it came back, and whether it did.

    Suspects come back where they are convicted; what the model cannot hold comes back wherever
    it does, at a level that counts or not. Others are censored at all that was spent on them.

    Args:
        found: Attacks in their order.
        group: Which images.
    """
    work: dict[str, tuple[int, bool]] = {}
    for findings in found:
        for one in findings.tried:
            if group_of(one) != group:
                continue
            spent, done = work.get(one.pair, (0, False))
            if done:
                continue
            back = one.back_at is not None
            if group == "suspects":
                back = one.pair in findings.convicted
            work[one.pair] = (spent + (one.work if back else one.spent), back)
    return work
