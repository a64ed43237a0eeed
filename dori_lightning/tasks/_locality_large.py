"""Ask the searched model and others how often embeddings draw the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from dori_lightning.locality.estimates import rate_of
from dori_lightning.locality.large import (
    TOWARDS,
    AtLarge,
    BudgetPoint,
    LinePoint,
    Transfer,
    lines_between,
    points_on,
)
from dori_lightning.tasks._locality_pictures import Asked
from dori_lightning.tasks._locality_study import place_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dori_lightning.mitigations.edits import Edit
    from dori_lightning.tasks._locality_study import SearchedTriggers, Study
    from dori_lightning.types import Init

__all__ = ["OnSearched", "ask_other_models", "ask_searched_model", "join"]

Held = Literal["memorized", "control"]
HELD: tuple[Held, ...] = ("memorized", "control")


@dataclass(frozen=True)
class OnSearched:
    """What was asked of the model that triggers were searched on."""

    budget: tuple[BudgetPoint, ...]
    lines: tuple[LinePoint, ...]
    transfers: tuple[Transfer, ...]


def ask_searched_model(study: Study, triggers: SearchedTriggers, *, edit: str) -> OnSearched:
    """Success against budget and on lines; the model carries the edit."""
    return OnSearched(
        budget=_budget(study, triggers, edit=edit),
        lines=_lines(study, triggers, edit=edit),
        transfers=_transfers(
            study, triggers, model=study.mitigation.name, searched=True, edit=edit
        ),
    )


def ask_other_models(
    study: Study, triggers: SearchedTriggers, others: Sequence[tuple[str, Edit]]
) -> tuple[Transfer, ...]:
    """Success on models that the triggers were not searched on.

    Args:
        study: The study; its model carries no edit.
        triggers: What was found.
        others: Name and edit of each model.
    """
    found: list[Transfer] = []
    for name, edit in others:
        with edit.applied(study.model):
            found += _transfers(study, triggers, model=name, searched=False, edit=edit.identity)
    return tuple(found)


def join(searched: OnSearched, others: Sequence[Transfer]) -> AtLarge:
    """Everything in one record."""
    return AtLarge(searched.budget, searched.lines, (*searched.transfers, *others))


def _budget(study: Study, triggers: SearchedTriggers, *, edit: str) -> tuple[BudgetPoint, ...]:
    start = study.settings.start
    # ends were drawn already, from every start
    own = [
        t
        for t in triggers.everything
        if t.condition.init == start or t.condition.budget.steps == study.budget.steps
    ]
    finite = [t for t in own if not t.diverged]
    works = study.desk.draws(
        [Asked(place_of(t, "searched"), t.pair, t.embedding) for t in finite],
        edit=edit,
        title="draw against budget",
    )
    points = []
    for held, pairs in zip(HELD, (study.studied, study.controls), strict=True):
        ids = [pair.id for pair in pairs]
        for init in study.attack.inits:
            for steps in sorted({t.condition.budget.steps for t in own}):
                outcomes: dict[str, list[bool]] = {name: [] for name in ids}
                diverged = 0
                for trigger, success in zip(finite, works, strict=True):
                    condition = trigger.condition
                    if (condition.init, condition.budget.steps) == (init, steps):
                        outcomes.get(trigger.pair.id, []).append(success)
                for trigger in own:
                    condition = trigger.condition
                    if (condition.init, condition.budget.steps) == (init, steps):
                        diverged += trigger.diverged and trigger.pair.id in ids
                rate = rate_of(outcomes)
                if rate.n or diverged:
                    points.append(BudgetPoint(held, init, steps, rate, diverged))
    return tuple(points)


def _lines(study: Study, triggers: SearchedTriggers, *, edit: str) -> tuple[LinePoint, ...]:
    settings = study.settings
    sets = triggers.working(settings.start)
    lines = lines_between(sets, count=settings.lines, seed=study.seed)
    by_id = {pair.id: pair for pair in study.studied}
    asked, keys = [], []
    for line in lines:
        for place, embedding in zip(
            settings.places, points_on(line, settings.places), strict=True
        ):
            name = f"lines/{line.toward}/{place:g}/{line.pair}.{line.number}"
            asked.append(Asked(name, by_id[line.pair], embedding))
            keys.append((line.toward, place, line.pair))
    works = study.desk.draws(asked, edit=edit, title="draw on lines")
    points = []
    for toward in TOWARDS:
        for place in settings.places:
            outcomes: dict[str, list[bool]] = {name: [] for name in by_id}
            for key, success in zip(keys, works, strict=True):
                if key[:2] == (toward, place):
                    outcomes[key[2]].append(success)
            rate = rate_of(outcomes)
            if rate.n:
                points.append(LinePoint(toward, place, rate))
    return tuple(points)


def _transfers(
    study: Study, triggers: SearchedTriggers, *, model: str, searched: bool, edit: str
) -> tuple[Transfer, ...]:
    place = "searched" if searched else f"on_{quote(model, safe='')}"
    asked: list[Asked] = []
    keys: list[tuple[Held, Init | Literal["prompt_itself"]]] = []
    for held, pairs in zip(HELD, (study.studied, study.controls), strict=True):
        for pair in pairs:
            embedding = study.data.encoded(pair).embedding
            asked.append(Asked(f"{place}/prompt_itself/{pair.id}", pair, embedding))
            keys.append((held, "prompt_itself"))
    steps = study.budget.steps
    for held, sets in zip(HELD, (triggers.memorized, triggers.controls), strict=True):
        for own in sets:
            chosen = own.only_working() if held == "memorized" else own
            for restart, embedding in zip(chosen.restarts, chosen.ends, strict=True):
                name = f"{place}/{own.start}/s{steps}/{own.pair.id}.r{restart}"
                asked.append(Asked(name, own.pair, embedding))
                keys.append((held, own.start))
    works = study.desk.draws(asked, edit=edit, title=f"draw on {model}")
    found = []
    for key in dict.fromkeys(keys):
        held, start = key
        outcomes: dict[str, list[bool]] = {}
        for one, own_key, success in zip(asked, keys, works, strict=True):
            if own_key == key:
                outcomes.setdefault(one.pair.id, []).append(success)
        found.append(Transfer(model, searched, held, start, rate_of(outcomes)))
    return tuple(found)
