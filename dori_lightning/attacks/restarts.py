"""Attack few pairs many times, with attacks of one pair side by side in a forward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from dori_lightning.attacks.campaign import attack_identity, read_triggers
from dori_lightning.attacks.embedding_attack import EmbeddingAttack
from dori_lightning.attacks.ledger import AttackLedger
from dori_lightning.attacks.memory import pairs_that_fit
from dori_lightning.attacks.solver import AttackProblem, refuse_broken
from dori_lightning.progress import stage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from dori_lightning.attacks.embedding_attack import ControlPrompts
    from dori_lightning.attacks.settings import AttackSettings
    from dori_lightning.attacks.triggers import Trigger
    from dori_lightning.models.protocol import TextToImage
    from dori_lightning.pairs.datamodule import PairsDataModule
    from dori_lightning.types import Budget, Pair

__all__ = ["attack_restarts"]


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
) -> list[Trigger]:
    """Attack pairs in this process, reusing what ``folder`` holds.

    The same attacks as ``campaign.attack_pairs`` makes, in the same ledger. There a forward pass
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
    ledger = AttackLedger(folder, attack_identity(model, settings, budget, seed=seed, edit=edit))
    jobs = [
        (
            EmbeddingAttack(
                model,
                settings=settings,
                budget=budget,
                init=init,
                restart=restart,
                controls=controls,
                ledger=ledger,
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
        width = pairs_that_fit(
            model,
            noise_batch=settings.noise_batch,
            wanted=settings.pairs_per_forward,
            pair_id=missing[0][1].id,
        )
    batches = [missing[start : start + width] for start in range(0, len(missing), width)]
    with stage("attack", len(batches) * budget.steps) as advance:
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
        module.ledger.write(
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
