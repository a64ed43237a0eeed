"""Train a small checkpoint that really memorizes the given pairs, and write its card."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from dori_lightning.audit.context import reference_images
from dori_lightning.models.export import weights_of, write_folder
from dori_lightning.models.generation import (
    GenerationRequest,
    generate_images,
    image_seeds,
    load_images,
)
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.progress import encode_prompts
from dori_lightning.models.stable_diffusion import stable_diffusion
from dori_lightning.planting.card import write_card
from dori_lightning.planting.flow import (
    FlowRecipe,
    flow_base,
    untrained_flow,
)
from dori_lightning.planting.recipe import PlantRecipe, base_components, build_tokenizer
from dori_lightning.planting.stream import (
    EncodedStream,
    TrainingStream,
    encode_stream,
    padded_tokens,
    stream_words,
)
from dori_lightning.planting.training import (
    latent_statistics,
    train_autoencoder,
    train_transformer,
    train_unet,
)
from dori_lightning.runtime.artifacts import claim_folder
from dori_lightning.runtime.cache import TENSORS, Cache
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.tasks.run_record import git_sha, package_versions, tracked
from dori_lightning.tracking import Tracker
from dori_lightning.types import KINDS, Pair

log = logging.getLogger(__name__)


def run(cfg: DictConfig, folder: Path) -> None:
    """Plant ``cfg.pairs`` into a new checkpoint in ``folder/checkpoint``.

    An interrupted run goes on where it was.

    Raises:
        InputError: ``folder`` holds another planting, or nothing is to be planted.
    """
    recipe: PlantRecipe | FlowRecipe = instantiate(cfg.planting)
    pairs = instantiate(cfg.pairs).read()
    listed = "\n".join(
        f"{p.id}|{p.kind}|{p.prompt}|{p.subject}|{p.repeats}|{p.sha256}" for p in pairs
    )
    pairs_hash = hashlib.sha256(listed.encode()).hexdigest()[:16]
    claim_folder(folder, {"recipe": asdict(recipe), "seed": int(cfg.seed), "pairs": pairs_hash})
    with tracked(cfg, folder, tags=("plant",)) as tracker:
        _plant(cfg, folder, recipe, pairs, tracker)


def _plant(
    cfg: DictConfig,
    folder: Path,
    recipe: PlantRecipe | FlowRecipe,
    pairs: Sequence[Pair],
    tracker: Tracker,
) -> None:
    target = folder / "checkpoint"
    if isinstance(recipe, FlowRecipe):
        exposures = _plant_transformer(cfg, folder, recipe, pairs, tracker)
    else:
        exposures = _plant_unet(cfg, folder, recipe, pairs, tracker)
    family = "sd3" if isinstance(recipe, FlowRecipe) else "sd"
    similarity = measured_similarity(cfg, target, pairs, folder / "pictures", family=family)
    write_card(
        target,
        recipe=recipe,
        pairs=pairs,
        exposures=exposures,
        similarity=similarity,
        seed=cfg.seed,
        provenance={
            "git_sha": git_sha(),
            "packages": package_versions(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    for kind in KINDS:
        of_kind = [similarity[p.id] for p in pairs if p.kind == kind and p.id in similarity]
        if of_kind:
            tracker.summary({f"final/similarity_{kind}": median(of_kind)})
    tracker.artifact(
        f"{folder.name}-checkpoint",
        kind="model",
        files={p.relative_to(target).as_posix(): p for p in target.rglob("*")},
        metadata={"recipe": asdict(recipe), "seed": int(cfg.seed)},
    )
    log.info(
        "planted; audit it with: python -m dori_lightning +experiment=audit "
        "checkpoint.source=%s checkpoint.name=%s and the same pairs=", target, folder.name,
    )  # fmt: skip


def _plant_unet(
    cfg: DictConfig, folder: Path, recipe: PlantRecipe, pairs: Sequence[Pair], tracker: Tracker
) -> Counter[str]:
    """Write a Stable Diffusion to ``folder/checkpoint``; gives how often each pair was shown."""
    stream_of = partial(TrainingStream, pairs, size=recipe.resolution, seed=cfg.seed)
    base = base_components(recipe, recipe.base) if recipe.base else None
    if base is not None:
        autoencoder, tokenizer = base.autoencoder, base.tokenizer
    else:
        everything = stream_of(mix=recipe.autoencoder_mix, every_photograph=True)
        autoencoder = train_autoencoder(
            recipe, everything, folder / "autoencoder", seed=cfg.seed,
            logger=tracker.training("autoencoder"),
        )  # fmt: skip
        tokenizer = build_tokenizer(stream_words(pairs), max_length=recipe.max_length)
    stream = stream_of(mix=recipe.mix)
    encode = partial(encode_stream, stream, autoencoder, padded_tokens(tokenizer))
    encoded = _encoded(folder, recipe, encode)
    if base is None:
        _, scale = latent_statistics(encoded)
        autoencoder.register_to_config(scaling_factor=scale)
    unet, text_encoder, scheduler = train_unet(
        recipe, encoded, tokenizer, folder / "diffusion", base=base, seed=cfg.seed,
        scaling_factor=float(autoencoder.config["scaling_factor"]),
        logger=tracker.training("diffusion"),
    )  # fmt: skip
    components = stable_diffusion(
        unet=unet, autoencoder=autoencoder, text_encoder=text_encoder, tokenizer=tokenizer,
        scheduler=scheduler,
    )  # fmt: skip
    write_folder(folder / "checkpoint", components, weights_of(components, "fp16"))
    return encoded.exposures(stream.planted)


def _plant_transformer(
    cfg: DictConfig, folder: Path, recipe: FlowRecipe, pairs: Sequence[Pair], tracker: Tracker
) -> Counter[str]:
    """Write a flow transformer to ``folder/checkpoint``; gives how often each pair was shown."""
    base = flow_base(recipe)
    parts = untrained_flow(recipe, base, stream_words(pairs), seed=cfg.seed)
    stream = TrainingStream(pairs, mix=recipe.mix, size=recipe.resolution, seed=cfg.seed)
    encode = partial(encode_stream, stream, parts.autoencoder, parts.text.tokens)
    encoded = _encoded(folder, recipe, encode)
    mean, scale = latent_statistics(encoded)
    config: Any = parts.autoencoder
    config.register_to_config(shift_factor=mean, scaling_factor=scale)
    train_transformer(
        recipe, encoded, parts, folder / "diffusion", seed=cfg.seed,
        logger=tracker.training("diffusion"),
    )  # fmt: skip
    written = parts.components
    write_folder(folder / "checkpoint", written, weights_of(written, "fp16"))
    return encoded.exposures(stream.planted)


def _encoded(
    folder: Path, recipe: PlantRecipe | FlowRecipe, encode: Callable[..., Any]
) -> EncodedStream:
    """The stream as latents and token ids, encoded once for the run folder."""
    count = recipe.stream_length
    with progress_bar("encode the training stream", count) as advance:
        # the run folder holds one recipe, seed and list of pairs
        elements = Cache(folder).get(
            "stream", {"count": count}, partial(encode, count=count, advance=advance), TENSORS
        )
    return EncodedStream(elements, length=recipe.steps * recipe.batch)


def measured_similarity(
    cfg: DictConfig, checkpoint: Path, pairs: Sequence[Pair], folder: Path, *, family: str
) -> dict[str, float]:
    """Best similarity of each audited pair's images, from its prompt, with its original.

    Args:
        cfg: Gives sampling and measures.
        checkpoint: Folder of the checkpoint.
        pairs: All pairs.
        folder: Where the images go.
        family: Of the checkpoint.
    """
    model = load_checkpoint(name="planted", source=str(checkpoint), family=family)
    sampling, measures = instantiate(cfg.sampling), instantiate(cfg.metrics)
    audited = [pair for pair in pairs if pair.role == "audit"]
    embeddings = encode_prompts(model, [pair.prompt for pair in audited], "prompts").cpu()
    requests = [
        GenerationRequest(folder / pair.id, row)
        for pair, row in zip(audited, embeddings, strict=True)
    ]
    with progress_bar("measure memorization", len(audited) * sampling.images_per_pair) as advance:
        generate_images(model, requests, sampling, advance=advance)
    references = reference_images(audited, model.resolution, measures)
    best = {}
    for pair, request in zip(audited, requests, strict=True):
        images = load_images(request.folder, image_seeds(sampling))
        best[pair.id] = float(references.measure(pair, images).similarity[measures.decider].max())
    return best
