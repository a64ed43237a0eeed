"""The ladder: what one attack costs, from a naive loop to the package's own."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn
from torch.nn import functional as F

from dori_lightning.attacks.budget import AttackSettings, BudgetSettings
from dori_lightning.attacks.embedding_attack import (
    AttackContext,
    ControlPrompts,
    attack_rounds,
    run_attacks,
)
from dori_lightning.attacks.solver import (
    AttackProblem,
    noise_and_timesteps,
    random_embedding,
    solve,
)
from dori_lightning.bench.measure import (
    counted,
    counted_operations,
    matmul_peak,
    seconds_alone,
    timed_in_turn,
)
from dori_lightning.bench.report import Limits, Row, row_of
from dori_lightning.metrics.calibration import ReferenceImages
from dori_lightning.metrics.statistics import wilson_interval
from dori_lightning.mitigations.base import Context
from dori_lightning.models.memory import PeakMemory, pairs_at_once
from dori_lightning.models.protocol import Sampling
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.runtime import batching
from dori_lightning.runtime.logging import progress_disabled
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Budget, Pair

# -------- attack_loops
# The attack as others would write it, each loop whole: what the package's own is held against.
#
# All of them solve the same problem: Adam on a text embedding, the mean denoising error of a
# batch of noise samples and timesteps that are drawn anew at every step, by the same keys as the
# package's attack draws them (``attacks.draws``).


@dataclass(frozen=True)
class AttackTask:
    """N searches.

    Attributes:
        ids: Pair ids, length N, for the draws.
        images: Pictures to reproduce (N, 3, H, W) in [0, 1], on the CPU.
        latents: Their latents (N, C, h, w), on the CPU.
        initial: Initial embeddings (N, T, D), on the CPU.
        steps: Steps of Adam.
        noise_batch: B, noise samples of a step.
        lr: Adam's learning rate.
        seed: Of the draws.
    """

    ids: tuple[str, ...]
    images: torch.Tensor
    latents: torch.Tensor
    initial: torch.Tensor
    steps: int
    noise_batch: int = 8
    lr: float = 0.1
    seed: int = 0

    def draw(
        self, model: StableDiffusion, row: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise (B, C, h, w) and timesteps (B,) of a step, on the model's device."""
        noise, timesteps = noise_and_timesteps(
            self.seed, self.ids[row], 0, step,
            shape=(self.noise_batch, *self.latents.shape[1:]), timesteps=model.num_train_timesteps,
        )  # fmt: skip
        return noise.to(model.device), timesteps.to(model.device)


@dataclass(frozen=True)
class Found:
    """What a loop found.

    Attributes:
        embeddings: Embeddings (N, T, D), on the CPU.
        losses: Attack loss of every step (N, steps), on the CPU.
    """

    embeddings: torch.Tensor
    losses: torch.Tensor


def _error(
    model: StableDiffusion,
    denoiser: nn.Module | Any,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of each row's predicted noise (N,), or of v."""
    alpha = model.alphas_cumprod[timesteps][:, None, None, None]
    noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    dtype = next(model.unet.parameters()).dtype
    output = denoiser(
        noised.to(dtype), timesteps, encoder_hidden_states=context.to(dtype), return_dict=False
    )[0].float()
    target = noise
    if model.prediction_type == "v_prediction":
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    return F.mse_loss(output, target, reduction="none").flatten(1).mean(1)


def naive(model: StableDiffusion, task: AttackTask) -> Found:
    """B0: weights left trainable, no autocast, picture encoded at every step, one by one."""
    embeddings, losses = [], []
    for row in range(len(task.ids)):
        embedding = task.initial[row : row + 1].clone().to(model.device).requires_grad_(True)
        optimizer = torch.optim.Adam([embedding], lr=task.lr)
        own = []
        for step in range(task.steps):
            latents = model.encode_images(task.images[row : row + 1])
            noise, timesteps = task.draw(model, row, step)
            with torch.enable_grad():
                loss = _error(
                    model, model.unet, latents.expand_as(noise), noise, timesteps,
                    embedding.expand(len(noise), -1, -1),
                ).mean()  # fmt: skip
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            own.append(loss.item())
        embeddings.append(embedding.detach().cpu()[0])
        losses.append(torch.tensor(own))
    model.unet.zero_grad(set_to_none=True)
    return Found(torch.stack(embeddings), torch.stack(losses))


def fair(model: StableDiffusion, task: AttackTask, denoiser: nn.Module | Any = None) -> Found:
    """B1: frozen, evaluation mode, autocast, cached latents, losses left on the device.

    Args:
        model: Model under attack; its autocast is used.
        task: What to search.
        denoiser: What to call instead of the model's denoiser, such as its compiled copy (B2).
    """
    # not "or": a compiled module has no truth value
    denoiser = model.unet if denoiser is None else denoiser
    embeddings, losses = [], []
    with model.frozen(), torch.enable_grad():
        for row in range(len(task.ids)):
            latents = task.latents[row].to(model.device)
            embedding = task.initial[row : row + 1].clone().to(model.device).requires_grad_(True)
            optimizer = torch.optim.Adam([embedding], lr=task.lr)
            own = []
            for step in range(task.steps):
                noise, timesteps = task.draw(model, row, step)
                with _autocast(model):
                    loss = _error(
                        model, denoiser, latents.expand_as(noise), noise, timesteps,
                        embedding.expand(len(noise), -1, -1),
                    ).mean()  # fmt: skip
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                own.append(loss.detach())
            embeddings.append(embedding.detach().cpu()[0])
            losses.append(torch.stack(own).cpu())
    return Found(torch.stack(embeddings), torch.stack(losses))


def hand_written(model: StableDiffusion, task: AttackTask, *, share: int) -> Found:
    """The package's own arithmetic without the package: ``share`` pairs a pass, losses summed.

    No Trainer, no store, no row that can stand still, no checks: the difference to the package's
    own attack is what these cost.
    """
    batch, rows = task.noise_batch, len(task.ids)
    embedding = task.initial.clone().to(model.device).requires_grad_(True)
    repeated = task.latents.to(model.device).repeat_interleave(batch, 0)
    optimizer = torch.optim.Adam([embedding], lr=task.lr)
    losses = []
    # the last pass is filled up, as the package does it
    passes = [
        [start + k if start + k < rows else start for k in range(share)]
        for start in range(0, rows, share)
    ]
    with model.frozen(), torch.enable_grad():
        for step in range(task.steps):
            drawn = [task.draw(model, row, step) for row in range(rows)]
            noise, timesteps = (torch.cat(part) for part in zip(*drawn, strict=True))
            gradient, own = torch.zeros_like(embedding), []
            for places in passes:
                count = len(dict.fromkeys(places))
                index = torch.tensor(places)
                samples = (index[:, None] * batch + torch.arange(batch)).flatten()
                point = embedding.detach()[index].requires_grad_(True)
                with _autocast(model):
                    error = _error(
                        model, model.unet, repeated[samples], noise[samples], timesteps[samples],
                        point.repeat_interleave(batch, 0),
                    )  # fmt: skip
                loss = error.view(share, batch).mean(1)
                (part,) = torch.autograd.grad(loss.sum(), point)
                gradient[index[:count]] = part[:count]
                own.append(loss.detach()[:count])
            embedding.grad = gradient
            optimizer.step()
            losses.append(torch.cat(own))
    return Found(embedding.detach().cpu(), torch.stack(losses, 1).cpu())


def _autocast(model: StableDiffusion) -> AbstractContextManager[Any]:
    if model.autocast is None:
        return nullcontext()
    return torch.autocast(model.device.type, model.autocast)


# -------- subjects
# What is measured: a model with pairs, and a model of Stable Diffusion 1.4's shape without.


@dataclass(frozen=True)
class Subject:
    """A model with the pairs it is asked for.

    Attributes:
        model: The checkpoint.
        pairs: Pairs of kind vm.
        context: Encoded pairs, their references, the sampler; what mitigations work with.
        trainer: Runs the package's attack.
        folder: Where the package's attack may write; emptied between runs.
        threshold: Similarity above which a picture is a copy.
        seed: Run seed.
    """

    model: StableDiffusion
    pairs: tuple[Pair, ...]
    context: Context
    trainer: L.Trainer
    folder: Path
    threshold: float
    seed: int

    @property
    def references(self) -> ReferenceImages:
        """The pairs' pictures."""
        return self.context.references

    @property
    def sampling(self) -> Sampling:
        """How pictures are generated."""
        return self.context.sampling

    def task(self, pairs: int, *, steps: int, noise_batch: int) -> AttackTask:
        """The attack on the first pairs from random embeddings."""
        chosen = self.pairs[:pairs]
        batch = self.context.data.batch(chosen)
        places = [self.references.places[pair.id] for pair in chosen]
        initial = [
            random_embedding(self.seed, pair.id, 0, self.model.embedding_shape) for pair in chosen
        ]
        return AttackTask(
            ids=tuple(pair.id for pair in chosen),
            images=self.references.images[places],
            latents=batch.latents,
            initial=torch.stack(initial),
            steps=steps,
            noise_batch=noise_batch,
            seed=self.seed,
        )

    def scratch(self, name: str) -> Path:
        """An empty folder."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place

    def memorization(
        self, embeddings: torch.Tensor, sampling: Sampling | None = None
    ) -> tuple[bool, ...]:
        """Which of the first N pairs' pictures embeddings (N, T, D) bring back."""
        sampling = sampling or self.sampling
        pictures = sampling.images_per_pair
        noise = torch.stack(
            [
                torch.randn(
                    self.model.latent_shape,
                    generator=torch.Generator("cpu").manual_seed(sampling.seed + k),
                )
                for k in range(pictures)
            ]
        )
        images = self.model.generate(
            embeddings.repeat_interleave(pictures, 0),
            noise.repeat(len(embeddings), 1, 1, 1),
            sampling,
            pair_ids=[p.id for p in self.pairs[: len(embeddings)] for _ in range(pictures)],
        )
        decider = self.references.measures.decider
        return tuple(
            bool(
                self.references.measure(pair, own.cpu()).similarity[decider].max()
                >= self.threshold
            )
            for pair, own in zip(self.pairs, torch.split(images, pictures), strict=False)
        )


def rate_of(hits: tuple[bool, ...]) -> dict[str, Any]:
    """Memorization rate with its interval."""
    low, high = wilson_interval(sum(hits), len(hits))
    return {"hits": sum(hits), "n": len(hits), "mr": sum(hits) / len(hits), "ci95": [low, high]}


def random_task(
    model: StableDiffusion, *, pairs: int, steps: int, noise_batch: int, seed: int
) -> AttackTask:
    """An attack on noise, for a model that knows no pictures."""
    generator = keyed_generator("bench", seed)
    side = model.resolution
    return AttackTask(
        ids=tuple(f"noise{k}" for k in range(pairs)),
        images=torch.rand(pairs, 3, side, side, generator=generator),
        latents=torch.randn(pairs, *model.latent_shape, generator=generator),
        initial=torch.randn(pairs, *model.embedding_shape, generator=generator),
        steps=steps,
        noise_batch=noise_batch,
        seed=seed,
    )


def compiler() -> str:
    """Why nothing can be compiled here for the CPU; empty where it can."""
    found = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return "" if found else "no C++ compiler (g++, clang++) on this machine"


# -------- attack_rows

WHAT = {
    "B0": "naive: weights trainable, no autocast, picture encoded at every step, one at a time",
    "B1": "fair: frozen, evaluation mode, autocast where the model has it, latents cached, "
    "one at a time",
    "B2": "B1 with channels-last memory and torch.compile",
    "ours": "the package's attack, as an audit calls it",
    "by hand": "the same arithmetic in a loop without the package",
}


def solved(model: StableDiffusion, task: AttackTask) -> Found:
    """The package's solver on a task, without Trainer and store."""
    result = solve(
        model,
        AttackProblem(task.ids, (0,) * len(task.ids), task.latents, task.initial),
        budget=Budget("none", None, task.steps),
        settings=AttackSettings(lr=task.lr, noise_batch=task.noise_batch),
        seed=task.seed,
    )
    return Found(result.embeddings[:, -1], result.losses)


def own_attack(subject: Subject, task: AttackTask) -> Found:
    """The package's attack with everything an audit has around it: Trainer, store, files."""
    settings = AttackSettings(
        inits=("random",),
        budget=BudgetSettings(steps=task.steps),
        lr=task.lr,
        noise_batch=task.noise_batch,
    )
    context = AttackContext(
        model=subject.model,
        data=subject.context.data,
        settings=settings,
        budget=settings.budget.resolve(None),
        controls=ControlPrompts((), None),
        folder=subject.scratch("attacks"),
        seed=task.seed,
        edit="none",
    )
    rounds = attack_rounds(settings, subject.pairs[: len(task.ids)])
    triggers = run_attacks(context, rounds, trainer=subject.trainer)
    losses = [t.losses for t in triggers if t.losses is not None]
    return Found(torch.stack([t.embedding for t in triggers]), torch.stack(losses))


def attack_rows(
    model: StableDiffusion,
    task: AttackTask,
    *,
    ours: Callable[[AttackTask], Found],
    repeats: int,
    compiled: bool,
    title: str,
    quality: Mapping[str, Any] | None = None,
) -> tuple[tuple[Row, ...], Limits]:
    """Measure every way in turn.

    Args:
        model: Model under attack.
        task: What is timed.
        ours: The package's attack.
        repeats: Timed rounds.
        compiled: Whether to compile; the row says why not where that cannot be.
        title: What the progress line says.
        quality: ``subject`` and ``task`` for loss and memorization rate; None leaves them out.
    """
    share = pairs_at_once(model) if model.device.type == "cpu" else len(task.ids)
    ways: dict[str, Callable[[AttackTask], Found]] = {
        "B0": partial(naive, model),
        "B1": partial(fair, model),
        "ours": ours,
        "by hand": partial(hand_written, model, share=share),
    }
    eager = dict(ways)
    skipped = _why_not_compiled(model, compiled)
    if not skipped:
        twin: nn.Module = copy.deepcopy(model.denoiser())
        twin.to(memory_format=torch.channels_last)
        twin.eval().requires_grad_(False)
        fast = torch.compile(twin)
        ways["B2"] = partial(fair, model, denoiser=fast)
        # counted without compilation: the same operations
        eager["B2"] = partial(fair, model, denoiser=twin)
    ways = {name: ways[name] for name in WHAT if name in ways}
    one = replace(task, steps=1)
    costs = {name: _cost(model, partial(run, one), len(task.ids)) for name, run in eager.items()}
    # counted one pass after the other
    costs["ours"]["bytes"] *= batching.parallel_batches(model)
    limits = _limits(model, one, share)
    timed = timed_in_turn(
        {name: partial(run, task) for name, run in ways.items()},
        repeats=repeats,
        device=model.device,
        title=title,
    )
    needed = limits.gflop_needed * task.steps
    reference: Found = timed["ours"].result
    found = {}
    if quality is not None:
        found = {name: _quality(run, quality) for name, run in ways.items()}
    rows = []
    for name, what in WHAT.items():
        if name not in timed:
            rows.append(Row(name, what, skipped=skipped))
            continue
        own, cost = timed[name], costs[name]
        row = row_of(
            name,
            what,
            own,
            pairs=len(task.ids),
            samples=cost["unet"] * task.steps,
            gflop=cost["gflop"] * task.steps,
        )
        rows.append(
            replace(
                row,
                peak_bytes=cost["bytes"] if row.peak_bytes is None else row.peak_bytes,
                peak_share=1e9 * needed / row.per_pair / limits.peak,
                alone_share=limits.seconds_alone * task.steps / row.per_pair,
                values={
                    "loss_first": float(own.result.losses[:, 0].mean()),
                    "loss_last": float(own.result.losses[:, -1].mean()),
                    "furthest_from_ours": float(
                        (own.result.embeddings - reference.embeddings).abs().max()
                    ),
                    "encoded_each_step": cost["encoded"],
                    **found.get(name, {}),
                },
            )
        )
    whole = replace(
        limits,
        gflop_needed=needed,
        seconds_alone=limits.seconds_alone * task.steps,
    )
    return tuple(rows), whole


def _why_not_compiled(model: StableDiffusion, compiled: bool) -> str:
    if not compiled:
        return "not asked for (compile)"
    return compiler() if model.device.type == "cpu" else ""


def _cost(model: StableDiffusion, run: Callable[[], Any], pairs: int) -> dict[str, Any]:
    """Operations per pair, rows through the model and memory of one step."""
    memory = PeakMemory()
    with batching.disable_parallel(), counted(model) as counts, memory:
        operations = counted_operations(run)
    return {
        "gflop": operations.flop / 1e9 / pairs,
        "bytes": memory.peak,
        "unet": counts.unet,
        "encoded": counts.encoded,
    }


def _limits(model: StableDiffusion, one: AttackTask, share: int) -> Limits:
    """What a step needs and what its operations take alone, per pair, at a full pass's shapes."""
    full = min(share, len(one.ids))
    operations = counted_operations(
        lambda: hand_written(
            model,
            replace(
                one,
                ids=one.ids[:full],
                images=one.images[:full],
                latents=one.latents[:full],
                initial=one.initial[:full],
            ),
            share=full,
        )
    )
    dtype = model.autocast or next(model.unet.parameters()).dtype
    return Limits(
        peak=matmul_peak(model.device, dtype),
        peak_dtype=str(dtype).removeprefix("torch."),
        gflop_needed=operations.flop / 1e9 / full,
        seconds_alone=seconds_alone(operations, model.device) / full,
    )


def _quality(run: Callable[[AttackTask], Found], quality: Mapping[str, Any]) -> dict[str, Any]:
    """Loss at the end and memorization rate of a longer attack."""
    subject: Subject = quality["subject"]
    with progress_disabled():
        found = run(quality["task"])
    return {
        "steps": quality["task"].steps,
        "final_loss": float(found.losses[:, -5:].mean()),
        "memorization": rate_of(subject.memorization(found.embeddings)),
    }
