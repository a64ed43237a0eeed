"""What an audit or a sweep would take, estimated from its configuration alone.

A dry run loads no weights, images or corpus. It counts what is known beforehand (attacks, images,
evaluations of the denoiser) and estimates GPU hours and disk space from them; what cannot be known
is listed as not counted. What finding an edit takes, each mitigation says itself
(``CostEstimate``).
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from rich.table import Table

from dori_lightning.attacks.budget import AttackSettings, evaluation_steps
from dori_lightning.audit.loss_evidence import LOSS_ROWS
from dori_lightning.audit.power import PowerSettings
from dori_lightning.config import base_checkpoint
from dori_lightning.metrics.evidence import EvidenceSettings, nulls_among
from dori_lightning.mitigations.base import CostEstimate, Evaluations, Mitigation, check_family
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.models.lora import LoraSetting, lora_entries
from dori_lightning.models.protocol import Sampling
from dori_lightning.pairs.copies import counted_with_copies
from dori_lightning.pairs.corpus import ORDINARY_PROMPTS
from dori_lightning.report.words import claims_words
from dori_lightning.runtime.artifacts import content_hash, drop_keys, write_json
from dori_lightning.runtime.logging import answer_console
from dori_lightning.tasks.run_record import to_container
from dori_lightning.tasks.status import jobs_of
from dori_lightning.types import KINDS, InputError, Kind, first_line

log = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
UNKNOWN = "unknown, this mitigation gives no estimate"

PEAK_FRACTION = 0.30
"""Share of a card's dense bf16 peak that the estimate assumes.

Published throughputs of diffusers and of MosaicML's training imply 27 to 39 % of an A100's at
batches of 8 to 128.
"""

PNG_BYTES_PER_PIXEL = 1.6
"""Of a photograph: about half of its three bytes; an assumption."""


@dataclass(frozen=True)
class CheckpointCost:
    """One checkpoint's architecture in numbers.

    Operations were counted with ``torch.utils.flop_counter`` on the architectures without weights,
    a multiply-add as two. The gradient of the embedding alone takes about as long as the forward
    pass, since weights are frozen. The often quoted 338.7 GMAC or 0.68 TFLOP of SD 1.x leave out
    the products inside attention.

    Attributes:
        forward: TFLOP of a row of the denoiser.
        to_embedding: TFLOP more for the gradient of the embedding.
        to_weights: TFLOP more for the gradient of all weights.
        decode: TFLOP to decode an image.
        parameters: Weights of the denoiser.
        embedding: Numbers of a text embedding.
        resolution: Pixels of an image's side.
        speeds: TFLOP per second by device.
    """

    forward: float
    to_embedding: float
    to_weights: float
    decode: float
    parameters: int
    embedding: int
    resolution: int
    speeds: dict[str, float]

    def tflop(self, work: Evaluations) -> float:
        """Operations of some work."""
        return (
            (work.forward + work.attack + work.training) * self.forward
            + work.attack * self.to_embedding
            + work.training * self.to_weights
            + work.decoded * self.decode
        )

    def hours(self, work: Evaluations) -> dict[str, float]:
        """Estimated hours of some work by device."""
        return {name: self.tflop(work) / speed / 3600 for name, speed in self.speeds.items()}


_CARDS = {"H100": 989.0 * PEAK_FRACTION, "A100": 312.0 * PEAK_FRACTION}
_TWO_CORES = {"two CPU cores": 400 * (0.484e-3 + 0.505e-3) / 4.0}
"""As fast as the attack on the planted checkpoint: 4 s for 50 steps of 8 rows."""

_SD1 = CheckpointCost(0.8033, 0.8659, 1.6035, 2.5145, 859_520_964, 77 * 768, 512, _CARDS)
_SD2 = CheckpointCost(0.8043, 0.8669, 1.6045, 2.5145, 865_910_724, 77 * 1024, 512, _CARDS)
_SD2_768 = CheckpointCost(2.1491, 2.5138, 4.2941, 5.7543, 865_910_724, 77 * 1024, 768, _CARDS)
_SDXL = CheckpointCost(6.7612, 7.5146, 13.4696, 10.4704, 2_567_463_684, 79 * 2048, 1024, _CARDS)
_SD3M = CheckpointCost(8.9043, 11.796, 17.8037, 10.472, 2_028_328_000, 334 * 4096, 1024, _CARDS)
_SD35M = CheckpointCost(11.2496, 15.4813, 22.4941, 10.472, 2_243_171_520, 334 * 4096, 1024, _CARDS)
_SD35L = CheckpointCost(31.1211, 38.3712, 62.2343, 10.472, 8_056_627_520, 334 * 4096, 1024, _CARDS)
_FLUXD = CheckpointCost(74.385, 89.255, 148.755, 10.472, 11_901_408_320, 513 * 4096, 1024, _CARDS)
_FLUXS = CheckpointCost(69.467, 82.731, 138.925, 10.472, 11_891_178_560, 257 * 4096, 1024, _CARDS)
_PIXART = CheckpointCost(6.6336, 8.7448, 13.2642, 10.4704, 610_856_096, 301 * 4096, 1024, _CARDS)
_TINY = CheckpointCost(0.484e-3, 0.505e-3, 0.960e-3, 1.259e-3, 8_687_464, 16 * 96, 64, _TWO_CORES)

CHECKPOINTS = {
    "sd14": _SD1, "sd15": _SD1, "sd20_base": _SD2, "sd20": _SD2_768, "sd21": _SD2_768,
    "sdxl": _SDXL,
    "sd3_medium": _SD3M, "sd35_medium": _SD35M, "sd35_large": _SD35L,
    "flux1_dev": _FLUXD, "flux1_schnell": _FLUXS, "pixart_sigma": _PIXART,
    "dori_tiny": _TINY, "dori_tiny_twin": _TINY,
}  # fmt: skip
"""By the name of the checkpoint; others have no known cost."""

KEPT = {
    "sdxl": (4247, 480),
    "sd3_medium": (4366, 335), "sd35_medium": (7980, 335), "sd35_large": (15673, 819),
    "flux1_dev": (24704, 699), "pixart_sigma": (3028, 262),
}  # fmt: skip
"""MiB that a noise sample keeps for the gradient, in bf16 and at the checkpoint's own resolution:
of a whole pass, and of the inputs of blocks, which gradient checkpointing keeps. Counted without
weights."""


@dataclass(frozen=True)
class Part:
    """Work that is done once.

    Attributes:
        what: What it is, for a reader.
        work: Its evaluations.
        hours: Estimated hours by device; empty where the checkpoint's cost is unknown.
        bytes: Estimated disk space; None where the checkpoint's sizes are unknown.
        not_counted: Why evaluations are missing or may be fewer; empty where they are exact.
    """

    what: str
    work: Evaluations
    hours: dict[str, float]
    bytes: float | None
    not_counted: str = ""


@dataclass(frozen=True)
class JobPlan:
    """What one audit would take.

    Attributes:
        audit: What no other job can do: the attacks, and the images of this mitigation.
        shared: What jobs of a sweep share, by key: edits, and the unmitigated model's images.
        mitigation: Name of the mitigation.
        pairs: Pairs by kind.
        attacks: Embeddings that are searched.
        remarks: What the numbers assume.
    """

    audit: Part
    shared: dict[str, Part]
    mitigation: str
    pairs: dict[Kind, int]
    attacks: int
    remarks: tuple[str, ...]


_PLAN = TypeAdapter(JobPlan)


def plan(cfg: DictConfig, folder: Path) -> None:
    """Print what an audit would take and write ``plan.json`` into ``folder``.

    A job of a sweep whose end adds up the plans leaves the printing to that.
    """
    job = plan_of(cfg)
    write_json(folder / PLAN_FILE, asdict(job), sort_keys=False)
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    if hydra is None or hydra.mode is not RunMode.MULTIRUN or not hydra.callbacks:
        _print({folder.name: job}, title=f"Plan of {folder.name}: nothing is computed")


def sum_plans(folder: Path) -> None:
    """Add up the plans of a sweep's jobs, print them and write ``plan.json`` into ``folder``.

    Work that jobs share is counted once.

    Raises:
        InputError: No job left a plan.
    """
    jobs = jobs_of([folder], planned=True)
    plans = {
        place.name.removesuffix(",task.dry_run=True"): _PLAN.validate_json(
            (place / PLAN_FILE).read_bytes()
        )
        for place in jobs.folders
        if (place / PLAN_FILE).is_file()
    }
    if not plans:
        raise InputError(
            f"no job of the sweep left a {PLAN_FILE}\n  where: {folder}\n"
            f"  fix:   run it again with task.dry_run=true, and see why its jobs fail"
        )
    missing = len(jobs.folders) + len(jobs.unstarted) - len(plans)
    if missing:
        log.warning("%d jobs have no plan: the sum is without them", missing)
    total = _print(plans, title=f"Plan of the sweep {folder.name}: nothing is computed")
    record = {"jobs": len(plans), "without_plan": missing, **asdict(total)}
    write_json(folder / PLAN_FILE, record, sort_keys=False)


def attack_settings(cfg: DictConfig) -> AttackSettings:
    """The search that ``attack`` names.

    Raises:
        InputError: It names another way into the model.
    """
    found = instantiate(cfg.attack)
    if not isinstance(found, AttackSettings):
        name = cfg.attack.get("name", "this")
        raise InputError(
            f"attack {name} is no search for embeddings, which is what task={cfg.task.name} runs",
            where=f"attack={name}",
            fix=f"+experiment=certify 'certify.paths=[{name}]'",
        )
    return found


def plan_of(cfg: DictConfig) -> JobPlan:
    """Count what an audit would take.

    Raises:
        InputError: Settings of the attack, the mitigation or ``task.assume_pairs`` are impossible,
            the mitigation is not defined on the checkpoint's family, or the list has too few
            controls for the error rate asked for.
    """
    settings = attack_settings(cfg)
    sampling: Sampling = instantiate(cfg.sampling)
    mitigation: Mitigation = instantiate(cfg.mitigation)
    check_family(mitigation, cfg.checkpoint.get("family", "sd"))
    pairs, pairs_from = count_pairs(cfg)
    config = to_container(cfg)
    part = partial(_part, CHECKPOINTS.get(str(cfg.checkpoint.name)))
    steps = settings.budget.steps
    snapshots = len(evaluation_steps(settings.stops, steps))
    attacks = settings.restarts * sum(
        count * len(settings.inits_of(kind)) for kind, count in pairs.items()
    )
    everyone, suspected = sum(pairs.values()), pairs.get("vm", 0) + pairs.get("tm", 0)
    searches = _searches(settings, sampling, attacks)
    prompts = Evaluations.of_images(everyone * sampling.images_per_pair, sampling)
    work, images = searches + prompts, searches.decoded + prompts.decoded
    if config["evidence"]["losses"]:  # under the empty prompt, the own one and each start
        asked = 2 * everyone + attacks // settings.restarts
        work += Evaluations(forward=asked * LOSS_ROWS)
    # all that decides the work which jobs of a sweep may share
    decides = {
        "checkpoint": drop_keys(config["checkpoint"], "device", "channels_last", "base"),
        "pairs": drop_keys(config["pairs"], "cache"),
        "corpus": config["corpus"],
        "sampling": drop_keys(config["sampling"], "batch"),
        "seed": config["seed"],
    }
    ordinary = Evaluations.of_images(ORDINARY_PROMPTS * sampling.images_per_pair, sampling)
    shared = {
        content_hash([decides, "ordinary"]): part(
            "images of ordinary prompts", ordinary, images=ordinary.decoded
        )
    }
    if config["reference"]:
        # attacked in each job's folder: its key is no other job's
        shared[content_hash(["reference", config])] = part(
            "the reference model", work + ordinary, images=images, embeddings=attacks * snapshots
        )
    base = base_checkpoint(config["checkpoint"])
    if base:
        shared[content_hash(["base", config])] = part(
            f"its base, {base['name']}",
            work + ordinary,
            images=images,
            embeddings=attacks * snapshots,
        )
    adjusted = 0
    for method, estimate in _edits(mitigation, sampling, suspected):
        key = content_hash([decides, repr(replace(method, name=""))])  # type: ignore[type-var]
        stored, unknown = estimate.stored_weights, estimate.not_counted
        shared[key] = part(f"edit {method.name}", estimate.work, unknown, weights=stored)
        adjusted = estimate.evaluations_per_image  # of the mitigation itself, which comes last
    if not isinstance(mitigation, NoMitigation):  # compared with the unmitigated model
        utility = _utility(config["utility"], suspected, sampling)
        images += utility.decoded
        work += utility + Evaluations(forward=adjusted * images, attack=adjusted * images)
        before = Evaluations.of_images(everyone * sampling.images_per_pair, sampling) + utility
        shared[content_hash([decides, config["utility"]])] = part(
            "the unmitigated model", before, images=before.decoded
        )
    return JobPlan(
        audit=part("audit", work, images=images, embeddings=attacks * snapshots),
        shared=shared,
        mitigation=mitigation.name,
        pairs=pairs,
        attacks=attacks,
        remarks=(
            *_remarks(pairs, pairs_from, str(cfg.checkpoint.name)),
            *_lora_remarks(str(cfg.checkpoint.name), cfg.checkpoint.get("lora")),
            *_early_remarks(settings, sampling, pairs),
            *_evidence_remarks(pairs, instantiate(cfg.evidence), reference=bool(cfg.reference)),
            *_power_remarks(instantiate(cfg.power), attack=steps * settings.noise_batch),
        ),
    )


def _edits(
    mitigation: Mitigation, sampling: Sampling, pairs: int
) -> Iterator[tuple[Mitigation, CostEstimate]]:
    """Estimates of a mitigation's edit and of those it builds on, which come first."""
    if isinstance(mitigation, NoMitigation):
        return
    estimate = CostEstimate(not_counted=UNKNOWN)
    if hasattr(mitigation, "estimate_cost"):
        estimate = mitigation.estimate_cost(sampling, pairs)
    for method in estimate.builds_on:
        yield from _edits(method, sampling, pairs)
    yield mitigation, estimate


def count_pairs(cfg: DictConfig) -> tuple[dict[Kind, int], str]:
    """Count the pairs of the list, or take the assumed numbers where it cannot be read."""
    try:
        missing = OmegaConf.missing_keys(cfg.pairs)
        if missing:
            raise InputError(f"{sorted(missing)[0]} is not given")
        kinds = [pair.kind for pair in instantiate(cfg.pairs).read() if pair.role == "audit"]
        counts = {kind: kinds.count(kind) for kind in KINDS}
    except InputError as error:
        reason = first_line(error)
    else:
        attacked = counted_with_copies(counts, cfg.pairs.self_controls)
        instantiate(cfg.evidence).check_nulls(attacked, reference=bool(cfg.reference))
        return attacked, "as listed" + (" with self-controls" if attacked != counts else "")
    assumed: Any = OmegaConf.to_container(cfg.task.assume_pairs, resolve=True)
    try:
        counts = TypeAdapter(dict[Kind, NonNegativeInt]).validate_python(assumed, strict=True)
    except ValidationError:
        raise InputError(
            f"task.assume_pairs cannot be {assumed!r}",
            where="task.assume_pairs",
            fix="pairs by kind, as in {vm: 112, tm: 388, control: 500}",
        ) from None
    return counts, f"assumed: {reason}"


def _utility(settings: Mapping[str, Any], suspected: int, sampling: Sampling) -> Evaluations:
    """What measuring utility takes of either model, mitigated and not."""
    images = settings["prompts"] * settings["pictures"]
    images += suspected * settings["neighbours"] * settings["neighbour_pictures"]
    losses = Evaluations(forward=settings["examples"] * settings["draws"])
    return losses + Evaluations.of_images(images, sampling)


def _part(
    cost: CheckpointCost | None,
    what: str,
    work: Evaluations,
    not_counted: str = "",
    *,
    images: int = 0,
    embeddings: int = 0,
    weights: float = 0.0,
) -> Part:
    """Work, and the images, embeddings and share of the denoiser's weights that it stores."""
    if cost is None:
        return Part(what, work, {}, None, not_counted)
    size = images * PNG_BYTES_PER_PIXEL * cost.resolution**2
    size += 4 * (embeddings * cost.embedding + weights * cost.parameters)
    return Part(what, work, cost.hours(work), size, not_counted)


def _searches(settings: AttackSettings, sampling: Sampling, attacks: float) -> Evaluations:
    """Work of a number of searches that take all their steps, and of their images."""
    steps, drawn = settings.budget.steps, sampling.images_per_pair
    rated = evaluation_steps(settings.snapshots, steps)
    looks = [look for look in settings.looks if look < steps and look not in rated]
    each = len(rated) * drawn + len(looks) * (1 if settings.one_image else drawn)
    work = Evaluations(attack=round(attacks * steps * settings.noise_batch))
    return work + Evaluations.of_images(round(attacks * each), sampling)


def _early_remarks(
    settings: AttackSettings, sampling: Sampling, pairs: Mapping[Kind, int]
) -> Iterator[str]:
    """That searches may end before their last step, and what is left of them then."""
    if not settings.early_stop:
        return
    yield "attack.early_stop: counted as if no image came back before the last step"
    controls = pairs.get("control", 0)
    if settings.futility is None or not controls:
        return
    searched = min(1.0, max(settings.futility, 2 / (1 + controls)))
    held = unheld = Evaluations()
    for kind, count in pairs.items():
        for init in settings.inits_of(kind):
            attacks = settings.restarts * count
            chosen = _searches(settings, sampling, attacks * searched)
            back = Evaluations()
            if init != "prompt":
                back = Evaluations(attack=attacks * settings.stops[0] * settings.noise_batch)
                back += Evaluations.of_images(attacks, sampling)
            held += chosen if kind == "control" else back
            unheld += chosen
    yield (
        f"attack.futility: searches and their images take about {held.attack + held.forward:,} "
        f"evaluations where prompts, or the first look, bring all suspects back, "
        f"{unheld.attack + unheld.forward:,} where none is held"
    )


def _remarks(pairs: Mapping[Kind, int], pairs_from: str, checkpoint: str) -> Iterator[str]:
    """What the numbers of an audit assume."""
    yield f"pairs ({'+'.join(pairs)}) {pairs_from}"
    cost = CHECKPOINTS.get(checkpoint)
    if cost is None:
        yield f"not counted: hours and disk of {checkpoint}, whose denoiser's cost is not known"
    else:
        speeds = (f"{_flop(speed)}/s on {device}" for device, speed in cost.speeds.items())
        yield (
            f"{checkpoint}: a row takes {_flop(cost.forward)} forward, "
            f"{_flop(cost.forward + cost.to_embedding)} with the embedding's gradient, "
            f"{_flop(cost.forward + cost.to_weights)} with that of all weights; "
            f"{', '.join(speeds)}"
        )
        if checkpoint in KEPT:
            whole, inputs = (_size(kept * 2**20) for kept in KEPT[checkpoint])
            yield (
                f"{checkpoint}: {_size(2 * cost.parameters)} of weights in bf16; a noise sample "
                f"keeps {whole} for the gradient, or with checkpoint.gradient_checkpointing=true "
                f"{inputs} beside one block; attack.samples_per_forward says how many at once"
            )
        if cost.speeds is _CARDS:
            yield f"hours are of one card at {PEAK_FRACTION:.0%} of its dense bf16 peak: estimates"


def _lora_remarks(checkpoint: str, setting: LoraSetting | None) -> Iterator[str]:
    """What is added to the checkpoint's weights before it is audited."""
    for path, scale in lora_entries(setting):
        yield f"{checkpoint} with LoRA {Path(path).name} at scale {scale:g}"


def _evidence_remarks(
    pairs: Mapping[Kind, int], evidence: EvidenceSettings, *, reference: bool
) -> Iterator[str]:
    """What so many controls can show of one image alone and of all together."""
    suspects, nulls = pairs["vm"] + pairs["tm"], nulls_among(pairs, reference=reference)
    if suspects:
        yield claims_words(suspects, nulls, evidence.rate)


def _power_remarks(settings: PowerSettings, *, attack: int) -> Iterator[str]:
    """What measuring the attack's power would add.

    Args:
        settings: How it is measured.
        attack: UNet evaluations of one attack.
    """
    if settings.when == "never":
        return
    trained = settings.steps * settings.rounds * settings.rows
    where = {"always": "", "nothing_found": " where nothing is found"}[settings.when]
    yield (
        f"not counted: the attack's power{where}: {settings.count} images planted by up to "
        f"{trained:,} evaluations with the gradient of all weights, and attacked by "
        f"{settings.count * attack:,}"
    )


def _print(plans: Mapping[str, JobPlan], *, title: str) -> Part:
    """Show the jobs by name, what they share, and the sum, which is returned."""
    shared = {key: part for job in plans.values() for key, part in job.shared.items()}.values()
    parts = [*(job.audit for job in plans.values()), *shared]
    devices = {device: None for part in parts for device in part.hours}
    total = Part(
        "total",
        sum((part.work for part in parts), start=Evaluations()),
        {device: sum(part.hours.get(device, 0.0) for part in parts) for device in devices},
        sum(part.bytes or 0.0 for part in parts),
    )
    table = Table("job", title=title, title_justify="left")
    table.columns[0].overflow = "fold"
    for name in (
        "pairs", "attacks", "forward+backward", "forward", "training", "images",
        *(f"h, {device}" for device in devices), "disk",
    ):  # fmt: skip
        table.add_column(name, justify="right")

    def row(name: str, part: Part, pairs: str = "", attacks: str = "") -> None:
        work = part.work
        counts = (work.attack, work.forward, work.training, work.decoded)
        hours = (_time(part.hours.get(device)) for device in devices)
        table.add_row(name, pairs, attacks, *map("{:,}".format, counts), *hours, _size(part.bytes))

    for name, job in plans.items():
        row(name, job.audit, "+".join(map(str, job.pairs.values())), f"{job.attacks:,}")
    table.add_section()
    for part in shared:
        row(f"{part.what}, once", part)
    table.add_section()
    row("total", total, attacks=f"{sum(job.attacks for job in plans.values()):,}")
    console = answer_console(150)
    console.print(table)
    remarks = [text for job in plans.values() for text in job.remarks]
    remarks += [f"not counted: {p.what}: {p.not_counted}" for p in shared if p.not_counted]
    remarks.append("not counted: loading, encoding of images, descriptors and reports")
    for text in dict.fromkeys(remarks):
        console.print(f"- {text}", highlight=False)
    return total


def _time(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:,.1f}" if hours >= 10 else f"{hours:.2f}"


def _size(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def _flop(tflop: float) -> str:
    return f"{tflop:,.2f} TFLOP" if tflop >= 0.1 else f"{1e3 * tflop:,.2f} GFLOP"
