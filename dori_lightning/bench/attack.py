"""The attack ladder: one attack by plain loops, by the package, and by its layers alone.

All ways solve the same problem: Adam on a text embedding against the mean denoising error of a
batch of noise samples and timesteps, drawn anew at every step by the same keys as the package's
attack draws them.
"""

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
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
    BenchContext,
    BenchSettings,
    Family,
    Row,
    ShapeSettings,
    peak_bytes,
    seconds_alone,
    timed_in_turn,
)
from dori_lightning.models.memory import pairs_at_once
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.report.words import number_words
from dori_lightning.runtime.batching import parallel_batches
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Budget

WAYS = {
    "B1": "fair loop: frozen, evaluation mode, autocast where the model has it, latents cached, "
    "one pair at a time",
    "B2": "B1 with channels-last memory and torch.compile",
    "ours": "the package's attack, as an audit calls it",
    "solver": "its arithmetic alone, without Trainer, store and files",
}
ALONE = "layers alone"


@dataclass(frozen=True)
class AttackTask:
    """An attack on N pairs.

    Attributes:
        ids: Pair ids, length N, for the draws.
        latents: Their latents (N, C, h, w), on the CPU.
        initial: Initial embeddings (N, T, D), on the CPU.
        steps: Steps of Adam.
        noise_batch: B, noise samples of a step.
        lr: Adam's learning rate.
        seed: Of the draws.
    """

    ids: tuple[str, ...]
    latents: torch.Tensor
    initial: torch.Tensor
    steps: int
    noise_batch: int = 8
    lr: float = 0.1
    seed: int = 0

    def __str__(self) -> str:
        pairs, steps = number_words(len(self.ids), "pair"), number_words(self.steps, "step")
        return f"{pairs}, {steps} of {number_words(self.noise_batch, 'noise sample')}"

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
class Attacked:
    """What an attack ended with.

    Attributes:
        embeddings: Embeddings (N, T, D), on the CPU.
        losses: Attack loss of every step (N, steps), on the CPU.
    """

    embeddings: torch.Tensor
    losses: torch.Tensor


Attack = Callable[[AttackTask], Attacked]


def fair(model: StableDiffusion, task: AttackTask, denoiser: Any = None) -> Attacked:
    """B1: frozen, evaluation mode, autocast, cached latents, losses left on the device.

    Args:
        model: Model under attack; its autocast is used.
        task: The attack.
        denoiser: Called instead of the model's denoiser, such as its compiled copy (B2).
    """
    # not "or": a compiled module has no truth value
    denoiser = model.unet if denoiser is None else denoiser
    embeddings, losses = [], []
    with model.frozen(), torch.enable_grad():
        for row in range(len(task.ids)):
            latents = task.latents[row].to(model.device)
            embedding = task.initial[row : row + 1].clone().to(model.device).requires_grad_(True)
            optimizer = torch.optim.Adam([embedding], lr=task.lr)
            of_steps = []
            for step in range(task.steps):
                noise, timesteps = task.draw(model, row, step)
                loss = _error(
                    model, denoiser, latents.expand_as(noise), noise, timesteps,
                    embedding.expand(len(noise), -1, -1),
                ).mean()  # fmt: skip
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                of_steps.append(loss.detach())
            embeddings.append(embedding.detach().cpu()[0])
            losses.append(torch.stack(of_steps).cpu())
    return Attacked(torch.stack(embeddings), torch.stack(losses))


def _error(
    model: StableDiffusion,
    denoiser: Any,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    embeddings: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of each row's predicted noise (N,), or of v."""
    alpha = model.alphas_cumprod[timesteps][:, None, None, None]
    noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    dtype = next(model.unet.parameters()).dtype
    device, half = model.device.type, model.autocast
    with torch.autocast(device, half or torch.bfloat16, enabled=half is not None):
        (output,) = denoiser(
            noised.to(dtype), timesteps, encoder_hidden_states=embeddings.to(dtype),
            return_dict=False,
        )  # fmt: skip
    output = output.float()
    target = noise
    if model.prediction_type == "v_prediction":
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    return F.mse_loss(output, target, reduction="none").flatten(1).mean(1)


def solver_attack(model: StableDiffusion, task: AttackTask) -> Attacked:
    """The package's solver, without Trainer and store."""
    result = solve(
        model,
        AttackProblem(task.ids, (0,) * len(task.ids), task.latents, task.initial),
        budget=Budget("none", None, task.steps),
        settings=AttackSettings(lr=task.lr, noise_batch=task.noise_batch),
        seed=task.seed,
    )
    return Attacked(result.embeddings[:, -1], result.losses)


def audit_attack(bench: BenchContext, task: AttackTask) -> Attacked:
    """The package's attack with everything that an audit has around it: Trainer, store, files."""
    settings = AttackSettings(
        inits=("random",), budget=BudgetSettings(steps=task.steps), lr=task.lr,
        noise_batch=task.noise_batch,
    )  # fmt: skip
    context = AttackContext(
        model=bench.model,
        data=bench.context.data,
        settings=settings,
        budget=settings.budget.resolve(None),
        controls=ControlPrompts((), None),
        folder=bench.scratch("attacks"),
        seed=task.seed,
        edit="none",
    )
    rounds = attack_rounds(settings, bench.pairs[: len(task.ids)])
    found = run_attacks(context, rounds, trainer=bench.context.trainer(inference_mode=False))
    losses = [each.losses for each in found if each.losses is not None]
    return Attacked(torch.stack([each.embedding for each in found]), torch.stack(losses))


def attack_task(bench: BenchContext, pairs: int, *, steps: int, noise_batch: int) -> AttackTask:
    """The attack on the first pairs from random embeddings."""
    chosen, seed = bench.pairs[:pairs], bench.context.seed
    initial = [random_embedding(seed, p.id, 0, bench.model.embedding_shape) for p in chosen]
    latents = bench.context.data.batch(chosen).latents
    ids = tuple(pair.id for pair in chosen)
    return AttackTask(ids, latents, torch.stack(initial), steps, noise_batch, seed=seed)


def attack_family(bench: BenchContext, settings: BenchSettings) -> Family:
    """The ladder on a checkpoint."""
    task = attack_task(
        bench, settings.pairs, steps=settings.steps, noise_batch=settings.noise_batch
    )
    model = bench.model
    ours = {"ours": partial(audit_attack, bench), "solver": partial(solver_attack, model)}
    rows = attack_rows(model, task, ours, settings)
    return Family("attack", f"attack on {bench.model.name}: {task}", rows)


def shape_family(model: StableDiffusion, settings: ShapeSettings, *, seed: int) -> Family:
    """The ladder on random latents, for a model of Stable Diffusion 1.4's shape."""
    generator, count = keyed_generator("bench", seed), settings.pairs
    ids = tuple(f"noise{k}" for k in range(count))
    latents = torch.randn(count, *model.latent_shape, generator=generator)
    initial = torch.randn(count, *model.embedding_shape, generator=generator)
    task = AttackTask(ids, latents, initial, settings.steps, settings.noise_batch, seed=seed)
    rows = attack_rows(model, task, {"ours": partial(solver_attack, model)}, settings)
    title = f"attack on Stable Diffusion 1.4's UNet, random weights in {settings.dtype}, latents"
    return Family("sd14", f"{title} of side {settings.latent}: {task}", rows)


def attack_rows(
    model: StableDiffusion,
    task: AttackTask,
    ours: Mapping[str, Attack],
    settings: BenchSettings | ShapeSettings,
) -> tuple[Row, ...]:
    """Measure every way in turn, then what its operations take alone.

    Args:
        model: Model under attack.
        task: What is timed.
        ours: The package's ways, one of which is ``ours``.
        settings: How often, and whether to compile; the row says why not where that cannot be.
    """
    attacks: dict[str, Attack] = {"B1": partial(fair, model), **ours}
    # memory on the CPU is that of single operations, which compiled code does not show
    eager = dict(attacks)
    skipped = "" if settings.compile else "not asked for (compile)"
    compilers = ("g++", "clang++", "c++")
    if settings.compile and model.device.type == "cpu" and not any(map(shutil.which, compilers)):
        skipped = "no C++ compiler (g++, clang++) on this machine"
    if not skipped:
        twin = copy.deepcopy(model.denoiser()).to(memory_format=torch.channels_last)
        fast = torch.compile(twin.eval().requires_grad_(False))
        attacks["B2"] = partial(fair, model, denoiser=fast)
        eager["B2"] = partial(fair, model, denoiser=twin)
    timed, results = timed_in_turn(
        {name: (WAYS[name], partial(attacks[name], task)) for name in WAYS if name in attacks},
        model=model, pairs=len(task.ids), repeats=settings.repeats, title="attack",
    )  # fmt: skip
    # one step of one full pass
    share = pairs_at_once(model) if model.device.type == "cpu" else len(task.ids)
    full = {name: getattr(task, name)[:share] for name in ("ids", "latents", "initial")}
    one, rows = replace(task, steps=1, **full), []
    for name, what in WAYS.items():
        if name not in timed:
            if name == "B2":
                rows.append(Row(name, what, skipped=skipped))
            continue
        memory = peak_bytes(partial(eager[name], one), model.device)
        if name in ours and model.device.type == "cpu":
            memory *= parallel_batches(model)  # measured with one pass after the other
        difference = (results[name].embeddings - results["ours"].embeddings).abs().max()
        values = {
            "last_loss": float(results[name].losses[:, -1].mean()),
            "furthest_from_ours": float(difference),
        }
        rows.append(replace(timed[name], peak_bytes=memory, values=values))
    alone = task.steps * seconds_alone(partial(solver_attack, model, one), model.device)
    what = "its matrix products, convolutions and attention, each shape by itself"
    return (*rows, Row(ALONE, what, pairs=len(one.ids), seconds=(alone,)))
