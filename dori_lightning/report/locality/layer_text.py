"""Answers about layers: what triggers activate, and which weights methods select with them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dori_lightning.report.locality.words import (
    METHOD_WORDS,
    Answer,
    estimate_words,
    no_answer,
)
from dori_lightning.report.summary import number_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dori_lightning.locality.activations import ActivationFindings, LayerActivation
    from dori_lightning.locality.weights import LayerSelection, WeightFindings

__all__ = ["activation_answer", "method_answer", "weight_answer", "weight_sentence"]


def activation_answer(found: ActivationFindings) -> Answer:
    """How differently triggers activate layers."""
    sentences = []
    for method, word in METHOD_WORDS.items():
        rows = [row for row in found.layers if row.method == method]
        ours = _by_layer(rows, "triggers")
        if not ours:
            return no_answer("activations", "Do triggers of one image activate a model alike?")
        prompts, starts = _by_layer(rows, "memorized_prompts"), _by_layer(rows, "starts")
        apart = sum(ours[k].distance.value > prompts[k].distance.value for k in ours)
        closer = sum(ours[k].relative.value < starts[k].relative.value for k in ours)
        own = sum(
            ours[k].relative.value < ours[k].relative_between.value
            for k in ours
            if ours[k].relative_between.count
        )
        sentences.append(
            f"{word}'s layers: triggers of one image are farther apart than prompts of different "
            f"memorized images in {apart} of {len(ours)}; relative to their size they are closer "
            f"than their starts in {closer}, and closer than triggers of different images in {own}"
        )
    return Answer(
        "activations",
        "Do triggers of one image activate a model alike?",
        ". ".join(sentences) + ".",
        f"Mean distance of two activations at one noise (seed {found.noise_seed}) and timestep "
        f"({found.timestep}), on the checkpoint as it is: outputs of the cross-attention value "
        f"layers (NeMo), inputs of the feed-forward output layers (Wanda). Second row: divided by "
        f"the activations' own size, so that long embeddings are not far apart for their length "
        f"alone; 1.41 where two are orthogonal. Bars are 95 % bootstrap intervals.",
    )


def _by_layer(rows: Sequence[LayerActivation], group: str) -> dict[str, LayerActivation]:
    return {row.layer: row for row in rows if row.group == group}


def weight_answer(found: WeightFindings) -> Answer:
    """Whether a method selects the same weights."""
    sentences = []
    for method, word in METHOD_WORDS.items():
        rows = [row for row in found.layers if row.method == method]
        ours = [row for row in rows if row.group == "triggers"]
        if not ours:
            return no_answer("weights", "Does a pruning method find the same weights?")
        others = {
            group: [row for row in rows if row.group == group]
            for group in ("starts", "memorized_prompts", "control_prompts")
        }
        empty, compared = sum(r.both_empty for r in ours), sum(r.compared for r in ours)
        sentences.append(
            f"{word}, mean over {number_words(len(ours), 'layer')}: triggers of one image agree "
            f"to {_mean(r.iou.value for r in ours)}, of different images to "
            f"{_mean(r.iou_between.value for r in ours)}, random selections of these sizes to "
            f"{_mean(r.chance for r in ours)}; their starts {_iou(others['starts'])}, memorized "
            f"prompts {_iou(others['memorized_prompts'])}, control prompts "
            f"{_iou(others['control_prompts'])}. Both selections were empty, which counts as 1, "
            f"in {empty} of {compared} comparisons of triggers; without those "
            f"{_mean(r.iou_nonempty for r in ours)}"
        )
        if method in found.memorized:
            asked = found.memorized[method]
            sentences.append(
                f"{word} takes "
                + ", ".join(
                    f"{own[0]} of {own[1]} {group.replace('_', ' ')}"
                    for group, own in asked.items()
                )
                + " for memorized and leaves the others alone"
            )
    return Answer(
        "weights",
        "Does a pruning method find the same weights whatever triggers the image?",
        ". ".join(sentences) + ".",
        "Intersection over union of what a method selects with two embeddings, by layer, on the "
        "checkpoint as it is; bars are 95 % bootstrap intervals. Open marks: triggers of two "
        "different images. Ticks: random selections of the same sizes. Below: mean size of a "
        "selection, as a share of what could be selected; two empty selections count as 1.",
    )


def _iou(rows: Sequence[LayerSelection]) -> str:
    return _mean(row.iou.value for row in rows)


def _mean(values: Iterable[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    return f"{sum(known) / len(known):.2f}" if known else "n/a"


def method_answer(found: WeightFindings) -> Answer:
    """Whether two methods select in the same place."""
    own = next((a for a in found.agreement if a.group == "triggers"), None)
    question = "Do NeMo and Wanda point to the same place?"
    if own is None or not own.overlap.count:
        return no_answer("methods", question)
    prompts = next((a for a in found.agreement if a.group == "memorized_prompts"), None)
    text = (
        f"{_shared(own.shared_parameters)}By transformer block, the shares of their selections "
        f"overlap to {estimate_words(own.overlap)} with the same trigger, and to "
        f"{estimate_words(own.overlap_other)} with two triggers"
        f"{' of different images' if own.overlap_other_images else ''}. The first would be higher "
        f"if both found where an image is."
    )
    if prompts is not None and prompts.overlap.count:
        text += (
            f" Memorized prompts: {estimate_words(prompts.overlap)} with the same prompt, "
            f"{estimate_words(prompts.overlap_other)} with two."
        )
    if own.undefined:
        text += f" Left out: {number_words(own.undefined, 'trigger')} with an empty selection."
    return Answer(
        "methods",
        question,
        text,
        "Share of each method's selection that lies in each transformer block that both look at, "
        "averaged over triggers. NeMo selects value neurons of cross-attention, Wanda single "
        "weights of the feed-forward layer beside it.",
    )


def _shared(parameters: int) -> str:
    if parameters:
        return f"There are {parameters} weight matrices in which both select. "
    return "They prune different layers, so no weight can be selected by both. "


def weight_sentence(found: WeightFindings) -> str:
    """The answer about weights in one sentence."""
    parts = []
    for method, word in METHOD_WORDS.items():
        ours = [r for r in found.layers if (r.method, r.group) == (method, "triggers")]
        if ours:
            parts.append(
                f"{word} {_mean(r.iou.value for r in ours)} with two triggers of one image, "
                f"{_mean(r.iou_between.value for r in ours)} with triggers of two images, "
                f"{_mean(r.chance for r in ours)} by chance"
            )
    if not parts:
        return ""
    return (
        f"Agreement of the weights that a method selects (1 is the same, 0 nothing in common, "
        f"mean over layers): {'; '.join(parts)}."
    )
