"""Which pairs a checkpoint still reproduces, prompted and attacked, and how sure we are of it."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import instantiate
from rich.console import Console

from dori_lightning.attacks.campaign import Trigger, attack_pairs
from dori_lightning.attacks.embedding_attack import ControlPrompts
from dori_lightning.files import write_atomically
from dori_lightning.metrics.measure import calibrate_measures
from dori_lightning.metrics.replication import cells as cells_of
from dori_lightning.mitigations.edits import EmptyEdit
from dori_lightning.models.pictures import (
    PictureOrder,
    generate_pictures,
    load_pictures,
    picture_seeds,
    unmitigated_name,
)
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.pairs.manifest import check_prompt_lengths
from dori_lightning.progress import stage
from dori_lightning.report.page import write_page
from dori_lightning.report.plots import write_figures
from dori_lightning.report.record import write_report
from dori_lightning.report.tables import cells_table
from dori_lightning.report.verdict import make_report
from dori_lightning.tasks._folder import claim_folder, without
from dori_lightning.tasks._originals import originals_of
from dori_lightning.tasks._plan import plan
from dori_lightning.tasks._provenance import plain, provenance_of
from dori_lightning.tasks._utility import measure_utility
from dori_lightning.tasks._workshop import edit_record, workshop_of
from dori_lightning.types import Condition, InputError, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    import lightning.pytorch as L
    from omegaconf import DictConfig

    from dori_lightning.attacks.settings import AttackSettings
    from dori_lightning.metrics.measure import Measures, Originals
    from dori_lightning.models.protocol import Sampling
    from dori_lightning.models.stable_diffusion import StableDiffusion
    from dori_lightning.report.pictures import Disclosure
    from dori_lightning.report.record import AuditReport
    from dori_lightning.types import Calibration, Pair

__all__ = ["run"]

log = logging.getLogger(__name__)


def run(cfg: DictConfig, folder: Path) -> float | None:
    """Audit a checkpoint and write the report into ``folder``.

    Returns:
        Memorization rate of vm pairs under the strongest condition measured, for sweepers; None
        without vm pairs.
    """
    if cfg.task.dry_run:
        plan(cfg, folder)
        return None
    started = datetime.now(UTC)
    pairs = [pair for pair in instantiate(cfg.pairs).read() if pair.role == "audit"]
    settings, sampling, measures = (
        instantiate(cfg.attack),
        instantiate(cfg.sampling),
        instantiate(cfg.metrics),
    )
    mitigation, spent = instantiate(cfg.mitigation), instantiate(cfg.utility)
    check_controls(pairs, settings, measures)
    claim_folder(folder, method_of(plain(cfg)))
    loggers = [instantiate(node)(save_dir=folder) for node in cfg.logger.values()]
    trainer = instantiate(cfg.trainer, default_root_dir=folder, logger=loggers or False)
    model = instantiate(cfg.checkpoint)
    check_prompt_lengths(
        pairs, model.token_count, model.embedding_shape[0], strict=cfg.task.strict_prompts
    )

    data = PairsDataModule(
        pairs,
        model,
        pairs_per_batch=settings.pairs_per_forward,
        cache=Path(cfg.paths.cache) / "encoded",
    )
    data.prepare()
    controls = [pair for pair in pairs if pair.kind == "control"]
    prompts = ControlPrompts(
        tuple(p.id for p in controls), data.batch(controls).embeddings if controls else None
    )
    budget = settings.budget.resolve(prompts.embeddings)

    originals = originals_of(pairs, model.resolution, measures)
    workshop = workshop_of(cfg, data=data, originals=originals, sampling=sampling)
    suspected = [pair for pair in pairs if pair.kind != "control"]
    found = workshop.find(mitigation, model, suspected)
    edit, edited = found.edit, not isinstance(found.edit, EmptyEdit)
    prompted = [
        Trigger(pair, Condition("prompt"), 0, data.encoded(pair).embedding) for pair in pairs
    ]
    # what the checkpoint as it is draws, shared by the jobs of a sweep
    unmitigated = Path(cfg.paths.cache) / "unmitigated" / unmitigated_name(model, sampling)
    if edited:
        _draw(model, prompted, unmitigated, sampling, trainer, title="before")
    with edit.applied(model):
        triggers = [
            *prompted,
            *attack_pairs(
                model,
                pairs,
                trainer=trainer,
                data=data,
                settings=settings,
                budget=budget,
                controls=prompts,
                folder=folder / "attacks",
                seed=cfg.seed,
                edit=edit.identity,
            ),
        ]
        _draw(model, triggers, folder / "pictures", sampling, trainer, edit=edit.identity)
    trainer.strategy.barrier()
    if not trainer.is_global_zero:
        return None

    outcomes = [_measure(t, folder / "pictures", sampling, originals) for t in triggers]
    baseline = [_measure(t, unmitigated, sampling, originals) for t in prompted if edited]
    calibration = _calibrate(model, data, originals, baseline or outcomes)
    cells = cells_of(
        outcomes,
        calibration,
        checkpoint=model.name,
        mitigation=mitigation.name,
        aggregation=measures.aggregation,
    )
    if baseline:
        cells += cells_of(
            baseline,
            calibration,
            checkpoint=model.name,
            mitigation="none",
            aggregation=measures.aggregation,
        )
    write_atomically(folder / "edit.json", edit_record(found, mitigation.name))
    utility = None
    if edited and spent.asked:
        utility = measure_utility(
            model,
            edit,
            pairs=suspected,
            corpus=workshop.corpus,
            originals=originals,
            sampling=sampling,
            settings=spent,
            folder=folder,
            cache=Path(cfg.paths.cache) / "unmitigated",
            descriptor=calibration.descriptor,
            threshold=calibration.threshold,
            seed=cfg.seed,
        )
    report = make_report(
        checkpoint=model.name,
        mitigation=mitigation.name,
        cells=cells,
        calibration=calibration,
        outcomes=outcomes,
        baseline=baseline,
        utility=utility,
        provenance=provenance_of(cfg, model, pairs, started=started),
    )
    _write(report, folder, images=cfg.report.images.value, max_pairs=cfg.report.max_pairs)
    rates = [cell.mr for cell in cells if cell.kind == "vm" and cell.n]
    return max(rates) if rates else None


def method_of(cfg: dict[str, Any]) -> dict[str, Any]:
    """What decides the results of an audit, out of its resolved configuration.

    How much is measured of a mitigation's cost is not among it: that is measured anew each time.
    """
    return {
        "seed": cfg["seed"],
        "checkpoint": without(cfg["checkpoint"], "device", "channels_last"),
        "mitigation": cfg["mitigation"],
        "corpus": cfg["corpus"],
        "attack": without(cfg["attack"], "pairs_per_forward"),
        "sampling": without(cfg["sampling"], "batch"),
        "pairs": without(cfg["pairs"], "cache"),
    }


def check_controls(pairs: Sequence[Pair], settings: AttackSettings, measures: Measures) -> None:
    """Refuse early what would fail for want of control pairs after hours of work.

    Raises:
        InputError: Says what needs them.
    """
    controls = sum(pair.kind == "control" for pair in pairs)
    if not controls and measures.descriptors[measures.decider].threshold is None:
        raise InputError(
            f"{measures.decider} has no threshold of its own, it is calibrated on control pairs, "
            f"and the list has none\n"
            f"  mend:  add pairs of kind control (pictures the checkpoint cannot hold, with their "
            f"prompts), or fix it with metrics.descriptors.{measures.decider}.threshold=NUMBER"
        )
    if "control_prompt" in settings.inits and controls < 2:
        raise InputError(
            f"attack.inits has control_prompt, but the list has {controls} control pairs\n"
            f"  mend:  add pairs of kind control, or drop control_prompt from attack.inits"
        )


def _place(folder: Path, trigger: Trigger) -> Path:
    """Where a trigger's pictures go."""
    condition = trigger.condition
    if condition.attack == "prompt":
        return folder / "prompt" / trigger.pair.id
    name = f"dori_{condition.init}_r{trigger.restart}_s{condition.budget.steps}"
    return folder / name / trigger.pair.id


def _draw(
    model: StableDiffusion,
    triggers: Sequence[Trigger],
    folder: Path,
    sampling: Sampling,
    trainer: L.Trainer,
    *,
    edit: str = "none",
    title: str = "generate",
) -> None:
    """Generate this process's share of the triggers' pictures."""
    orders = [PictureOrder(_place(folder, t), t.embedding, t.pair.id) for t in triggers]
    own = orders[trainer.global_rank :: trainer.world_size]
    total = len(own) * sampling.images_per_pair
    with stage(title, total, visible=trainer.is_global_zero) as advance:
        generate_pictures(model, own, sampling, edit=edit, advance=advance)


def _measure(trigger: Trigger, folder: Path, sampling: Sampling, originals: Originals) -> Outcome:
    """Compare a trigger's pictures with its original."""
    seeds, place = picture_seeds(sampling), _place(folder, trigger)
    measured = originals.measure(
        trigger.pair, load_pictures(place, seeds), failed=trigger.diverged
    )
    return Outcome(
        pair=trigger.pair,
        condition=trigger.condition,
        restart=trigger.restart,
        status="diverged" if trigger.diverged else "ok",
        seeds=seeds,
        similarity=measured.similarity,
        diversity=measured.diversity,
        lpips=measured.lpips,
        alignment=measured.alignment,
        loss_first=trigger.loss_first,
        loss_last=trigger.loss_last,
        displacement=trigger.displacement,
        images=tuple(place / f"{seed}.png" for seed in seeds),
    )


def _calibrate(
    model: StableDiffusion,
    data: PairsDataModule,
    originals: Originals,
    outcomes: Sequence[Outcome],
) -> Calibration:
    """Set the threshold from what unattacked prompts give and what the autoencoder can give."""
    prompted = [outcome for outcome in outcomes if outcome.condition.attack == "prompt"]
    pictures = {o.pair.id: load_pictures(o.images[0].parent, o.seeds) for o in prompted}
    latents = [data.encoded(pair).latent[None].to(model.device) for pair in originals.pairs]
    reconstructions = torch.cat([model.decode_latents(latent).cpu() for latent in latents])
    return calibrate_measures(
        originals, prompted, pictures=pictures, reconstructions=reconstructions
    )


def _write(report: AuditReport, folder: Path, *, images: Disclosure, max_pairs: int) -> None:
    """Write record, figures and page, and say the answer on the console."""
    write_report(report, folder)
    write_figures(report, folder, images=images)
    page = write_page(report, folder, images=images, max_pairs=max_pairs)
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else 120)
    console.print(cells_table(report.cells))
    console.print(report.verdict)
    console.print(f"page: {page}", soft_wrap=True)
