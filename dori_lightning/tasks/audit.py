"""Which pairs a checkpoint still reproduces, prompted and attacked, and how sure we are of it."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from hydra.utils import instantiate
from omegaconf import DictConfig

from dori_lightning.audit.context import (
    AuditContext,
    audit_bytes,
    check_controls,
    control_prompts,
    reference_images,
    with_self_controls,
)
from dori_lightning.audit.evaluation import (
    Evaluation,
    OtherRun,
    attack_and_generate,
    evaluate,
)
from dori_lightning.audit.power import PowerSettings, check_never_seen, measure_power
from dori_lightning.audit.targets import aim
from dori_lightning.audit.utility import generate_shares, measure_utility, write_utility
from dori_lightning.config import base_checkpoint
from dori_lightning.metrics.evidence import BaseEvidence, Power
from dori_lightning.metrics.replication import attack_effort
from dori_lightning.mitigations.base import Context, EditResult, check_family
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.mitigations.edits import Edit, EmptyEdit, changed_weights
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.pairs.copies import check_evidence, relative_detail
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.pairs.readers import FolderPairs
from dori_lightning.pairs.validation import check_prompt_lengths
from dori_lightning.planting.dataset import PositiveControls
from dori_lightning.report.findings import INVALID, Circumstances, base_evidence, make_report
from dori_lightning.report.pages import write_audit_page
from dori_lightning.report.record import AuditReport, Provenance, write_report
from dori_lightning.report.tables import cells_table, rich_table
from dori_lightning.runtime import distributed
from dori_lightning.runtime.artifacts import (
    check_folder,
    check_space,
    claim_folder,
    drop_keys,
    write_json,
)
from dori_lightning.runtime.logging import answer_console
from dori_lightning.tasks.plan import attack_settings, plan
from dori_lightning.tasks.results_logging import objective, track_attack, track_report
from dori_lightning.tasks.run_record import (
    FINGERPRINT,
    deciding_settings,
    provenance_of,
    to_container,
    tracked,
    with_fingerprint,
)
from dori_lightning.tracking import Tracker
from dori_lightning.types import BASELINE, InputError, Pair, Pairs

CURVE_POINTS = 500
"""Points of a training's curves."""


def run(cfg: DictConfig, folder: Path) -> float | None:
    """Audit a checkpoint and write the report into ``folder``.

    Returns:
        Memorization rate of vm pairs under the strongest condition measured, for sweepers; None
        without vm pairs, and where the audit is invalid.
    """
    if cfg.task.dry_run:
        plan(cfg, folder)
        return None
    # before anything is logged: a wrong command must not reach the run that the folder belongs to
    check_folder(folder, method_of(to_container(cfg)), unknown=[FINGERPRINT])
    tags = (str(cfg.checkpoint.name), str(cfg.mitigation.name))
    with tracked(cfg, folder, tags=tags) as tracker:
        return _audit(cfg, folder, tracker)


def _audit(cfg: DictConfig, folder: Path, tracker: Tracker) -> float | None:
    started = datetime.now(UTC)
    context = set_up(cfg, folder, tracker)
    found = context.find_edit()
    generated = attack_and_generate(context, found.edit, on_round=partial(track_attack, tracker))
    reference = _attack_other(cfg.reference, context, "reference")
    base = _attack_other(base_checkpoint(to_container(cfg)["checkpoint"]), context, "base")
    first = context.trainer.is_global_zero
    evaluation = evaluate(context, generated, reference, base) if first else None
    power = _measure_power(cfg, context, found.edit, evaluation)
    generate_shares(context, found.edit)
    if evaluation is None:
        return None
    utility = measure_utility(context, found.edit, evaluation.calibration)
    if utility is not None:
        write_utility(utility, folder)
    changed = changed_weights(found.edit, context.model)
    _write_edit_record(folder, found, context.mitigation.name, changed=changed)
    sides = (context.model.resolution, reference.context.model.resolution) if reference else ()
    circumstances = Circumstances(
        inert=changed == 0 and context.mitigation.name != BASELINE,
        skipped=context.pairs.skipped_ids,
        resolutions=sides,
        detail=relative_detail(context.pairs),
        learned=evaluation.learned,
    )
    provenance = provenance_of(cfg, context.model, context.pairs, started=started)
    report = make_report(
        circumstances,
        checkpoint=context.model.name,
        mitigation=context.mitigation.name,
        cells=evaluation.cells,
        calibration=evaluation.calibration,
        outcomes=evaluation.outcomes,
        baseline=evaluation.baseline,
        images=evaluation.evidence,
        unseen=evaluation.unseen,
        false_discovery_rate=context.evidence.rate,
        reference_model=evaluation.reference,
        base=_base_evidence(context, evaluation, base, provenance),
        power=power,
        check=generated.check,
        check_before=generated.check_before,
        utility=utility,
        effort=attack_effort(
            evaluation.outcomes,
            noise_batch=context.attack.noise_batch,
            picture_evaluations=context.sampling.steps * context.sampling.rows_per_step,
            images_per_pair=context.sampling.images_per_pair,
            looked=generated.looked,
        ),
        provenance=provenance,
    )
    _publish(cfg, report, folder)
    images, max_pairs = cfg.report.images.value, cfg.report.max_pairs
    track_report(
        tracker, report, found, folder, changed=changed, images=images, max_pairs=max_pairs
    )
    return objective(report)


def set_up(
    cfg: DictConfig, folder: Path, tracker: Tracker, *, more: Mapping[str, Any] | None = None
) -> AuditContext:
    """Build the context, check that the disk holds what will be written, and claim the folder.

    What a later stage would refuse is refused here. A reference and a base are loaded, known by
    their fingerprints and let go before the checkpoint is, so that never two are in memory.

    Args:
        cfg: Composed configuration.
        folder: Run folder.
        tracker: Loggers of the run.
        more: What else decides the results besides what ``method_of`` says.

    Raises:
        InputError: An input is missing or does not fit the others, the disk is too full, or
            ``folder`` holds results of other settings.
    """
    # the other processes read and load while this one does
    distributed.launch(make_trainer(cfg, tracker))
    listed, copied = instantiate(cfg.pairs).read(), cfg.pairs.self_controls
    check_evidence(listed, copied, instantiate(cfg.evidence), reference=bool(cfg.reference))
    check_never_seen(_own_positive_controls(cfg), listed)
    reference = _fingerprint_of(cfg.reference)
    tuned_from = base_checkpoint(to_container(cfg)["checkpoint"])
    # without its LoRA, a checkpoint cannot be itself
    base = None if cfg.checkpoint.get("base") == "auto" else _fingerprint_of(tuned_from)
    pairs = with_self_controls(listed, copied, Path(cfg.paths.cache) / "copies")
    context = audit_context(cfg, folder, pairs, tracker=tracker)
    if context.model.fingerprint == reference:
        raise InputError(
            f"the reference is the checkpoint under audit itself ({reference}): it did see the "
            f"images",
            where="reference",
            fix="give a checkpoint that was not trained on them, or reference=none",
        )
    if context.model.fingerprint == base:
        raise InputError(
            f"the base is the checkpoint under audit itself ({base}): nothing was tuned",
            where="checkpoint.base",
            fix="give the checkpoint that it was tuned from, or checkpoint.base=none",
        )
    context.data.prepare()
    check_space(
        folder,
        audit_bytes(context),
        fix="choose another disk with paths.output=FOLDER, or write less: fewer "
        "attack.snapshots or sampling.images_per_pair",
    )
    # every input was checked: from here on the folder belongs to these settings
    method = {**method_of(to_container(cfg)), **(more or {})}
    claim_folder(folder, with_fingerprint(method, context.model))
    distributed.start(context.make_trainer())
    write_skipped(context.pairs, folder)
    return aim(context)


def write_skipped(pairs: Pairs, folder: Path) -> None:
    """Write ``skipped_pairs.json``: which pairs and images were left out of the list, and why."""
    if pairs.skipped and distributed.is_first():
        write_json(folder / "skipped_pairs.json", {"skipped": [asdict(p) for p in pairs.skipped]})


def audit_context(
    cfg: DictConfig, folder: Path, pairs: Pairs, *, tracker: Tracker | None = None
) -> AuditContext:
    """Build and check the inputs of an audit; what can fail without the model fails before it.

    Args:
        cfg: Composed configuration of a task with pairs, attack and mitigation.
        folder: Run folder.
        pairs: The list of pairs, as it was read; those of role ``training`` are left out.
        tracker: Loggers of the run, which also log fits.

    Raises:
        InputError: The list lacks control pairs, a prompt is too long, or the model has fewer
            sampling steps than asked for.
    """
    measures, corpus, sampling = map(instantiate, (cfg.metrics, cfg.corpus, cfg.sampling))
    mitigation, utility = map(instantiate, (cfg.mitigation, cfg.utility))
    attack = attack_settings(cfg)
    audited = [pair for pair in pairs if pair.role == "audit"]
    check_controls(audited, attack)
    check_family(mitigation, cfg.checkpoint.get("family", "sd"))
    model = instantiate(cfg.checkpoint)
    model.sampling_timesteps(sampling)  # raises where the schedule has fewer steps
    strict = cfg.task.get("strict_prompts", False)
    audited = [*check_prompt_lengths(audited, model, strict=strict)]
    cache = Path(cfg.paths.cache)
    data = PairsDataModule(audited, model, cache=cache / "encoded")
    controls = control_prompts(audited, data)
    return AuditContext(
        folder=folder,
        cache=cache,
        seed=cfg.seed,
        pairs=Pairs(audited, skipped=pairs.skipped),
        model=model,
        data=data,
        references=reference_images(audited, model.resolution, measures),
        corpus=corpus,
        sampling=sampling,
        attack=attack,
        budget=attack.budget.resolve(controls.embeddings, own_units=not model.spread().absolute),
        control_prompts=controls,
        mitigation=mitigation,
        utility=utility,
        evidence=instantiate(cfg.evidence),
        make_trainer=partial(make_trainer, cfg, tracker),
    )


def _fingerprint_of(node: Mapping[str, Any] | None) -> str | None:
    """Load a checkpoint, take its fingerprint, and let it go; None where there is none."""
    found: str | None = instantiate(node).fingerprint if node else None
    gc.collect()  # parts of a model may hold each other
    return found


def other_context(
    node: Mapping[str, Any] | None, context: AuditContext, name: str
) -> AuditContext | None:
    """The same audit of another checkpoint, without a mitigation; None without one.

    Args:
        node: What builds it; None or empty for none.
        context: The audit.
        name: Of its folder in the run's.
    """
    if not node:
        return None
    model = instantiate(node)
    data = PairsDataModule(context.pairs, model, cache=context.cache / "encoded")
    measures = context.references.measures
    data.prepare()
    return replace(
        context,
        folder=context.folder / name,
        model=model,
        data=data,
        references=context.references
        if model.resolution == context.model.resolution
        else reference_images(context.pairs, model.resolution, measures),
        control_prompts=control_prompts(context.pairs, data),
        mitigation=NoMitigation(),
    )


def _attack_other(
    node: Mapping[str, Any] | None, context: AuditContext, name: str
) -> OtherRun | None:
    """Attack the same pairs, with the same budget, on another checkpoint."""
    there = other_context(node, context, name)
    if there is None:
        return None
    return OtherRun(there, attack_and_generate(there, EmptyEdit()))


def _base_evidence(
    context: AuditContext, evaluation: Evaluation, base: OtherRun | None, provenance: Provenance
) -> BaseEvidence | None:
    """What the same attacks found in the checkpoint that this one was tuned from."""
    there = evaluation.base
    if base is None or there is None:
        return None
    return base_evidence(
        base.context.model.fingerprint,
        checkpoint=base.context.model.name,
        cells=there.cells,
        calibration=there.calibration,
        outcomes=there.outcomes,
        images=there.evidence,
        unseen=there.unseen,
        false_discovery_rate=context.evidence.rate,
        check=base.generated.check,
        provenance=provenance,
    )


def _measure_power(
    cfg: DictConfig, context: AuditContext, edit: Edit, evaluation: Evaluation | None
) -> Power | None:
    """Plant and attack images of our own where nothing was found; by all processes together.

    Args:
        cfg: Its ``power`` says whether and how.
        context: The audit.
        edit: What the mitigation changes.
        evaluation: What the audit found; None on all processes but the first.
    """
    settings: PowerSettings = instantiate(cfg.power)
    nothing = evaluation is not None and not any(
        row.answer == "yes" for row in evaluation.evidence
    )
    wanted = settings.when == "always" or (
        settings.when == "nothing_found" and distributed.broadcast_object(nothing)
    )
    if not wanted:
        return None
    return measure_power(context, edit, positive_controls(cfg), settings)


def positive_controls(cfg: DictConfig) -> Sequence[Pair]:
    """The images that are planted: the user's, or some that are drawn.

    Raises:
        InputError: Something is wrong with the user's list.
    """
    own = _own_positive_controls(cfg)
    if own:
        return own
    count = instantiate(cfg.power).count
    return PositiveControls(cache=Path(cfg.paths.cache) / "pairs", count=count).read()


def _own_positive_controls(cfg: DictConfig) -> tuple[Pair, ...]:
    """The user's images that are to be planted; none where they are drawn, or none is needed.

    Raises:
        InputError: Something is wrong with their list, or it has none.
    """
    settings: PowerSettings = instantiate(cfg.power)
    if settings.images is None or settings.when == "never":
        return ()
    try:
        listed = FolderPairs(settings.images, kind="vm", limit=settings.count).read()
    except InputError as error:
        raise InputError(f"positive controls (power.images): {error}") from error
    found = tuple(pair for pair in listed if pair.kind == "vm")
    if not found:
        raise InputError(
            f"{settings.images} has no image of kind vm to plant",
            where="power.images",
            fix="leave the column kind out, or power.images=null for images that are drawn",
        )
    return found


def make_trainer(cfg: DictConfig, tracker: Tracker | None, /, **settings: Any) -> L.Trainer:
    """A Trainer of ``cfg.trainer`` and keyword arguments; the tracker logs a fit."""
    if tracker is not None and "max_steps" in settings:  # a fit, however long, as one curve
        settings = {
            "logger": tracker.training("finetune"),
            "log_every_n_steps": max(1, settings["max_steps"] // CURVE_POINTS),
            **settings,
        }
    trainer: L.Trainer = instantiate(cfg.trainer, **settings)
    return trainer


def make_context(cfg: DictConfig, model: LatentDiffusion, pairs: Sequence[Pair]) -> Context:
    """Context of mitigations for tasks that make an edit and no audit.

    Starts the other processes of the run: they make an edit together.
    """
    corpus, sampling, measures = map(instantiate, (cfg.corpus, cfg.sampling, cfg.metrics))
    cache = Path(cfg.paths.cache)
    data = PairsDataModule(pairs, model, cache=cache / "encoded")
    data.prepare()
    references = reference_images(pairs, model.resolution, measures)
    distributed.start(make_trainer(cfg, None))
    return Context(
        seed=cfg.seed,
        corpus=corpus,
        data=data,
        references=references,
        sampling=sampling,
        trainer=partial(make_trainer, cfg, None),
        folder=cache / "edits",
    )


def method_of(cfg: dict[str, Any]) -> dict[str, Any]:
    """What decides the results of an audit, out of its resolved configuration.

    Without ``utility``: what a mitigation costs is measured anew each time.
    """
    # folders from before a setting existed can be resumed where it is at its default
    since = {
        "early_stop": False, "looks": [], "one_image": False, "futility": None, "parts": None,
    }  # fmt: skip
    attack = {k: v for k, v in cfg["attack"].items() if k not in since or v != since[k]}
    return {
        "seed": cfg["seed"],
        "checkpoint": deciding_settings(cfg["checkpoint"]),
        "mitigation": cfg["mitigation"],
        "corpus": cfg["corpus"],
        "attack": drop_keys(attack, "pairs_per_forward", "samples_per_forward"),
        "sampling": drop_keys(cfg["sampling"], "batch"),
        "pairs": drop_keys(cfg["pairs"], "cache"),
    }


def _write_edit_record(
    folder: Path, found: EditResult, mitigation: str, *, changed: int | None
) -> None:
    """Write ``edit.json``; ``changed`` is None for an edit that works without changing weights."""
    origin = found.edit.origin
    record: dict[str, Any] = {
        "mitigation": mitigation,
        "identity": found.edit.identity,
        "key": found.key,
        "made": found.made,
        "cost": dict(origin.cost) if origin else {},
        "changed_weights": changed,
        "notes": dict(origin.notes) if origin else {},
    }
    write_json(folder / "edit.json", record)


def _publish(cfg: DictConfig, report: AuditReport, folder: Path) -> None:
    """Write record, figures and page, and print the answer."""
    images = cfg.report.images.value
    write_report(report, folder)
    page = write_audit_page(report, folder, images=images, max_pairs=cfg.report.max_pairs)
    console = answer_console()
    title = f"{INVALID}: {', '.join(report.invalid)}" if report.invalid else ""
    console.print(rich_table(cells_table(report.cells, title=title)))
    console.print(report.verdict)
    console.print(f"page: {page}", soft_wrap=True)
