"""The embedding attack as a LightningModule: batches of pairs in, adversarial embeddings out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from dori_lightning.attacks.budget import AttackSettings, evaluation_steps
from dori_lightning.attacks.solver import (
    AttackProblem,
    AttackResult,
    joined,
    random_embedding,
    refuse_broken,
    solve,
)
from dori_lightning.attacks.store import AttackStore
from dori_lightning.models.memory import estimate_batch_size, limit_cpu_batch
from dori_lightning.models.protocol import TextToImage
from dori_lightning.pairs.datamodule import Encoded, PairBatch, PairsDataModule
from dori_lightning.runtime import distributed
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Budget, Condition, Init, InputError, Pair, Status

# -------- early_stop
# Attack from snapshot to snapshot, and stop where a pair came back.
#
# The rows that are left share passes anew after each snapshot. Each has its own draws and its own
# Adam state, so it takes the steps that it would have taken beside those that were stopped.


def stop_at_success(
    attack: Callable[[Sequence[Pair], range], None],
    read: Callable[[Pair], Sequence[Conditioning]],
    pairs: Sequence[Pair],
    *,
    ends: Sequence[int],
    reproduced: Callable[[Sequence[Conditioning]], Collection[str]],
) -> list[Conditioning]:
    """Attack pairs from one initial point and restart until each comes back or the end.

    Args:
        attack: Takes pairs through steps.
        read: Triggers of a pair's attack so far, one for each step looked at.
        pairs: Whom to attack.
        ends: Steps to look at, rising; the last one is the budget.
        reproduced: Ids of the pairs that triggers bring back.

    Returns:
        One trigger per pair and end; after a pair came back, the one that brought it back.
    """
    found: dict[str, list[Conditioning]] = {pair.id: [] for pair in pairs}
    left, begin = list(pairs), 0
    for end in ends:
        attack(left, range(begin, end))
        fresh = {
            pair.id: next(t for t in read(pair) if t.condition.budget.steps == end)
            for pair in left
        }
        for name, held in found.items():
            held.append(fresh[name] if name in fresh else _stopped(held[-1], end))
        back = reproduced([*fresh.values()]) if fresh else ()
        left, begin = [pair for pair in left if pair.id not in back], end
    return [trigger for held in found.values() for trigger in held]


def _stopped(trigger: Conditioning, steps: int) -> Conditioning:
    """What stands for a later budget where the attack was stopped."""
    condition = trigger.condition
    return replace(
        trigger,
        condition=replace(condition, budget=replace(condition.budget, steps=steps)),
        stopped_at=trigger.spent,
    )


# -------- embedding_attack


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
        """Embedding (T, D) of a control prompt other than the pair's own, drawn by key.

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


def input_hash(pair: Pair, latent: torch.Tensor, initial: torch.Tensor) -> str:
    """Hash of everything that a result depends on and that belongs to the pair."""
    digest = hashlib.sha256(f"{pair.id}\0{pair.prompt}\0{pair.sha256}\0".encode())
    for tensor in (latent, initial):
        digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


class EmbeddingAttack(L.LightningModule):
    """Attack batches of pairs in ``predict``: each process solves its own, nothing is averaged.

    Prediction rather than fitting, because no parameter of a module is trained: DDP would average
    the embeddings' gradients over processes, which weakens the attack and makes a mitigation look
    better than it is. Run it with a Trainer that has ``inference_mode=False``.
    """

    def __init__(
        self,
        model: TextToImage,
        *,
        settings: AttackSettings,
        budget: Budget,
        init: Init,
        restart: int,
        controls: ControlPrompts,
        store: AttackStore,
        seed: int,
    ) -> None:
        """Prepare the attack from one initial point.

        Args:
            model: Model under attack; kept out of the module's parameters and state.
            settings: Attack settings.
            budget: Resolved budget.
            init: Initial point.
            restart: Which restart.
            controls: Where ``control_prompt`` starts from.
            store: Finished pairs are read from it and new ones written to it.
            seed: Run seed.
        """
        super().__init__()
        # a list hides the module, so that its weights stay out of this one's state
        self._held = [model]
        self.settings, self.budget, self.init_point, self.restart = settings, budget, init, restart
        self.controls, self.store, self.seed = controls, store, seed
        # of the stretch that is taken next: the step to stop at, and who is told of every step
        self.stop_at = budget.steps
        self.on_step: Callable[[int], None] | None = None

    @property
    def model(self) -> TextToImage:
        """Model under attack."""
        return self._held[0]

    def initial(self, pairs: Sequence[Pair], embeddings: torch.Tensor) -> torch.Tensor:
        """Initial embeddings (N, T, D) of pairs.

        Args:
            pairs: N pairs.
            embeddings: Embeddings (N, T, D) of their prompts.
        """
        if self.init_point == "prompt":
            return embeddings
        shape = (int(embeddings.shape[1]), int(embeddings.shape[2]))
        if self.init_point == "random":
            return torch.stack(
                [random_embedding(self.seed, p.id, self.restart, shape) for p in pairs]
            )
        return torch.stack([self.controls.pick(self.seed, p.id, self.restart) for p in pairs])

    def begin(self, pair: Pair, encoded: Encoded) -> tuple[torch.Tensor, str]:
        """Where the search for one pair begins (T, D), and the hash of its inputs."""
        initial = self.initial([pair], encoded.embedding[None]).cpu()[0]
        return initial, input_hash(pair, encoded.latent, initial)

    def search(
        self,
        problem: AttackProblem,
        *,
        resume_from: AttackResult | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> AttackResult:
        """Solve a problem with this attack's settings, from where it stands; nothing is kept."""
        limit_cpu_batch(
            self.model,
            noise_batch=self.settings.noise_batch,
            wanted=self.settings.pairs_per_forward,
            pair_id=problem.ids[0],
        )
        return solve(
            self.model,
            problem,
            budget=self.budget,
            lr=self.settings.lr,
            noise_batch=self.settings.noise_batch,
            seed=self.seed,
            snapshots=self.settings.snapshots,
            keep_first_token=self.settings.keep_first_token,
            resume_from=resume_from,
            stop_at=self.stop_at,
            on_step=on_step,
        )

    def stored(self, pair_id: str, inputs: str) -> AttackResult | None:
        """What the store holds of a pair's attack, as far as it came."""
        return self.store.read(pair_id, self.init_point, self.restart, inputs)

    def reached(self, result: AttackResult | None) -> bool:
        """Whether a stored attack came as far as this one is to go."""
        return result is not None and result.steps >= self.stop_at

    def predict_step(self, batch: PairBatch, *_: Any) -> list[AttackResult]:
        """Solve the pairs of a batch as far as the store does not hold them yet.

        Returns:
            One result per pair of the batch, in its order.
        """
        initial = self.initial(batch.pairs, batch.embeddings).cpu()
        hashes = {
            p.id: input_hash(p, batch.latents[k], initial[k]) for k, p in enumerate(batch.pairs)
        }
        groups: dict[int, list[tuple[int, AttackResult | None]]] = {}
        for k, pair in enumerate(batch.pairs):
            stored = self.stored(pair.id, hashes[pair.id])
            if not self.reached(stored):
                begun = stored if stored is not None and stored.state is not None else None
                groups.setdefault(begun.steps if begun else 0, []).append((k, begun))
        for group in groups.values():
            rows = [k for k, _ in group]
            begun_rows = [begun for _, begun in group if begun is not None]
            problem = AttackProblem(
                tuple(batch.pairs[k].id for k in rows),
                self.restart,
                batch.latents[rows],
                initial[rows],
            )
            result = self.search(
                problem,
                resume_from=joined(begun_rows) if begun_rows else None,
                on_step=self.on_step,
            )
            self.store.write(result, self.init_point, hashes)
        found = [self.stored(p.id, hashes[p.id]) for p in batch.pairs]
        return [r for r in found if r is not None]


# -------- triggers
# What pictures are drawn from.


@dataclass(frozen=True)
class Conditioning:
    """An embedding to generate from, and how it came about.

    Attributes:
        pair: The pair it should reproduce.
        condition: Prompt or attack, with the steps spent so far.
        restart: Which restart.
        embedding: Text embedding (T, D).
        diverged: Whether the attack stopped being finite on the way.
        no_gradient: Whether it had no gradient to follow.
        loss_first: Attack loss at the first step; None for a prompt.
        loss_last: Mean attack loss of the last five steps spent; None for a prompt.
        displacement: Euclidean distance to the initial embedding; None for a prompt.
        losses: Attack loss of every step spent (S,); None for a prompt.
        stopped_at: Steps after which the attack was stopped, fewer than the condition's, because
            its pictures were copies; None where it took all of them.
    """

    pair: Pair
    condition: Condition
    restart: int
    embedding: torch.Tensor
    diverged: bool = False
    no_gradient: bool = False
    loss_first: float | None = None
    loss_last: float | None = None
    displacement: float | None = None
    losses: torch.Tensor | None = None
    stopped_at: int | None = None

    @property
    def spent(self) -> int:
        """Steps that led to the embedding."""
        return self.condition.budget.steps if self.stopped_at is None else self.stopped_at

    @property
    def status(self) -> Status:
        """What came of the attack; ``ok`` for a prompt."""
        return "no_gradient" if self.no_gradient else "diverged" if self.diverged else "ok"


# -------- campaign
# Attack every pair from every initial point, and collect what the store holds.
#
# Each process attacks its own share of the pairs.


def attack_identity(
    model: TextToImage, settings: AttackSettings, budget: Budget, *, seed: int, edit: str
) -> dict[str, str]:
    """What an attack's result depends on besides the pair.

    Batch width and the number of processes are not among it.
    """
    method = {
        "lr": settings.lr,
        "noise_batch": settings.noise_batch,
        "keep_first_token": settings.keep_first_token,
        "snapshots": [s for s in settings.snapshots if s <= budget.steps],
        "budget": asdict(budget),
    }
    digest = hashlib.sha256(json.dumps(method, sort_keys=True).encode()).hexdigest()[:16]
    return {"checkpoint": model.fingerprint, "edit": edit, "attack": digest, "seed": str(seed)}


def run_attacks(
    model: TextToImage,
    pairs: Sequence[Pair],
    *,
    trainer: L.Trainer,
    data: PairsDataModule,
    settings: AttackSettings,
    budget: Budget,
    controls: ControlPrompts,
    folder: Path,
    seed: int,
    edit: str,
    on_round: Callable[[Sequence[Conditioning]], None] | None = None,
    reproduced: Callable[[Sequence[Conditioning]], Collection[str]] | None = None,
) -> list[Conditioning]:
    """Attack pairs, reusing what ``folder`` holds.

    With ``reproduced``, an attack goes from one snapshot to the next, and pairs that came back
    are left out of what follows: the rest is put together anew, so that passes stay full and
    processes share it evenly. A pair's steps, and so its embeddings, are the same as without.

    Args:
        model: Model under attack, with the edit applied.
        pairs: Whom to attack.
        trainer: Runs the prediction; its processes share the pairs.
        data: Encoded pairs, a superset of ``pairs``.
        settings: Attack settings.
        budget: Resolved budget.
        controls: Where ``control_prompt`` starts from.
        folder: Ledger folder.
        seed: Run seed.
        edit: Identity of the edit.
        on_round: Called with the triggers from one initial point and restart, once all are there.
        reproduced: Names the pairs that the triggers of one snapshot bring back, the same on every
            process; their attacks stop there. None stops none.

    Returns:
        One trigger per pair, init, restart and snapshot, the same on every process. After its
        attack was stopped, a pair's triggers are the one that brought it back.

    Raises:
        InputError: Not even one pair fits the memory.
    """
    distributed.start(trainer)
    store = AttackStore(folder, attack_identity(model, settings, budget, seed=seed, edit=edit))
    triggers: list[Conditioning] = []
    for init in settings.inits:
        chosen = [p for p in pairs if init in settings.inits_of(p.kind)]
        for restart in range(settings.restarts):
            title = f"attack from {init}" + (
                f", restart {restart}" if settings.restarts > 1 else ""
            )
            module = EmbeddingAttack(
                model,
                settings=settings,
                budget=budget,
                init=init,
                restart=restart,
                controls=controls,
                store=store,
                seed=seed,
            )
            attack = partial(_attack, module, trainer=trainer, data=data, title=title)
            read = partial(read_triggers, module, data, budget=budget)
            if reproduced is None:
                attack(chosen, range(budget.steps))
                found = [t for pair in chosen for t in read(pair)]
            else:
                ends = evaluation_steps(settings.snapshots, budget.steps)
                found = stop_at_success(attack, read, chosen, ends=ends, reproduced=reproduced)
            if on_round is not None and found:
                on_round(found)
            triggers += found
    return triggers


def _attack(
    module: EmbeddingAttack,
    pairs: Sequence[Pair],
    steps: range,
    *,
    trainer: L.Trainer,
    data: PairsDataModule,
    title: str,
) -> None:
    """Attack pairs up to the end of ``steps``; all of it is in the store when this returns."""
    own = len(pairs[trainer.global_rank :: trainer.world_size])
    batches = -(-own // data.pairs_per_batch)
    if len(steps) < module.budget.steps:
        title += f", steps {steps.start} to {steps.stop}"
    with progress_bar(title, batches * len(steps), visible=trainer.is_global_zero) as advance:
        module.stop_at, module.on_step = steps.stop, _one_at_a_time(advance)
        if pairs:
            trainer.predict(module, datamodule=data.subset(pairs), return_predictions=False)
            distributed.barrier()  # the others' results are read next


def _one_at_a_time(advance: Callable[[int], None]) -> Callable[[int], None]:
    """Step callback that advances a stage by one step, whatever the step's number."""
    return lambda _: advance(1)


def read_triggers(
    module: EmbeddingAttack, data: PairsDataModule, pair: Pair, budget: Budget
) -> list[Conditioning]:
    """One trigger per snapshot of a pair's stored attack, as far as it came."""
    init, restart = module.init_point, module.restart
    initial, inputs = module.begin(pair, data.encoded(pair))
    result = module.store.read(pair.id, init, restart, inputs)
    if result is None:
        raise RuntimeError(
            f"the attack on {pair.id} from {init} left no result in {module.store.folder}"
        )
    triggers = []
    for k, steps in enumerate(result.snapshots):
        spent = result.losses[0, :steps]
        embedding = result.embeddings[0, k]
        # the point where an attack begins is as good as its prompt
        dead = steps > 0 and bool(result.no_gradient[0])
        triggers.append(
            Conditioning(
                pair=pair,
                condition=Condition("dori", init, replace(budget, steps=steps)),
                restart=restart,
                embedding=embedding,
                diverged=bool(spent.isnan().any()) and not dead,
                no_gradient=dead,
                loss_first=float(spent[0]) if steps else None,
                loss_last=float(spent[-5:].mean()) if steps else None,
                displacement=float((embedding - initial).norm()),
                losses=spent,
            )
        )
    return triggers


# -------- restarts
# Attack few pairs many times, with attacks of one pair side by side in a forward pass.


def attack_restarts(
    model: TextToImage,
    pairs: Sequence[Pair],
    *,
    data: PairsDataModule,
    settings: AttackSettings,
    budget: Budget,
    controls: ControlPrompts,
    folder: Path,
    seed: int,
    edit: str,
) -> list[Conditioning]:
    """Attack pairs in this process, reusing what ``folder`` holds.

    The same attacks as ``campaign.attack_pairs`` makes, in the same store. There a forward pass
    holds different pairs at one restart, here also one pair at many.

    Args:
        model: Model under attack, with the edit applied.
        pairs: Whom to attack.
        data: Encoded pairs.
        settings: Attack settings; ``restarts`` attacks from each start.
        budget: Resolved budget.
        controls: Where ``control_prompt`` starts from.
        folder: Ledger folder.
        seed: Run seed.
        edit: Identity of the edit.

    Returns:
        One trigger per init, restart, pair and snapshot.

    Raises:
        BrokenAttackError: The attack has no gradient.
    """
    store = AttackStore(folder, attack_identity(model, settings, budget, seed=seed, edit=edit))
    jobs = [
        (
            EmbeddingAttack(
                model,
                settings=settings,
                budget=budget,
                init=init,
                restart=restart,
                controls=controls,
                store=store,
                seed=seed,
            ),
            pair,
        )
        for init in settings.inits
        for restart in range(settings.restarts)
        for pair in pairs
        if init in settings.inits_of(pair.kind)
    ]
    missing = [job for job in jobs if not _is_done(*job, data)]
    width = 1
    if missing:
        width = estimate_batch_size(
            model,
            noise_batch=settings.noise_batch,
            wanted=settings.pairs_per_forward,
            pair_id=missing[0][1].id,
        )
    batches = [missing[start : start + width] for start in range(0, len(missing), width)]
    with progress_bar("attack", len(batches) * budget.steps) as advance:
        for batch in batches:
            _solve(batch, data, on_step=lambda _: advance(1))
    return [
        trigger for module, pair in jobs for trigger in read_triggers(module, data, pair, budget)
    ]


def _is_done(module: EmbeddingAttack, pair: Pair, data: PairsDataModule) -> bool:
    _, inputs = module.begin(pair, data.encoded(pair))
    return module.reached(module.stored(pair.id, inputs))


def _solve(
    batch: Sequence[tuple[EmbeddingAttack, Pair]],
    data: PairsDataModule,
    *,
    on_step: Callable[[int], None],
) -> None:
    """Solve a batch in shared passes and keep each row by itself."""
    first = batch[0][0]
    begun = [module.begin(pair, data.encoded(pair)) for module, pair in batch]
    problem = AttackProblem(
        ids=tuple(pair.id for _, pair in batch),
        restart=first.restart,
        latents=torch.stack([data.encoded(pair).latent for _, pair in batch]),
        initial=torch.stack([initial for initial, _ in begun]),
        restarts=tuple(module.restart for module, _ in batch),
    )
    result = first.search(problem, on_step=on_step)
    refuse_broken(result)
    for row, ((module, pair), (_, inputs)) in enumerate(zip(batch, begun, strict=True)):
        own = slice(row, row + 1)
        module.store.write(
            replace(
                result,
                ids=(pair.id,),
                restart=module.restart,
                embeddings=result.embeddings[own],
                losses=result.losses[own],
                diverged=result.diverged[own],
                no_gradient=result.no_gradient[own],
            ),
            module.init_point,
            {pair.id: inputs},
        )
