"""The other parts of an audit: generating images, finding edits, and the whole program."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dori_lightning.bench.measure import BenchContext, BenchSettings, Family, Row, timed_in_turn
from dori_lightning.mitigations.activations import activation_statistics
from dori_lightning.mitigations.adversarial_finetuning import AdversarialFinetuning
from dori_lightning.mitigations.base import Mitigation
from dori_lightning.mitigations.edits import Edit
from dori_lightning.mitigations.nemo import NeMo
from dori_lightning.models.generation import generation_noise, image_seeds
from dori_lightning.runtime.logging import with_progress


def sampling_family(bench: BenchContext, settings: BenchSettings) -> Family:
    """Generate an audit's images one at a time, and as the package does."""
    sampling, pairs = bench.context.sampling, settings.sampling_pairs
    embeddings = bench.context.data.batch(bench.pairs[:pairs]).embeddings
    rows, images = timed_in_turn(
        {
            "ours": (
                "the package's way: in batches, both halves of the guidance in one pass, to files",
                partial(bench.generate, embeddings),
            ),
            "B1": (
                "an image at a time, with and without the prompt one after the other",
                partial(one_at_a_time, bench, embeddings),
            ),
        },
        model=bench.model, pairs=pairs, repeats=settings.repeats, title="sampling",
        until=bench.until,
    )  # fmt: skip
    needed = sampling.steps * sampling.rows_per_step * sampling.images_per_pair * pairs
    alone, ours = (replace(rows[k], flops=bench.cost.forward * needed) for k in ("B1", "ours"))
    if "B1" in images:
        # the files round to eight bits
        difference = float((images["B1"] - images["ours"]).abs().max()) - 0.5 / 255
        ours = replace(ours, values={"furthest_pixel": max(0.0, difference)})
    title = (
        f"{sampling.images_per_pair} images of each of {pairs} pairs: {sampling.sampler}, "
        f"{sampling.steps} steps, guidance {sampling.guidance:g}"
    )
    return Family("sampling", title, (alone, ours), peak=bench.peak)


@torch.no_grad()
def one_at_a_time(bench: BenchContext, embeddings: torch.Tensor) -> torch.Tensor:
    """Images (N, K, 3, H, W) one by one, each half of the guidance by itself."""
    model, sampling = bench.model, bench.context.sampling
    empty, images = model.empty_embedding(), []
    for embedding in embeddings:
        for seed in image_seeds(sampling):
            scheduler = model.scheduler_of(sampling)
            noise = generation_noise(seed, model.latent_shape)
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
    return torch.cat(images).view(len(embeddings), -1, *images[0].shape[1:])


def nemo_family(bench: BenchContext, settings: BenchSettings, method: NeMo) -> Family:
    """NeMo's search pair after pair, and for all pairs together."""
    prompts = bench.context.corpus.prompts("calibration", method.statistics_prompts)
    statistics = activation_statistics(bench.model, prompts)
    # computed once and read by both: the search is what differs
    path = statistics.save(bench.scratch("nemo") / "statistics.safetensors")
    method = replace(method, statistics=str(path))
    family = mask_family(
        "nemo", bench, method, pairs=settings.nemo_pairs, repeats=settings.repeats
    )
    # copies that fill up passes on a CPU count here: how many questions there are is not known
    rows = [replace(row, flops=bench.cost.forward * row.samples) for row in family.rows]
    return replace(family, rows=tuple(rows), peak=bench.peak)


def mask_family(
    name: str, bench: BenchContext, method: Mitigation, *, pairs: int, repeats: int
) -> Family:
    """Make a mitigation's masks pair after pair, and for all pairs together."""
    chosen = bench.pairs[:pairs]
    apply = partial(method.apply, bench.model, context=bench.context)
    rows, results = timed_in_turn(
        {
            "ours": ("all pairs together", partial(apply, pairs=chosen)),
            "B1": ("one pair after the other", lambda: [apply(pairs=[p]) for p in chosen]),
        },
        model=bench.model, pairs=pairs, repeats=repeats, title=name, until=bench.until,
    )  # fmt: skip
    together: Edit = results["ours"]
    same = sum(
        edit.for_pair(pair.id).identity == together.for_pair(pair.id).identity
        for pair, edit in zip(chosen, results.get("B1", ()), strict=False)
    )
    values = {"pairs_with_equal_masks": same, "pairs": pairs}
    title = f"masks of {method.name} for {pairs} pairs"
    return Family(name, title, (rows["B1"], replace(rows["ours"], values=values)))


def finetuning_family(
    bench: BenchContext, settings: BenchSettings, method: AdversarialFinetuning
) -> Family:
    """Adversarial fine-tuning with one search and a few updates.

    Surrogates are images of similar prompts, which need no other edit first.
    """
    updates, pairs = settings.finetuning_updates, settings.finetuning_pairs
    short = replace(
        method,
        surrogates=replace(method.surrogates, source=None),
        epochs=1,
        updates=updates,
        ordinary_examples=min(method.ordinary_examples, 4 * method.ordinary_batch),
    )
    what = f"surrogates, one search for {pairs} pairs, {updates} of {method.updates} updates"
    run = partial(short.apply, bench.model, bench.pairs[:pairs], bench.context)
    rows, _ = timed_in_turn(
        {"ours": (what, run)},
        model=bench.model, pairs=pairs, repeats=settings.repeats, title=method.name,
        until=bench.until,
    )  # fmt: skip
    title = f"{method.name}, {pairs} pairs, {updates} updates"
    return Family("finetuning", title, tuple(rows.values()))


def audit_family(settings: BenchSettings, overrides: Sequence[str], place: Path) -> Family:
    """Run a whole audit as a user does, in a process of its own, and the same again.

    Args:
        settings: How much.
        overrides: What makes an audit of this run's checkpoint and pairs.
        place: Folder for what it writes.

    Raises:
        RuntimeError: The audit failed; carries the end of its error output.
    """
    command = [
        sys.executable, "-m", "dori_lightning", "+experiment=audit", *overrides,
        "attack.inits=[prompt]", "attack.other_inits=null",
        f"attack.budget.steps={settings.audit_steps}", f"pairs.limit={settings.audit_pairs}",
        "pairs.kinds=[vm]", "utility=none", "report.images=none", "name=audit",
        f"paths.output={place}",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    rows = []
    runs = (
        ("ours", f"attack from prompts, {settings.audit_steps} steps, images, report"),
        ("again", "the same command once more: everything is there already"),
    )
    for name, what in with_progress("bench: audit", runs):
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        seconds = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} left with {done.returncode}:\n{done.stderr[-2000:]}"
            )
        report = json.loads((place / "audit" / "report.json").read_text("utf-8"))
        samples = int(report["provenance"]["unet_evaluations"])
        rows.append(Row(name, what, settings.audit_pairs, (seconds,), samples=samples))
    title = f"a whole audit of {settings.audit_pairs} pairs, in a process of its own"
    return Family("audit", title, tuple(rows))
