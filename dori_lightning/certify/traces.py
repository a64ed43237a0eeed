"""What a mitigation leaves behind: losses that are higher than on a model that never saw an image.

Who holds both files reads off the losses what was removed, if the cure left a hole in the image's
shape. So the test has two sides: an image that the model denoises better than a model that never
saw it is still held, one that it denoises worse was removed (the "Streisand" trace).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dori_lightning.audit.loss_evidence import DRAWS, LEVELS
from dori_lightning.certify.base import Subject
from dori_lightning.models.generation import CPU_IMAGES
from dori_lightning.runtime import distributed
from dori_lightning.runtime.batching import OomBackoff, map_batches, parallel_batches
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Pair

_MEMORY = OomBackoff("losses", "sample", "checkpoint.precision=bf16, or a device with more memory")


@dataclass(frozen=True)
class Trace:
    """The denoising loss of an image, times that on a model that never saw it.

    Attributes:
        pair: Pair id.
        ratio: Geometric mean over noise levels and draws, under the empty prompt.
        below: Whether it lies below that of every control: the image is still held.
        above: Whether it lies above that of every control: the image was removed, and it shows.
    """

    pair: str
    ratio: float
    below: bool
    above: bool


def traces(
    audited: Subject, reference: Subject, suspects: Sequence[Pair], controls: Sequence[Pair]
) -> tuple[Trace, ...]:
    """Compare the losses of every suspect with those of a model that never saw it.

    Args:
        audited: The model under audit.
        reference: The other one, of the same latents.
        suspects: Pairs that the audited one may hold.
        controls: Pairs that neither holds; they say how far models differ anyway.

    Returns:
        One for each suspect; empty without controls, or where the models have other latents.
    """
    if not controls or audited.model.latent_shape != reference.model.latent_shape:
        return ()
    pairs = [*suspects, *controls]
    own, other = _log_losses(audited, pairs), _log_losses(reference, pairs)
    ratios = {pair.id: float((own[pair.id] - other[pair.id]).mean().exp()) for pair in pairs}
    usual = [ratios[pair.id] for pair in controls]
    return tuple(
        Trace(pair.id, ratio, below=ratio < min(usual), above=ratio > max(usual))
        for pair in suspects
        for ratio in [ratios[pair.id]]
    )


def _log_losses(subject: Subject, pairs: Sequence[Pair]) -> Mapping[str, torch.Tensor]:
    """Pair id to log losses (levels x draws,) under the empty prompt; each process its share."""
    model = subject.model
    steps = [round(level * model.num_train_timesteps) for level in LEVELS for _ in range(DRAWS)]
    noise = torch.stack(
        [
            torch.randn(
                model.latent_shape, generator=keyed_generator("traces", subject.context.seed, k)
            )
            for k in range(len(steps))
        ]
    )
    empty = model.empty_embedding()[0].cpu()
    own = list(pairs[distributed.rank() :: distributed.world_size()])
    latents = subject.latents(own) if own else torch.empty(0)
    rows = [(place, k) for place in range(len(own)) for k in range(len(steps))]

    def losses(part: list[tuple[int, int]]) -> list[float]:
        found = model.denoising_loss(
            latents[[place for place, _ in part]].to(model.device),
            noise[[k for _, k in part]].to(model.device),
            torch.tensor([steps[k] for _, k in part], device=model.device),
            empty.expand(len(part), -1, -1).to(model.device),
            pair_ids=[own[place].id for place, _ in part],
        )
        values: list[float] = found.double().cpu().tolist()
        return values

    with (
        subject.carried(),
        torch.no_grad(),
        model.frozen(),
        progress_bar("traces", len(rows)) as advance,
    ):
        width = CPU_IMAGES * parallel_batches(model)
        at_once = width if model.device.type == "cpu" else subject.sampling.batch
        values = map_batches(
            losses, rows, at_once=at_once, model=model, backoff=_MEMORY, advance=advance
        )
    logs = torch.tensor(values, dtype=torch.float64).log().reshape(len(own), len(steps))
    return distributed.all_gather_dict({pair.id: row for pair, row in zip(own, logs, strict=True)})
