"""Drawing an audit's pictures: one at a time, as the package does, and by another sampler."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dori_lightning.bench.counters import counted
from dori_lightning.bench.record import Row, row_of
from dori_lightning.bench.subjects import rate_of
from dori_lightning.bench.timing import timed_in_turn
from dori_lightning.metrics.statistics import mcnemar_exact
from dori_lightning.models.pictures import (
    PictureOrder,
    generate_pictures,
    generation_noise,
    load_pictures,
    picture_seeds,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dori_lightning.bench.counters import Counts
    from dori_lightning.bench.settings import BenchSettings
    from dori_lightning.bench.subjects import Subject
    from dori_lightning.models.protocol import Sampling
    from dori_lightning.types import Pair

__all__ = ["sampling_rows"]


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
    embeddings = subject.workshop.data.batch(pairs).embeddings
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
        PictureOrder(folder / pair.id, embedding, pair.id)
        for pair, embedding in zip(pairs, embeddings, strict=True)
    ]
    generate_pictures(subject.model, orders, sampling)
    return torch.cat([load_pictures(o.folder, picture_seeds(sampling)) for o in orders])


def _difference(pictures: torch.Tensor, stored: torch.Tensor) -> float:
    """Largest difference of a pixel, beyond the rounding to eight bits."""
    return max(0.0, float((pictures - stored).abs().max()) - 0.5 / 255)
