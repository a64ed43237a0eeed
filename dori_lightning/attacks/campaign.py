"""Attack every pair from every initial point, and collect what the ledger holds.

Each process attacks its own share of the pairs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

from dori_lightning import processes, trainers
from dori_lightning.attacks.budget import looked_at
from dori_lightning.attacks.early_stop import stop_at_success
from dori_lightning.attacks.embedding_attack import EmbeddingAttack
from dori_lightning.attacks.ledger import AttackLedger
from dori_lightning.attacks.triggers import Trigger
from dori_lightning.progress import stage
from dori_lightning.types import Condition

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    import lightning.pytorch as L

    from dori_lightning.attacks.embedding_attack import ControlPrompts
    from dori_lightning.attacks.settings import AttackSettings
    from dori_lightning.models.protocol import TextToImage
    from dori_lightning.pairs.datamodule import PairsDataModule
    from dori_lightning.types import Budget, Pair

__all__ = ["attack_identity", "attack_pairs", "read_triggers"]


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


def attack_pairs(
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
    on_round: Callable[[Sequence[Trigger]], None] | None = None,
    reproduced: Callable[[Sequence[Trigger]], Collection[str]] | None = None,
) -> list[Trigger]:
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
    trainers.start(trainer)
    ledger = AttackLedger(folder, attack_identity(model, settings, budget, seed=seed, edit=edit))
    triggers: list[Trigger] = []
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
                ledger=ledger,
                seed=seed,
            )
            attack = partial(_attack, module, trainer=trainer, data=data, title=title)
            read = partial(read_triggers, module, data, budget=budget)
            if reproduced is None:
                attack(chosen, range(budget.steps))
                found = [t for pair in chosen for t in read(pair)]
            else:
                ends = looked_at(settings.snapshots, budget.steps)
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
    """Attack pairs up to the end of ``steps``; all of it is in the ledger when this returns."""
    own = len(pairs[trainer.global_rank :: trainer.world_size])
    batches = -(-own // data.pairs_per_batch)
    if len(steps) < module.budget.steps:
        title += f", steps {steps.start} to {steps.stop}"
    with stage(title, batches * len(steps), visible=trainer.is_global_zero) as advance:
        module.until, module.on_step = steps.stop, _one_at_a_time(advance)
        if pairs:
            trainer.predict(module, datamodule=data.subset(pairs), return_predictions=False)
            processes.barrier()  # the others' results are read next


def _one_at_a_time(advance: Callable[[int], None]) -> Callable[[int], None]:
    """Step callback that advances a stage by one step, whatever the step's number."""
    return lambda _: advance(1)


def read_triggers(
    module: EmbeddingAttack, data: PairsDataModule, pair: Pair, budget: Budget
) -> list[Trigger]:
    """One trigger per snapshot of a pair's stored attack, as far as it came."""
    init, restart = module.init_point, module.restart
    initial, inputs = module.begin(pair, data.encoded(pair))
    result = module.ledger.read(pair.id, init, restart, inputs)
    if result is None:
        raise RuntimeError(
            f"the attack on {pair.id} from {init} left no result in {module.ledger.folder}"
        )
    triggers = []
    for k, steps in enumerate(result.snapshots):
        spent = result.losses[0, :steps]
        embedding = result.embeddings[0, k]
        # the point where an attack begins is as good as its prompt
        dead = steps > 0 and bool(result.no_gradient[0])
        triggers.append(
            Trigger(
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
