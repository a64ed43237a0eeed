"""The attack ladder: one attack by plain loops, by the package, and by its layers alone.

All ways solve the same problem: Adam on a text embedding against the mean denoising error of a
batch of noise samples and timesteps, drawn anew at every step by the same keys as the package's
attack draws them.
"""

import copy
import shutil
from collections.abc import Callable
from contextlib import nullcontext
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
from dori_lightning.attacks.timesteps import TimestepDraws
from dori_lightning.bench.measure import (
    BenchContext,
    BenchSettings,
    Family,
    Row,
    peak_bytes,
    seconds_alone,
    timed_in_turn,
)
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.memory import measure_batch, pairs_at_once
from dori_lightning.pairs.validation import image_tensor, square_image
from dori_lightning.report.words import number_words
from dori_lightning.runtime.batching import parallel_batches
from dori_lightning.runtime.logging import with_progress
from dori_lightning.types import Budget

WAYS = {
    "B0": "naive loop: weights trainable and in their own precision, image encoded at every step, "
    "one pair at a time; timed with the first pair",
    "B1": "fair loop: frozen, evaluation mode, autocast where the model has it, latents cached, "
    "one pair at a time, weights in torch's usual memory format",
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

    def first(self, count: int) -> "AttackTask":
        """The attack on the first pairs alone."""
        ids, latents, initial = self.ids[:count], self.latents[:count], self.initial[:count]
        return replace(self, ids=ids, latents=latents, initial=initial)

    def draw(
        self, model: LatentDiffusion, row: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise (B, C, h, w) and timesteps (B,) of a step, on the model's device."""
        noise, timesteps, _ = noise_and_timesteps(
            self.seed, self.ids[row], 0, step,
            shape=(self.noise_batch, *self.latents.shape[1:]),
            schedule=TimestepDraws(0, model.num_train_timesteps),
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


def fair(
    model: LatentDiffusion,
    task: AttackTask,
    *,
    denoiser: Any = None,
    images: torch.Tensor | None = None,
) -> Attacked:
    """B1: frozen, evaluation mode, autocast, cached latents, losses left on the device.

    Args:
        model: Model under attack; its autocast is used.
        task: The attack.
        denoiser: Called instead of the model's denoiser: a copy that is compiled (B2), or in
            another memory format.
        images: The images (N, 3, H, W) in [0, 1] make it B0: encoded at each step, without
            autocast, and with gradients of the weights, which nobody uses.
    """
    # not "or": a compiled module has no truth value
    denoiser = model.denoiser() if denoiser is None else denoiser
    half = model.autocast if images is None else None
    if denoiser is not model.denoiser():
        denoiser.requires_grad_(images is not None)
    embeddings, losses = [], []
    with model.frozen() if images is None else nullcontext(), torch.enable_grad():
        for row in range(len(task.ids)):
            latents = task.latents[row].to(model.device)
            embedding = task.initial[row : row + 1].clone().to(model.device).requires_grad_(True)
            optimizer = torch.optim.Adam([embedding], lr=task.lr)
            of_steps = []
            for step in range(task.steps):
                if images is not None:
                    latents = model.encode_images(images[row : row + 1])[0]
                noise, timesteps = task.draw(model, row, step)
                loss = _error(
                    model, denoiser, latents.expand_as(noise), noise, timesteps,
                    embedding.expand(len(noise), -1, -1), half=half,
                ).mean()  # fmt: skip
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                of_steps.append(loss.detach())
            embeddings.append(embedding.detach().cpu()[0])
            losses.append(torch.stack(of_steps).cpu())
    if images is not None:
        denoiser.zero_grad()
    return Attacked(torch.stack(embeddings), torch.stack(losses))


def _error(
    model: LatentDiffusion,
    denoiser: Any,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    embeddings: torch.Tensor,
    *,
    half: torch.dtype | None,
) -> torch.Tensor:
    """Mean squared error of each row's predicted noise (N,), or of v; autocast to ``half``."""
    alpha = model.variances(timesteps)[0][:, None, None, None]
    noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    dtype = next(model.parameters()).dtype
    with torch.autocast(model.device.type, half or torch.bfloat16, enabled=half is not None):
        (output,) = denoiser(
            noised.to(dtype), timesteps, encoder_hidden_states=embeddings.to(dtype),
            return_dict=False,
        )  # fmt: skip
    output = output.float()
    target = noise
    if model.prediction_type == "v_prediction":
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    return F.mse_loss(output, target, reduction="none").flatten(1).mean(1)


def solver_attack(model: LatentDiffusion, task: AttackTask) -> Attacked:
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
    """Every way but the compiled one in turn, then what their operations take alone.

    Memory is that of one step: of a pair, and of ours of all that it computes at once.
    """
    task = attack_task(
        bench, settings.pairs, steps=settings.steps, noise_batch=settings.noise_batch
    )
    model, cpu = bench.model, bench.model.device.type == "cpu"
    images = torch.stack(
        [image_tensor(square_image(p.image), model.resolution) for p in bench.pairs[:1]]
    )
    plain = _plain_denoiser(model)
    attacks: dict[str, Attack] = {
        "ours": partial(audit_attack, bench),
        "solver": partial(solver_attack, model),
        "B1": partial(fair, model, denoiser=plain),
        "B0": partial(fair, model, denoiser=plain, images=images),
    }
    rows, results = timed_in_turn(
        {
            name: (WAYS[name], partial(attack, task.first(1) if name == "B0" else task))
            for name, attack in attacks.items()
        },
        model=model, pairs=settings.pairs, repeats=settings.repeats, title="attack",
        until=bench.until,
    )  # fmt: skip
    rows["B0"] = replace(rows["B0"], pairs=1)
    # one step of one full pass, which on a CPU is filled up where there are fewer pairs
    full = pairs_at_once(model) if cpu else settings.pairs
    one = replace(task, steps=1).first(full)
    timed = [name for name, row in rows.items() if row.seconds]
    for name in with_progress("bench: memory", timed):
        step = one.first(1) if name == "B0" else one
        memory = peak_bytes(partial(attacks[name], step), model.device)
        if name in ("ours", "solver") and cpu:
            memory *= parallel_batches(model)  # measured with one pass after the other
        rows[name] = replace(
            _compared(rows[name], results, bench.cost.attack * task.noise_batch * task.steps),
            peak_bytes=memory,
        )
    planned = measure_batch(model).total(full * one.noise_batch, parallel=parallel_batches(model))
    rows["ours"] = replace(rows["ours"], planned_bytes=planned)
    alone = task.steps * seconds_alone(partial(solver_attack, model, one), model.device)
    what = "its matrix products, convolutions and attention, each shape by itself"
    limit = Row(ALONE, what, pairs=len(one.ids), seconds=(alone,))
    ordered = [rows[name] for name in WAYS if name in rows]
    title = f"attack on {model.name}: {task}"
    return Family("attack", title, (*ordered, limit), peak=bench.peak)


def compiled_family(bench: BenchContext, settings: BenchSettings) -> Family:
    """The fair loop with and without what the compiler makes of it, which takes minutes."""
    model = bench.model
    task = attack_task(
        bench, settings.pairs, steps=settings.steps, noise_batch=settings.noise_batch
    )
    title = f"fair attack on {model.name}, compiled: {task}"
    compilers = ("g++", "clang++", "c++")
    if model.device.type == "cpu" and not any(map(shutil.which, compilers)):
        why = "no C++ compiler (g++, clang++) on this machine"
        return Family("compiled", title, (Row("B2", WAYS["B2"], skipped=why),))
    twin = copy.deepcopy(model.denoiser()).to(memory_format=torch.channels_last)
    fast = torch.compile(twin.eval().requires_grad_(False))
    rows, results = timed_in_turn(
        {
            "B1": (WAYS["B1"], partial(fair, model, task, denoiser=_plain_denoiser(model))),
            "B2": (WAYS["B2"], partial(fair, model, task, denoiser=fast)),
        },
        model=model, pairs=settings.pairs, repeats=settings.repeats, title="compiled attack",
        until=bench.until,
    )  # fmt: skip
    work = bench.cost.attack * task.noise_batch * task.steps
    measured = tuple(_compared(row, results, work, to="B1") for row in rows.values())
    return Family("compiled", title, measured, peak=bench.peak)


def _plain_denoiser(model: LatentDiffusion) -> torch.nn.Module | None:
    """A copy in torch's usual memory format, where the model is in another: on a GPU."""
    if model.device.type == "cpu":
        return None
    return copy.deepcopy(model.denoiser()).to(memory_format=torch.contiguous_format)


def _compared(row: Row, results: dict[str, Attacked], work: float, *, to: str = "ours") -> Row:
    """A row with what its attack ended with, and the operations that it needs.

    Args:
        row: The row.
        results: Name of a way to what it ended with.
        work: Operations of a pair.
        to: Way whose embeddings the row's are compared with.
    """
    if not row.seconds:
        return row
    own, other = results[row.name], results[to].embeddings
    values = {
        "last_loss": float(own.losses[:, -1].mean()),
        f"furthest_from_{to}": float((own.embeddings - other[: len(own.embeddings)]).abs().max()),
    }
    return replace(row, values=values, flops=work * row.pairs)
