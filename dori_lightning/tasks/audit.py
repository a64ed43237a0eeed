"""Which pairs a checkpoint still reproduces, prompted and attacked, and how sure we are of it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from dori_lightning.audit.context import Bench, check_controls, control_prompts
from dori_lightning.audit.disk import audit_bytes
from dori_lightning.audit.evaluation import (
    attack_and_draw,
    measure_all,
    measure_cost,
    reference_images,
)
from dori_lightning.metrics.calibration import ReferenceImages
from dori_lightning.mitigations.base import Context, EditResult
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.mitigations.edits import changed_weights
from dori_lightning.models.memory import estimate_batch_size
from dori_lightning.models.protocol import Sampling
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.pairs.validation import check_prompt_lengths
from dori_lightning.report.findings import attack_effort
from dori_lightning.report.pages import write_audit_page
from dori_lightning.report.record import AuditReport, Disclosure, write_report, write_utility
from dori_lightning.report.tables import cells_table
from dori_lightning.report.verdict import INVALID, make_report
from dori_lightning.runtime import distributed
from dori_lightning.runtime.artifacts import (
    check_folder,
    check_space,
    claim_folder,
    drop_keys,
    write_atomically,
)
from dori_lightning.tasks.plan import plan
from dori_lightning.tasks.results_logging import objective, track_attack, track_report
from dori_lightning.tasks.run_record import provenance_of, to_container, tracked
from dori_lightning.tracking import Tracker
from dori_lightning.types import BASELINE, Pairs

# -------- context
# Give mitigations what they work with, as the configuration says.

CURVE_POINTS = 500
"""Points of a training's curves."""


def make_context(
    cfg: DictConfig,
    *,
    data: PairsDataModule,
    references: ReferenceImages,
    sampling: Sampling,
    tracker: Tracker | None = None,
) -> Context:
    """Context whose edits lie in the cache that the jobs of a sweep share.

    All processes of the run are there from here on: they make an edit together.
    """

    def trainer(**settings: Any) -> L.Trainer:
        if tracker is not None and "max_steps" in settings:  # a fit, however long, as one curve
            settings = {
                "logger": tracker.training("finetune"),
                "log_every_n_steps": max(1, settings["max_steps"] // CURVE_POINTS),
                **settings,
            }
        made: L.Trainer = instantiate(cfg.trainer, **settings)
        return made

    distributed.start(trainer())
    return Context(
        seed=cfg.seed,
        corpus=instantiate(cfg.corpus),
        data=data,
        references=references,
        sampling=sampling,
        trainer=trainer,
        folder=Path(cfg.paths.cache) / "edits",
    )


def edit_record(found: EditResult, mitigation: str, *, changed: int | None = None) -> bytes:
    """What a run folder says of the edit it was made under, as JSON.

    Args:
        found: The edit.
        mitigation: Name of the mitigation.
        changed: Weights that differ under it, None where it works without changing any.
    """
    origin = found.edit.origin
    record = {
        "mitigation": mitigation,
        "identity": found.edit.identity,
        "key": found.key,
        "made": found.made,
        "cost": dict(origin.cost) if origin else {},
        "changed_weights": changed,
        "counts": found.edit.counts(),
        "notes": dict(origin.notes) if origin else {},
    }
    return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()


# -------- audit_setup
# Everything that the stages of an audit work with, checked before hours are spent on it.


def set_up(cfg: DictConfig, folder: Path, tracker: Tracker) -> Bench:
    """Read, check and load what the configuration names.

    Raises:
        InputError: Something is missing, does not fit together, or ``folder`` holds results of
            other settings.
    """
    listed = instantiate(cfg.pairs).read()
    pairs = [pair for pair in listed if pair.role == "audit"]
    settings, sampling, measures, mitigation, utility = (
        instantiate(node)
        for node in (cfg.attack, cfg.sampling, cfg.metrics, cfg.mitigation, cfg.utility)
    )
    check_controls(pairs, settings, measures)
    model = instantiate(cfg.checkpoint)
    model.sampling_timesteps(sampling)  # refuses more steps than it has
    cut = check_prompt_lengths(
        pairs,
        model.token_count,
        model.embedding_shape[0],
        strict=cfg.task.strict_prompts,
        cut_off=model.cut_off,
    )
    pairs = [replace(pair, truncated=pair.id in cut) for pair in pairs]
    cache = Path(cfg.paths.cache)
    width = estimate_batch_size(
        model, noise_batch=settings.noise_batch, wanted=settings.pairs_per_forward
    )
    data = PairsDataModule(pairs, model, pairs_per_batch=width, cache=cache / "encoded")
    data.prepare()
    controls = control_prompts(pairs, data)
    budget = settings.budget.resolve(controls.embeddings)
    check_space(
        folder,
        audit_bytes(
            model,
            pairs,
            settings=settings,
            budget=budget,
            sampling=sampling,
            mitigated=not isinstance(mitigation, NoMitigation),
        ),
        fix="choose another disk with paths.output=FOLDER, or write less: fewer "
        "attack.snapshots or sampling.images_per_pair",
    )
    # all that can be mended was checked: from here on the folder belongs to these settings
    claim_folder(folder, method_of(to_container(cfg)))
    references = reference_images(pairs, model.resolution, measures)
    context = make_context(
        cfg, data=data, references=references, sampling=sampling, tracker=tracker
    )
    return Bench(
        folder=folder,
        cache=cache,
        seed=cfg.seed,
        pairs=Pairs(pairs, skipped=listed.skipped if isinstance(listed, Pairs) else ()),
        model=model,
        data=data,
        references=references,
        settings=settings,
        budget=budget,
        controls=controls,
        sampling=sampling,
        mitigation=mitigation,
        context=context,
        utility=utility,
        trainer=instantiate(cfg.trainer, default_root_dir=folder),
    )


def method_of(cfg: dict[str, Any]) -> dict[str, Any]:
    """What decides the results of an audit, out of its resolved configuration.

    How much is measured of a mitigation's cost is not among it: that is measured anew each time.
    """
    # a folder made before there was the choice goes on where it is not made
    unset = () if cfg["attack"].get("early_stop") else ("early_stop",)
    return {
        "seed": cfg["seed"],
        "checkpoint": drop_keys(
            cfg["checkpoint"], "device", "channels_last", "gradient_checkpointing"
        ),
        "mitigation": cfg["mitigation"],
        "corpus": cfg["corpus"],
        "attack": drop_keys(cfg["attack"], "pairs_per_forward", *unset),
        "sampling": drop_keys(cfg["sampling"], "batch"),
        "pairs": drop_keys(cfg["pairs"], "cache"),
    }


# -------- audit


def run(cfg: DictConfig, folder: Path) -> float | None:
    """Audit a checkpoint and write the report into ``folder``.

    Returns:
        Memorization rate of vm pairs under the strongest condition measured, for sweepers; None
        without vm pairs, and where the audit is invalid.
    """
    if cfg.task.dry_run:
        plan(cfg, folder)
        return None
    # first of all: a mistaken command must not reach the logged run that the folder belongs to
    check_folder(folder, method_of(to_container(cfg)))
    tags = (str(cfg.checkpoint.name), str(cfg.mitigation.name))
    with tracked(cfg, folder, tags=tags) as tracker:
        return _audit(cfg, folder, tracker)


def _audit(cfg: DictConfig, folder: Path, tracker: Tracker) -> float | None:
    started = datetime.now(UTC)
    bench = set_up(cfg, folder, tracker)
    found = bench.context.find(bench.mitigation, bench.model, bench.suspected)
    drawn = attack_and_draw(bench, found.edit, on_round=partial(track_attack, tracker))
    if not bench.trainer.is_global_zero:
        return None
    measured = measure_all(bench, drawn)
    utility = measure_cost(bench, found.edit, measured.calibration)
    if utility is not None:
        write_utility(utility, folder)
    changed = changed_weights(found.edit, bench.model)
    record = edit_record(found, bench.mitigation.name, changed=changed)
    write_atomically(folder / "edit.json", record)
    report = make_report(
        checkpoint=bench.model.name,
        mitigation=bench.mitigation.name,
        cells=measured.cells,
        calibration=measured.calibration,
        outcomes=measured.outcomes,
        baseline=measured.baseline,
        utility=utility,
        effort=attack_effort(
            measured.outcomes,
            noise_batch=bench.settings.noise_batch,
            picture_evaluations=bench.sampling.steps * bench.sampling.rows_per_step,
        ),
        provenance=provenance_of(cfg, bench.model, bench.pairs, started=started),
        skipped=bench.pairs.skipped,
        inert=changed == 0 and bench.mitigation.name != BASELINE,
    )
    images, max_pairs = cfg.report.images.value, cfg.report.max_pairs
    _write(report, folder, images=images, max_pairs=max_pairs)
    track_report(tracker, report, found, folder, images=images, max_pairs=max_pairs)
    return objective(report)


def _write(report: AuditReport, folder: Path, *, images: Disclosure, max_pairs: int) -> None:
    """Write record, figures and page, and say the answer on the console."""
    write_report(report, folder)
    page = write_audit_page(report, folder, images=images, max_pairs=max_pairs)
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else 120)
    title = f"{INVALID}: {', '.join(report.invalid)}" if report.invalid else None
    console.print(cells_table(report.cells, title=title))
    console.print(report.verdict)
    console.print(f"page: {page}", soft_wrap=True)
