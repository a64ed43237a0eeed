"""Attack every pair from every initial point, and collect what the ledger holds.

Each process attacks its own share of the pairs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from dori_lightning import processes, trainers
from dori_lightning.attacks.embedding_attack import EmbeddingAttack
from dori_lightning.attacks.ledger import AttackLedger
from dori_lightning.progress import stage
from dori_lightning.types import Condition

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import lightning.pytorch as L
    import torch

    from dori_lightning.attacks.embedding_attack import ControlPrompts
    from dori_lightning.attacks.settings import AttackSettings
    from dori_lightning.models.protocol import TextToImage
    from dori_lightning.pairs.datamodule import PairsDataModule
    from dori_lightning.types import Budget, Pair, Status

__all__ = ["Trigger", "attack_identity", "attack_pairs", "read_triggers"]


@dataclass(frozen=True)
class Trigger:
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

    @property
    def status(self) -> Status:
        """What came of the attack; ``ok`` for a prompt."""
        return "no_gradient" if self.no_gradient else "diverged" if self.diverged else "ok"


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
) -> list[Trigger]:
    """Attack pairs, reusing what ``folder`` holds.

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

    Returns:
        One trigger per pair, init, restart and snapshot, the same on every process.

    Raises:
        InputError: Not even one pair fits the memory.
    """
    trainers.start(trainer)
    ledger = AttackLedger(folder, attack_identity(model, settings, budget, seed=seed, edit=edit))
    triggers: list[Trigger] = []
    for init in settings.inits:
        chosen = [p for p in pairs if init in settings.inits_of(p.kind)]
        for restart in range(settings.restarts):
            own = len(chosen[trainer.global_rank :: trainer.world_size])
            batches = -(-own // data.pairs_per_batch)
            title = f"attack from {init}" + (
                f", restart {restart}" if settings.restarts > 1 else ""
            )
            with stage(title, batches * budget.steps, visible=trainer.is_global_zero) as advance:
                module = EmbeddingAttack(
                    model,
                    settings=settings,
                    budget=budget,
                    init=init,
                    restart=restart,
                    controls=controls,
                    ledger=ledger,
                    seed=seed,
                    on_step=_one_at_a_time(advance),
                )
                if chosen:
                    trainer.predict(
                        module, datamodule=data.subset(chosen), return_predictions=False
                    )
                    processes.barrier()  # the others' results are read below
            found = [t for pair in chosen for t in read_triggers(module, data, pair, budget)]
            if on_round is not None and found:
                on_round(found)
            triggers += found
    return triggers


def _one_at_a_time(advance: Callable[[int], None]) -> Callable[[int], None]:
    """Step callback that advances a stage by one step, whatever the step's number."""
    return lambda _: advance(1)


def read_triggers(
    module: EmbeddingAttack, data: PairsDataModule, pair: Pair, budget: Budget
) -> list[Trigger]:
    """One trigger per snapshot of a pair's stored attack."""
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
