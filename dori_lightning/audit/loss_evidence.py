"""Evidence by loss: does the model denoise an image better than that image's own altered copies?

A model that was trained on an image denoises it better than the same image mirrored, turned or
shifted; on one that it never saw it does about as well on all of them. Image and copies have the
same complexity and the same noise, so the ratio needs no descriptor, no generated image and no
threshold, and also shows images that no prompt brings back any more. The most favourable copy
counts, since a turned scene is less natural than the scene.

What it cannot tell: an image among near-duplicates of itself, one that the model was trained on
mirrored as well, a model whose denoising is damaged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from dori_lightning.attacks.embedding_attack import Conditioning
from dori_lightning.audit.context import AuditContext
from dori_lightning.metrics.evidence import LossEvidence
from dori_lightning.models.generation import CPU_IMAGES
from dori_lightning.pairs.copies import ALTER, Alteration
from dori_lightning.pairs.datamodule import LAYOUT, image_hash
from dori_lightning.pairs.validation import image_tensor, square_image
from dori_lightning.runtime import distributed
from dori_lightning.runtime.artifacts import content_hash
from dori_lightning.runtime.batching import OomBackoff, map_batches, parallel_batches
from dori_lightning.runtime.cache import TENSORS, Cache, Tensors
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Pair

LEVELS = (0.15, 0.35, 0.55)
"""Noise levels as shares of the schedule. On ``dori_tiny`` single levels from 0.05 to 0.55 tell
all planted images from all controls without a prompt, higher ones do not."""

DRAWS = 2
"""Noise samples at each level."""

LOSS_ROWS = (1 + len(ALTER)) * len(LEVELS) * DRAWS
"""Evaluations for one image under one conditioning."""

_MEMORY = OomBackoff("losses", "sample", "checkpoint.precision=bf16, or a device with more memory")


@dataclass(frozen=True)
class _Question:
    """One image and its copies under one conditioning.

    Attributes:
        pair: The pair.
        conditioning: Name of the conditioning.
        embedding: Text embedding (T, D).
    """

    pair: Pair
    conditioning: str
    embedding: torch.Tensor


def loss_evidence(
    context: AuditContext,
    conditionings: Sequence[Conditioning],
    *,
    known: Mapping[str, LossEvidence] = MappingProxyType({}),
) -> dict[str, LossEvidence]:
    """Compare every image with its altered copies, under the empty prompt and its conditionings.

    Each process does its share.

    Args:
        context: The audit; its model carries the edit.
        conditionings: Prompts and attacked embeddings. Of the snapshots of one search the last
            one counts; failed attacks are left out, and so are starts that no control was
            attacked from: an image with more tries than its nulls stands out by that alone. With
            ``attack.futility`` so are searches that ended early: their images have said more.
        known: What was measured before, of the prompts and the empty prompt; they are not asked
            again.

    Returns:
        Pair id to the smallest ratio over the conditionings, of all processes.
    """
    asked: dict[tuple[str, str], _Question] = {}
    if not known:
        empty = context.model.empty_embedding()[0].cpu()
        asked |= {(pair.id, "empty"): _Question(pair, "empty", empty) for pair in context.pairs}
    for one in conditionings:
        ended = one.stopped_at is not None and context.attack.futility is not None
        asked_before = one.of_prompt or (known and one.condition.attack == "prompt")
        if one.status == "ok" and not ended and not asked_before:
            name = one.condition.init or "own prompt"
            asked[one.pair.id, name] = _Question(one.pair, name, one.embedding)
    controlled = any(pair.kind == "control" for pair in context.pairs)
    tried = {q.conditioning for q in asked.values() if q.pair.kind == "control"}
    share = {pair.id for pair in context.pairs[distributed.rank() :: distributed.world_size()]}
    own = [
        question
        for (name, conditioning), question in asked.items()
        if name in share and (not controlled or conditioning in tried)
    ]
    found = {name: evidence for name, evidence in known.items() if name in share}
    for question, ratio in zip(own, _ratios(context, own), strict=True):
        best = found.get(question.pair.id)
        if best is None or ratio < best.ratio:
            found[question.pair.id] = LossEvidence(ratio, question.conditioning)
    return distributed.all_gather_dict(found)


def _ratios(context: AuditContext, questions: Sequence[_Question]) -> list[float]:
    """Loss of the image, times that of its most favourable copy, for each question."""
    model, latents = context.model, _latents(context, questions)
    copies = len(ALTER) + 1
    steps = [round(level * model.num_train_timesteps) for level in LEVELS for _ in range(DRAWS)]
    noise = torch.stack(
        [
            torch.randn(model.latent_shape, generator=keyed_generator("losses", context.seed, k))
            for k in range(len(steps))
        ]
    )
    rows = [(q, c, k) for q in questions for c in range(copies) for k in range(len(steps))]

    def losses(part: list[tuple[_Question, int, int]]) -> list[float]:
        found = model.denoising_loss(
            torch.stack([latents[q.pair.id][c] for q, c, _ in part]).to(model.device),
            noise[[k for _, _, k in part]].to(model.device),
            torch.tensor([steps[k] for _, _, k in part], device=model.device),
            torch.stack([q.embedding for q, _, _ in part]).to(model.device),
            pair_ids=[q.pair.id for q, _, _ in part],
        )
        advance(len(part))
        values: list[float] = found.double().cpu().tolist()
        return values

    with torch.no_grad(), model.frozen(), progress_bar("losses", len(rows)) as advance:
        width = CPU_IMAGES * parallel_batches(model)
        at_once = width if model.device.type == "cpu" else context.sampling.batch
        values = map_batches(losses, rows, at_once=at_once, model=model, backoff=_MEMORY)
    logs = torch.tensor(values, dtype=torch.float64).log()
    means = logs.reshape(len(questions), copies, len(steps)).mean(-1)
    ratios: list[float] = (means[:, 0] - means[:, 1:].amin(1)).exp().tolist()
    return ratios


def _latents(context: AuditContext, questions: Sequence[_Question]) -> dict[str, torch.Tensor]:
    """Pair id to the latents (1 + copies, C, h, w) of its image and of its altered copies."""
    model = context.model
    pairs = {question.pair.id: question.pair for question in questions}
    # by what the copies are made of, so that all jobs of a sweep find them
    place_of = {
        name: content_hash([image_hash(pair), _alterations(pair)]) for name, pair in pairs.items()
    }
    places = {place: name for name, place in place_of.items()}
    key = {
        "layout": LAYOUT,
        "model": model.fingerprint,
        "machine": context.machine,
        "side": model.resolution,
    }
    cache = Cache(context.cache / "altered" / content_hash(key)[:24])
    with progress_bar("encode altered copies", len(places)) as advance:

        def encode(place: str) -> Tensors:
            pair = pairs[places[place]]
            image = square_image(pair.image)
            copies = [
                image_tensor(ALTER[kind](image), model.resolution) for kind in _alterations(pair)
            ]
            latents = [model.encode_images(copy[None])[0].cpu() for copy in copies]
            advance(1)
            return {"latents": torch.stack(latents)}

        found = cache.share(
            dict.fromkeys(places, key), encode, TENSORS, found=lambda _: advance(1)
        )
    return {
        name: torch.cat(
            [context.data.encoded(pair).latent[None], found[place_of[name]]["latents"]]
        )
        for name, pair in pairs.items()
    }


def _alterations(pair: Pair) -> list[Alteration]:
    """How the copies that an image is compared with are made, as many of each image.

    A mirrored copy that is mirrored again is the suspect itself, which it must not be compared
    with.
    """
    kinds = [kind for kind in ALTER if kind != pair.alteration]
    return kinds + kinds[: len(ALTER) - len(kinds)]
