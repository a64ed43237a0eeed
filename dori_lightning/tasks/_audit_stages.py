"""The stages of an audit: attack and draw, measure, and what a mitigation costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dori_lightning import processes
from dori_lightning.attacks.campaign import attack_pairs
from dori_lightning.attacks.triggers import Trigger
from dori_lightning.metrics.replication import cells as cells_of
from dori_lightning.mitigations.edits import EmptyEdit
from dori_lightning.tasks._audit_pictures import calibrate, copies, draw, measure
from dori_lightning.tasks._utility import measure_utility
from dori_lightning.types import Condition

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dori_lightning.metrics.utility import Utility
    from dori_lightning.mitigations.edits import Edit
    from dori_lightning.tasks._audit_setup import Bench
    from dori_lightning.types import Calibration, Cell, Outcome

__all__ = ["Drawn", "Measured", "attack_and_draw", "measure_all", "price"]


@dataclass(frozen=True)
class Drawn:
    """What pictures were drawn from.

    Attributes:
        triggers: Prompts and adversarial embeddings, drawn under the edit.
        before: Prompts that the checkpoint drew without it; empty where there is no edit.
        calibration: The threshold that decided which attacks to stop; None where none was to be.
    """

    triggers: tuple[Trigger, ...]
    before: tuple[Trigger, ...]
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Measured:
    """What the pictures look like.

    Attributes:
        outcomes: Under the edit.
        baseline: Prompts without it; empty where there is no edit.
        calibration: The threshold, set on the checkpoint without an edit.
        cells: Rows of the answer, those of mitigation ``none`` last.
    """

    outcomes: tuple[Outcome, ...]
    baseline: tuple[Outcome, ...]
    calibration: Calibration
    cells: tuple[Cell, ...]


def attack_and_draw(
    bench: Bench, edit: Edit, *, on_round: Callable[[Sequence[Trigger]], None] | None = None
) -> Drawn:
    """Search embeddings under the edit, and draw from prompts and embeddings.

    Each process does its share; all of it is there when this returns.

    Args:
        bench: What the audit works with.
        edit: What the mitigation changes.
        on_round: Called with what the attack from one initial point and restart found.
    """
    prompted = tuple(
        Trigger(pair, Condition("prompt"), 0, bench.data.encoded(pair).embedding)
        for pair in bench.pairs
    )
    before = () if isinstance(edit, EmptyEdit) else prompted
    if before:
        draw(bench, before, bench.unmitigated, title="before")
    calibration = None
    if bench.settings.early_stop:
        if not before:
            draw(bench, prompted, bench.folder / "pictures", edit=edit.identity, title="prompts")
        processes.barrier()
        # every process sets it, so that all of them fail where none separates
        calibration = processes.from_first(_calibrated(bench, before or prompted, bool(before)))
    with edit.applied(bench.model):
        attacked = attack_pairs(
            bench.model,
            bench.pairs,
            trainer=bench.trainer,
            data=bench.data,
            settings=bench.settings,
            budget=bench.budget,
            controls=bench.controls,
            folder=bench.folder / "attacks",
            seed=bench.seed,
            edit=edit.identity,
            on_round=on_round,
            reproduced=partial(copies, bench, calibration, edit.identity) if calibration else None,
        )
        triggers = (*prompted, *attacked)
        draw(bench, triggers, bench.folder / "pictures", edit=edit.identity, title="generate")
    processes.barrier()
    return Drawn(triggers, before, calibration)


def _calibrated(bench: Bench, prompted: Sequence[Trigger], mitigated: bool) -> Calibration:
    """Set the threshold before the attack; what an attack draws has no part in it."""
    folder = bench.unmitigated if mitigated else bench.folder / "pictures"
    compared = partial(measure, folder=folder, originals=bench.originals, sampling=bench.sampling)
    return calibrate(bench.model, bench.data, bench.originals, [compared(t) for t in prompted])


def measure_all(bench: Bench, drawn: Drawn) -> Measured:
    """Compare every picture with its original, and count the copies."""
    compared = partial(measure, originals=bench.originals, sampling=bench.sampling)
    outcomes = tuple(compared(t, bench.folder / "pictures") for t in drawn.triggers)
    baseline = tuple(compared(t, bench.unmitigated) for t in drawn.before)
    calibration = drawn.calibration or calibrate(
        bench.model, bench.data, bench.originals, baseline or outcomes
    )
    counted = [(bench.mitigation.name, outcomes), *([("none", baseline)] if baseline else [])]
    cells = [
        cell
        for mitigation, own in counted
        for cell in cells_of(
            own,
            calibration,
            checkpoint=bench.model.name,
            mitigation=mitigation,
            aggregation=bench.originals.measures.aggregation,
        )
    ]
    return Measured(outcomes, baseline, calibration, tuple(cells))


def price(bench: Bench, edit: Edit, calibration: Calibration) -> Utility | None:
    """What the mitigation costs on prompts that nobody wanted to forget; None if not asked for."""
    if isinstance(edit, EmptyEdit) or not bench.utility.asked:
        return None
    return measure_utility(
        bench.model,
        edit,
        pairs=bench.suspected,
        corpus=bench.workshop.corpus,
        originals=bench.originals,
        sampling=bench.sampling,
        settings=bench.utility,
        folder=bench.folder,
        cache=bench.cache / "unmitigated",
        descriptor=calibration.descriptor,
        threshold=calibration.threshold,
        seed=bench.seed,
    )
