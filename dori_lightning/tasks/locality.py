"""Is memorization local? Many embeddings that replicate one image, compared in every place.

Reference: Finding DoRI (2507.16880), section on locality.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from hydra.utils import instantiate
from omegaconf import DictConfig

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.audit.targets import aim
from dori_lightning.locality.embeddings import Group, PromptGroup, embedding_findings
from dori_lightning.locality.study import (
    LocalitySettings,
    Part,
    SearchedTriggers,
    Study,
    compare_activations,
    compare_weights,
    find_threshold,
    groups_of,
    search,
    transfer_findings,
)
from dori_lightning.mitigations.base import check_family
from dori_lightning.mitigations.edits import EmptyEdit
from dori_lightning.mitigations.nemo import NeMo
from dori_lightning.mitigations.wanda import Wanda
from dori_lightning.report.locality import (
    LocalityReport,
    StudiedImage,
    answers,
    write_locality_files,
)
from dori_lightning.runtime import distributed
from dori_lightning.runtime.artifacts import check_folder, claim_folder, drop_keys
from dori_lightning.runtime.logging import answer_console
from dori_lightning.tasks.audit import audit_context, method_of, write_skipped
from dori_lightning.tasks.plan import attack_settings
from dori_lightning.tasks.results_logging import track_locality
from dori_lightning.tasks.run_record import (
    FINGERPRINT,
    provenance_of,
    to_container,
    tracked,
    with_fingerprint,
)
from dori_lightning.tracking import Tracker
from dori_lightning.types import InputError, Pair


def run(cfg: DictConfig, folder: Path) -> float | None:
    """Search triggers, compare them, and write record, figures and page into ``folder``.

    Returns:
        Share of attacks from ``task.start`` that replicate their image, for sweepers; None where
        all of them diverged.
    """
    tags = (str(cfg.checkpoint.name), str(cfg.mitigation.name))
    with tracked(cfg, folder, tags=tags) as tracker:
        return _study(cfg, folder, tracker)


def _study(cfg: DictConfig, folder: Path, tracker: Tracker) -> float | None:
    started = datetime.now(UTC)
    study = set_up(cfg, folder)
    audit, settings = study.audit, study.settings
    parts = settings.parts
    edit = study.find_edit(audit.mitigation).edit
    models = {audit.mitigation.name: edit}
    if "triggers" in parts:
        if not edit.is_empty:
            models["none"] = EmptyEdit()
        models |= {own.name: study.find_edit(own).edit for own in settings.transfer_to}
    with edit.applied(audit.model):
        triggers = search(study, edit=edit.identity)
    transfer = transfer_findings(study, triggers, models) if "triggers" in parts else None
    groups = groups_of(study, triggers)
    compared = {name: tuple(p.id for p in own.pairs) for name, own in study.prompts.items()}
    report = LocalityReport(
        checkpoint=audit.model.name,
        mitigation=audit.mitigation.name,
        start=settings.start,
        restarts=audit.attack.restarts,
        budget=audit.budget,
        descriptor=study.calibration.descriptor,
        threshold=study.calibration.threshold,
        pictures_each=audit.sampling.images_per_pair,
        images=tuple(_image(pair, triggers) for pair in (*study.studied, *study.controls)),
        memorized_prompts=compared["memorized_prompts"],
        control_prompts=compared["control_prompts"],
        embeddings=embedding_findings(
            triggers.attempts,
            {pair.id: audit.data.encoded(pair).embedding for pair in study.studied},
            study.prompts,
            seed=audit.seed,
        )
        if "embeddings" in parts
        else None,
        activations=compare_activations(study, groups) if "activations" in parts else None,
        weights=compare_weights(study, groups) if "weights" in parts else None,
        transfer=transfer,
        provenance=provenance_of(cfg, audit.model, audit.pairs, started=started),
    )
    page = write_locality_files(report, folder)
    console = answer_console()
    for answer in answers(report):
        console.print(f"{answer.question} {answer.text}")
    console.print(f"page: {page}", soft_wrap=True)
    ours = [own for own in triggers.attempts if own.init == settings.start]
    works = [own.works for own in ours if own.held == "memorized"]
    rate = sum(works) / len(works) if works else None
    track_locality(tracker, report, folder, objective=rate)
    return rate


def _image(pair: Pair, triggers: SearchedTriggers) -> StudiedImage:
    own = [attempt for attempt in triggers.attempts if attempt.pair.id == pair.id]
    attacked = Counter(attempt.init for attempt in own)
    working = Counter(attempt.init for attempt in own if attempt.works)
    return StudiedImage(
        id=pair.id,
        kind=pair.kind,
        prompt=pair.prompt,
        attacked=dict(attacked),
        working={init: working[init] for init in attacked},
    )


def set_up(cfg: DictConfig, folder: Path) -> Study:
    """Read, check and load what the configuration names.

    Raises:
        InputError: Something is missing or does not fit together, or the folder holds results of
            other settings.
    """
    settings = read_settings(cfg, attack_settings(cfg))
    by_neurons = {"activations", "weights"} & set(settings.parts)
    family = cfg.checkpoint.get("family", "sd")
    for other in (*([settings.nemo] if by_neurons else []), *settings.transfer_to):
        check_family(other, family)
    pairs = instantiate(cfg.pairs).read()
    chosen = choose_pairs([pair for pair in pairs if pair.role == "audit"], settings)
    values = to_container(cfg)
    # which questions are answered decides no answer
    method = {**method_of(values), "task": drop_keys(values["task"], "parts")}
    check_folder(folder, method, unknown=[FINGERPRINT])
    audit = audit_context(cfg, folder, pairs)
    claim_folder(folder, with_fingerprint(method, audit.model))
    audit = replace(audit, attack=replace(audit.attack, snapshots=(0, *audit.attack.snapshots)))
    distributed.start(audit.make_trainer())
    write_skipped(audit.pairs, folder)
    audit = aim(audit)
    aimed = {pair.id: pair for pair in audit.pairs}
    chosen = {name: tuple(aimed[pair.id] for pair in own) for name, own in chosen.items()}
    return Study(
        audit=audit,
        settings=settings,
        studied=chosen["studied"],
        controls=chosen["controls"],
        prompts={
            name: Group(name, chosen[name], audit.data.batch(chosen[name]).embeddings)
            for name in get_args(PromptGroup)
        },
        calibration=find_threshold(audit),
    )


def read_settings(cfg: DictConfig, attack: AttackSettings) -> LocalitySettings:
    """Read and check the task's settings, before a model is loaded.

    Args:
        cfg: Composed configuration.
        attack: Attack settings.

    Raises:
        InputError: Names the key, its value and what it may be.
    """
    attack.check_whole()
    task: dict[str, Any] = instantiate(cfg.task, _convert_="all")
    inits, trainer = attack.inits, cfg.trainer
    given = {item.name: task[item.name] for item in fields(LocalitySettings)}
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    prompts = attack.restarts if given["prompts"] is None else given["prompts"]
    models = tuple(given["transfer_to"].values())
    settings = LocalitySettings(**{**given, **lists, "prompts": prompts, "transfer_to": models})
    known = get_args(Part)
    # fmt: off
    rules = (
        (settings.parts and set(settings.parts) <= set(known),
         f"task.parts must be some of {', '.join(known)}, got {list(settings.parts)}"),
        (settings.images >= 1, f"task.images must be at least 1, got {settings.images}"),
        (settings.control_images >= 0,
         f"task.control_images must be 0 or more, got {settings.control_images}"),
        (settings.prompts >= 2, f"task.prompts must be at least 2, got {settings.prompts}"),
        (settings.lines >= 1, f"task.lines must be at least 1, got {settings.lines}"),
        (settings.start in inits,
         f"task.start must be among attack.inits ({', '.join(inits)}), got {settings.start!r}"),
        (settings.start in attack.inits_of("control"),
         f"attack.other_inits must hold task.start ({settings.start}), or the controls would be "
         f"attacked in another way"),
        (all(0 < place < 1 for place in settings.places),
         f"task.places must lie between 0 and 1, got {list(settings.places)}"),
        (attack.restarts >= 2, f"attack.restarts must be at least 2, or there is nothing to "
         f"compare, got {attack.restarts}"),
        (attack.budget.steps >= 1,
         f"attack.budget.steps must be at least 1, got {attack.budget.steps}"),
        (isinstance(settings.nemo, NeMo) and isinstance(settings.wanda, Wanda),
         "task.nemo and task.wanda must be settings of these methods, such as "
         "mitigation@task.nemo=nemo_all_layers"),
        (trainer.get("devices", 1) == 1 and trainer.get("num_nodes", 1) == 1,
         "task=locality runs in one process: trainer.devices=1 trainer.num_nodes=1"),
    )
    # fmt: on
    for holds, rule in rules:
        if not holds:
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
) -> Mapping[Literal["studied", "controls", PromptGroup], tuple[Pair, ...]]:
    """Choose who is studied and who is compared with, by place in the list, never by result.

    Args:
        pairs: Pairs that an audit would look at.
        settings: The task's settings.

    Returns:
        ``studied``: memorized images whose triggers are searched; ``controls``: control images
        that are attacked; ``memorized_prompts``: others whose prompts are compared with, vm
        before tm; ``control_prompts``: control pairs whose prompts are compared with.

    Raises:
        InputError: There are too few pairs of a kind.
    """
    studied = tuple(pair for pair in pairs if pair.kind == "vm")[: settings.images]
    controls = tuple(pair for pair in pairs if pair.kind == "control")
    # another caption of a studied image is no other image
    images = {own.sha256 for pair in studied for own in pair.references if own.sha256}
    suspected = [p for kind in ("vm", "tm") for p in pairs if p.kind == kind]
    others = [
        pair
        for pair in suspected
        if pair not in studied and not any(own.sha256 in images for own in pair.references)
    ]
    for have, least, what in (
        (studied, 1, "memorized images under study (kind vm)"),
        (others, 2, "other memorized images (kind vm or tm) to compare with"),
        (controls, 2, "control pairs (kind control) to compare with"),
    ):
        if len(have) < least:
            raise InputError(
                f"task=locality needs at least {least} {what}, the list has {len(have)}\n"
                f"  where: pairs\n"
                f"  fix:   a longer list, or a smaller task.images"
            )
    return {
        "studied": studied,
        "controls": controls[: settings.control_images],
        "memorized_prompts": tuple(others[: settings.prompts]),
        "control_prompts": controls[: settings.prompts],
    }
