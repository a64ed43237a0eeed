"""Count what one audit would take, from its configuration alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from dori_lightning.attacks.budget import looked_at
from dori_lightning.tasks._folder import without
from dori_lightning.tasks._plan_costs import CHECKPOINTS, Evaluations, drawn
from dori_lightning.tasks._plan_edits import Part, edit_parts, inference_work
from dori_lightning.tasks._provenance import plain
from dori_lightning.types import KINDS, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from omegaconf import DictConfig

    from dori_lightning.attacks.settings import AttackSettings
    from dori_lightning.models.protocol import Sampling

__all__ = ["JobPlan", "plan_of"]


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
    config = plain(cfg)
    checkpoint, mitigation = str(cfg.checkpoint.name), config["mitigation"]
    steps = settings.budget.steps
    snapshots = len(looked_at(settings.snapshots, steps))
    attacks = sum(
        count * len(settings.inits_of(kind)) * settings.restarts
        for kind, count in pairs.items()
        if kind in KINDS
    )
    everyone, suspected = sum(pairs.values()), pairs.get("vm", 0) + pairs.get("tm", 0)
    pictures = (everyone + attacks * snapshots) * sampling.images_per_pair
    work = Evaluations(attack=attacks * steps * settings.noise_batch) + drawn(pictures, sampling)
    decides = {
        "checkpoint": without(config["checkpoint"], "device", "channels_last"),
        "pairs": without(config["pairs"], "cache"),
        "corpus": config["corpus"],
        "sampling": without(config["sampling"], "batch"),
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
            f"  mend:  pairs by kind, as in {{vm: 112, tm: 388, control: 500}}"
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
