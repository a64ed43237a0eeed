"""Through which door does a model give its training images away, and how much work does it take?

Reference: *Adversarial Work Criterion* (ICML 2026 workshop); Croce and Hein, *Reliable evaluation
of adversarial robustness with an ensemble of diverse parameter-free attacks* (AutoAttack, 2020).
"""

import logging
from datetime import UTC, datetime
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.table import Table

from dori_lightning.audit.context import AuditContext
from dori_lightning.audit.evaluation import (
    calibrate,
    generate_ordinary,
)
from dori_lightning.audit.power import PowerSettings, plant
from dori_lightning.certify.base import Plan, Subject
from dori_lightning.certify.cascade import PROTOCOL, Cascade, CertifySettings, Chosen
from dori_lightning.certify.traces import traces
from dori_lightning.mitigations.base import Evaluations
from dori_lightning.mitigations.edits import EmptyEdit
from dori_lightning.report.certificate import make_certificate, write_certificate
from dori_lightning.runtime import distributed
from dori_lightning.runtime.artifacts import check_folder, write_json
from dori_lightning.runtime.cache import held
from dori_lightning.runtime.logging import answer_console
from dori_lightning.tasks.audit import (
    method_of,
    other_context,
    positive_controls,
    set_up,
)
from dori_lightning.tasks.plan import CHECKPOINTS, PLAN_FILE, count_pairs
from dori_lightning.tasks.results_logging import track_certificate
from dori_lightning.tasks.run_record import FINGERPRINT, provenance_of, to_container, tracked
from dori_lightning.tracking import Tracker
from dori_lightning.types import Calibration, InputError

log = logging.getLogger(__name__)


def run(cfg: DictConfig, folder: Path) -> float | None:
    """Certify a checkpoint under a mitigation; write record, figures and page into ``folder``.

    Returns:
        Work at which the first suspect came back, for sweepers that look for lasting removal: the
        more the better; the most that was spent on one where none did.
    """
    settings, chosen = read_settings(cfg)
    if cfg.task.dry_run:
        plan_certificate(cfg, chosen, folder)
        return None
    method = {**method_of(to_container(cfg)), **_more(settings)}
    check_folder(folder, method, unknown=[FINGERPRINT])
    tags = (str(cfg.checkpoint.name), str(cfg.mitigation.name))
    with tracked(cfg, folder, tags=tags) as tracker:
        return _certify(cfg, folder, settings, chosen, tracker)


def read_settings(cfg: DictConfig) -> tuple[CertifySettings, Chosen]:
    """Read and check the attacks, before anything is loaded.

    Raises:
        InputError: There are none, or one means nothing on this mitigation or family.
    """
    if not cfg.certify:
        raise InputError(
            "task=certify has no attacks",
            where="certify",
            fix="certify=certify_1, or +experiment=certify",
        )
    settings: CertifySettings = instantiate(cfg.certify)
    return settings, settings.choose(_plan(cfg))


def _plan(cfg: DictConfig) -> Plan:
    return Plan(
        mitigation=instantiate(cfg.mitigation),
        family=str(cfg.checkpoint.get("family", "sd")),
        own_tokenizer="source" in cfg.checkpoint,
        sampling=instantiate(cfg.sampling),
    )


def plan_certificate(cfg: DictConfig, chosen: Chosen, folder: Path) -> None:
    """Print what each attack would take at most, and write ``plan.json``; nothing is loaded."""
    pairs, pairs_from = count_pairs(cfg)
    power: PowerSettings = instantiate(cfg.power)
    planted = 0 if power.when == "never" else power.count
    suspects = pairs["vm"] + pairs["tm"]
    images = suspects + pairs["control"] + planted + (suspects if cfg.reference else 0)
    plan, cost = _plan(cfg), CHECKPOINTS.get(str(cfg.checkpoint.name))
    rows = {attack.name: attack.rows(plan) for attack in chosen.attacks}
    devices = list(cost.speeds) if cost else []

    def hours(count: int) -> dict[str, float]:
        # as if each row had the embedding's gradient: an upper bound
        return cost.hours(Evaluations(attack=count)) if cost else {}

    document = {
        "protocol": PROTOCOL,
        "images": images,
        "attacks": {
            name: {"rows_per_image": each, "rows": each * images, "hours": hours(each * images)}
            for name, each in rows.items()
        },
    }
    write_json(folder / PLAN_FILE, document, sort_keys=False)
    table = Table("attack", "its adversary holds", title=f"Plan of {folder.name}, at most")
    for name in ("rows per image", "rows", *(f"h, {device}" for device in devices)):
        table.add_column(name, justify="right")
    holds = {attack.name: attack.holds for attack in chosen.attacks}
    for name, each in [*rows.items(), ("all", sum(rows.values()))]:
        times = (f"{time:.2f}" for time in hours(each * images).values())
        table.add_row(name, holds.get(name, ""), f"{each:,}", f"{each * images:,}", *times)
    console = answer_console(150)
    console.print(table)
    for text in (
        f"{images} images: {suspects} suspects ({pairs_from}), {pairs['control']} controls, "
        f"{planted} planted, {suspects if cfg.reference else 0} on the reference",
        "suspects that come back are not tried again, and attacks end where controls come back",
        *(f"left out: {name}: {why}" for name, why in chosen.left_out.items()),
        "not counted: the mitigation's edit, planting, loading, descriptors",
    ):
        console.print(f"- {text}", highlight=False)


def _more(settings: CertifySettings) -> dict[str, object]:
    """What decides a certificate besides what decides an audit.

    Not the list of attacks: each is kept with its own settings, so a folder may be given more.
    """
    return {"certify": {"max_false_positive": settings.max_false_positive}}


def _certify(
    cfg: DictConfig, folder: Path, settings: CertifySettings, chosen: Chosen, tracker: Tracker
) -> float | None:
    started = datetime.now(UTC)
    context = set_up(cfg, folder, tracker, more=_more(settings))
    edit = context.find_edit().edit
    calibration = find_thresholds(context)
    audited = Subject("audited", context, edit, calibration)
    there = other_context(cfg.reference, context, "reference")
    reference = None
    if there is not None:
        reference = Subject("reference", there, EmptyEdit(), calibration, audited)
    power: PowerSettings = instantiate(cfg.power)
    planted = None
    if power.when != "never":
        copy = plant(context, edit, positive_controls(cfg), power)
        planted = Subject("planted", copy.context, copy.edit, copy.calibration)
    suspects = context.suspected
    controls = [pair for pair in context.pairs if pair.kind == "control"]
    cascade = Cascade(
        settings=settings,
        attacks=chosen.attacks,
        plan=_plan(cfg),
        audited=audited,
        suspects=suspects,
        controls=controls,
        reference=reference,
        planted=planted,
        folder=folder,
    )
    found = cascade.run()
    left = traces(audited, reference, suspects, controls) if reference else ()
    if not distributed.is_first():
        return None
    lost = set(calibration.not_auditable)
    certificate = make_certificate(
        checkpoint=context.model.name,
        mitigation=context.mitigation.name,
        reference=there.model.name if there else "",
        found=found,
        suspects=[pair.id for pair in suspects if pair.id not in lost],
        not_auditable=[pair.id for pair in suspects if pair.id in lost],
        left_out=chosen.left_out,
        traces=left,
        planted=None if planted is None else len(planted.context.pairs),
        provenance=provenance_of(cfg, context.model, context.pairs, started=started),
    )
    page = write_certificate(
        certificate,
        folder,
        pairs=suspects,
        images=cfg.report.images.value,
        max_pairs=cfg.report.max_pairs,
    )
    track_certificate(tracker, certificate, folder)
    console = answer_console()
    console.print(certificate.verdict)
    console.print(f"page: {page}", soft_wrap=True)
    return float(certificate.first_work or certificate.most_work)


def find_thresholds(context: AuditContext) -> Calibration:
    """Set each image's threshold on the checkpoint without an edit, as an audit does."""
    own = context.unmitigated / f"images-{context.trainer.global_rank}.lock"
    own.parent.mkdir(parents=True, exist_ok=True)
    with held(own, "the unmitigated images"):
        generate_ordinary(context)
    distributed.barrier()
    return distributed.broadcast_object(calibrate(context, ()))
