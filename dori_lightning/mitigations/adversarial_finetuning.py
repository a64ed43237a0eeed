"""Train the denoiser to show surrogates wherever an attack finds a memorized image.

Reference: Finding DoRI (2507.16880), section "adversarial fine-tuning": surrogates from a pruned
model, L = L_DM + L_Adv, fresh 50-step attacks as inner loop, all weights of the UNet, five epochs.
Adversarial embeddings are called triggers, as in the paper.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.nn.utils import parametrize

from dori_lightning.attacks.budget import AttackSettings, evaluation_steps
from dori_lightning.attacks.solver import (
    AttackProblem,
    AttackResult,
    concat,
    random_embedding,
    refuse_broken,
    solve,
)
from dori_lightning.mitigations.base import (
    Context,
    CostEstimate,
    Evaluations,
    require,
    require_at_least_one,
)
from dori_lightning.mitigations.finetuning import FinetunedMitigation, FinetuneSettings, Finetuning
from dori_lightning.mitigations.replacements import (
    Surrogates,
    SurrogateSettings,
    draw_indices,
    find_surrogates,
)
from dori_lightning.models.memory import estimate_batch_size
from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.pairs.datamodule import PairBatch
from dori_lightning.pairs.encoded_corpus import EncodedCorpus
from dori_lightning.runtime import distributed
from dori_lightning.runtime.logging import with_progress
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Init, Pair

log = logging.getLogger(__name__)

FIRST_RESTART = 1_000
"""Searches of the training draw their noise as restarts from here on, which no audit reaches: it
attacks with noise that the model was not trained against."""

_PROBE = 16
"""Noise samples that measure how well a pair is memorized before training."""


@dataclass(frozen=True)
class PoolSettings:
    """How triggers are searched and kept.

    Attributes:
        attack: The inner attack: one search per pair and round, from an initial point drawn from
            ``attack.inits``. Embeddings at its ``snapshots`` are trained against too: they lie
            on the same path and cost nothing.
        warm: Each round goes on from the pair's last trigger (its prompt in the first) and
            searches one more from a random embedding, instead of one search from a drawn point.
        replay: Rounds whose triggers stay in the pool; 1 keeps the current round's only.
        skip_robust: Skip a pair for one round after its best trigger's loss has risen by this
            share of the way from its prompt's to the empty prompt's, as both were before training,
            and end a search half-way whose loss is beyond that; None does neither.
    """

    attack: AttackSettings = field(
        default_factory=lambda: AttackSettings(inits=("prompt", "random", "control_prompt"))
    )
    warm: bool = False
    replay: int = 1
    skip_robust: float | None = None

    def __post_init__(self) -> None:
        self.attack.check_whole()
        require(
            self.attack.timesteps != "importance",
            "pool.attack.timesteps cannot be importance, whose density holds for one model: the "
            "model that is trained changes from round to round",
            self.attack.timesteps,
        )
        require_at_least_one(self, "replay", within="pool.")
        share = self.skip_robust
        require(
            share is None or 0 < share <= 1, "pool.skip_robust must be in (0, 1] or null", share
        )


@dataclass(frozen=True)
class AdversarialFinetuning(FinetunedMitigation):
    """Adversarial fine-tuning: the mitigation of Finding DoRI.

    The paper leaves open the optimizer, the learning rate, what an epoch is, how many triggers an
    image gets and where their searches begin. Here an epoch searches triggers for every pair
    once and then takes ``updates`` optimizer steps against them.

    Attributes:
        name: How reports call it.
        surrogates: Where the images to show instead come from.
        pool: How triggers are searched and kept.
        finetune: Optimizer settings.
        epochs: Rounds of search and training; the paper takes five.
        updates: Optimizer steps of a round.
        adversarial_batch: Triggers of a step, each with a surrogate of its pair (L_Adv).
        ordinary_batch: Ordinary images of a step (L_DM).
        adversarial_weight: Weight of L_Adv against L_DM; 1 in the paper.
        redirect: Share of a step's triggers that are trained on the memorized image's own noised
            latent instead of the surrogate's, towards the surrogate. The paper has none: L_Adv
            sees noised surrogates alone, which leaves the model able to denoise the image
            itself once an attack has found the way to it. See ``redirect_loss``.
        ordinary_examples: Ordinary images that are drawn from; those that are drawn are encoded.
        low_rank: Rank of a low-rank update (LoRA) of all linear layers instead of training all
            weights, which the paper reports as failing; None trains all.
    """

    name: str
    surrogates: SurrogateSettings
    pool: PoolSettings = field(default_factory=PoolSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    epochs: int = 5
    updates: int = 50
    adversarial_batch: int = 8
    ordinary_batch: int = 8
    adversarial_weight: float = 1.0
    redirect: float = 0.0
    ordinary_examples: int = 2000
    low_rank: int | None = None

    def __post_init__(self) -> None:
        require_at_least_one(
            self, "epochs", "updates", "adversarial_batch", "ordinary_batch", "ordinary_examples"
        )
        weight, rank = self.adversarial_weight, self.low_rank
        require(weight > 0, "adversarial_weight must be > 0", weight)
        require(0 <= self.redirect <= 1, "redirect must be in [0, 1]", self.redirect)
        require(rank is None or rank >= 1, "low_rank must be >= 1 or null", rank)

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Optimizer steps."""
        return self.epochs * self.updates

    def estimate_cost(self, sampling: Sampling, pairs: int) -> CostEstimate:
        """Estimate what finding the edit takes for a number of pairs to forget."""
        attack = self.pool.attack
        attacks = self.epochs * pairs * (2 if self.pool.warm else 1)
        rows = self.adversarial_batch + self.ordinary_batch
        candidates = pairs * self.surrogates.candidates
        source, skips = self.surrogates.source, self.pool.skip_robust is not None
        return CostEstimate(
            Evaluations.of_images(candidates, sampling)
            + Evaluations(
                attack=attacks * attack.budget.steps * attack.noise_batch,
                training=self.steps * rows,
            ),
            "pairs that stay robust are skipped, so this is the most it takes" if skips else "",
            stored_weights=1.0,
            builds_on=() if source is None else (source,),
        )

    def trains(self, model: TextToImage, name: str) -> bool:
        """Every weight, or none besides the low-rank update."""
        del model, name
        return self.low_rank is None

    def added_weights(self, model: TextToImage) -> int:
        """Weights of the low-rank update."""
        return 0 if self.low_rank is None else LowRank.count(model.denoiser(), self.low_rank)

    def training(
        self, model: TextToImage, pairs: Sequence[Pair], context: Context
    ) -> Callable[[], AdversarialTraining]:
        """Find surrogates, then alternate between searching triggers and training."""
        ordinary = context.ordinary(model, "calibration", self.ordinary_examples)
        surrogates = find_surrogates(model, pairs, context, self.surrogates)
        return lambda: AdversarialTraining(
            model, self, pairs, context, surrogates=surrogates, ordinary=ordinary
        )


class AdversarialTraining(Finetuning):
    """The training of ``AdversarialFinetuning``; every first step of a round searches triggers."""

    def __init__(
        self,
        model: TextToImage,
        method: AdversarialFinetuning,
        pairs: Sequence[Pair],
        context: Context,
        *,
        surrogates: Surrogates,
        ordinary: EncodedCorpus,
    ) -> None:
        """Train on triggers of ``pairs`` with their surrogates, and on ordinary images."""
        low_rank = None
        if method.low_rank is not None:
            low_rank = LowRank(model.denoiser(), method.low_rank, seed=context.seed)
        trained = low_rank.trains if low_rank is not None else lambda _: True
        super().__init__(model, method.finetune, trained=trained)
        self.low_rank = low_rank
        self.method, self.seed = method, context.seed
        self.surrogates, self.ordinary = surrogates, ordinary
        self.pool = TriggerPool(
            model,
            context.data.batch(pairs),
            method.pool,
            ordinary=ordinary,
            seed=context.seed,
        )

    def work(self, steps: int) -> int:
        """Rows through the denoiser up to an optimizer step, with no pair left out."""
        method = self.method
        rounds = -(-steps // method.updates)
        rows = method.adversarial_batch + method.ordinary_batch
        return rounds * self.pool.rows_of_search + steps * rows

    @property
    def notes(self) -> dict[str, Any]:
        """Where surrogates come from; attack losses and skipped pairs by round."""
        return {"surrogates": self.surrogates.notes, "rounds": self.pool.rounds}

    @property
    def reused(self) -> int:
        """What others spent on its surrogates."""
        return self.surrogates.reused

    def training_step(self, *_: Any) -> torch.Tensor:
        """L_DM on ordinary images plus the weighted L_Adv on triggers and surrogates."""
        method, step, device = self.method, self.global_step, self.model.device
        if step % method.updates == 0:
            # attacks run in full precision whatever the training's, as those of an audit do
            with torch.autocast(device.type, enabled=False):
                self.pool.worked = self.worked
                self.pool.search(step // method.updates)
        generator = keyed_generator("adversarial_finetuning", self.seed, step)
        ids, triggers = self.pool.draw(method.adversarial_batch, generator)
        surrogates = self.surrogates.draw(ids, generator)
        rows = torch.randint(len(self.ordinary), (method.ordinary_batch,), generator=generator)
        sizes = [len(ids), len(rows)]
        noise = torch.randn((sum(sizes), *surrogates.shape[1:]), generator=generator)
        timesteps = torch.randint(
            self.model.num_train_timesteps, (sum(sizes),), generator=generator
        )
        # every process drew everything, and trains on its rows of either half
        shards = [distributed.shard(size) for size in sizes]

        def ours(both: torch.Tensor) -> torch.Tensor:
            halves = zip(torch.split(both, sizes), shards, strict=True)
            return torch.cat([half[shard.rows] for half, shard in halves]).to(device)

        names = ids[shards[0].rows]
        plain_images = self.ordinary.rows(rows[shards[1].rows].tolist())
        turned = len(range(round(method.redirect * len(ids)))[shards[0].rows])
        latents = torch.cat([surrogates[shards[0].rows], plain_images.latents]).to(device)
        embeddings = torch.cat([triggers[shards[0].rows], plain_images.embeddings]).to(device)
        noise, timesteps = ours(noise), ours(timesteps)
        plain = self.model.denoising_loss(
            latents[turned:], noise[turned:], timesteps[turned:], embeddings[turned:]
        )
        adversarial = plain[: len(names) - turned]
        if turned:
            memorized = torch.stack([self.pool.latents[name] for name in names[:turned]])
            redirected = redirect_loss(
                self.model,
                memorized.to(device),
                latents[:turned],
                noise[:turned],
                timesteps[:turned],
                embeddings[:turned],
            )
            adversarial = torch.cat([redirected, adversarial])
        ordinary = shards[1].weight * plain[len(names) - turned :].mean()
        forgetting = shards[0].weight * adversarial.mean()
        self.log("finetune/adversarial_loss", forgetting)
        self.log("finetune/ordinary_loss", ordinary)
        return ordinary + method.adversarial_weight * forgetting

    def finish(self) -> None:
        """Merge the low-rank update into the weights."""
        if self.low_rank is not None:
            self.low_rank.merge()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the triggers, which took most of the time."""
        checkpoint["trigger_pool"] = self.pool.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the triggers back."""
        self.pool.restore(checkpoint["trigger_pool"])


Found: TypeAlias = tuple[torch.Tensor, float]
"""Embeddings of one search (S, T, D), the last one where it ended, and its final loss."""


class PoolEntry(NamedTuple):
    """One trigger.

    Attributes:
        pair: Id of its pair.
        round: Round that found it.
        embedding: Adversarial embedding (T, D).
    """

    pair: str
    round: int
    embedding: torch.Tensor


class TriggerPool:
    """Triggers of all pairs, searched anew each round; the prompts are always among them.

    Attributes:
        found: Triggers of the rounds that are replayed.
        warm: Pair id to the embedding that its next search goes on from.
        rested: Ids of the pairs that the next round skips, since they are robust.
        rounds: What each round found, for the edit's notes.
        worked: Called after each step of a search with the rows that all processes computed.
    """

    def __init__(
        self,
        model: TextToImage,
        batch: PairBatch,
        settings: PoolSettings,
        *,
        ordinary: EncodedCorpus,
        seed: int,
    ) -> None:
        """Start with the prompts of all pairs; ``control_prompt`` begins at ``ordinary`` ones."""
        self.model, self.settings, self.seed = model, settings, seed
        self.ordinary = ordinary
        budget = settings.attack.budget
        own_units = not model.spread().absolute
        needed = budget.needs_controls and not own_units
        self.budget = budget.resolve(
            ordinary.embeddings() if needed else None, own_units=own_units
        )
        self.ids = tuple(pair.id for pair in batch.pairs)
        self.latents: dict[str, torch.Tensor] = dict(zip(self.ids, batch.latents, strict=True))
        self.prompts: dict[str, torch.Tensor] = dict(zip(self.ids, batch.embeddings, strict=True))
        self.found: list[PoolEntry] = []
        self.warm = dict(self.prompts)
        self.rested: set[str] = set()
        self.rounds: list[dict[str, Any]] = []
        self.worked: Callable[[int], None] = lambda _: None
        self._limits: dict[str, float] = {}
        if settings.skip_robust is not None:
            self._limits = self._robust_losses(settings.skip_robust)

    @property
    def rows_of_search(self) -> int:
        """Rows through the denoiser that a round's search takes with all pairs in it."""
        attack = self.settings.attack
        searches = 2 if self.settings.warm else 1
        return searches * len(self.ids) * attack.budget.steps * attack.noise_batch

    def search(self, number: int) -> None:
        """Search the triggers of a round, from 0, against the model as it is now.

        A search that is interrupted leaves the pool as it was.
        """
        settings, restart = self.settings, FIRST_RESTART + 2 * number
        names = [name for name in self.ids if name not in self.rested]
        if settings.warm:
            results = [
                self._attack(restart, names, [self.warm[name] for name in names]),
                self._attack(restart + 1, names, [self._random(name, number) for name in names]),
            ]
            # goes on from the last snapshot
            self.warm.update({name: rows[-1] for name, (rows, _) in results[0].items()})
        else:
            starts = [self._start(name, number) for name in names]
            results = [self._attack(restart, names, starts)]
        self.found = [kept for kept in self.found if kept.round > number - settings.replay]
        self.found += [
            PoolEntry(name, number, row)
            for result in results
            for name in names
            for row in result[name][0]
        ]
        losses = {name: min(result[name][1] for result in results) for name in names}
        self.rested = {
            name for name, loss in losses.items() if loss > self._limits.get(name, float("inf"))
        }
        mean = sum(losses.values()) / len(losses) if losses else float("nan")
        self.rounds.append(
            {
                "searched": len(names),
                "attack_loss": round(mean, 6),
                "robust": len(self.rested),
                "unet_evaluations": self.model.unet_evaluations,
            }
        )
        log.info(
            "round %d: %d pairs attacked, mean loss of the best triggers %.4f, %d robust",
            number, len(names), mean, len(self.rested),
        )  # fmt: skip

    def draw(self, count: int, generator: torch.Generator) -> tuple[list[str], torch.Tensor]:
        """Draw ``count`` triggers, each of a pair drawn evenly.

        Returns:
            Pair ids and embeddings (``count``, T, D).
        """
        triggers = {name: [self.prompts[name]] for name in self.ids}
        for trigger in self.found:
            triggers[trigger.pair].append(trigger.embedding)
        order: list[int] = []
        while len(order) < count:
            order += torch.randperm(len(self.ids), generator=generator).tolist()
        names = [self.ids[k] for k in order[:count]]
        rows = zip(names, draw_indices(triggers, names, generator), strict=True)
        return names, torch.stack([triggers[name][k] for name, k in rows])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as tensors and plain values."""
        return {
            "found": [tuple(entry) for entry in self.found],
            "warm": self.warm,
            "rested": sorted(self.rested),
            "rounds": self.rounds,
            "limits": self._limits,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave."""
        self.found = [PoolEntry(*entry) for entry in state["found"]]
        self.warm, self._limits = dict(state["warm"]), dict(state["limits"])
        self.rested, self.rounds = set(state["rested"]), list(state["rounds"])

    def _start(self, name: str, number: int) -> torch.Tensor:
        """Initial embedding (T, D) of a pair's search: its kind is drawn by key."""
        generator = keyed_generator("trigger_init", self.seed, name, number)
        inits = self.settings.attack.inits
        init: Init = inits[int(torch.randint(len(inits), (1,), generator=generator))]
        if init == "prompt":
            return self.prompts[name]
        if init == "random":
            return self._random(name, number)
        place = int(torch.randint(len(self.ordinary), (1,), generator=generator))
        return self.ordinary.rows([place]).embeddings[0]

    def _random(self, name: str, number: int) -> torch.Tensor:
        """Random initial embedding (T, D) of a pair's search in a round."""
        normal = random_embedding(
            self.seed, name, FIRST_RESTART + number, self.model.embedding_shape
        )
        return self.model.random_start(normal, parts=self.settings.attack.parts)

    def _attack(
        self, restart: int, names: Sequence[str], starts: Sequence[torch.Tensor]
    ) -> dict[str, Found]:
        """Search from ``starts``, N embeddings (T, D); processes share the pairs.

        Returns:
            Pair id to the embeddings at the snapshots (S, T, D) and the final loss.
        """
        attack = self.settings.attack
        results: dict[str, Found] = {}
        shard = range(distributed.rank(), len(names), distributed.world_size())
        if shard:
            estimate_batch_size(
                self.model,
                noise_batch=attack.samples_at_once,
                wanted=attack.pairs_per_forward,
                pair_id=names[shard[0]],
            )
            own = [names[k] for k in shard]
            problem = AttackProblem(
                tuple(own),
                (restart,) * len(own),
                torch.stack([self.latents[name] for name in own]),
                torch.stack([starts[k] for k in shard]),
            )
            results = self._solve(problem, len(names) * attack.noise_batch)
        return distributed.all_gather_dict(results)

    def _solve(self, problem: AttackProblem, rows: int) -> dict[str, Found]:
        """Search this process' share; ``rows`` go through the denoisers of all in a step."""
        attack, steps = self.settings.attack, self.budget.steps
        wanted = evaluation_steps(attack.snapshots, steps)
        end = steps // 2 if self._limits else steps
        search = partial(
            solve,
            self.model,
            budget=self.budget,
            # with the point where a search may end
            settings=replace(attack, snapshots=(*attack.snapshots, end)),
            seed=self.seed,
            on_step=lambda _: self.worked(rows),
        )

        def found(result: AttackResult, ends: Sequence[int]) -> dict[str, Found]:
            points = result.embeddings[:, [s in ends for s in result.snapshots]]
            losses = result.losses[:, -5:].mean(1).tolist()
            return dict(zip(result.ids, zip(points, losses, strict=True), strict=True))

        first = search(problem, stop_at=end)
        refuse_broken(first)
        results = found(first, (*wanted, end))
        if first.state is None:
            return results
        limits = self._limits
        going = [k for k, name in enumerate(first.ids) if not results[name][1] > limits[name]]
        if going:
            rest = replace(
                problem,
                ids=tuple(problem.ids[k] for k in going),
                restarts=tuple(problem.restarts[k] for k in going),
                latents=problem.latents[going],
                initial=problem.initial[going],
            )
            last = search(rest, resume_from=concat([first.row(k) for k in going]))
            results |= found(last, wanted)
        return results

    @torch.no_grad()
    def _robust_losses(self, share: float) -> dict[str, float]:
        """Loss beyond which a pair counts as robust, by pair; the model is untrained yet."""
        limits, empty = {}, self.model.empty_embedding().cpu()[0]
        for name in with_progress("losses before training", self.ids):
            # all the way to the empty prompt's, the prompt's own counts for nothing
            memorized = self._probed_loss(name, self.prompts[name]) if share < 1 else 0.0
            limits[name] = (1 - share) * memorized + share * self._probed_loss(name, empty)
        return limits

    def _probed_loss(self, name: str, embedding: torch.Tensor) -> float:
        """Mean loss of a pair's image under an embedding (T, D), always at the same noise."""
        generator, device = keyed_generator("robust", self.seed, name), self.model.device
        latents = self.latents[name].expand(_PROBE, *self.latents[name].shape)
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.randint(self.model.num_train_timesteps, (_PROBE,), generator=generator)
        losses = self.model.denoising_loss(
            latents.to(device),
            noise.to(device),
            times.to(device),
            embedding.expand(_PROBE, *embedding.shape).to(device),
            pair_ids=[name] * _PROBE,
        )
        return float(losses.mean())


def redirect_loss(
    model: TextToImage,
    memorized: torch.Tensor,
    surrogates: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    embeddings: torch.Tensor,
) -> torch.Tensor:
    """How far the model is from seeing the surrogate in the noised memorized image, (N,).

    Mean squared error between the clean latent that the model's noise prediction implies and the
    surrogate's, times min(SNR, 1): at low noise the image is plain to see and nothing can be
    redirected, so the weight bounds the loss there. The attack's objective, denoising the
    memorized image, is thereby trained against directly.

    Args:
        model: Model in training.
        memorized: Latents of the memorized images (N, C, h, w).
        surrogates: Latents to see instead (N, C, h, w).
        noise: Standard normal noise (N, C, h, w).
        timesteps: Timesteps (N,).
        embeddings: Triggers (N, T, D).
    """
    signal, spread = (factor[:, None, None, None] for factor in model.scales(timesteps))
    kept, added = (factor[:, None, None, None] for factor in model.variances(timesteps))
    noised = model.noised(memorized, noise, timesteps)
    predicted = model.predict_noise(noised, timesteps, embeddings)
    # the noise that leads from here to the surrogate; its error is SNR times the latent's
    target = (noised - signal * surrogates) / spread
    weight = (added / kept).clamp(max=1.0)
    return (weight * (predicted - target).square()).flatten(1).mean(1)


class LowRank:
    """Low-rank updates (LoRA) of every linear layer of a module, merged into them at the end.

    The scale alpha / r of the paper is 1; the learning rate does what it would do.

    Reference: Hu et al. (2022), https://arxiv.org/abs/2106.09685.
    """

    def __init__(self, module: nn.Module, rank: int, *, seed: int = 0) -> None:
        """Parametrize the linear layers of ``module`` in place, small ones by a smaller rank."""
        self._layers = [
            (name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)
        ]
        for name, layer in self._layers:
            parametrize.register_parametrization(
                layer,
                "weight",
                _Update(
                    layer.weight,
                    min(rank, *layer.weight.shape),
                    keyed_generator("low_rank", seed, name),
                ),
            )

    @staticmethod
    def count(module: nn.Module, rank: int) -> int:
        """Weights that updates of ``module`` would have."""
        shapes = [m.weight.shape for m in module.modules() if isinstance(m, nn.Linear)]
        return sum(min(rank, *shape) * sum(shape) for shape in shapes)

    @staticmethod
    def trains(name: str) -> bool:
        """Whether the parameter of a name belongs to an update."""
        return name.endswith(("parametrizations.weight.0.up", "parametrizations.weight.0.down"))

    def merge(self) -> None:
        """Add the updates to the weights and leave plain linear layers; may be called again."""
        for _, layer in self._layers:
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


class _Update(nn.Module):
    """Weight (O, I) plus ``up @ down``; ``up`` starts at zero, so nothing changes at first."""

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(torch.zeros(rows, rank).to(weight))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down
