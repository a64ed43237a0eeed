"""What finding an edit takes, as far as its settings say it beforehand."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dori_lightning.tasks._plan_costs import Evaluations, drawn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dori_lightning.models.protocol import Sampling

__all__ = ["KNOWN", "Part", "edit_parts", "inference_work"]


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
    plain = {k: v for k, v in settings.items() if k != "name"}
    identity = json.dumps([shared, plain], sort_keys=True, default=str)
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
