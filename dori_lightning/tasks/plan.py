"""What a job would take, said before it starts: a dry run needs no weights, list or pictures."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from dori_lightning.attacks.budget import AttackSettings, evaluation_steps
from dori_lightning.models.protocol import Sampling
from dori_lightning.runtime.artifacts import drop_keys, write_atomically
from dori_lightning.tasks.run_record import to_container
from dori_lightning.tasks.status import jobs_of
from dori_lightning.types import KINDS, InputError

# -------- plan_costs
# What an evaluation of a checkpoint's denoiser costs, counted on its architecture.
#
# Operations per row were counted with ``torch.utils.flop_counter`` on the architectures of the
# checkpoints without weights, one multiply-add as two operations: for SD 1.x at 64 x 64 latents
# 0.80 TFLOP forward, and 0.87 more for the gradient of the embedding alone (weights are frozen,
# so the backward pass is about as long as the forward pass, not twice), or 1.60 more for that of
# all weights. The same forward pass is often quoted as 338.7 GMAC or 0.68 TFLOP: that leaves out
# the products inside attention.
#
# How much of a card's peak this work reaches decides the hours. Published throughputs of
# diffusers and of MosaicML's training imply 27 to 39 % of an A100's dense bf16 peak at batches
# of 8 to 128; here it is 30 % for every card. For the embedded benchmark the speed is that of
# the attack on two CPU cores, 4 s for 50 steps of 8 rows.

FRACTION = 0.30
"""Share of a card's peak that the estimate assumes."""

_PEAK = {"H100": 989.0, "A100": 312.0}
"""Dense bf16 peak, TFLOP/s (SXM cards)."""
_CARDS = {name: peak * FRACTION for name, peak in _PEAK.items()}
_TWO_CORES = {"two CPU cores": 400 * (0.484e-3 + 0.505e-3) / 4.0}

BYTES_PER_PIXEL = 1.6
"""Of a photograph as PNG: about half of its three bytes; an assumption."""


@dataclass(frozen=True)
class Evaluations:
    """Work, in rows that go through the denoiser or the decoder.

    Attributes:
        forward: Without gradient.
        attack: With the gradient of the embedding.
        training: With the gradient of the weights.
        decoded: Latents that are decoded to pictures.
    """

    forward: int = 0
    attack: int = 0
    training: int = 0
    decoded: int = 0

    def __add__(self, other: Evaluations) -> Evaluations:
        return Evaluations(
            self.forward + other.forward,
            self.attack + other.attack,
            self.training + other.training,
            self.decoded + other.decoded,
        )

    @property
    def rows(self) -> int:
        """Rows that go through the denoiser."""
        return self.forward + self.attack + self.training


def drawn(pictures: int, sampling: Sampling) -> Evaluations:
    """Work of drawing pictures; guidance takes two rows a step."""
    halves = 1 if sampling.guidance == 1 else 2
    return Evaluations(forward=pictures * sampling.steps * halves, decoded=pictures)


@dataclass(frozen=True)
class CheckpointCost:
    """One checkpoint's architecture in numbers.

    Attributes:
        forward: TFLOP of a row of the denoiser.
        to_embedding: TFLOP more for the gradient of the embedding.
        to_weights: TFLOP more for the gradient of all weights.
        decode: TFLOP to decode a picture.
        parameters: Weights of the denoiser.
        embedding: Numbers of a text embedding.
        resolution: Pixels of a picture's side.
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
            work.rows * self.forward
            + work.attack * self.to_embedding
            + work.training * self.to_weights
            + work.decoded * self.decode
        )

    def hours(self, work: Evaluations) -> dict[str, float]:
        """Estimated hours of some work by device."""
        return {name: self.tflop(work) / speed / 3600 for name, speed in self.speeds.items()}

    @property
    def picture_bytes(self) -> float:
        """Estimated size of a picture's file."""
        return BYTES_PER_PIXEL * self.resolution**2


_SD1 = CheckpointCost(0.8033, 0.8659, 1.6035, 2.5145, 859_520_964, 77 * 768, 512, _CARDS)
_SD2 = CheckpointCost(0.8043, 0.8669, 1.6045, 2.5145, 865_910_724, 77 * 1024, 512, _CARDS)
_SD2_768 = CheckpointCost(2.1491, 2.5138, 4.2941, 5.7543, 865_910_724, 77 * 1024, 768, _CARDS)

CHECKPOINTS: dict[str, CheckpointCost] = {
    "sd14": _SD1,
    "sd15": _SD1,
    "sd20_base": _SD2,
    "sd20": _SD2_768,
    "sd21": _SD2_768,
    "dori_tiny": CheckpointCost(
        0.484e-3, 0.505e-3, 0.960e-3, 1.259e-3, 8_687_464, 16 * 96, 64, _TWO_CORES
    ),
}
"""By the name of the checkpoint; others have no known cost."""


# -------- plan_edits
# What finding an edit takes, as far as its settings say it beforehand.


@dataclass(frozen=True)
class Part:
    """A piece of work that jobs of a sweep may share.

    Attributes:
        what: What it is, for a reader.
        work: Its evaluations.
        unknown: Why they are not all known beforehand; empty where they are.
        weights: Share of the denoiser's weights that the edit stores.
        pictures: Pictures that are kept.
    """

    what: str
    work: Evaluations
    unknown: str = ""
    weights: float = 0.0
    pictures: int = 0


def edit_parts(
    settings: Mapping[str, Any], *, suspected: int, sampling: Sampling, shared: str
) -> dict[str, Part]:
    """List what finding an edit takes, with the edits that it builds on.

    Args:
        settings: A mitigation's node of the configuration, resolved.
        suspected: Pairs to forget.
        sampling: How pictures are generated.
        shared: What else decides edits, such as the checkpoint and the pairs.

    Returns:
        Key of each edit to its work. Equal keys are one edit, made once in a sweep.
    """
    kind = str(settings.get("_target_", "")).rpartition(".")[2]
    name = str(settings.get("name", kind))
    if kind == "NoMitigation":
        return {}
    to_container = {k: v for k, v in settings.items() if k != "name"}
    identity = json.dumps([shared, to_container], sort_keys=True, default=str)
    key = hashlib.sha256(identity.encode()).hexdigest()[:24]
    estimate = KNOWN.get(kind)
    part = (
        Part(f"edit {name}", Evaluations(), "no estimate for this mitigation")
        if estimate is None
        else estimate(name, settings, suspected, sampling)
    )
    nested: dict[str, Part] = {}
    for inner in (settings.get("like"), (settings.get("surrogates") or {}).get("source")):
        if inner is not None:
            nested |= edit_parts(inner, suspected=suspected, sampling=sampling, shared=shared)
    return {**nested, key: part}


def inference_work(settings: Mapping[str, Any], pictures: int) -> Evaluations:
    """What a mitigation adds to every picture that is drawn under it, at most."""
    if str(settings.get("_target_", "")).endswith(".PromptAdjustment"):
        steps = int(settings["adjusting"]["iterations"]) * pictures
        return Evaluations(forward=steps, attack=steps)
    return Evaluations()


def _random(name: str, *_: Any) -> Part:
    return Part(f"edit {name}", Evaluations())


def _nemo(name: str, settings: Mapping[str, Any], suspected: int, sampling: Sampling) -> Part:
    rows, criterion = suspected * settings["samples"], settings["criterion"]
    if criterion == "replication":
        first = drawn(rows, sampling)
    elif criterion == "denoising_loss":
        first = Evaluations(forward=2 * rows)  # with the prompt and with the empty one
    else:
        ordinary = settings["threshold_prompts"] if settings["threshold"] is None else 0
        first = Evaluations(forward=rows + ordinary * settings["samples"])
    return Part(
        f"edit {name}",
        first,
        "only the first look at each prompt is counted; the search depends on what it finds "
        "(published: 15.7 s a vm prompt and 45.9 s a tm prompt on a V100 or A100)",
    )


def _wanda(name: str, settings: Mapping[str, Any], suspected: int, sampling: Sampling) -> Part:
    base = 1 if settings["base"] == "empty" else settings["base_prompts"]
    halves = 1 if sampling.guidance == 1 else 2
    rows = (suspected + base) * settings["steps"] * settings["seeds"] * halves
    return Part(f"edit {name}", Evaluations(forward=rows))


def _esd(name: str, settings: Mapping[str, Any], _: int, sampling: Sampling) -> Part:
    rows = settings["steps"] * settings["batch"]
    visited = settings["sampling_steps"] or sampling.steps
    halves = 1 if settings["guidance"] == 1 else 2
    # on average the sampler is stopped half way; then the teacher predicts with and without
    partly = rows * (visited - 1) // 2 * halves
    stored = {"x": 0.051, "strict": 0.022, "u": 0.946, "full": 1.0}[settings["variant"]]
    return Part(
        f"edit {name}", Evaluations(forward=partly + 2 * rows, training=rows), weights=stored
    )


def _anchors(settings: Mapping[str, Any], suspected: int, sampling: Sampling) -> Evaluations:
    anchors = settings["anchors"]
    return drawn(suspected * anchors["prompts"] * anchors["images"], sampling)


def _concept_ablation(
    name: str, settings: Mapping[str, Any], suspected: int, sampling: Sampling
) -> Part:
    rows = 2 * settings["steps"] * settings["batch"]
    work = _anchors(settings, suspected, sampling) + Evaluations(training=rows)
    return Part(f"edit {name}", work, weights=1.0)


def _siss(name: str, settings: Mapping[str, Any], suspected: int, sampling: Sampling) -> Part:
    # two gradients of one forward pass
    rows = settings["steps"] * settings["batch"]
    work = _anchors(settings, suspected, sampling) + Evaluations(training=2 * rows)
    return Part(f"edit {name}", work, weights=1.0)


def _adversarial(
    name: str, settings: Mapping[str, Any], suspected: int, sampling: Sampling
) -> Part:
    pool, rounds = settings["pool"], settings["epochs"]
    attack = pool["attack"]
    searches = rounds * suspected * (2 if pool["warm"] else 1)
    searched = searches * attack["budget"]["steps"] * attack["noise_batch"]
    trained = rounds * settings["updates"]
    rows = trained * (settings["adversarial_batch"] + settings["ordinary_batch"])
    surrogates = drawn(suspected * settings["surrogates"]["candidates"], sampling)
    skipping = "pairs that stay robust are skipped, so this is the most it takes"
    return Part(
        f"edit {name}",
        surrogates + Evaluations(attack=searched, training=rows),
        skipping if pool["skip_robust"] is not None else "",
        weights=1.0,
    )


def _nothing(name: str, settings: Mapping[str, Any], *_: Any) -> Part:
    asked = settings["calibration_prompts"] if settings["target"] is None else 0
    return Part(f"edit {name}", Evaluations(forward=2 * asked))


KNOWN: dict[str, Callable[[str, Mapping[str, Any], int, Sampling], Part]] = {
    "RandomPruning": _random,
    "NeMo": _nemo,
    "Wanda": _wanda,
    "ESD": _esd,
    "ConceptAblation": _concept_ablation,
    "SISS": _siss,
    "AdversarialFinetuning": _adversarial,
    "PromptAdjustment": _nothing,
}
"""Class of a mitigation to its estimate."""


# -------- plan_job
# Count what one audit would take, from its configuration alone.


@dataclass(frozen=True)
class JobPlan:
    """What one audit would take.

    Attributes:
        checkpoint: Name of the checkpoint.
        mitigation: Name of the mitigation.
        pairs: Pairs by kind.
        pairs_from: ``list``, or why they are assumed.
        ball: How far the attack may go, in words.
        attacks: Embeddings that are searched.
        attack_steps: Steps of each.
        pictures: Pictures of the audit: from prompts and from found embeddings.
        work: The attack, and those pictures.
        shared: Work that jobs of a sweep share, by key: edits, and what the unmitigated model
            draws.
        bytes: Estimated disk space of pictures and embeddings; None where the checkpoint's sizes
            are unknown.
        at_most: Whether attacks may end before their last step (``attack.early_stop``), so that
            what is counted is the most it can be.
    """

    checkpoint: str
    mitigation: str
    pairs: Mapping[str, int]
    pairs_from: str
    ball: str
    attacks: int
    attack_steps: int
    pictures: int
    work: Evaluations
    shared: Mapping[str, Part]
    bytes: float | None
    at_most: bool = False


def plan_of(cfg: DictConfig) -> JobPlan:
    """Count what an audit would take.

    Raises:
        InputError: ``task.assume_pairs`` or the attack's settings are impossible.
    """
    settings: AttackSettings = instantiate(cfg.attack)
    sampling: Sampling = instantiate(cfg.sampling)
    pairs, pairs_from = _pairs(cfg)
    config = to_container(cfg)
    checkpoint, mitigation = str(cfg.checkpoint.name), config["mitigation"]
    steps = settings.budget.steps
    snapshots = len(evaluation_steps(settings.snapshots, steps))
    attacks = sum(
        count * len(settings.inits_of(kind)) * settings.restarts
        for kind, count in pairs.items()
        if kind in KINDS
    )
    everyone, suspected = sum(pairs.values()), pairs.get("vm", 0) + pairs.get("tm", 0)
    pictures = (everyone + attacks * snapshots) * sampling.images_per_pair
    work = Evaluations(attack=attacks * steps * settings.noise_batch) + drawn(pictures, sampling)
    decides = {
        "checkpoint": drop_keys(config["checkpoint"], "device", "channels_last"),
        "pairs": drop_keys(config["pairs"], "cache"),
        "corpus": config["corpus"],
        "sampling": drop_keys(config["sampling"], "batch"),
        "seed": config["seed"],
    }
    shared = dict(
        edit_parts(mitigation, suspected=suspected, sampling=sampling, shared=json.dumps(decides))
    )
    if shared:  # a mitigated model is compared with the unmitigated one
        by_each = _utility(config.get("utility", {}), suspected, sampling)
        pictures += by_each.decoded
        work = work + by_each + inference_work(mitigation, pictures)
        before = drawn(everyone * sampling.images_per_pair, sampling) + by_each
        shared[_key(decides, config.get("utility"))] = Part(
            "the unmitigated model", before, pictures=before.decoded
        )
    return JobPlan(
        checkpoint=checkpoint,
        mitigation=str(mitigation["name"]),
        pairs=pairs,
        pairs_from=pairs_from,
        ball=_ball(settings),
        attacks=attacks,
        attack_steps=steps,
        pictures=pictures,
        work=work,
        shared=shared,
        bytes=_bytes(checkpoint, pictures=pictures, embeddings=attacks * snapshots),
        at_most=settings.early_stop,
    )


def _ball(settings: AttackSettings) -> str:
    budget = settings.budget
    radius = "" if budget.norm == "none" else f", {budget.norm} {budget.radius:g}"
    return f"{budget.steps} steps{radius}{' (relative)' if radius and budget.relative else ''}"


def _pairs(cfg: DictConfig) -> tuple[dict[str, int], str]:
    """Count the pairs of the list, or take the assumed numbers where it cannot be read."""
    try:
        missing = OmegaConf.missing_keys(cfg.pairs)
        if missing:
            raise InputError(f"{sorted(missing)[0]} is not given")
        read = instantiate(cfg.pairs).read()
    except InputError as error:
        reason = str(error).partition("\n")[0]
    else:
        counts = dict.fromkeys(KINDS, 0)
        for pair in read:
            counts[pair.kind] += pair.role == "audit"
        return {str(kind): count for kind, count in counts.items()}, "list"
    assumed = OmegaConf.to_container(cfg.task.assume_pairs, resolve=True)
    bad = not isinstance(assumed, dict) or any(
        kind not in KINDS or not isinstance(count, int) or isinstance(count, bool) or count < 0
        for kind, count in assumed.items()
    )
    if bad:
        raise InputError(
            f"task.assume_pairs cannot be {assumed!r}\n  where: task.assume_pairs\n"
            f"  fix:   pairs by kind, as in {{vm: 112, tm: 388, control: 500}}"
        )
    assert isinstance(assumed, dict)
    return {str(kind): int(count) for kind, count in assumed.items()}, f"assumed: {reason}"


def _utility(settings: Mapping[str, Any], suspected: int, sampling: Sampling) -> Evaluations:
    """What measuring a mitigation's cost takes of either model, mitigated and not."""
    if not settings:
        return Evaluations()
    pictures = settings["prompts"] * settings["pictures"]
    pictures += suspected * settings["neighbours"] * settings["neighbour_pictures"]
    losses = Evaluations(forward=settings["examples"] * settings["draws"])
    return losses + drawn(pictures, sampling)


def _key(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _bytes(checkpoint: str, *, pictures: int, embeddings: int) -> float | None:
    cost = CHECKPOINTS.get(checkpoint)
    if cost is None:
        return None
    return pictures * cost.picture_bytes + embeddings * cost.embedding * 4


# -------- plan

log = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
_WIDTH = 150


def plan(cfg: DictConfig, folder: Path) -> None:
    """Print what the audit would take and write ``plan.json`` into ``folder``.

    A job of a sweep whose end adds up the plans leaves the printing to that.

    Raises:
        InputError: The attack's settings or ``task.assume_pairs`` are impossible.
    """
    job = plan_of(cfg)
    record = (json.dumps(asdict(job), indent=2, sort_keys=True) + "\n").encode()
    write_atomically(folder / PLAN_FILE, record)
    if not _is_summed():
        _print([job], title=f"Plan of {folder.name}: nothing is computed")


def _is_summed() -> bool:
    if not HydraConfig.initialized():
        return False
    settings = HydraConfig.get()
    return settings.mode is RunMode.MULTIRUN and bool(settings.callbacks)


def sum_plans(folder: Path) -> None:
    """Add up the plans of a sweep's jobs, print them and write ``plan.json`` into ``folder``.

    Work that jobs share is counted once.

    Raises:
        InputError: No job left a plan.
    """
    jobs = jobs_of([folder], planned=True)
    found = [place for place in jobs.folders if (place / PLAN_FILE).is_file()]
    if not found:
        raise InputError(
            f"no job of the sweep left a {PLAN_FILE}\n  where: {folder}\n"
            f"  fix:   run it again with task.dry_run=true, and see why its jobs fail"
        )
    lost = len(jobs.folders) - len(found) + len(jobs.unstarted)
    if lost:
        log.warning("%d jobs have no plan: the sum is without them", lost)
    plans = [_read(place / PLAN_FILE) for place in found]
    _print(plans, title=f"Plan of the sweep {folder.name}: nothing is computed")
    total = {
        "jobs": len(plans),
        "without_plan": lost,
        "work": {name: asdict(_total(group)) for name, group in _by_checkpoint(plans).items()},
        "hours": _hours(plans),
        "bytes": _disk(plans),
        "not_counted": list(_not_counted(plans)),
    }
    record = (json.dumps(total, indent=2, sort_keys=True) + "\n").encode()
    write_atomically(folder / PLAN_FILE, record)


def _read(path: Path) -> JobPlan:
    held = json.loads(path.read_text(encoding="utf-8"))
    shared = {
        key: Part(**{**part, "work": Evaluations(**part["work"])})
        for key, part in held["shared"].items()
    }
    pairs = {kind: held["pairs"][kind] for kind in KINDS if kind in held["pairs"]}
    work = Evaluations(**held["work"])
    return JobPlan(**{**held, "pairs": pairs, "work": work, "shared": shared})


def _by_checkpoint(plans: Sequence[JobPlan]) -> dict[str, list[JobPlan]]:
    groups: dict[str, list[JobPlan]] = {}
    for job in plans:
        groups.setdefault(job.checkpoint, []).append(job)
    return groups


def _shared(plans: Iterable[JobPlan]) -> dict[str, Part]:
    return {key: part for job in plans for key, part in job.shared.items()}


def _total(plans: Sequence[JobPlan]) -> Evaluations:
    work = [job.work for job in plans] + [part.work for part in _shared(plans).values()]
    return sum(work, start=Evaluations())


def _hours(plans: Sequence[JobPlan]) -> dict[str, float]:
    """Estimated hours by device, over all checkpoints whose cost is known."""
    hours: dict[str, float] = {}
    for checkpoint, group in _by_checkpoint(plans).items():
        cost = CHECKPOINTS.get(checkpoint)
        for device, value in (cost.hours(_total(group)) if cost else {}).items():
            hours[device] = hours.get(device, 0.0) + value
    return hours


def _disk(plans: Sequence[JobPlan]) -> float:
    """Estimated bytes, edits included, over all checkpoints whose sizes are known."""
    total = sum(job.bytes or 0.0 for job in plans)
    for checkpoint, group in _by_checkpoint(plans).items():
        cost = CHECKPOINTS.get(checkpoint)
        if cost is not None:
            stored = sum(part.weights for part in _shared(group).values())
            total += stored * cost.parameters * 4
            total += sum(p.pictures for p in _shared(group).values()) * cost.picture_bytes
    return total


def _not_counted(plans: Sequence[JobPlan]) -> Iterator[str]:
    for checkpoint in sorted(set(_by_checkpoint(plans)) - set(CHECKPOINTS)):
        yield f"hours and disk of {checkpoint}: what its denoiser costs is not known"
    for part in _shared(plans).values():
        if part.unknown:
            yield f"{part.what}: {part.unknown}"
    yield "loading, encoding of pictures, descriptors and reports"


def _print(plans: Sequence[JobPlan], *, title: str) -> None:
    """Show the jobs, what they share, and the sum."""
    hours = _hours(plans)
    table = Table(title=title, title_justify="left")
    table.add_column("job")
    for name in ("pairs", "attacks", "forward+backward", "forward", "training", "pictures",
                 *(f"h, {device}" for device in hours), "disk"):  # fmt: skip
        table.add_column(name, justify="right")
    several = len(_by_checkpoint(plans)) > 1, len({job.ball for job in plans}) > 1
    for job in plans:
        words = (
            job.checkpoint if several[0] else "",
            job.mitigation,
            job.ball if several[1] else "",
        )
        counts = "+".join(str(count) for count in job.pairs.values())
        table.add_row(
            " ".join(filter(None, words)), counts, f"{job.attacks:,}",
            *_cells(job.checkpoint, job.work, job.pictures, hours), _size(job.bytes),
        )  # fmt: skip
    table.add_section()
    for checkpoint, group in _by_checkpoint(plans).items():
        cost = CHECKPOINTS.get(checkpoint)
        for part in _shared(group).values():
            kept = part.weights * cost.parameters * 4 if cost else 0.0
            kept += part.pictures * cost.picture_bytes if cost else 0.0
            table.add_row(
                f"{part.what}, once", "", "",
                *_cells(checkpoint, part.work, part.work.decoded, hours),
                _size(kept if cost else None),
            )  # fmt: skip
    table.add_section()
    total = _total(plans)
    table.add_row(
        "total", "", f"{sum(job.attacks for job in plans):,}", *_counts(total),
        f"{total.decoded:,}", *(_time(value) for value in hours.values()), _size(_disk(plans)),
    )  # fmt: skip
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else _WIDTH)
    console.print(table)
    for text in _remarks(plans):
        console.print(f"- {text}", markup=False, highlight=False)


def _cells(
    checkpoint: str, work: Evaluations, pictures: int, devices: Iterable[str]
) -> tuple[str, ...]:
    cost = CHECKPOINTS.get(checkpoint)
    hours = cost.hours(work) if cost else {}
    return (*_counts(work), f"{pictures:,}", *(_time(hours.get(device)) for device in devices))


def _counts(work: Evaluations) -> tuple[str, str, str]:
    return f"{work.attack:,}", f"{work.forward:,}", f"{work.training:,}"


def _time(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:,.1f}" if hours >= 10 else f"{hours:.2f}"


def _size(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def _flop(tflop: float) -> str:
    return f"{tflop:,.2f} TFLOP" if tflop >= 0.1 else f"{1e3 * tflop:,.2f} GFLOP"


def _remarks(plans: Sequence[JobPlan]) -> Iterator[str]:
    for text in dict.fromkeys(f"pairs {job.pairs_from}" for job in plans):
        yield f"{text} ({'+'.join(plans[0].pairs)})" if text != "pairs list" else "pairs as listed"
    for checkpoint in _by_checkpoint(plans):
        cost = CHECKPOINTS.get(checkpoint)
        if cost is None:
            continue
        speeds = ", ".join(
            f"{_flop(speed)}/s on {device}" for device, speed in cost.speeds.items()
        )
        yield (
            f"{checkpoint}: a row takes {_flop(cost.forward)} forward, "
            f"{_flop(cost.forward + cost.to_embedding)} with the embedding's gradient, "
            f"{_flop(cost.forward + cost.to_weights)} with that of all weights; {speeds}"
        )
    if any(len(CHECKPOINTS[c].speeds) > 1 for c in _by_checkpoint(plans) if c in CHECKPOINTS):
        yield f"hours are of one card at {FRACTION:.0%} of its dense bf16 peak: estimates"
    if any(job.at_most for job in plans):
        yield "attack.early_stop: counted as if no image came back before the last step"
    for text in _not_counted(plans):
        yield f"not counted: {text}"
