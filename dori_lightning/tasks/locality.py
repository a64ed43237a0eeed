"""Is memorization local? Many embeddings that draw one image, compared in every place.

Reference: Finding DoRI (2507.16880), section on locality.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.locality.embeddings import (
    EmbeddingFindings,
    PromptSet,
    TriggerSet,
    embedding_findings,
)
from dori_lightning.locality.study import (
    LocalitySettings,
    Part,
    ReplicationJudge,
    Study,
    ask_other_models,
    ask_searched_model,
    groups_of,
    join,
    look_at_activations,
    look_at_weights,
    rule_of,
    search,
)
from dori_lightning.mitigations.edits import Edit, EmptyEdit
from dori_lightning.mitigations.nemo import NeMo
from dori_lightning.mitigations.wanda import Wanda
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.report.locality import (
    LocalityReport,
    StudiedImage,
    answers,
    write_locality_files,
)
from dori_lightning.runtime import distributed
from dori_lightning.runtime.artifacts import claim_folder, drop_keys
from dori_lightning.tasks.audit import audit_context, method_of
from dori_lightning.tasks.results_logging import track_locality
from dori_lightning.tasks.run_record import provenance_of, to_container, tracked
from dori_lightning.tracking import Tracker
from dori_lightning.types import InputError, Pair

if TYPE_CHECKING:
    from dori_lightning.locality.study import SearchedTriggers


def prepare(cfg: DictConfig, folder: Path) -> Study:
    """Read, check and load what the configuration names.

    Raises:
        InputError: Something is missing or does not fit together, or the folder holds results of
            other settings.
    """
    settings = settings_of_task(cfg, instantiate(cfg.attack))
    pairs = [pair for pair in instantiate(cfg.pairs).read() if pair.role == "audit"]
    chosen = choose_pairs(pairs, settings)
    claim_folder(folder, _method_of(to_container(cfg)))
    context = audit_context(cfg, folder, pairs)
    distributed.start(context.make_trainer())
    return Study(
        folder=folder,
        seed=cfg.seed,
        settings=settings,
        attack=replace(context.attack, snapshots=(0, *context.attack.snapshots)),
        budget=context.budget,
        control_prompts=context.control_prompts,
        pairs=tuple(pairs),
        studied=chosen["studied"],
        controls=chosen["controls"],
        memorized=_prompts(chosen["memorized"], context.data),
        ordinary=_prompts(chosen["ordinary"], context.data),
        model=context.model,
        data=context.data,
        context=context.for_mitigations,
        desk=ReplicationJudge(
            model=context.model,
            sampling=context.sampling,
            references=context.references,
            rule=rule_of(context),
            folder=folder / "pictures",
            record=folder / "similarities.json",
        ),
        mitigation=context.mitigation,
    )


def _prompts(pairs: tuple[Pair, ...], data: PairsDataModule) -> PromptSet:
    return PromptSet(pairs, data.batch(pairs).embeddings)


def _method_of(cfg: dict[str, Any]) -> dict[str, Any]:
    """What decides the results, out of the resolved configuration."""
    return {**method_of(cfg), "task": drop_keys(cfg["task"], "parts")}


# -------- locality_settings
# Settings of the locality task, checked before a model is loaded.


def settings_of_task(cfg: DictConfig, attack: AttackSettings) -> LocalitySettings:
    """Read and check the task's settings.

    Args:
        cfg: Composed configuration.
        attack: Attack settings.

    Raises:
        InputError: Names the key, what it holds and what it may hold.
    """
    attack.check_whole()
    task = cfg.task
    settings = LocalitySettings(
        parts=tuple(task.parts),
        images=task.images,
        ids=None if task.ids is None else tuple(task.ids),
        control_images=task.control_images,
        prompts=attack.restarts if task.prompts is None else task.prompts,
        start=task.start,
        forget=task.forget,
        places=tuple(task.places),
        lines=task.lines,
        activation_step=task.activation_step,
        noise_seed=task.noise_seed,
        nemo=instantiate(task.nemo),
        wanda=instantiate(task.wanda),
        transfer_to=tuple(instantiate(node) for node in task.transfer_to.values()),
    )
    known = get_args(Part)
    for good, rule in (
        (
            bool(settings.parts) and set(settings.parts) <= set(known),
            f"task.parts must be some of {', '.join(known)}, got {list(settings.parts)}",
        ),
        (settings.images >= 1, f"task.images must be at least 1, got {settings.images}"),
        (
            settings.control_images >= 0,
            f"task.control_images must be 0 or more, got {settings.control_images}",
        ),
        (settings.prompts >= 2, f"task.prompts must be at least 2, got {settings.prompts}"),
        (settings.lines >= 1, f"task.lines must be at least 1, got {settings.lines}"),
        (
            settings.start in attack.inits,
            f"task.start must be among attack.inits ({', '.join(attack.inits)}), "
            f"got {settings.start!r}",
        ),
        (
            settings.start in attack.inits_of("control"),
            f"attack.other_inits must hold task.start ({settings.start}), or the controls would "
            f"be attacked in another way",
        ),
        (
            settings.forget in ("suspected", "studied"),
            f"task.forget must be suspected or studied, got {settings.forget!r}",
        ),
        (
            all(0 < place < 1 for place in settings.places),
            f"task.places must lie between 0 and 1, got {list(settings.places)}",
        ),
        (
            attack.restarts >= 2,
            f"attack.restarts must be at least 2, or there is nothing to compare, "
            f"got {attack.restarts}",
        ),
        (
            attack.budget.steps >= 1,
            f"attack.budget.steps must be at least 1, got {attack.budget.steps}",
        ),
        (
            isinstance(settings.nemo, NeMo) and isinstance(settings.wanda, Wanda),
            "task.nemo and task.wanda must be settings of these methods, such as "
            "mitigation@task.nemo=nemo_all_layers",
        ),
        (
            cfg.trainer.get("devices", 1) == 1 and cfg.trainer.get("num_nodes", 1) == 1,
            "task=locality runs in one process: trainer.devices=1 trainer.num_nodes=1",
        ),
    ):
        if not good:
            raise InputError(rule)
    names = [cfg.mitigation.name, *(own.name for own in settings.transfer_to)]
    if len(set(names)) < len(names):
        raise InputError(
            f"the mitigation and task.transfer_to name one model twice: {', '.join(names)}\n"
            f"  fix:   drop one from task.transfer_to, or give it a name of its own"
        )
    return settings


def choose_pairs(
    pairs: Sequence[Pair], settings: LocalitySettings
) -> Mapping[Literal["studied", "controls", "memorized", "ordinary"], tuple[Pair, ...]]:
    """Choose who is studied and who is compared with, by place in the list, never by result.

    Args:
        pairs: Pairs that an audit would look at.
        settings: The task's settings.

    Returns:
        ``studied``: memorized images whose triggers are searched; ``controls``: control images
        that are attacked; ``memorized``: others whose prompts are compared with, vm before tm;
        ``ordinary``: control pairs whose prompts are compared with.

    Raises:
        InputError: An id is not in the list, or there are too few pairs of a kind.
    """
    by_id = {pair.id: pair for pair in pairs}
    if settings.ids is not None:
        unknown = [name for name in settings.ids if name not in by_id]
        if unknown:
            raise InputError(
                f"task.ids names {', '.join(unknown)}, which the list of pairs does not have"
            )
        studied = tuple(by_id[name] for name in settings.ids)
    else:
        studied = tuple(p for p in pairs if p.kind == "vm")[: settings.images]
    controls = tuple(p for p in pairs if p.kind == "control")
    # another caption of a studied picture is no other image
    pictures = {p.sha256 for p in studied if p.sha256}
    others = sorted(
        (p for p in pairs if p.kind != "control" and p not in studied
         and p.sha256 not in pictures),
        key=lambda p: p.kind != "vm",
    )  # fmt: skip
    for found, wanted, what in (
        (studied, 1, "memorized images under study (kind vm)"),
        (others, 2, "other memorized images (kind vm or tm) to compare with"),
        (controls, 2, "control pairs (kind control) to compare with"),
    ):
        if len(found) < wanted:
            raise InputError(
                f"task=locality needs at least {wanted} {what}, the list has {len(found)}\n"
                f"  where: pairs\n"
                f"  fix:   a longer list, or a smaller task.images"
            )
    return {
        "studied": studied,
        "controls": controls[: settings.control_images],
        "memorized": tuple(others[: settings.prompts]),
        "ordinary": controls[: settings.prompts],
    }


# -------- locality


def run(cfg: DictConfig, folder: Path) -> float | None:
    """Search triggers, compare them, and write record, figures and page into ``folder``.

    Returns:
        Share of attacks from ``task.start`` that draw their image, for sweepers; None where all
        of them diverged.
    """
    tags = (str(cfg.checkpoint.name), str(cfg.mitigation.name))
    with tracked(cfg, folder, tags=tags) as tracker:
        return _study(cfg, folder, tracker)


def _study(cfg: DictConfig, folder: Path, tracker: Tracker) -> float | None:
    started = datetime.now(UTC)
    study = prepare(cfg, folder)
    parts = study.settings.parts
    edit = study.edit_of(study.mitigation).edit
    others = _other_models(study, edit) if "triggers" in parts else []
    with edit.applied(study.model):
        triggers = search(study, edit=edit.identity)
        at_large = (
            ask_searched_model(study, triggers, edit=edit.identity)
            if "triggers" in parts
            else None
        )
    transfers = ask_other_models(study, triggers, others)
    groups = groups_of(study, triggers)
    report = LocalityReport(
        checkpoint=study.model.name,
        mitigation=study.mitigation.name,
        start=study.settings.start,
        restarts=study.attack.restarts,
        budget=study.budget,
        descriptor=study.desk.rule.descriptor,
        threshold=study.desk.rule.threshold,
        pictures_each=study.desk.sampling.images_per_pair,
        images=_images(triggers),
        memorized_prompts=tuple(pair.id for pair in study.memorized.pairs),
        control_prompts=tuple(pair.id for pair in study.ordinary.pairs),
        embeddings=_embeddings(study, triggers) if "embeddings" in parts else None,
        activations=look_at_activations(study, groups) if "activations" in parts else None,
        weights=look_at_weights(study, groups) if "weights" in parts else None,
        at_large=join(at_large, transfers) if at_large else None,
        provenance=provenance_of(cfg, study.model, study.pairs, started=started),
    )
    page = write_locality_files(report, folder)
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else 120)
    for answer in answers(report):
        console.print(f"{answer.question} {answer.text}")
    console.print(f"page: {page}", soft_wrap=True)
    asked = sum(image.attacked.get(study.settings.start, 0) for image in report.studied)
    works = sum(image.working.get(study.settings.start, 0) for image in report.studied)
    rate = works / asked if asked else None
    track_locality(tracker, report, folder, objective=rate)
    return rate


def _other_models(study: Study, searched: Edit) -> list[tuple[str, Edit]]:
    """The checkpoint as it is, and the mitigated models that triggers are tried on."""
    original: list[tuple[str, Edit]] = [] if searched.is_empty else [("none", EmptyEdit())]
    return [
        *original,
        *((own.name, study.edit_of(own).edit) for own in study.settings.transfer_to),
    ]


def _embeddings(study: Study, triggers: SearchedTriggers) -> EmbeddingFindings:
    return embedding_findings(
        [own.only_working() for own in triggers.memorized],
        triggers.controls,
        memorized_prompts=study.memorized,
        control_prompts=study.ordinary,
        seed=study.seed,
    )


def _images(triggers: SearchedTriggers) -> tuple[StudiedImage, ...]:
    by_id: dict[str, list[TriggerSet]] = {}
    everything: Sequence[TriggerSet] = (*triggers.memorized, *triggers.controls)
    for own in everything:
        by_id.setdefault(own.pair.id, []).append(own)
    return tuple(
        StudiedImage(
            id=name,
            kind=sets[0].pair.kind,
            prompt=sets[0].pair.prompt,
            attacked={own.start: len(own.working) for own in sets},
            working={own.start: sum(own.working) for own in sets},
        )
        for name, sets in by_id.items()
    )
