"""Which searches are futile: their loss falls no further than on images the model cannot hold.

The statistic of a search is the logarithm of its loss, times the loss under the empty prompt at
the same noise and timesteps, those that the attack drew anyway. The level of a loss tells how
difficult an image is; the ratio tells what the text adds. Images decide that an image came back,
the ratio only who is searched on.

The rule is a conformal test against the controls that are attacked beside the suspects. Once the
median control's loss is about that under the empty prompt (from a random start that takes some
eight steps, and until then the ratio says nothing), a search goes on at each look while no more
than a share of the controls does as well: half at the first look, then a quarter, and so on, and
``level`` at the last look. That bounds how many images *that the model does not hold* are searched
to the end: at most that share, on average, as long as they and the controls are exchangeable. How
many *memorized* images are given up too early is bounded by nothing that controls can say; where
it is known, of planted images, it stands in ``experiments/011-sequential``. Two controls at least
must do as well: a single one may be an oddity, such as one that any search pushes far down.

Controls follow the same rule as suspects. Each is judged against the others and by the same number
of them, so that it goes on at least as long as it would if any one suspect were a control too.
They go on only as long as a suspect does. What they would have reached later is unknown then, and
so is how close a copy would have come after the look that it ended at: for p-values all copies are
equally close (``copies_tie`` in ``metrics.evidence.judge``). The p-value of a copy is then the
rank of the look at which it came back, among controls of which none was given less time.

Reference: Vovk et al., "Algorithmic Learning in a Random World", 2005.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from dori_lightning.attacks.embedding_attack import AttackContext, Conditioning
from dori_lightning.attacks.solver import noise_and_timesteps
from dori_lightning.models.memory import pairs_at_once
from dori_lightning.runtime import distributed
from dori_lightning.runtime.batching import OomBackoff, map_batches
from dori_lightning.runtime.cache import TENSORS, Cache, Codec, Tensors
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.types import Init

WINDOW = 2
"""Steps, at most, whose losses make a ratio: the last ones."""

NEAR = math.log(1.05)
"""Searches are judged once the median control's ratio is no higher."""

_MEMORY = OomBackoff(
    "empty prompt", "pair", "checkpoint.precision=bf16, or a device with more memory"
)


def futile(ratios: Mapping[str, float], controls: Collection[str], share: float) -> frozenset[str]:
    """Searches that do no better than controls.

    Args:
        ratios: Pair id to the log ratio of its search so far; NaN (a failed search) is no reason
            to stop, nor to stop another.
        controls: Those of them that the model cannot hold.
        share: Of searches on such images that may go on, in (0, 1).
    """
    nulls = [(name, ratios[name]) for name in controls]
    # a search that beats all controls but one goes on, however few they are
    share = max(share, 2 / (1 + len(nulls)))

    def p_value(name: str) -> float:
        as_low = sum(ratio <= ratios[name] for other, ratio in nulls if other != name)
        return (1 + as_low) / (1 + len(nulls))

    return frozenset(name for name in ratios if p_value(name) > share)


@dataclass
class FutilityTest:
    """Judges the searches of an audit, look by look.

    Those from one initial point with the same restart are judged together, against the controls
    among them; one that has ended counts with its last ratio. Where no suspect is left, the
    controls end too. Without controls no search is futile. Nor is one where there never were
    suspects: controls that are attacked later than those must have the tries that they had.

    Attributes:
        level: Share of searches on images that the model does not hold that may go on to the end,
            in (0, 1).
        controls: Ids of pairs that the model cannot hold.
        last: Steps of the last look before the end.
        measure: Log ratios of searches by pair id (``log_ratios``).
        ratios: Initial point and restart to pair id to its last log ratio.
        looks: Initial point and restart to the number of looks that decided.
        judged: Pair id, restart and step of the losses that ratios needed.
    """

    level: float
    controls: Collection[str]
    last: int
    measure: Callable[[Sequence[Conditioning]], Mapping[str, float]]
    ratios: dict[tuple[Init | None, int], dict[str, float]] = field(default_factory=dict)
    looks: Counter[tuple[Init | None, int]] = field(default_factory=Counter)
    judged: set[tuple[str, int, int]] = field(default_factory=set)

    def futile(
        self, conditionings: Sequence[Conditioning], copies: Collection[str]
    ) -> frozenset[str]:
        """Ids of searches that need not go on.

        Args:
            conditionings: Searches on their way up to one look, each of another pair.
            copies: Ids of those whose images are copies, which end anyway.
        """
        start = (conditionings[0].condition.init, conditionings[0].restart)
        ids = {one.pair.id for one in conditionings}
        ratios = self.ratios.setdefault(start, dict.fromkeys(ids, math.nan))
        controls = [name for name in ratios if name in self.controls]
        suspects, left = ids.difference(controls, copies), ids.difference(copies)
        if len(controls) in (0, len(ratios)):
            return frozenset()
        if not suspects:
            return frozenset(left)
        asked = [c for c in conditionings if c.pair.id in controls or c.pair.id in left]
        ratios.update(self.measure(asked))
        self.judged |= {
            (one.pair.id, one.restart, step) for one in asked for step in judged_steps(one.spent)
        }
        known = [ratios[name] for name in controls if not math.isnan(ratios[name])]
        if not known or median(known) > NEAR:
            return frozenset()
        self.looks[start] += 1
        halved = 0.5 ** self.looks[start] if conditionings[0].spent < self.last else 0.0
        ended = futile(ratios, controls, max(self.level, halved))
        return frozenset(left & ended) if suspects - ended else frozenset(left)


def judged_steps(taken: int) -> range:
    """Steps whose losses judge a search that took so many: the later half, at most ``WINDOW``."""
    return range(max(taken // 2, taken - WINDOW), taken)


def log_ratios(context: AttackContext, conditionings: Sequence[Conditioning]) -> dict[str, float]:
    """Log ratio of each search's loss to that under the empty prompt, at the steps that judge it.

    Losses under the empty prompt are stored beside the attacks. They depend on pair, restart and
    step, not on where a search began, so all initial points share them. Each process computes its
    share.

    Args:
        context: What the attacks share; its model carries the edit.
        conditionings: Searches of different pairs, on their way.

    Returns:
        Pair id to the ratio, the same on every process; NaN where the search failed.

    Raises:
        InputError: Not even one pair fits into memory.
    """
    own = conditionings[distributed.rank() :: distributed.world_size()]
    stored = {one.pair.id: _read(context, one) for one in own}
    missing = [
        (one, step)
        for one in own
        for step in judged_steps(one.spent)
        if step not in stored[one.pair.id]
    ]
    for (one, step), loss in zip(missing, _losses(context, missing), strict=True):
        stored[one.pair.id][step] = loss
    for one in {one.pair.id: one for one, _ in missing}.values():
        _write(context, one, stored[one.pair.id])
    found = {}
    for one in own:
        assert one.losses is not None, "a prompt is no search"
        steps = judged_steps(one.spent)
        reached = float(one.losses[steps.start : steps.stop].double().mean())
        empty = sum(stored[one.pair.id][step] for step in steps) / len(steps)
        found[one.pair.id] = math.log(reached / empty) if reached > 0 < empty else math.nan
    return distributed.all_gather_dict(found)


def _losses(context: AttackContext, asked: Sequence[tuple[Conditioning, int]]) -> list[float]:
    """Mean loss under the empty prompt at the draws of one step of one search, for each."""
    model, noises = context.model, context.settings.noise_batch
    empty = model.empty_embedding()

    def losses(part: list[tuple[Conditioning, int]]) -> list[float]:
        latents = torch.stack([context.data.encoded(one.pair).latent for one, _ in part])
        draws = [
            noise_and_timesteps(
                context.seed,
                one.pair.id,
                one.restart,
                step,
                shape=(noises, *latents.shape[1:]),
                timesteps=model.num_train_timesteps,
            )
            for one, step in part
        ]
        found = model.denoising_loss(
            latents.repeat_interleave(noises, 0).to(model.device),
            torch.cat([noise for noise, _ in draws]).to(model.device),
            torch.cat([timesteps for _, timesteps in draws]).to(model.device),
            empty.to(model.device).expand(len(part) * noises, -1, -1),
            pair_ids=[one.pair.id for one, _ in part for _ in range(noises)],
        )
        means: list[float] = found.view(len(part), noises).double().mean(1).cpu().tolist()
        return means

    with torch.no_grad(), model.frozen(), progress_bar("empty prompt", len(asked)) as advance:
        return map_batches(
            losses,
            asked,
            at_once=pairs_at_once(model),
            model=model,
            backoff=_MEMORY,
            advance=advance,
        )


def _encode(losses: dict[int, float]) -> Tensors:
    steps = sorted(losses)
    values = torch.tensor([losses[step] for step in steps], dtype=torch.float64)
    return {"steps": torch.tensor(steps, dtype=torch.int64), "losses": values}


def _decode(tensors: Tensors) -> dict[int, float]:
    return dict(zip(tensors["steps"].tolist(), tensors["losses"].tolist(), strict=True))


_CODEC: Codec[dict[int, float]] = TENSORS.mapped(_encode, _decode)
"""Step to the loss under the empty prompt at its draws."""


def _place(context: AttackContext, one: Conditioning) -> tuple[str, dict[str, str]]:
    """Name of the file with a search's losses under the empty prompt, and what they depend on."""
    digest = hashlib.sha256(f"{one.pair.id}\0{one.pair.sha256}\0".encode())
    digest.update(context.data.encoded(one.pair).latent.contiguous().numpy().tobytes())
    key = {**context.identity, "inputs": digest.hexdigest()[:16]}
    return f"empty/{one.pair.id}.r{one.restart}", key


def _read(context: AttackContext, one: Conditioning) -> dict[int, float]:
    return Cache(context.folder).read(*_place(context, one), _CODEC) or {}


def _write(context: AttackContext, one: Conditioning, losses: dict[int, float]) -> None:
    name, key = _place(context, one)
    Cache(context.folder).write(name, losses, key, _CODEC)
