"""Train a small Stable Diffusion that really memorizes the given pairs, and write its card."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median

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
from dori_lightning.planting.recipe import PlantRecipe, base_components, build_tokenizer
from dori_lightning.planting.stream import (
    EncodedStream,
    TrainingStream,
    encode_stream,
    stream_words,
)
from dori_lightning.planting.training import latent_scale, train_autoencoder, train_diffusion
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
    recipe: PlantRecipe = instantiate(cfg.task.recipe)
    pairs = instantiate(cfg.pairs).read()
    listed = "\n".join(
        f"{p.id}|{p.kind}|{p.prompt}|{p.subject}|{p.repeats}|{p.sha256}" for p in pairs
    )
    pairs_hash = hashlib.sha256(listed.encode()).hexdigest()[:16]
    claim_folder(folder, {"recipe": asdict(recipe), "seed": int(cfg.seed), "pairs": pairs_hash})
    with tracked(cfg, folder, tags=("plant",)) as tracker:
        _plant(cfg, folder, recipe, pairs, tracker)


def _plant(
    cfg: DictConfig, folder: Path, recipe: PlantRecipe, pairs: Sequence[Pair], tracker: Tracker
) -> None:
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
    count = recipe.stream_length
    with progress_bar("encode the training stream", count) as advance:
        # the run folder holds one recipe, seed and list of pairs
        encode = partial(
            encode_stream, stream, autoencoder, tokenizer, count=count, advance=advance
        )
        elements = Cache(folder).get("stream", {"count": count}, encode, TENSORS)
    encoded = EncodedStream(elements, length=recipe.steps * recipe.batch)
    if base is None:
        scale = latent_scale(encoded)
        autoencoder.register_to_config(scaling_factor=scale)
    unet, text_encoder, scheduler = train_diffusion(
        recipe, encoded, tokenizer, folder / "diffusion", base=base, seed=cfg.seed,
        scaling_factor=float(autoencoder.config["scaling_factor"]),
        logger=tracker.training("diffusion"),
    )  # fmt: skip
    target = folder / "checkpoint"
    components = stable_diffusion(
        unet=unet, autoencoder=autoencoder, text_encoder=text_encoder, tokenizer=tokenizer,
        scheduler=scheduler,
    )  # fmt: skip
    write_folder(target, components, weights_of(components, "fp16"))
    similarity = measured_similarity(cfg, target, pairs, folder / "pictures")
    write_card(
        target,
        recipe=recipe,
        pairs=pairs,
        exposures=encoded.exposures(stream.planted),
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


def measured_similarity(
    cfg: DictConfig, checkpoint: Path, pairs: Sequence[Pair], folder: Path
) -> dict[str, float]:
    """Best similarity of each audited pair's images, from its prompt, with its original.

    Args:
        cfg: Gives sampling and measures.
        checkpoint: Folder of the checkpoint.
        pairs: All pairs.
        folder: Where the images go.
    """
    model = load_checkpoint(name="planted", source=str(checkpoint))
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
