"""Transfer: embeddings that were found on another model, drawn from here.

A mitigation that only moves an image's trigger, or that hides the way to it from a search, is open
to who has searched elsewhere: on the checkpoint before it was mitigated, which anybody may have
kept, or under another mitigation.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.attacks.embedding_attack import RESULT, Job, run_attacks
from dori_lightning.certify.base import AttackBase, Attempt, Holds, Plan, Subject
from dori_lightning.certify.embeddings import search
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.mitigations.edits import EmptyEdit
from dori_lightning.runtime import distributed
from dori_lightning.runtime.artifacts import content_hash
from dori_lightning.runtime.cache import Cache, held
from dori_lightning.types import INITS, Init, InputError, Pair

log = logging.getLogger(__name__)

UNMITIGATED = "unmitigated"
"""Stands for the audited checkpoint without its edit."""

Start = tuple[Init, int]
"""Initial point and restart of the search that found an embedding."""


@dataclass(frozen=True)
class Transfer(AttackBase):
    """Draw from embeddings found elsewhere, then search on from them for a few steps.

    Nothing is searched here at the first level, so that it succeeds also where gradients are
    masked; at the second the search begins where no gradient of this model leads. Planted images
    are left out: there is no other model that holds them. The search on the unmitigated checkpoint
    is not counted as work: who holds its embeddings has them already. It is kept for the other
    jobs of a sweep.

    Attributes:
        source: ``unmitigated`` for a search on the checkpoint before the mitigation, or the run
            folder of an audit of the same pairs.
        search: That search, and with other steps the one that goes on from there.
        steps: Steps of the search that goes on; 0 for none.
    """

    name: str = "transfer"
    source: str = UNMITIGATED
    search: AttackSettings = field(default_factory=AttackSettings)
    steps: int = 10
    gradient_free: bool = field(default=True, init=False)
    holds: Holds = field(default="embedding", init=False)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise InputError(
                f"the search that goes on takes no {self.steps} steps",
                where=f"certify.attacks.{self.name}.steps",
                fix="a number >= 0",
            )

    def check(self, plan: Plan) -> None:
        """Refuse to transfer from nowhere.

        Raises:
            InputError: The source is the model itself, or no finished audit.
        """
        place = f"certify.attacks.{self.name}.source"
        if self.source != UNMITIGATED:
            _image_hashes(Path(self.source), place)
            if not self._starts():
                raise InputError(
                    f"{self.source} holds no embeddings of an attack: it has no files "
                    f"attacks/START/PAIR.rRESTART.safetensors",
                    where=place,
                    fix="the run folder of an audit with an attack",
                )
        elif isinstance(plan.mitigation, NoMitigation):
            raise InputError(
                f"attack {self.name} has no source: without a mitigation the unmitigated "
                f"checkpoint is the one under audit",
                where=place,
                fix=f"mitigation=NAME, the run folder of an audit of another model, or leave "
                f"{self.name} out of certify.paths",
            )

    def file_hashes(self) -> dict[str, str]:
        """Hashes of the embeddings' files; see ``mitigations.base.settings_fingerprint``."""
        return {
            str(path.relative_to(self.source)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self._files()
        }

    def _files(self) -> list[Path]:
        """Files of a run folder's embeddings."""
        if self.source == UNMITIGATED:
            return []
        return sorted(Path(self.source).glob(f"attacks/*/*.r*{RESULT.suffix}"))

    def _starts(self) -> list[Start]:
        """Where searches on the source began, the prompt first."""
        if self.source == UNMITIGATED:
            restarts = range(self.search.restarts)
            return [(init, restart) for init in self.search.inits for restart in restarts]
        found: dict[str, set[int]] = {}
        for path in self._files():
            number = path.stem.rpartition(".r")[2]
            if number.isdigit():
                found.setdefault(path.parent.name, set()).add(int(number))
        return [(init, restart) for init in INITS for restart in sorted(found.get(init, ()))]

    def rows(self, plan: Plan) -> int:
        """Images from each embedding, and those after the search from there."""
        onward = self.steps * self.search.noise_batch + plan.drawing if self.steps else 0
        return len(self._starts()) * (plan.drawing + onward)

    def applies(self, subject: Subject) -> bool:
        """On the audited model, and on a reference whose embeddings have the same shape."""
        if subject.role == "planted":
            return False
        if subject.role == "audited":
            return True
        there = subject.audited
        return there is not None and (there.model.embedding_shape == subject.model.embedding_shape)

    def run(self, subject: Subject, pairs: Sequence[Pair], attempt: Attempt) -> None:
        """Draw from what was found elsewhere, then from where a search leads from there."""
        owner = subject.audited or subject
        if self.source == UNMITIGATED:
            found = self._find(owner, pairs)
        else:
            found = self._read(owner, pairs)
        for start, embeddings in found.items():
            level = f"found elsewhere from {_words(start)}"
            left = attempt.left(level)
            if left:
                with subject.carried():
                    images = subject.draw({pair.id: embeddings[pair.id] for pair in left})
                attempt.add(level, images, rows=subject.drawing)
        if not self.steps:
            return
        for start, embeddings in found.items():
            level = f"{self.steps} steps from what was found elsewhere from {_words(start)}"
            left = attempt.left(level)
            if left:
                ends = self._go_on(subject, left, start, embeddings)
                with subject.carried():
                    images = subject.draw(ends)
                rows = self.steps * self.search.noise_batch + subject.drawing
                attempt.add(level, images, rows=rows)

    def _go_on(
        self,
        subject: Subject,
        pairs: Sequence[Pair],
        start: Start,
        embeddings: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Embeddings (T, D) after a search that goes on from others."""
        init, restart = start
        settings = replace(
            self.search,
            budget=replace(self.search.budget, steps=self.steps),
            snapshots=(),
            looks=(),
            early_stop=False,
        )
        results = search(subject, settings, pairs, init, restart, initial=embeddings)
        return {name: result.embeddings[0, -1] for name, result in results.items()}

    def _find(
        self, audited: Subject, pairs: Sequence[Pair]
    ) -> dict[Start, dict[str, torch.Tensor]]:
        """Search on the checkpoint without its edit, or read what a job did; by all processes."""
        before = audited.with_edit(EmptyEdit())
        settings = replace(self.search, other_inits=None)
        controls = before.context.control_prompts.embeddings
        budget = settings.budget.resolve(controls, own_units=not before.model.spread().absolute)
        context = replace(before.context, attack=settings, budget=budget)
        scale = before.scale if settings.own_units else 1.0
        there = context.attack_context(before.edit.identity, scale=scale)
        name = f"triggers-{content_hash(there.identity)[:16]}"
        there = replace(there, folder=context.unmitigated / name)
        rounds = [[Job(pair, init, restart) for pair in pairs] for init, restart in self._starts()]
        first, evaluations = distributed.is_first(), audited.model.unet_evaluations
        there.folder.mkdir(parents=True, exist_ok=True)
        lock, what = there.folder / "search.lock", "embeddings of the unmitigated checkpoint"
        with held(lock, what) if first else nullcontext():
            ends = run_attacks(there, rounds)
        spent = audited.model.unet_evaluations - evaluations
        if spent:
            log.info("%s: %d rows on the unmitigated checkpoint, not counted", self.name, spent)
        return {
            start: {
                one.pair.id: one.embedding
                for one in ends
                if (one.condition.init, one.restart) == start
                and one.condition.budget.steps == context.budget.steps
            }
            for start in self._starts()
        }

    def _read(
        self, audited: Subject, pairs: Sequence[Pair]
    ) -> dict[Start, dict[str, torch.Tensor]]:
        """Embeddings in a run folder, of starts that every pair was attacked from there.

        Raises:
            InputError: It holds other images, embeddings of another shape, or not every pair's.
        """
        place, folder = f"certify.attacks.{self.name}.source", Path(self.source)
        hashes, every = _image_hashes(folder, place), audited.context.pairs
        others = [pair.id for pair in every if hashes.get(pair.id) != pair.sha256]
        if others:
            raise InputError(
                f"{folder} is not an audit of these images: it has no, or another, "
                f"{_some(others)}",
                where=place,
                fix="a run folder of the same list of pairs",
            )
        store, known = Cache(folder), {path.relative_to(folder) for path in self._files()}

        def name(pair: Pair, start: Start) -> str:
            init, restart = start
            return f"attacks/{Job(pair, init, restart).name}"

        starts = [
            start
            for start in self._starts()
            if all(Path(f"{name(pair, start)}{RESULT.suffix}") in known for pair in every)
        ]
        if not starts:
            raise InputError(
                f"{folder} attacked no start on all of these pairs, and without embeddings of "
                f"controls nothing can be judged",
                where=place,
                fix="audit there with attack=dori attack.other_inits=null",
            )
        found: dict[Start, dict[str, torch.Tensor]] = {}
        shape = audited.model.embedding_shape
        for start in starts:
            for pair in pairs:
                result = store.read(name(pair, start), {}, RESULT)
                if result is None or result.embeddings.shape[2:] != shape:
                    has = "a damaged file" if result is None else "another shape"
                    raise InputError(
                        f"{name(pair, start)} of {folder} is no embedding of {shape[0]} rows and "
                        f"{shape[1]} columns: {has}",
                        where=place,
                        fix="an audit of a checkpoint with the same text encoders",
                    )
                found.setdefault(start, {})[pair.id] = result.embeddings[0, -1]
        return found


def _words(start: Start) -> str:
    init, restart = start
    more = f", restart {restart}" if restart else ""
    return f"{init.replace('_', ' ')}{more}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _image_hashes(folder: Path, where: str) -> dict[str, str]:
    """Pair id to the hash of its image's file, as the record of a run folder says.

    Raises:
        InputError: It is not the folder of a finished audit.
    """
    try:
        record = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return {str(k): str(v) for k, v in record["provenance"]["image_hashes"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder} is not the run folder of a finished audit: {error}",
            where=where,
            fix=f"{UNMITIGATED}, or a folder with a report.json of task=audit",
        ) from error
