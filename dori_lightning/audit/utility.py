"""Measure what a mitigation costs: the mitigated model against the unmitigated one.

Both models see the same ordinary images under the same noise, and generate from the same ordinary
and neighbour prompts with the same seeds. Prompts and images are those that the corpus keeps for
evaluation: no mitigation has calibrated on them.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa
import torch

from dori_lightning.audit.context import AuditContext
from dori_lightning.metrics.image_distances import (
    FEWEST_GROUPS,
    Features,
    LatentFeatures,
    frechet_images,
)
from dori_lightning.metrics.utility import (
    Comparison,
    LossRow,
    PictureRow,
    PromptKind,
    Utility,
    compare_losses,
    compare_pictures,
    count_replicas,
    replicated_before,
)
from dori_lightning.mitigations.edits import Edit
from dori_lightning.models.generation import (
    CPU_IMAGES,
    GenerationRequest,
    generate_images,
    image_seeds,
    load_images,
)
from dori_lightning.models.progress import encode_prompts
from dori_lightning.models.protocol import TextToImage
from dori_lightning.pairs.corpus import neighbour_prompts
from dori_lightning.runtime import distributed
from dori_lightning.runtime.artifacts import content_hash, write_atomically
from dori_lightning.runtime.batching import fixed_batches
from dori_lightning.runtime.cache import TENSORS, Cache, held
from dori_lightning.runtime.documents import json_bytes, parquet_bytes, relative_to
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Calibration, InputError, Pair, first_line

IMAGES_DESCRIBED_AT_ONCE = 16

log = logging.getLogger(__name__)


def generate_shares(context: AuditContext, edit: Edit) -> None:
    """Generate each process's share of the images that ``measure_utility`` compares.

    Where there is but one process, it generates them there.

    Args:
        context: The audit; its model carries no edit.
        edit: What the mitigation changes.
    """
    rank, world = distributed.rank(), distributed.world_size()
    if world == 1 or edit.is_empty or not context.utility.asked:
        return
    share = slice(rank, None, world)
    own = [
        replace(images, prompts=images.prompts[share], embeddings=images.embeddings[share])
        for images in _image_sets(context, {}).values()
    ]
    count = sum(images.count for images in own)
    with progress_bar("utility, unmitigated", count) as advance:
        for images in own:
            images.generate(advance)
    with edit.applied(context.model), progress_bar("utility, mitigated", count) as advance:
        for images in own:
            images.generate(advance, edit=edit.identity)
    distributed.barrier()


def measure_utility(context: AuditContext, edit: Edit, calibration: Calibration) -> Utility | None:
    """Compare the model with and without an edit on what it should not remove.

    Images of the mitigated model go to ``pictures/utility`` in the run folder; losses and images
    of the unmitigated model are shared by the jobs of a sweep.

    Args:
        context: The audit; its model carries no edit.
        edit: What the mitigation changes.
        calibration: Descriptor and threshold of replication.

    Returns:
        All measures; what could not be measured is left out with the reason. None without an edit,
        and where nothing is to be measured.

    Raises:
        InputError: The edit was made for another checkpoint.
    """
    if edit.is_empty or not context.utility.asked:
        return None
    left_out: dict[str, str] = {}
    examples = _loss_examples(context, left_out)
    image_sets = _image_sets(context, left_out)
    losses = _run_both_models(context, edit, examples, image_sets)
    features: Features = context.utility.inception or LatentFeatures(
        context.model.encode_images, context.model.latent_shape[0]
    )
    comparisons: dict[str, Comparison] = {}
    rows: list[PictureRow] = []
    for name, images in image_sets.items():
        described = images.describe(features, calibration.descriptor)
        rows += described.rows
        if name == "neighbours":
            described = described.without(
                replicated_before(described.rows, threshold_of=calibration.threshold_of)
            )
            if not described.rows:
                left_out[name] = "every one brought its original back without the mitigation"
                continue
        comparisons[name] = compare_pictures(
            described.rows,
            described.unmitigated,
            described.mitigated,
            features=f"{features.name}, {features.dimension} features",
            seed=context.seed,
        )
        left_out.update(_gaps(name, comparisons[name], features))
    neighbours = [row for row in rows if row.kind == "neighbour"]
    for name, reason in left_out.items():
        log.info("utility: %s is left out: %s", name, reason)
    return Utility(
        descriptor=calibration.descriptor,
        denoising_loss=compare_losses(losses, seed=context.seed) if losses else None,
        ordinary=comparisons.get("ordinary"),
        neighbours=comparisons.get("neighbours"),
        replicas=count_replicas(neighbours, threshold_of=calibration.threshold_of)
        if neighbours
        else None,
        left_out=left_out,
        loss_rows=tuple(losses),
        picture_rows=tuple(rows),
    )


def _loss_examples(context: AuditContext, left_out: dict[str, str]) -> LossExamples | None:
    """Ordinary images with captions, or the reason in ``left_out``."""
    settings, model = context.utility, context.model
    if not settings.examples:
        left_out["denoising_loss"] = "not asked for (utility.examples=0)"
        return None
    try:
        ordinary = context.for_mitigations.ordinary(model, "evaluation", settings.examples)
    except InputError as error:
        left_out["denoising_loss"] = first_line(error)
        return None
    with progress_bar("utility, encode", len(ordinary)) as advance:
        encoded = ordinary.rows(range(len(ordinary)), advance=advance)
    return LossExamples(
        prompts=ordinary.prompts,
        embeddings=encoded.embeddings,
        latents=encoded.latents,
        draws=settings.draws,
        seed=context.seed,
    )


def _image_sets(context: AuditContext, left_out: dict[str, str]) -> dict[str, PromptImages]:
    """``ordinary`` and ``neighbours``, or the reasons in ``left_out``."""
    settings, suspected = context.utility, context.suspected
    sets = {}
    if settings.prompts:
        try:
            prompts = ordinary_prompts(context.corpus.prompts("evaluation", settings.prompts))
            sets["ordinary"] = PromptImages.of(context, prompts, settings.pictures)
        except InputError as error:
            left_out["ordinary"] = first_line(error)
    else:
        left_out["ordinary"] = "not asked for (utility.prompts=0)"
    neighbours, lacking = near_prompts(suspected, settings.neighbours)
    if neighbours:
        sets["neighbours"] = PromptImages.of(context, neighbours, settings.neighbour_pictures)
    elif not settings.neighbours or not suspected:
        reason = "no suspected pairs" if settings.neighbours else "utility.neighbours=0"
        left_out["neighbours"] = f"not asked for ({reason})"
    if lacking:
        left_out["neighbours of some pairs" if neighbours else "neighbours"] = (
            f"{len(lacking)} of {len(suspected)} pairs; the first: {next(iter(lacking.values()))}"
        )
    return sets


def _run_both_models(
    context: AuditContext,
    edit: Edit,
    examples: LossExamples | None,
    image_sets: dict[str, PromptImages],
) -> list[LossRow]:
    """Generate the images of both models, and return their denoising losses."""
    model, batch = context.model, context.sampling.batch
    count = sum(images.count for images in image_sets.values())
    count += len(examples.prompts) * examples.draws if examples is not None else 0
    baseline = _baseline_folder(context)
    unmitigated = mitigated = torch.empty(0)
    baseline.mkdir(parents=True, exist_ok=True)
    # jobs of a sweep wait for the one that computes what they share
    with (
        held(baseline / "lock", "the unmitigated images"),
        progress_bar("utility, unmitigated", count) as advance,
    ):
        if examples is not None:
            key: dict[str, str | int] = {
                "checkpoint": model.fingerprint,
                "machine": baseline.name,
                "corpus": context.corpus.identity,
                "examples": len(examples.prompts),
                "draws": examples.draws,
                "seed": examples.seed,
            }
            unmitigated = Cache(baseline).get(
                f"losses-{content_hash([*key.values()])[:24]}",
                key,
                lambda: {
                    "losses": denoising_losses(model, examples, batch=batch, advance=advance)
                },
                TENSORS,
            )["losses"]
        for images in image_sets.values():
            images.generate(advance)
    with edit.applied(model), progress_bar("utility, mitigated", count) as advance:
        if examples is not None:
            mitigated = denoising_losses(model, examples, batch=batch, advance=advance)
        for images in image_sets.values():
            images.generate(advance, edit=edit.identity)
    if examples is None:
        return []
    return [
        LossRow(
            id=corpus_id(k),
            prompt=prompt,
            draw=r,
            timestep=examples.draw(k, r, model.num_train_timesteps)[1],
            unmitigated=float(unmitigated[k, r]),
            mitigated=float(mitigated[k, r]),
        )
        for k, prompt in enumerate(examples.prompts)
        for r in range(examples.draws)
    ]


def _baseline_folder(context: AuditContext) -> Path:
    """Folder of the unmitigated model's losses and images.

    One for each device and precision: their roundings differ, which a ratio near 1 would show.
    """
    return context.unmitigated / f"utility-{context.machine}"


def corpus_id(place: int) -> str:
    """Id of an element of the corpus; per-pair edits choose by it whose mask a row sees."""
    return f"corpus_{place:04d}"


@dataclass(frozen=True)
class LossExamples:
    """Ordinary images with captions, and how often noise is drawn for each.

    Attributes:
        prompts: N captions.
        embeddings: Their embeddings (N, T, D).
        latents: Scaled latents (N, C, h, w) of the images.
        draws: Draws of noise and timestep for each image, R.
        seed: Seed of the draws.
    """

    prompts: tuple[str, ...]
    embeddings: torch.Tensor
    latents: torch.Tensor
    draws: int
    seed: int

    def draw(self, place: int, number: int, timesteps: int) -> tuple[torch.Tensor, int]:
        """Noise (C, h, w) and timestep of one draw; the same for every model and device.

        The R timesteps of an image are uniform on R equal parts of the schedule, one on each:
        their mean is that of uniform timesteps, with less variance.
        """
        generator = keyed_generator("utility", self.seed, corpus_id(place), number)
        noise = torch.randn(self.latents.shape[1:], generator=generator)
        within = float(torch.rand((), generator=generator, dtype=torch.float64))
        return noise, math.floor((number + within) / self.draws * timesteps)


@torch.no_grad()
def denoising_losses(
    model: TextToImage,
    examples: LossExamples,
    *,
    batch: int,
    advance: Callable[[int], None] = lambda _: None,
) -> torch.Tensor:
    """Denoising loss of every example under every draw.

    Under an edit that differs by pair, example k sees the mask that ``edits.owner_of`` gives its
    id: the masks of the edited pairs take turns, and the mean is what an edit costs on average
    over pairs. A defence that filters embeddings during generation leaves the denoiser as it is:
    it costs nothing by this measure, and is judged by its images.

    Args:
        model: Carries the edit, or none.
        examples: N examples with R draws each.
        batch: Rows of a forward pass on a GPU. On the CPU a pass has ``CPU_IMAGES`` rows, so
            that a model without an edit gives the same bits again.
        advance: Called with the number of losses that were just measured.

    Returns:
        Mean squared errors (N, R), fp64 on the CPU.
    """
    draws = [(k, r) for k in range(len(examples.prompts)) for r in range(examples.draws)]
    values: list[torch.Tensor] = []
    for part, count in fixed_batches(draws, CPU_IMAGES if model.device.type == "cpu" else batch):
        drawn = [examples.draw(k, r, model.num_train_timesteps) for k, r in part]
        rows = [k for k, _ in part]
        losses = model.denoising_loss(
            examples.latents[rows].to(model.device),
            torch.stack([noise for noise, _ in drawn]).to(model.device),
            torch.tensor([timestep for _, timestep in drawn], device=model.device),
            examples.embeddings[rows].to(model.device),
            pair_ids=[corpus_id(k) for k in rows],
        )
        values.append(losses[:count].double().cpu())
        advance(count)
    return torch.cat(values).reshape(len(examples.prompts), examples.draws)


@dataclass(frozen=True)
class UtilityPrompt:
    """A prompt that both models generate images from.

    Attributes:
        kind: Ordinary, or near a suspected pair's.
        id: Its name.
        group: Prompts of one group depend on each other: equal prompts, or those near one pair.
        text: The prompt.
        pair: The pair it lies near.
    """

    kind: PromptKind
    id: str
    group: str
    text: str
    pair: Pair | None = None

    @property
    def owner(self) -> str:
        """Whose mask its rows see under a per-pair edit."""
        return self.id if self.pair is None else self.pair.id


def ordinary_prompts(prompts: Iterable[str]) -> list[UtilityPrompt]:
    """Prompts of the corpus; equal ones give equal images, so they count as one group."""
    return [
        UtilityPrompt("ordinary", corpus_id(k), prompt, prompt) for k, prompt in enumerate(prompts)
    ]


def near_prompts(pairs: Sequence[Pair], count: int) -> tuple[list[UtilityPrompt], dict[str, str]]:
    """Prompts near those of the suspected pairs, under each pair's own mask.

    Returns:
        The prompts, and pair id to the reason for each pair that has too few.
    """
    texts: dict[str, tuple[str, ...]] = {}
    lacking: dict[str, str] = {}
    for pair in pairs:
        try:
            texts[pair.id] = neighbour_prompts(pair, count, split="evaluation")
        except InputError as error:
            lacking[pair.id] = first_line(error)
    groups = _groups(texts)
    prompts = [
        UtilityPrompt("neighbour", f"{pair.id}_near{k}", groups[pair.id], text, pair)
        for pair in pairs
        for k, text in enumerate(texts.get(pair.id, ()))
    ]
    return prompts, lacking


def _groups(texts: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Pair id to group: pairs that share a prompt share a group."""
    groups: dict[str, str] = {}
    first_pair: dict[str, str] = {}
    for name, prompts in texts.items():
        groups[name] = name
        for prompt in prompts:
            old, new = groups[first_pair.setdefault(prompt, name)], groups[name]
            groups = {key: old if group == new else group for key, group in groups.items()}
    return groups


@dataclass(frozen=True)
class DescribedImages:
    """Images of both models, compared seed by seed.

    Attributes:
        rows: One for each prompt and seed, N.
        unmitigated: Features (N, F) of the unmitigated model's images.
        mitigated: Features (N, F) of the mitigated model's images.
    """

    rows: list[PictureRow]
    unmitigated: torch.Tensor
    mitigated: torch.Tensor

    def without(self, ids: set[str]) -> DescribedImages:
        """Leave out the prompts of some ids."""
        stay = [k for k, row in enumerate(self.rows) if row.id not in ids]
        rows = [self.rows[k] for k in stay]
        return DescribedImages(rows, self.unmitigated[stay], self.mitigated[stay])


@dataclass(frozen=True)
class PromptImages:
    """Prompts, and the images that both models generate from them.

    Attributes:
        context: The audit.
        prompts: N prompts, at least one.
        embeddings: Their embeddings (N, T, D).
        seeds: Generation seeds of each prompt's K images.
    """

    context: AuditContext
    prompts: Sequence[UtilityPrompt]
    embeddings: torch.Tensor
    seeds: tuple[int, ...]

    @classmethod
    def of(
        cls, context: AuditContext, prompts: Sequence[UtilityPrompt], images_each: int
    ) -> PromptImages:
        """Encode prompts, each for ``images_each`` images."""
        texts = [prompt.text for prompt in prompts]
        embeddings = encode_prompts(context.model, texts, "utility, prompts")
        sampling = replace(context.sampling, images_per_pair=images_each)
        return cls(context, prompts, embeddings, image_seeds(sampling))

    @property
    def count(self) -> int:
        """Images of one model."""
        return len(self.prompts) * len(self.seeds)

    def folder(self, prompt: UtilityPrompt, *, mitigated: bool) -> Path:
        """Folder of a prompt's images by one of the models; equal prompts share the baseline's."""
        if not mitigated:
            return _baseline_folder(self.context) / content_hash([prompt.text])[:24]
        return self.context.folder / "pictures" / "utility" / prompt.kind / prompt.id

    def generate(self, advance: Callable[[int], None], *, edit: str | None = None) -> None:
        """Generate the model's images; it carries the edit of that identity, or none."""
        requests = {}
        for prompt, embedding in zip(self.prompts, self.embeddings, strict=True):
            folder = self.folder(prompt, mitigated=edit is not None)
            owner = None if edit is None else prompt.owner
            requests[folder] = GenerationRequest(folder, embedding, owner)
        sampling = replace(self.context.sampling, images_per_pair=len(self.seeds))
        generate_images(
            self.context.model,
            list(requests.values()),
            sampling,
            edit=edit or "none",
            advance=advance,
        )

    def describe(self, features: Features, descriptor: str) -> DescribedImages:
        """Read both models' images and compare them seed by seed, by a descriptor's name."""
        rows: list[PictureRow] = []
        both: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        width = max(1, IMAGES_DESCRIBED_AT_ONCE // len(self.seeds))
        with progress_bar("utility, compare", len(self.prompts)) as advance:
            for start in range(0, len(self.prompts), width):
                part = self.prompts[start : start + width]
                images = [
                    torch.cat([load_images(self.folder(p, mitigated=m), self.seeds) for p in part])
                    for m in (False, True)
                ]
                both[0].append(self._kept_features(part, images[0], features))
                both[1].append(features.describe(images[1].to(self.context.model.device)))
                rows += self._rows(part, images, descriptor)
                advance(len(part))
        return DescribedImages(rows, torch.cat(both[0]), torch.cat(both[1]))

    def _kept_features(
        self, prompts: Sequence[UtilityPrompt], images: torch.Tensor, features: Features
    ) -> torch.Tensor:
        """Features of the unmitigated model's images (P K, 3, H, W) of some prompts.

        Kept beside the images: every job of a sweep compares with them.
        """
        split = torch.split(images, len(self.seeds))
        name = f"features-{features.identity}"
        caches = [Cache(self.folder(prompt, mitigated=False)) for prompt in prompts]
        keys = [{"images": hashlib.sha256(own.numpy().tobytes()).hexdigest()} for own in split]
        kept = [cache.read(name, key, TENSORS) for cache, key in zip(caches, keys, strict=True)]
        found = [stored["features"] for stored in kept if stored is not None]
        if len(found) == len(prompts):
            return torch.cat(found)
        described = features.describe(images.to(self.context.model.device))
        each = torch.split(described, len(self.seeds))
        for cache, key, own in zip(caches, keys, each, strict=True):
            cache.write(name, {"features": own}, key, TENSORS)
        return described

    def _rows(
        self, prompts: Sequence[UtilityPrompt], images: Sequence[torch.Tensor], descriptor: str
    ) -> Iterator[PictureRow]:
        """Rows of some prompts; ``images`` are the unmitigated and the mitigated model's."""
        references, alignment = self.context.references, self.context.references.measures.alignment
        judge = references.measures.descriptors[descriptor]
        described = [judge.describe(own) for own in images]
        generated = [(prompt, seed) for prompt in prompts for seed in self.seeds]
        texts = [prompt.text for prompt, _ in generated]
        aligned = [
            alignment.alignment(own, texts).tolist() if alignment else [None] * len(texts)
            for own in images
        ]
        for k, (prompt, seed) in enumerate(generated):
            unmitigated, mitigated = (own[k : k + 1] for own in described)
            originals: list[float | None] = [None, None]
            if prompt.pair is not None:
                originals = [
                    float(references.compare(descriptor, own, prompt.pair).max())
                    for own in (unmitigated, mitigated)
                ]
            yield PictureRow(
                kind=prompt.kind,
                id=prompt.id,
                group=prompt.group,
                prompt=prompt.text,
                seed=seed,
                similarity=float(judge.compare(mitigated, unmitigated)[0, 0]),
                original_unmitigated=originals[0],
                original_mitigated=originals[1],
                alignment_unmitigated=aligned[0][k],
                alignment_mitigated=aligned[1][k],
                unmitigated=self.folder(prompt, mitigated=False) / f"{seed}.png",
                mitigated=self.folder(prompt, mitigated=True) / f"{seed}.png",
            )


def _gaps(name: str, comparison: Comparison, features: Features) -> dict[str, str]:
    """What a comparison had to leave out, by the names that reports use."""
    prefix = "" if name == "ordinary" else f"{name}."
    gaps = {}
    if comparison.kid is None:
        gaps[f"{prefix}kid"] = f"needs {FEWEST_GROUPS} independent prompts or pairs"
    if comparison.fid is None:
        images = comparison.prompts * comparison.pictures_each
        gaps[f"{prefix}fid"] = (
            f"needs {frechet_images(features.dimension)} pictures by each model for "
            f"{features.dimension} features, there are {images}"
        )
    if comparison.alignment is None:
        gaps[f"{prefix}alignment"] = "needs a local CLIP model (metrics.alignment)"
    return gaps


def write_utility(utility: Utility, folder: Path) -> Path:
    """Write ``utility_losses.parquet``, ``utility_pictures.parquet`` and ``utility.json``.

    The JSON file comes last: where it is new, the tables belong to it.

    Paths of images are stored relative to the folder.

    Returns:
        Path of ``utility.json``.
    """

    def rows(items: Iterable[LossRow | PictureRow]) -> list[dict[str, Any]]:
        return [
            {k: relative_to(v, folder) if isinstance(v, Path) else v for k, v in asdict(i).items()}
            for i in items
        ]

    document = json_bytes(utility.to_dict())
    losses = parquet_bytes(rows(utility.loss_rows), _columns(LossRow))
    pictures = parquet_bytes(rows(utility.picture_rows), _columns(PictureRow))
    write_atomically(folder / "utility_losses.parquet", losses)
    write_atomically(folder / "utility_pictures.parquet", pictures)
    return write_atomically(folder / "utility.json", document)


def _columns(row: type[LossRow | PictureRow]) -> dict[str, pa.DataType]:
    types = {int: pa.int64(), float: pa.float64(), float | None: pa.float64()}
    return {name: types.get(hint, pa.string()) for name, hint in get_type_hints(row).items()}
