"""Finding edits: two ways of pruning, and one epoch of adversarial fine-tuning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.attacks.solver import AttackProblem, solve
from dori_lightning.bench.attack import AttackTask, Subject, rate_of
from dori_lightning.bench.measure import Counts, counted, timed_in_turn
from dori_lightning.bench.report import BenchSettings, Row, row_of
from dori_lightning.metrics.statistics import mcnemar_exact
from dori_lightning.mitigations.activations import activation_statistics
from dori_lightning.mitigations.adversarial_finetuning import (
    AdversarialFinetuning,
    AdversarialTraining,
)
from dori_lightning.mitigations.finetuning import finetune
from dori_lightning.mitigations.nemo import NeMo
from dori_lightning.mitigations.replacements import Surrogates
from dori_lightning.mitigations.wanda import Wanda
from dori_lightning.models.generation import (
    GenerationRequest,
    generate_images,
    generation_noise,
    image_seeds,
    load_images,
)
from dori_lightning.models.protocol import Sampling
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Budget, Pair

# -------- part_rows


def nemo_rows(subject: Subject, settings: BenchSettings, method: NeMo) -> tuple[Row, ...]:
    """Search neurons with one question a pass, pair after pair, and as the package does."""
    pairs = subject.pairs[: settings.nemo_pairs]
    encoded = {pair.id: subject.context.data.encoded(pair) for pair in pairs}
    prompts = subject.context.corpus.prompts("calibration", method.statistics_prompts)
    statistics = activation_statistics(subject.model, prompts)
    path = statistics.save(subject.scratch("nemo") / "statistics.safetensors")
    # computed once and read by both: the search is what differs
    method = replace(method, statistics=str(path))

    def one_at_a_time() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, own in encoded.items():
            found |= method.find(subject.model, {name: own}, subject.context).masks
        return found

    def ours() -> dict[str, Any]:
        return method.find(subject.model, encoded, subject.context).masks

    counts: dict[str, Counts] = {}
    ways: dict[str, Callable[[], Any]] = {"B1": one_at_a_time, "ours": ours}
    timed = timed_in_turn(
        {name: _counting(subject, run, counts, name) for name, run in ways.items()},
        repeats=settings.nemo_repeats, device=subject.model.device, title="NeMo",
    )  # fmt: skip
    same = _equal(timed["B1"].result, timed["ours"].result)
    words = {
        "B1": "one candidate set a pass, one pair after the other, as released",
        "ours": "the next candidate set of every pair in one pass",
    }
    blocked = sum(int(m.sum()) for own in timed["ours"].result.values() for m in own.values())
    return tuple(
        row_of(
            name, words[name], own, pairs=len(pairs), samples=counts[name].unet,
            values={
                "unet_passes": counts[name].unet_passes, "same_neurons": same, "blocked": blocked,
                "criterion": type(method.criterion).__name__,
            },
        )
        for name, own in timed.items()
    )  # fmt: skip


def _counting(
    subject: Subject, run: Callable[[], Any], counts: dict[str, Counts], name: str
) -> Callable[[], Any]:
    """Count each run by hooks, which cost nothing beside a pass; the last run's counts stay."""

    def counting() -> Any:
        with counted(subject.model) as counts[name]:
            return run()

    return counting


def _equal(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[pair][name], right[pair][name]) for pair in left for name in left[pair]
    )


def wanda_rows(subject: Subject, settings: BenchSettings, method: Wanda) -> tuple[Row, ...]:
    """Make masks pair after pair, and for all pairs at once."""
    pairs = subject.pairs[: settings.wanda_pairs]
    embeddings = subject.context.data.batch(pairs).embeddings
    find = partial(method.find, subject.model, context=subject.context)
    counts: dict[str, Counts] = {}
    ways: dict[str, Callable[[], Any]] = {
        "B1": lambda: [mask for row in embeddings for mask in find(row[None])],
        "ours": lambda: list(find(embeddings)),
    }
    timed = timed_in_turn(
        {name: _counting(subject, run, counts, name) for name, run in ways.items()},
        repeats=settings.repeats, device=subject.model.device, title="Wanda",
    )  # fmt: skip
    # masks of weights whose scores tie up to rounding may differ
    differing = [
        float(torch.cat([(a[n] != b[n]).flatten() for n in a]).float().mean())
        for a, b in zip(timed["B1"].result, timed["ours"].result, strict=True)
    ]
    words = {"B1": "a pair at a time", "ours": "the package's way: all pairs together"}
    return tuple(
        row_of(
            name, words[name], own, pairs=len(pairs), samples=counts[name].unet,
            values={"unet_passes": counts[name].unet_passes, "weights_differ": max(differing)},
        )
        for name, own in timed.items()
    )  # fmt: skip


def finetuning_rows(
    subject: Subject, settings: BenchSettings, methods: Mapping[str, AdversarialFinetuning]
) -> tuple[Row, ...]:
    """One epoch of adversarial fine-tuning by each method: its search in full, some updates.

    Surrogates are noise: their making is not part of an epoch, and the time does not depend on
    them.
    """
    pairs = subject.pairs[: settings.finetuning_pairs]
    rows = []
    for name, method in methods.items():
        times, whole = _epoch(subject, pairs, method, updates=settings.finetuning_updates)
        updates, epoch = times["updates"], method.updates
        per_update = (whole - times["search_seconds"]) / updates
        search_samples = times["search_samples"]
        per_step = method.adversarial_batch + method.ordinary_batch
        rows.append(
            Row(
                name,
                f"one epoch of {method.name}: {len(pairs)} pairs searched, {epoch} updates",
                pairs=1,
                unit="epoch",
                seconds=(times["search_seconds"] + epoch * per_update,),
                samples=search_samples + epoch * per_step,
                values={
                    "search_seconds": times["search_seconds"],
                    "seconds_per_update": per_update,
                    "updates_timed": updates,
                    "updates_of_an_epoch": epoch,
                    "search_evaluations": search_samples,
                    "update_evaluations": epoch * per_step,
                    "epochs_of_the_recipe": method.epochs,
                },
            )
        )
    return tuple(rows)


def _epoch(
    subject: Subject, pairs: Sequence[Pair], method: AdversarialFinetuning, *, updates: int
) -> tuple[dict[str, Any], float]:
    """Search once, train a few updates; times of the search, and seconds of the whole."""
    model, context = subject.model, subject.context
    updates = min(updates, method.updates)
    generator = keyed_generator("bench surrogates", subject.seed)
    shape = (method.surrogates.per_pair, *model.latent_shape)
    surrogates = {pair.id: torch.randn(shape, generator=generator) for pair in pairs}
    ordinary = context.encodings(
        model, "calibration", min(method.ordinary_examples, 4 * method.ordinary_batch)
    )
    times: dict[str, Any] = {"updates": updates}

    def make() -> AdversarialTraining:
        module = AdversarialTraining(
            model,
            method,
            pairs,
            context,
            surrogates=Surrogates(surrogates, {}),
            ordinary=ordinary,
        )
        search = module.pool.search

        def timed_search(number: int) -> None:
            before, started = model.unet_evaluations, time.perf_counter()
            search(number)
            times["search_seconds"] = time.perf_counter() - started
            times["search_samples"] = model.unet_evaluations - before

        module.pool.search = timed_search  # type: ignore[method-assign]
        return module

    started = time.perf_counter()
    finetune(make, model, context, steps=updates, key=f"bench-{method.name}", title=method.name)
    return times, time.perf_counter() - started


# -------- program_rows
# The program as a whole: how long it takes to start, to audit, and how an audit grows.


def _run(arguments: Sequence[str], place: Path) -> float:
    """Run the program with its results below ``place``; seconds it took.

    Raises:
        RuntimeError: It failed; carries the end of what it said.
    """
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dori_lightning", *arguments, f"paths.output={place / 'outputs'}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"},
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(
            f"python -m dori_lightning {' '.join(arguments)} left with {done.returncode}:\n"
            f"{done.stderr[-2000:]}"
        )
    return seconds


def startup_rows(
    settings: BenchSettings, overrides: Sequence[str], place: Path
) -> tuple[Row, ...]:
    """Start the program: its help, its configuration, and an audit that has nothing to do.

    Args:
        settings: How often.
        overrides: What makes an audit of this run's checkpoint and pairs.
        place: Folder for what it writes.
    """
    empty = (
        *_audit(overrides, pairs=1, steps=0), "sampling.steps=2", "sampling.images_per_pair=1",
    )  # fmt: skip
    rows = []
    for name, what, limit, arguments in (
        ("--help", "list of choices", 1.0, ("--help",)),
        ("--cfg job", "composed configuration", 3.0, ("--cfg", "job")),
        ("audit", "audit of one pair without an attack, two sampler steps", 10.0, empty),
    ):
        seconds = []
        for k in range(settings.startup_repeats + 1):
            own = [*arguments, f"name=empty{k}"] if name == "audit" else list(arguments)
            seconds.append(_run(own, place))
        rows.append(
            Row(
                name, what, pairs=1, unit="start", seconds=tuple(seconds[1:]),
                warm_up=seconds[0], values={"at_most_seconds": limit},
            )
        )  # fmt: skip
    return tuple(rows)


def audit_rows(settings: BenchSettings, overrides: Sequence[str], place: Path) -> tuple[Row, ...]:
    """Run a whole audit as a user does, in a process of its own, and the same again.

    Args:
        settings: How much.
        overrides: What makes an audit of this run's checkpoint and pairs.
        place: Folder for what it writes.
    """
    rows = []
    arguments = _audit(overrides, pairs=settings.audit_pairs, steps=settings.audit_steps)
    for name, what in (
        (
            "ours",
            f"audit from the command line, attack from prompts, {settings.audit_steps} steps",
        ),
        ("again", "the same command once more: everything is there already"),
    ):
        seconds = _run([*arguments, "name=whole"], place)
        report = json.loads((place / "outputs" / "whole" / "report.json").read_text("utf-8"))
        rows.append(
            Row(
                name, what, pairs=settings.audit_pairs, seconds=(seconds,),
                samples=int(report["provenance"]["unet_evaluations"]),
                values={"report_seconds": report["provenance"]["wall_seconds"]},
            )
        )  # fmt: skip
    return tuple(rows)


def _audit(overrides: Sequence[str], *, pairs: int, steps: int) -> tuple[str, ...]:
    return (
        "+experiment=audit", *overrides, "attack.inits=[prompt]", "attack.other_inits=null",
        f"attack.budget.steps={steps}", f"pairs.limit={pairs}", "pairs.kinds=[vm]",
        "utility=none", "report.images=none",
    )  # fmt: skip


def scaling_rows(subject: Subject, settings: BenchSettings) -> tuple[Row, ...]:
    """What an attack costs with more budgets to read off it, and with more pairs.

    Pairs beyond those of the list are further restarts of the same ones.
    """
    model, most = subject.model, max(settings.scaling_pairs)
    base = subject.task(
        len(subject.pairs), steps=settings.scaling_steps, noise_batch=settings.noise_batch
    )
    eight = min(8, most)
    ways: dict[str, Any] = {}
    about: dict[str, tuple[str, int]] = {}
    for count in settings.scaling_budgets:
        snapshots = _evenly(count, settings.scaling_steps)
        name = f"{count} budgets" if count > 1 else "1 budget"
        about[name] = (f"{eight} pairs, measured after steps {list(snapshots)}", eight)
        ways[name] = partial(_grown, model, base, eight, snapshots, settings.scaling_steps)
    few = max(1, settings.scaling_steps // 4)
    for count in settings.scaling_pairs:
        name = f"{count} pairs"
        about[name] = (f"{few} steps, one budget", count)
        ways[name] = partial(_grown, model, base, count, (), few)
    counts = {}
    for name, run in ways.items():
        with counted(model) as own:
            run()
        counts[name] = own
    timed = timed_in_turn(
        ways, repeats=settings.scaling_repeats, device=model.device, title="scaling"
    )
    return tuple(
        row_of(
            name, about[name][0], own, pairs=about[name][1], samples=counts[name].unet,
            values={"unet_passes": counts[name].unet_passes},
        )
        for name, own in timed.items()
    )  # fmt: skip


def _evenly(count: int, steps: int) -> tuple[int, ...]:
    """``count`` different steps up to the last one, evenly apart."""
    return tuple(sorted({round(steps * (k + 1) / count) for k in range(count)}))


def _grown(
    model: Any, base: AttackTask, pairs: int, snapshots: tuple[int, ...], steps: int
) -> None:
    """Attack ``pairs`` rows as an audit does, eight pairs of a batch after the other."""
    task = replace(base, steps=steps)
    have = len(task.ids)
    for start in range(0, pairs, 8):
        places = range(start, min(start + 8, pairs))
        solve(
            model,
            AttackProblem(
                tuple(task.ids[k % have] for k in places),
                tuple(k // have for k in places),
                task.latents[[k % have for k in places]],
                task.initial[[k % have for k in places]],
            ),
            budget=Budget("none", None, steps),
            settings=AttackSettings(lr=task.lr, noise_batch=task.noise_batch, snapshots=snapshots),
            seed=task.seed,
        )


# -------- sampling_rows
# Drawing an audit's pictures: one at a time, as the package does, and by another sampler.


def sampling_rows(
    subject: Subject, settings: BenchSettings, samplers: Mapping[str, Sampling]
) -> tuple[Row, ...]:
    """Draw an audit's pictures one at a time, and as the package does.

    Args:
        subject: What to draw.
        settings: How much.
        samplers: Further ways of sampling by name: each draws the same pictures, and its rate is
            compared with that of the first row, pair by pair.
    """
    pairs = subject.pairs[: settings.sampling_pairs]
    embeddings = subject.context.data.batch(pairs).embeddings
    ways: dict[str, Callable[[], Any]] = {
        "B1": partial(_one_at_a_time, subject, embeddings),
        "ours": partial(_own_pictures, subject, pairs, embeddings, subject.sampling),
        **{
            name: partial(_own_pictures, subject, pairs, embeddings, sampling)
            for name, sampling in samplers.items()
        },
    }
    words = {
        "B1": "a picture at a time, with and without the prompt one after the other",
        "ours": "the package's way: batched, both halves of the guidance in one pass, files kept",
        **{
            name: f"ours with {s.sampler}, {s.steps} steps, guidance {s.guidance:g}"
            for name, s in samplers.items()
        },
    }
    counts: dict[str, Counts] = {}
    for name, run in ways.items():
        with counted(subject.model) as counts[name]:
            run()
    timed = timed_in_turn(
        ways, repeats=settings.repeats, device=subject.model.device, title="sampling"
    )
    hits = subject.memorization(embeddings)
    rows = []
    for name, own in timed.items():
        mine = subject.memorization(embeddings, samplers[name]) if name in samplers else hits
        values: dict[str, Any] = {
            "unet_passes": counts[name].unet_passes,
            "decoded": counts[name].decoded,
            "memorization": rate_of(mine),
        }
        if name in samplers:
            gained = sum(b and not a for a, b in zip(hits, mine, strict=True))
            lost = sum(a and not b for a, b in zip(hits, mine, strict=True))
            values |= {"gained": gained, "lost": lost, "mcnemar_p": mcnemar_exact(gained, lost)}
        if name == "ours":
            values["furthest_pixel"] = _difference(timed["B1"].result, own.result)
        rows.append(
            row_of(
                name, words[name], own, pairs=len(pairs), samples=counts[name].unet, values=values
            )
        )
    return tuple(rows)


@torch.no_grad()
def _one_at_a_time(subject: Subject, embeddings: torch.Tensor) -> torch.Tensor:
    """Pictures (N K, 3, H, W), a picture at a time, each half of the guidance by itself."""
    model, sampling = subject.model, subject.sampling
    empty, images = model.empty_embedding(), []
    for embedding in embeddings:
        for k in range(sampling.images_per_pair):
            scheduler = model._sampler(sampling)
            noise = generation_noise(sampling.seed + k, model.latent_shape)
            x = noise[None].to(model.device) * scheduler.init_noise_sigma
            context = embedding[None].to(model.device)
            for t in scheduler.timesteps.tolist():
                inputs = scheduler.scale_model_input(x, t)
                times = torch.tensor([t], device=model.device)
                output = model._denoise(inputs, times, context, None)
                if sampling.guidance != 1.0:
                    without = model._denoise(inputs, times, empty, None)
                    output = without + sampling.guidance * (output - without)
                x = scheduler.step(output, t, x, return_dict=False)[0]
            images.append(model.decode_latents(x).cpu())
    return torch.cat(images)


def _own_pictures(
    subject: Subject, pairs: Sequence[Pair], embeddings: torch.Tensor, sampling: Sampling
) -> torch.Tensor:
    """The same as the package draws them, read back from the files."""
    folder = subject.scratch("pictures")
    orders = [
        GenerationRequest(folder / pair.id, embedding, pair.id)
        for pair, embedding in zip(pairs, embeddings, strict=True)
    ]
    generate_images(subject.model, orders, sampling)
    return torch.cat([load_images(o.folder, image_seeds(sampling)) for o in orders])


def _difference(pictures: torch.Tensor, stored: torch.Tensor) -> float:
    """Largest difference of a pixel, beyond the rounding to eight bits."""
    return max(0.0, float((pictures - stored).abs().max()) - 0.5 / 255)
