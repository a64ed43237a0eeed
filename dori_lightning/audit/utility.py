"""Measure what a mitigation costs: the mitigated model against the unmitigated one."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load, save

from dori_lightning.metrics.calibration import ReferenceImages
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
    UtilitySettings,
    compare_losses,
    compare_pictures,
    count_replicas,
    replicated_before,
)
from dori_lightning.mitigations.edits import Edit
from dori_lightning.models.generation import (
    CPU_PICTURES,
    GenerationRequest,
    baseline_cache_key,
    generate_images,
    image_seeds,
    load_images,
)
from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.pairs.corpus import Corpus, neighbour_prompts
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import InputError, Pair

# -------- utility_cache
# What the unmitigated model does, kept for all the jobs of a sweep.


@dataclass(frozen=True)
class Unmitigated:
    """Places for pictures and losses of one unmitigated model.

    Attributes:
        folder: Shared by the jobs of a sweep.
        model: The model.
        sampling: How pictures are generated; how many of each prompt does not matter.
    """

    folder: Path
    model: TextToImage
    sampling: Sampling

    @property
    def place(self) -> Path:
        """Folder of this model as it computes here.

        Device and precision change roundings, which a ratio near 1 would show.
        """
        precision = str(getattr(self.model, "autocast", None) or torch.float32)
        machine = f"{self.model.device.type}-{precision.removeprefix('torch.')}"
        return self.folder / baseline_cache_key(self.model, self.sampling) / f"utility-{machine}"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Other jobs that want the same wait for this one instead of computing it too."""
        self.place.mkdir(parents=True, exist_ok=True)
        with FileLock(self.place / "lock"):
            yield

    def pictures(self, prompt: str) -> Path:
        """Folder of a prompt's pictures."""
        return self.place / _hash(prompt)

    def losses(
        self, key: tuple[int | str, ...], compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Read losses that were computed before, or compute and keep them.

        Args:
            key: Everything besides the model that decides them.
            compute: Gives them, fp64.
        """
        path = self.place / f"losses-{_hash(*key)}.safetensors"
        if path.is_file():
            try:
                return load(path.read_bytes())["losses"]
            except (KeyError, ValueError, RuntimeError, SafetensorError):
                log.warning("%s is damaged and is computed again", path)
        losses = compute()
        write_atomically(path, save({"losses": losses}))
        return losses


def _hash(*parts: float | str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


# -------- utility_losses
# Denoising losses of ordinary pictures, under draws that depend on names alone.


def corpus_id(place: int) -> str:
    """Name of an element of the corpus; per-pair edits choose by it whose mask the row sees."""
    return f"corpus_{place:04d}"


@dataclass(frozen=True)
class LossExamples:
    """Ordinary pictures with captions, and how often noise is drawn for each.

    Attributes:
        prompts: N captions.
        embeddings: Their embeddings (N, T, D).
        latents: Scaled latents (N, C, h, w) of the pictures.
        draws: Draws for each, R.
        seed: Seed of the draws.
    """

    prompts: tuple[str, ...]
    embeddings: torch.Tensor
    latents: torch.Tensor
    draws: int
    seed: int

    def draw(self, place: int, number: int, timesteps: int) -> tuple[torch.Tensor, int]:
        """Noise (C, h, w) and timestep of one draw; the same for every model and device.

        The R timesteps of an example are uniform on R equal parts of the schedule, one on each:
        their mean is that of uniform timesteps, with less scatter.
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
    advance: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Denoising loss of every example under every draw.

    Under an edit that differs by pair, example k sees the mask that its name is given by
    ``mitigations.edits.owner_of``. So the masks of the edited pairs are used in turn, and the mean
    is what an edit costs on average over pairs. A defence that filters embeddings when pictures
    are generated leaves the denoiser as it is: it costs nothing by this measure, and is judged by
    its pictures.

    Args:
        model: Carries the edit, or none.
        examples: N examples with R draws each.
        batch: Rows of a pass; on the CPU every pass has the same shape whatever this says, so that
            a model without an edit gives the same bits again.
        advance: Called with the number of rows that just became done.

    Returns:
        Mean squared errors (N, R), fp64 on the CPU.
    """
    places = [(k, r) for k in range(len(examples.prompts)) for r in range(examples.draws)]
    width = CPU_PICTURES if model.device.type == "cpu" else batch
    values: list[torch.Tensor] = []
    for start in range(0, len(places), width):
        part = places[start : start + width]
        full = [*part, *[part[0]] * (width - len(part))]
        drawn = [examples.draw(k, r, model.num_train_timesteps) for k, r in full]
        rows = [k for k, _ in full]
        losses = model.denoising_loss(
            examples.latents[rows].to(model.device),
            torch.stack([noise for noise, _ in drawn]).to(model.device),
            torch.tensor([timestep for _, timestep in drawn], device=model.device),
            examples.embeddings[rows].to(model.device),
            pair_ids=[corpus_id(k) for k in rows],
        )
        values.append(losses[: len(part)].double().cpu())
        if advance is not None:
            advance(len(part))
    return torch.cat(values).reshape(len(examples.prompts), examples.draws)


# -------- utility_pictures
# Draw ordinary and neighbour prompts by both models, and describe what came out.

CHUNK = 16
"""Pictures that are described at once."""


@dataclass(frozen=True)
class Asked:
    """A prompt that both models draw.

    Attributes:
        kind: Ordinary, or near a suspected pair's.
        id: Its name.
        owner: Whose mask its rows see under a per-pair edit.
        group: What it depends on together with others: equal prompts, or the pair.
        prompt: The prompt.
        pair: The pair it lies near.
    """

    kind: PromptKind
    id: str
    owner: str
    group: str
    prompt: str
    pair: Pair | None = None


def ordinary_prompts(prompts: Iterable[str]) -> list[Asked]:
    """Prompts of the corpus; equal ones give equal pictures, so they count as one group."""
    return [
        Asked("ordinary", corpus_id(k), corpus_id(k), prompt, prompt)
        for k, prompt in enumerate(prompts)
    ]


def near_prompts(pairs: Sequence[Pair], count: int) -> tuple[list[Asked], dict[str, str]]:
    """Prompts near those of the suspected pairs, under each pair's own mask.

    Returns:
        The prompts, and why pairs without any have none.
    """
    prompts: dict[str, tuple[str, ...]] = {}
    without: dict[str, str] = {}
    for pair in pairs:
        try:
            prompts[pair.id] = neighbour_prompts(pair, count, split="evaluation")
        except InputError as error:
            without[pair.id] = str(error).splitlines()[0]
    groups = _merged(prompts)
    asked = [
        Asked("neighbour", f"{pair.id}_near{k}", pair.id, groups[pair.id], prompt, pair)
        for pair in pairs
        for k, prompt in enumerate(prompts.get(pair.id, ()))
    ]
    return asked, without


def _merged(prompts: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Pair id to group: pairs that share a prompt share a group."""
    groups: dict[str, str] = {}
    first: dict[str, str] = {}
    for name, own in prompts.items():
        groups[name] = name
        for prompt in own:
            known, new = groups[first.setdefault(prompt, name)], groups[name]
            groups = {key: known if group == new else group for key, group in groups.items()}
    return groups


@dataclass(frozen=True)
class PictureSet:
    """Prompts that both models draw, and where the pictures go.

    Attributes:
        model: Draws them.
        asked: The prompts, at least one.
        embeddings: Their embeddings (N, T, D).
        sampling: How; K pictures of each.
        cache: Where the unmitigated model's pictures lie.
        folder: Where the mitigated model's go.
    """

    model: TextToImage
    asked: Sequence[Asked]
    embeddings: torch.Tensor
    sampling: Sampling
    cache: Unmitigated
    folder: Path

    @classmethod
    def of(
        cls, model: TextToImage, asked: Sequence[Asked], *, sampling: Sampling, pictures: int,
        cache: Unmitigated, folder: Path,
    ) -> PictureSet:  # fmt: skip
        """Encode the prompts; ``pictures`` of each are drawn."""
        return cls(
            model=model,
            asked=asked,
            embeddings=model.encode_prompts([item.prompt for item in asked]),
            sampling=replace(sampling, images_per_pair=pictures),
            cache=cache,
            folder=folder,
        )

    @property
    def pictures(self) -> int:
        """Pictures by each model."""
        return len(self.asked) * self.sampling.images_per_pair

    def _before(self, item: Asked) -> Path:
        return self.cache.pictures(item.prompt)

    def _after(self, item: Asked) -> Path:
        return self.folder / item.kind / item.id

    def draw_unmitigated(self, advance: Callable[[int], None]) -> None:
        """Draw what the cache lacks by the model as it is; it must carry no edit."""
        orders = {
            self._before(item): GenerationRequest(self._before(item), row)
            for item, row in zip(self.asked, self.embeddings, strict=True)
        }
        generate_images(self.model, list(orders.values()), self.sampling, advance=advance)

    def draw_mitigated(self, edit: str, advance: Callable[[int], None]) -> None:
        """Draw by the model that carries the edit of that identity now."""
        orders = [
            GenerationRequest(self._after(item), row, item.owner)
            for item, row in zip(self.asked, self.embeddings, strict=True)
        ]
        generate_images(self.model, orders, self.sampling, edit=edit, advance=advance)

    def describe(
        self, references: ReferenceImages, features: Features, *, descriptor: str
    ) -> tuple[list[PictureRow], torch.Tensor, torch.Tensor]:
        """Read both models' pictures and compare them seed by seed.

        Returns:
            Rows, and the features (N K, F) of the unmitigated and of the mitigated model's
            pictures in their order.
        """
        rows: list[PictureRow] = []
        described: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        seeds = image_seeds(self.sampling)
        width = max(1, CHUNK // len(seeds))
        for start in range(0, len(self.asked), width):
            part = [item for item in self.asked[start : start + width] for _ in seeds]
            numbers = [seed for _ in self.asked[start : start + width] for seed in seeds]
            both = [
                torch.cat([load_images(where(item), seeds) for item in part[:: len(seeds)]])
                for where in (self._before, self._after)
            ]
            for found, pictures in zip(described, both, strict=True):
                found.append(features.describe(pictures.to(self.model.device)))
            rows += self._rows(part, numbers, both, references, descriptor)
        return rows, torch.cat(described[0]), torch.cat(described[1])

    def _rows(
        self,
        part: Sequence[Asked],
        seeds: Sequence[int],
        both: Sequence[torch.Tensor],
        references: ReferenceImages,
        descriptor: str,
    ) -> Iterable[PictureRow]:
        measures = references.measures
        judge = measures.descriptors[descriptor]
        before, after = (judge.describe(pictures) for pictures in both)
        scores = [
            measures.alignment.alignment(pictures, [item.prompt for item in part]).tolist()
            if measures.alignment
            else None
            for pictures in both
        ]

        def with_original(row: torch.Tensor, item: Asked) -> float | None:
            if item.pair is None:
                return None
            k = references.places[item.pair.id]
            original = references.features[descriptor][k : k + 1]
            return float(judge.compare(row, original)[0, 0])

        for k, (item, seed) in enumerate(zip(part, seeds, strict=True)):
            one, other = before[k : k + 1], after[k : k + 1]
            aligned: list[Any] = [None if own is None else own[k] for own in scores]
            yield PictureRow(
                kind=item.kind,
                id=item.id,
                group=item.group,
                prompt=item.prompt,
                seed=seed,
                similarity=float(judge.compare(other, one)[0, 0]),
                original_unmitigated=with_original(one, item),
                original_mitigated=with_original(other, item),
                alignment_unmitigated=aligned[0],
                alignment_mitigated=aligned[1],
                unmitigated=self._before(item) / f"{seed}.png",
                mitigated=self._after(item) / f"{seed}.png",
            )


# -------- utility

log = logging.getLogger(__name__)


def measure_utility(
    model: TextToImage,
    edit: Edit,
    *,
    pairs: Sequence[Pair],
    corpus: Corpus,
    references: ReferenceImages,
    sampling: Sampling,
    settings: UtilitySettings,
    folder: Path,
    cache: Path,
    descriptor: str,
    threshold: float,
    seed: int = 0,
) -> Utility:
    """Compare the model with and without an edit on what nobody wanted to forget.

    Ordinary prompts and pictures are those that the corpus keeps for evaluation: no mitigation has
    calibrated on them. What cannot be measured here is left out, with the reason.

    Args:
        model: The model, without the edit.
        edit: What the mitigation changes.
        pairs: Suspected pairs, whose neighbour prompts are drawn.
        corpus: Ordinary prompts and pictures.
        references: The pairs' pictures, described; also says which measures there are.
        sampling: How pictures are generated.
        settings: How much is measured.
        folder: Run folder; the mitigated model's pictures go to ``pictures/utility`` in it.
        cache: Folder for what the unmitigated model does, shared by the jobs of a sweep.
        descriptor: The deciding descriptor.
        threshold: Similarity above which a picture counts as a replica.
        seed: Run seed.

    Raises:
        InputError: The edit was made for another checkpoint.
    """
    plan = _plan(
        model, pairs, corpus, sampling=sampling, settings=settings, folder=folder, cache=cache,
        seed=seed,
    )  # fmt: skip
    losses = _run(model, edit, plan, batch=sampling.batch, key=corpus.identity)
    left_out = dict(plan.left_out)
    features: Features = settings.inception or LatentFeatures(
        model.encode_images, model.latent_shape[0]
    )
    compared: dict[str, Comparison] = {}
    rows: list[PictureRow] = []
    for name, pictures in plan.pictures.items():
        own, before, after = pictures.describe(references, features, descriptor=descriptor)
        rows += own
        if name == "neighbours":
            old = replicated_before(
                own, threshold=threshold, aggregation=references.measures.aggregation
            )
            stay = [k for k, row in enumerate(own) if row.id not in old]
            own, before, after = [own[k] for k in stay], before[stay], after[stay]
            if not own:
                left_out[name] = "every one brought its original back without the mitigation"
                continue
        compared[name] = compare_pictures(
            own, before, after, features=f"{features.name}, {features.dimension} features",
            seed=seed,
        )  # fmt: skip
        left_out.update(_gaps(name, compared[name], features))
    near = [row for row in rows if row.kind == "neighbour"]
    for name, reason in left_out.items():
        log.info("utility: %s is left out: %s", name, reason)
    return Utility(
        descriptor=descriptor,
        denoising_loss=compare_losses(losses, seed=seed) if losses else None,
        ordinary=compared.get("ordinary"),
        neighbours=compared.get("neighbours"),
        replicas=count_replicas(
            near, threshold=threshold, aggregation=references.measures.aggregation
        )
        if near
        else None,
        left_out=left_out,
        loss_rows=tuple(losses),
        picture_rows=tuple(rows),
    )


@dataclass(frozen=True)
class _Plan:
    """What both models will be given.

    Attributes:
        cache: Where the unmitigated model's results lie.
        examples: For denoising losses; None where left out.
        pictures: ``ordinary`` and ``neighbours``, as far as they are not left out.
        left_out: What will not be measured: name to reason.
    """

    cache: Unmitigated
    examples: LossExamples | None
    pictures: dict[str, PictureSet]
    left_out: dict[str, str]


def _plan(
    model: TextToImage,
    pairs: Sequence[Pair],
    corpus: Corpus,
    *,
    sampling: Sampling,
    settings: UtilitySettings,
    folder: Path,
    cache: Path,
    seed: int,
) -> _Plan:
    kept = Unmitigated(cache, model, sampling)
    left_out: dict[str, str] = {}
    sets: dict[str, PictureSet] = {}
    where = folder / "pictures" / "utility"
    examples = None
    try:
        examples = _examples(model, corpus, settings, seed=seed)
    except InputError as error:
        left_out["denoising_loss"] = _first_line(error)
    if examples is None:
        left_out.setdefault("denoising_loss", "not asked for (utility.examples=0)")
    asked = []
    try:
        asked = ordinary_prompts(
            corpus.prompts("evaluation", settings.prompts) if settings.prompts else ()
        )
    except InputError as error:
        left_out["ordinary"] = _first_line(error)
    if asked:
        sets["ordinary"] = PictureSet.of(
            model, asked, sampling=sampling, pictures=settings.pictures, cache=kept, folder=where
        )
    else:
        left_out.setdefault("ordinary", "not asked for (utility.prompts=0)")
    near, without = near_prompts(pairs, settings.neighbours)
    if near:
        sets["neighbours"] = PictureSet.of(
            model, near, sampling=sampling, pictures=settings.neighbour_pictures, cache=kept,
            folder=where,
        )  # fmt: skip
    elif not settings.neighbours or not pairs:
        reason = "no suspected pairs" if settings.neighbours else "utility.neighbours=0"
        left_out["neighbours"] = f"not asked for ({reason})"
    if without:
        left_out["neighbours of some pairs" if near else "neighbours"] = (
            f"{len(without)} of {len(pairs)} pairs; the first: {next(iter(without.values()))}"
        )
    return _Plan(kept, examples, sets, left_out)


def _examples(
    model: TextToImage, corpus: Corpus, settings: UtilitySettings, *, seed: int
) -> LossExamples | None:
    if not settings.examples:
        return None
    found = corpus.examples("evaluation", settings.examples, model.resolution)
    return LossExamples(
        prompts=found.prompts,
        embeddings=model.encode_prompts(found.prompts),
        latents=model.encode_images(found.images),
        draws=settings.draws,
        seed=seed,
    )


def _run(model: TextToImage, edit: Edit, plan: _Plan, *, batch: int, key: str) -> list[LossRow]:
    """Let both models draw, and return what they lose on ordinary pictures."""
    examples, sets = plan.examples, list(plan.pictures.values())
    count = sum(pictures.pictures for pictures in sets)
    before = after = torch.empty(0)
    with plan.cache.alone():
        if examples is not None:
            named = (key, len(examples.prompts), examples.draws, examples.seed)
            before = plan.cache.losses(
                named, lambda: denoising_losses(model, examples, batch=batch)
            )
        with progress_bar("utility, unmitigated", count) as advance:
            for pictures in sets:
                pictures.draw_unmitigated(advance)
    with edit.applied(model), progress_bar("utility, mitigated", count) as advance:
        if examples is not None:
            after = denoising_losses(model, examples, batch=batch)
        for pictures in sets:
            pictures.draw_mitigated(edit.identity, advance)
    if examples is None:
        return []
    return [
        LossRow(
            id=corpus_id(k),
            prompt=prompt,
            draw=r,
            timestep=examples.draw(k, r, model.num_train_timesteps)[1],
            unmitigated=float(before[k, r]),
            mitigated=float(after[k, r]),
        )
        for k, prompt in enumerate(examples.prompts)
        for r in range(examples.draws)
    ]


def _gaps(name: str, found: Comparison, features: Features) -> dict[str, str]:
    """What a comparison had to leave out, by the names that reports use."""
    prefix = "" if name == "ordinary" else f"{name}."
    gaps = {}
    if found.kid is None:
        gaps[f"{prefix}kid"] = f"needs {FEWEST_GROUPS} independent prompts or pairs"
    if found.fid is None:
        gaps[f"{prefix}fid"] = (
            f"needs {frechet_images(features.dimension)} pictures by each model for "
            f"{features.dimension} features, there are {found.prompts * found.pictures_each}"
        )
    if found.alignment is None:
        gaps[f"{prefix}alignment"] = "needs a local CLIP model (metrics.alignment)"
    return gaps


def _first_line(error: InputError) -> str:
    return str(error).splitlines()[0]
