"""Everything that the questions about locality share: images, model, edit, triggers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import instantiate

from dori_lightning.attacks.restarts import attack_restarts
from dori_lightning.locality.groups import PromptSet, TriggerSet
from dori_lightning.models.pictures import unmitigated_name
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.pairs.manifest import check_prompt_lengths
from dori_lightning.tasks._audit_setup import control_prompts, method_of
from dori_lightning.tasks._folder import claim_folder, without
from dori_lightning.tasks._locality_pictures import Asked, PictureDesk, rule_of
from dori_lightning.tasks._locality_settings import choose_pairs, settings_of_task
from dori_lightning.tasks._originals import originals_of
from dori_lightning.tasks._provenance import plain
from dori_lightning.tasks._workshop import workshop_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from dori_lightning.attacks.embedding_attack import ControlPrompts
    from dori_lightning.attacks.settings import AttackSettings
    from dori_lightning.attacks.triggers import Trigger
    from dori_lightning.mitigations.base import Found, Mitigation, Workshop
    from dori_lightning.models.stable_diffusion import StableDiffusion
    from dori_lightning.tasks._locality_settings import LocalitySettings
    from dori_lightning.types import Budget, Init, Pair

__all__ = ["SearchedTriggers", "Study", "prepare", "search"]


@dataclass(frozen=True)
class Study:
    """What is studied and with what.

    Attributes:
        folder: Run folder.
        seed: Run seed.
        settings: The task's settings.
        attack: Attack settings; snapshots hold 0, the start.
        budget: The attack's budget, resolved.
        control_prompts: Where attacks from ``control_prompt`` begin.
        pairs: Every pair of the list.
        studied: Memorized images whose triggers are searched.
        controls: Control images that are attacked in the same way.
        memorized: Prompts of other memorized images.
        ordinary: Control prompts.
        model: The checkpoint.
        data: Encoded pairs.
        workshop: What mitigations work with.
        desk: Draws and judges pictures.
        mitigation: Whose model triggers are searched on.
    """

    folder: Path
    seed: int
    settings: LocalitySettings
    attack: AttackSettings
    budget: Budget
    control_prompts: ControlPrompts
    pairs: tuple[Pair, ...]
    studied: tuple[Pair, ...]
    controls: tuple[Pair, ...]
    memorized: PromptSet
    ordinary: PromptSet
    model: StableDiffusion
    data: PairsDataModule
    workshop: Workshop
    desk: PictureDesk
    mitigation: Mitigation

    def edit_of(self, mitigation: Mitigation) -> Found:
        """A mitigation's edit: read from the cache, or made and kept there."""
        suspected = [pair for pair in self.pairs if pair.kind != "control"]
        forgotten = self.studied if self.settings.forget == "studied" else suspected
        return self.workshop.find(mitigation, self.model, forgotten)


@dataclass(frozen=True)
class SearchedTriggers:
    """What the attacks found.

    Attributes:
        everything: One per image, start, restart and snapshot, those of controls too.
        memorized: Attacks on memorized images, one set per image and start, those that diverged
            left out.
        controls: The same for control images.
    """

    everything: tuple[Trigger, ...]
    memorized: tuple[TriggerSet, ...]
    controls: tuple[TriggerSet, ...]

    def working(self, start: Init) -> tuple[TriggerSet, ...]:
        """Triggers of memorized images from one start that draw their image."""
        return tuple(own.only_working() for own in self.memorized if own.start == start)


def prepare(cfg: DictConfig, folder: Path) -> Study:
    """Read, check and load what the configuration names.

    Raises:
        InputError: Something is missing or does not fit together, or the folder holds results of
            other settings.
    """
    attack = instantiate(cfg.attack)
    settings = settings_of_task(cfg, attack)
    pairs = [pair for pair in instantiate(cfg.pairs).read() if pair.role == "audit"]
    chosen = choose_pairs(pairs, settings)
    sampling, measures = instantiate(cfg.sampling), instantiate(cfg.metrics)
    mitigation = instantiate(cfg.mitigation)
    claim_folder(folder, _method_of(plain(cfg)))
    model = instantiate(cfg.checkpoint)
    check_prompt_lengths(pairs, model.token_count, model.embedding_shape[0], strict=False)
    cache = Path(cfg.paths.cache)
    data = PairsDataModule(pairs, model, cache=cache / "encoded")
    prompts = control_prompts(pairs, data)
    originals = originals_of(pairs, model.resolution, measures)
    unmitigated = cache / "unmitigated" / unmitigated_name(model, sampling)
    return Study(
        folder=folder,
        seed=cfg.seed,
        settings=settings,
        attack=replace(attack, snapshots=(0, *attack.snapshots)),
        budget=attack.budget.resolve(prompts.embeddings),
        control_prompts=prompts,
        pairs=tuple(pairs),
        studied=chosen["studied"],
        controls=chosen["controls"],
        memorized=_prompts(chosen["memorized"], data),
        ordinary=_prompts(chosen["ordinary"], data),
        model=model,
        data=data,
        workshop=workshop_of(cfg, data=data, originals=originals, sampling=sampling),
        desk=PictureDesk(
            model=model,
            sampling=sampling,
            originals=originals,
            rule=rule_of(model, data, originals, sampling, unmitigated),
            folder=folder / "pictures",
            record=folder / "similarities.json",
        ),
        mitigation=mitigation,
    )


def search(study: Study, *, edit: str) -> SearchedTriggers:
    """Attack the images under study and the controls, and see which ends draw their image.

    Args:
        study: The study; its model carries the edit.
        edit: Identity of the edit.
    """
    found = attack_restarts(
        study.model,
        [*study.studied, *study.controls],
        data=study.data,
        settings=study.attack,
        budget=study.budget,
        controls=study.control_prompts,
        folder=study.folder / "attacks",
        seed=study.seed,
        edit=edit,
    )
    last = [t for t in found if t.condition.budget.steps == study.budget.steps]
    finite = [t for t in last if not t.diverged]
    asked = [Asked(place_of(t, "searched"), t.pair, t.embedding) for t in finite]
    works = study.desk.draws(asked, edit=edit, title="draw from ends")
    drawn = dict(zip(map(_key, finite), works, strict=True))
    starts = {_key(t): t.embedding for t in found if t.condition.budget.steps == 0}
    return SearchedTriggers(
        everything=tuple(found),
        memorized=_sets(study, study.studied, finite, starts, drawn),
        controls=_sets(study, study.controls, finite, starts, drawn),
    )


def place_of(trigger: Trigger, model: str) -> str:
    """Folder for the pictures of a trigger on a model."""
    condition = trigger.condition
    return (
        f"{model}/{condition.init}/s{condition.budget.steps}/{trigger.pair.id}.r{trigger.restart}"
    )


def _key(trigger: Trigger) -> tuple[str, str, int]:
    return trigger.pair.id, str(trigger.condition.init), trigger.restart


def _sets(
    study: Study,
    pairs: Sequence[Pair],
    ends: Sequence[Trigger],
    starts: dict[tuple[str, str, int], torch.Tensor],
    works: dict[tuple[str, str, int], bool],
) -> tuple[TriggerSet, ...]:
    sets = []
    for init in study.attack.inits:
        for pair in pairs:
            own = [t for t in ends if t.pair == pair and t.condition.init == init]
            if own:
                sets.append(
                    TriggerSet(
                        pair=pair,
                        start=init,
                        prompt=study.data.encoded(pair).embedding,
                        restarts=tuple(t.restart for t in own),
                        starts=torch.stack([starts[_key(t)] for t in own]),
                        ends=torch.stack([t.embedding for t in own]),
                        working=tuple(works[_key(t)] for t in own),
                    )
                )
    return tuple(sets)


def _prompts(pairs: tuple[Pair, ...], data: PairsDataModule) -> PromptSet:
    return PromptSet(pairs, data.batch(pairs).embeddings)


def _method_of(cfg: dict[str, Any]) -> dict[str, Any]:
    """What decides the results, out of the resolved configuration."""
    return {**method_of(cfg), "task": without(cfg["task"], "parts")}
