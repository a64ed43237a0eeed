"""The embedding attack: jobs in, adversarial embeddings out.

A job is one attack: a pair, an initial point, a restart. Jobs are cut into batches, whose rows
share forward passes and nothing else; each process attacks its own jobs and stores every result in
a file of its own, which is asked first when the run is started again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import IterableDataset

from dori_lightning.attacks.budget import AttackSettings, evaluation_steps
from dori_lightning.attacks.model_check import IMAGES, text_density
from dori_lightning.attacks.solver import (
    AttackProblem,
    AttackResult,
    OptimizerState,
    concat,
    random_embedding,
    refuse_broken,
    solve,
)
from dori_lightning.models.memory import estimate_batch_size
from dori_lightning.models.protocol import TextToImage
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.runtime import distributed
from dori_lightning.runtime.artifacts import content_hash
from dori_lightning.runtime.cache import TENSORS, Cache, Codec, Tensors
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Budget, Condition, Init, InputError, Pair, Status

_STATE = tuple(field.name for field in fields(OptimizerState))


def _encode(result: AttackResult) -> Tensors:
    tensors = {
        "embeddings": result.embeddings[0],
        "snapshots": torch.tensor(result.snapshots, dtype=torch.int64),
        "losses": result.losses[0],
        "diverged": result.diverged,
        "no_gradient": result.no_gradient,
    }
    if result.state is not None:
        tensors |= {name: getattr(result.state, name)[0] for name in _STATE}
    return tensors


def _decode(tensors: Tensors) -> AttackResult:
    state = {name: tensors[name][None] for name in _STATE if name in tensors}
    return AttackResult(
        ids=("",),
        embeddings=tensors["embeddings"][None],
        snapshots=tuple(tensors["snapshots"].tolist()),
        losses=tensors["losses"][None],
        diverged=tensors["diverged"],
        no_gradient=tensors["no_gradient"],
        state=OptimizerState(**state) if state else None,
    )


RESULT: Codec[AttackResult] = TENSORS.mapped(_encode, _decode)
"""A result of one row. The file does not hold the pair's id: its name does."""


@dataclass(frozen=True)
class Conditioning:
    """A text embedding to generate from, with its provenance.

    Attributes:
        pair: The pair it should reproduce.
        condition: Prompt or attack, with the steps spent so far.
        restart: Which restart.
        embedding: Text embedding (T, D).
        status: What came of the attack; ``ok`` for a prompt.
        loss_first: Attack loss at the first step; None for a prompt.
        loss_last: Mean attack loss of the last five steps spent; None for a prompt.
        displacement: Euclidean distance to the initial embedding; None for a prompt.
        losses: Attack loss of every step spent (S,); None for a prompt.
        stopped_at: Steps after which the attack was stopped, fewer than the condition's, because
            its images were copies, 0 where it never began; None where it took all of them.
        seeds: Generation seeds of the images that are drawn of it; None for all K.
        of_prompt: Whether its images are the prompt's, which stands for an attack.
    """

    pair: Pair
    condition: Condition
    restart: int
    embedding: torch.Tensor
    status: Status = "ok"
    loss_first: float | None = None
    loss_last: float | None = None
    displacement: float | None = None
    losses: torch.Tensor | None = None
    stopped_at: int | None = None
    seeds: tuple[int, ...] | None = None
    of_prompt: bool = False

    @property
    def spent(self) -> int:
        """Steps that led to the embedding."""
        return self.condition.budget.steps if self.stopped_at is None else self.stopped_at


Look = Callable[[Sequence[Conditioning]], tuple[Sequence[Conditioning], Collection[str]]]
"""Takes the conditionings of one snapshot, one for each pair. Gives them back with the images that
were drawn of them, and ids of the pairs whose attacks end there."""


@dataclass(frozen=True)
class ControlPrompts:
    """Prompts that an attack may start from.

    Attributes:
        ids: Pair ids, length M.
        embeddings: Their embeddings (M, T, D), None where there are none.
    """

    ids: tuple[str, ...]
    embeddings: torch.Tensor | None

    def pick(self, seed: int, pair_id: str, restart: int) -> torch.Tensor:
        """Embedding (T, D) of a control prompt of another pair, drawn by key.

        Raises:
            InputError: There is no other control prompt.
        """
        others = [k for k, name in enumerate(self.ids) if name != pair_id]
        if not others or self.embeddings is None:
            raise InputError(
                "attack.inits has control_prompt, which needs a control pair besides the attacked "
                "one; add pairs of kind control or drop it from attack.inits"
            )
        generator = keyed_generator("control_prompt", seed, pair_id, restart)
        return self.embeddings[others[int(torch.randint(len(others), (1,), generator=generator))]]


@dataclass(frozen=True)
class Job:
    """One attack.

    Attributes:
        pair: Pair to reproduce.
        init: Initial point.
        restart: Which restart, from 0.
    """

    pair: Pair
    init: Init
    restart: int

    @property
    def name(self) -> str:
        """Name of the result's file, without suffix."""
        return f"{self.init}/{self.pair.id}.r{self.restart}"


def attack_rounds(settings: AttackSettings, pairs: Sequence[Pair]) -> list[list[Job]]:
    """Every attack on ``pairs`` by the settings, one round for each initial point and restart."""
    return [
        [Job(pair, init, restart) for pair in pairs if init in settings.inits_of(pair.kind)]
        for init in settings.inits
        for restart in range(settings.restarts)
    ]


@dataclass(frozen=True)
class AttackContext:
    """What all jobs of a run share.

    Attributes:
        model: Model under attack, with the edit applied.
        data: Pairs, encoded.
        settings: Attack settings.
        budget: Their budget, resolved for the checkpoint.
        controls: Where attacks from ``control_prompt`` begin.
        folder: Where results are stored, ``INIT/PAIR.rRESTART.safetensors``.
        seed: Run seed.
        edit: Identity of the edit that the model carries.
        scale: Factor of random initial points and of the steps from them (``ModelCheck``).
    """

    model: TextToImage
    data: PairsDataModule
    settings: AttackSettings
    budget: Budget
    controls: ControlPrompts
    folder: Path
    seed: int
    edit: str
    scale: float = 1.0

    @cached_property
    def identity(self) -> dict[str, str]:
        """What every result depends on; batch size and world size are not part of it."""
        method = {
            "lr": self.settings.lr,
            "noise_batch": self.settings.noise_batch,
            "snapshots": [s for s in self.settings.stops if s <= self.budget.steps],
            "budget": asdict(self.budget),
        }
        if self.settings.timesteps != "uniform":
            method["timesteps"] = self.settings.timesteps
        if self.settings.timesteps == "importance":
            method["density"] = self._density_key
        if self.settings.parts is not None:
            method["parts"] = sorted(self.settings.parts)
        if not self.model.spread().absolute:
            method["units"] = "spread of each part"
        return {
            "checkpoint": self.model.fingerprint,
            "edit": self.edit,
            "attack": content_hash(method)[:16],
            "seed": str(self.seed),
        }

    @property
    def _examples(self) -> tuple[Pair, ...]:
        """Images that a density of timesteps is measured on, from all over the list."""
        pairs = self.data.pairs
        return pairs[:: max(1, math.ceil(len(pairs) / IMAGES))]

    @property
    def _density_key(self) -> dict[str, str | int | float]:
        """What such a density depends on."""
        return {
            "checkpoint": self.model.fingerprint,
            "edit": self.edit,
            "seed": self.seed,
            "scale": self.scale,
            "parts": ",".join(sorted(self.settings.parts or ())),
            "images": content_hash([pair.sha256 for pair in self._examples])[:16],
        }

    @cached_property
    def density(self) -> torch.Tensor | None:
        """Where the text matters, measured once for an edit; None where nobody asks.

        The model carries the edit where this is asked first.
        """
        if self.settings.timesteps != "importance":
            return None

        def measure() -> Tensors:
            examples = self.data.batch(self._examples)
            ids = [pair.id for pair in examples.pairs]
            found = text_density(
                self.model, examples.latents, self.seed, ids,
                scale=self.scale, parts=self.settings.parts,
            )  # fmt: skip
            return {"density": found}

        cache = Cache(self.folder)
        return cache.get("timesteps", self._density_key, measure, TENSORS)["density"]

    def key(self, job: Job) -> dict[str, str]:
        """What the result of a job depends on."""
        pair = job.pair
        digest = hashlib.sha256(f"{pair.id}\0{pair.prompt}\0{pair.sha256}\0".encode())
        for tensor in (self.data.encoded(pair).latent, self.initial(job)):
            digest.update(tensor.contiguous().numpy().tobytes())
        return {**self.identity, "inputs": digest.hexdigest()[:16]}

    def initial(self, job: Job) -> torch.Tensor:
        """Embedding (T, D) that a job begins at, fp32 on the CPU."""
        prompt = self.data.encoded(job.pair).embedding
        if job.init == "prompt":
            return prompt
        if job.init == "random":
            tokens, width = prompt.shape
            normal = random_embedding(self.seed, job.pair.id, job.restart, (tokens, width))
            scale, parts = self.scale_of(job), self.settings.parts
            return self.model.random_start(normal, scale=scale, parts=parts)
        other = self.controls.pick(self.seed, job.pair.id, job.restart)
        return self.model.searched_alone(other, self.settings.parts)

    def scale_of(self, job: Job) -> float:
        """Factor of the steps of a job; prompts have the units of the model's own encoder."""
        return self.scale if job.init == "random" else 1.0

    def read(self, job: Job) -> AttackResult | None:
        """Stored result of a job, None where there is none with the same key.

        Its search may be on its way: ``steps`` says how far it came, and with its state it goes on
        to the same bits. So runs with and without early stop can use each other's results.
        """
        result = Cache(self.folder).read(job.name, self.key(job), RESULT)
        return None if result is None else replace(result, ids=(job.pair.id,))

    def write(self, job: Job, result: AttackResult) -> None:
        """Store the result of a job, a single row; the file also says what its rows are."""
        parts = ", ".join(f"{p.name} {p.shape[0]}x{p.shape[1]}" for p in self.model.parts)
        Cache(self.folder).write(job.name, result, {**self.key(job), "parts": parts}, RESULT)

    def conditionings(self, job: Job) -> list[Conditioning]:
        """One conditioning per snapshot of a job's stored result.

        Raises:
            RuntimeError: There is no result.
        """
        result = self.read(job)
        if result is None:
            raise RuntimeError(f"the attack {job.name} left no result in {self.folder}")
        initial, found = self.initial(job), []
        for k, steps in enumerate(result.snapshots):
            losses, embedding = result.losses[0, :steps], result.embeddings[0, k]
            status: Status = "diverged" if bool(losses.isnan().any()) else "ok"
            # the point where an attack begins is as good as its prompt
            if steps > 0 and bool(result.no_gradient[0]):
                status = "no_gradient"
            found.append(
                Conditioning(
                    pair=job.pair,
                    condition=Condition("dori", job.init, replace(self.budget, steps=steps)),
                    restart=job.restart,
                    embedding=embedding,
                    status=status,
                    loss_first=float(losses[0]) if steps else None,
                    loss_last=float(losses[-5:].mean()) if steps else None,
                    displacement=float((embedding - initial).norm()),
                    losses=losses,
                )
            )
        return found


@dataclass(frozen=True)
class JobBatch:
    """Jobs that share forward passes, all at the same step.

    Attributes:
        jobs: B jobs.
        problem: Their images, and embeddings that they begin at.
        resume_from: Their results so far; None at the beginning.
    """

    jobs: tuple[Job, ...]
    problem: AttackProblem
    resume_from: AttackResult | None

    def to(self, _device: torch.device) -> JobBatch:
        """Let Lightning, which cannot rebuild a frozen dataclass, leave moving to the solver."""
        return self


class JobBatches(IterableDataset[JobBatch]):
    """Batches of the jobs that the store does not hold as far as they are to go."""

    def __init__(self, context: AttackContext, jobs: Sequence[Job], *, stop_at: int) -> None:
        """Ask the store, and cut what is missing into batches.

        Args:
            context: What the jobs share.
            jobs: Jobs of this process.
            stop_at: Step that they are to come to.
        """
        self.context, self.batches = context, list[tuple[int, list[Job]]]()
        by_step: dict[int, list[Job]] = {}
        for job in jobs:
            result = context.read(job)
            if result is None or result.steps < stop_at:
                step = result.steps if result is not None and result.state is not None else 0
                by_step.setdefault(step, []).append(job)
        for step, group in by_step.items():
            size = estimate_batch_size(
                context.model,
                noise_batch=context.settings.samples_at_once,
                wanted=context.settings.pairs_per_forward,
                pair_id=group[0].pair.id,
            )
            self.batches += [(step, group[k : k + size]) for k in range(0, len(group), size)]
        self.steps = sum(stop_at - step for step, _ in self.batches)

    def __iter__(self) -> Iterator[JobBatch]:
        for step, jobs in self.batches:
            results = [result for job in jobs if step and (result := self.context.read(job))]
            problem = AttackProblem(
                ids=tuple(job.pair.id for job in jobs),
                restarts=tuple(job.restart for job in jobs),
                latents=torch.stack([self.context.data.encoded(job.pair).latent for job in jobs]),
                initial=torch.stack([self.context.initial(job) for job in jobs]),
                scales=tuple(map(self.context.scale_of, jobs)),
            )
            yield JobBatch(tuple(jobs), problem, concat(results) if results else None)


class EmbeddingAttack(L.LightningModule):
    """Attack batches of jobs in ``predict``: each process solves its own, nothing is averaged.

    Prediction rather than fitting, because no parameter of a module is trained: DDP would average
    the embeddings' gradients over processes, which weakens the attack and makes a mitigation look
    better than it is. Run it with a Trainer that has ``inference_mode=False``.
    """

    def __init__(
        self,
        context: AttackContext,
        *,
        stop_at: int,
        on_step: Callable[[int], None],
        strict: bool,
    ) -> None:
        """Prepare the attack.

        Args:
            context: What the jobs share; its model stays out of this module's state.
            stop_at: Step to stop at.
            on_step: Called after each step of a batch with its number.
            strict: Raise where an attack has no gradient, instead of marking its result.
        """
        super().__init__()
        self.context, self.stop_at = context, stop_at
        self.on_step, self.strict = on_step, strict

    def predict_step(self, batch: JobBatch, *_: Any) -> AttackResult:
        """Solve the jobs of a batch and store each result.

        Raises:
            BrokenAttackError: ``strict`` is set and an attack has no gradient.
        """
        context = self.context
        result = solve(
            context.model,
            batch.problem,
            budget=context.budget,
            settings=context.settings,
            seed=context.seed,
            density=context.density,
            resume_from=batch.resume_from,
            stop_at=self.stop_at,
            on_step=self.on_step,
        )
        if self.strict:
            refuse_broken(result)
        for row, job in enumerate(batch.jobs):
            context.write(job, result.row(row))
        return result


def run_attacks(
    context: AttackContext,
    rounds: Sequence[Sequence[Job]],
    *,
    trainer: L.Trainer | None = None,
    strict: bool = False,
    on_round: Callable[[Sequence[Conditioning]], None] | None = None,
    look: Look | None = None,
    answered: Callable[[Job], Conditioning | None] = lambda _: None,
) -> list[Conditioning]:
    """Attack every job, reusing what is stored.

    With ``look``, a round goes from one snapshot to the next, and pairs whose answer is known are
    left out of what follows: the others are cut into batches anew, so that these stay full and
    processes share them evenly. A pair's steps, and so its embeddings, are the same as without.

    Args:
        context: What the jobs share.
        rounds: Jobs that may share batches (``attack_rounds``), round by round.
        trainer: Runs the prediction; its processes share the jobs of a round. None attacks in this
            process.
        strict: Raise where an attack has no gradient, instead of marking its result.
        on_round: Called with the conditionings of a round, once all are there.
        look: Says at each snapshot which pairs' attacks end there, the same on every process.
            Needs rounds in which no pair is twice. None ends none.
        answered: The prompt of a job whose answer is known before the first step: it stands for
            the attack then; with ``look``.

    Returns:
        One conditioning per job and snapshot, the same on every process. After its attack was
        stopped, those of a pair are the one at which it was.

    Raises:
        InputError: Not even one pair fits into memory.
        BrokenAttackError: ``strict`` is set and an attack has no gradient.
    """
    if trainer is not None:
        distributed.start(trainer)
    attack = partial(_attack, context, trainer=trainer, strict=strict)
    found: list[Conditioning] = []
    for jobs in filter(None, rounds):
        if look is None:
            attack(jobs, range(context.budget.steps))
            new = [one for job in jobs for one in context.conditionings(job)]
        else:
            ends = evaluation_steps(context.settings.stops, context.budget.steps)
            starts = {
                job.pair.id: replace(
                    prompt,
                    condition=Condition("dori", job.init, replace(context.budget, steps=0)),
                    restart=job.restart,
                    of_prompt=True,
                )
                for job in jobs
                if (prompt := answered(job)) is not None
            }
            new = stop_when_known(
                attack, context.conditionings, jobs, ends=ends, look=look, known=starts
            )
            rated = evaluation_steps(context.settings.snapshots, context.budget.steps)
            new = [one for one in new if one.condition.budget.steps in rated]
        if on_round is not None:
            on_round(new)
        found += new
    return found


def _attack(
    context: AttackContext,
    jobs: Sequence[Job],
    steps: range,
    *,
    trainer: L.Trainer | None,
    strict: bool,
) -> None:
    """Take jobs to the end of ``steps``; all results are in the store when this returns."""
    if not jobs:
        return
    title = "attack"
    if len({(job.init, job.restart) for job in jobs}) == 1:
        title += f" from {jobs[0].init}"
        if context.settings.restarts > 1:
            title += f", restart {jobs[0].restart}"
    if len(steps) < context.budget.steps:
        title += f", steps {steps.start} to {steps.stop}"
    own = jobs[distributed.rank() :: distributed.world_size()]
    batches = JobBatches(context, own, stop_at=steps.stop)
    with progress_bar(title, batches.steps) as advance:
        module = EmbeddingAttack(
            context, stop_at=steps.stop, on_step=lambda _: advance(1), strict=strict
        )
        if trainer is None:
            for batch in batches:
                module.predict_step(batch)
        else:
            data = context.data.serve(batches)
            trainer.predict(module, datamodule=data, return_predictions=False)
        distributed.barrier()  # the others' results are read next


def stop_when_known(
    attack: Callable[[Sequence[Job], range], None],
    read: Callable[[Job], Sequence[Conditioning]],
    jobs: Sequence[Job],
    *,
    ends: Sequence[int],
    look: Look,
    known: Mapping[str, Conditioning] = MappingProxyType({}),
) -> list[Conditioning]:
    """Attack from snapshot to snapshot, and stop where a pair's answer is known.

    The jobs that are left share batches anew after each snapshot. Each has its own draws and its
    own Adam state, so it takes the steps that it would have taken beside those that were stopped.

    Args:
        attack: Takes jobs through steps.
        read: Conditionings of a job so far, one for each snapshot.
        jobs: Jobs of different pairs.
        ends: Steps to evaluate at, rising; the last one is the budget.
        look: Says at each end which attacks stop.
        known: Pair id to where its attack begins, if that is the answer already.

    Returns:
        One conditioning per job and end; after an attack was stopped, the one at which it was.
    """
    found: dict[str, list[Conditioning]] = {job.pair.id: [] for job in jobs}
    left, begin = [job for job in jobs if job.pair.id not in known], 0
    for end in ends:
        attack(left, range(begin, end))
        new = [next(c for c in read(job) if c.condition.budget.steps == end) for job in left]
        seen, ended = look(new) if new else ((), ())
        latest = {one.pair.id: one for one in seen}
        for name, conditionings in found.items():
            before = conditionings[-1] if conditionings else known.get(name)
            conditionings.append(latest.get(name) or _stopped(before, end))
        left, begin = [job for job in left if job.pair.id not in ended], end
    return [one for conditionings in found.values() for one in conditionings]


def _stopped(last: Conditioning | None, steps: int) -> Conditioning:
    """What stands for a later budget where the attack was stopped."""
    assert last is not None, "an attack that was never looked at goes on"
    budget = replace(last.condition.budget, steps=steps)
    condition = replace(last.condition, budget=budget)
    return replace(
        last, condition=condition, stopped_at=last.spent if last.spent < steps else None
    )
