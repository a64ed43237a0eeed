"""Words: is there a prompt, other than its own, that brings an image back?

An adversarial embedding cannot be typed. Here tokens are searched: soft ones follow the gradient
of the denoising loss, taken at the nearest words (PEZ), and single words are then swapped for
those that the gradient promises most of (GCG). What is found is typed: images are drawn from the
prompt, as anybody would.

References: Wen et al., *Hard prompts made easy* (PEZ, 2302.03668); Zou et al., *Universal and
transferable adversarial attacks on aligned language models* (GCG, 2307.15043).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, get_args

import torch
from torch.nn import functional as F

from dori_lightning.attacks.solver import RowAdam, loss_and_gradient
from dori_lightning.certify.base import (
    AttackBase,
    Attempt,
    Holds,
    Plan,
    Subject,
    refuse_family,
)
from dori_lightning.certify.embeddings import search, whole_search
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.memory import pairs_at_once
from dori_lightning.models.protocol import Sampling
from dori_lightning.runtime import distributed
from dori_lightning.runtime.batching import OomBackoff, map_batches
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import InputError, Pair

Start = Literal["random", "embedding", "caption"]
"""Where a search begins: at random words, at those whose encoding is nearest to an adversarial
embedding, at the caption's own."""

FAMILIES = ("sd", "sdxl")
"""Families that read prompts with CLIP's text encoders alone."""

_STARTS: Mapping[Start, str] = {
    "random": "from scratch",
    "embedding": "from an embedding",
    "caption": "from the caption",
}

_IDLE_STEPS = 20
"""Steps of soft tokens that may pass until one of them is nearest to another word."""

_TEXT_STEPS = 60
"""Steps of soft tokens towards an embedding, through the text encoder alone."""

_MEMORY = OomBackoff("swapped words", "prompt", "a device with more memory")


@dataclass(frozen=True)
class WordSearch(AttackBase):
    """Search a prompt whose denoising loss on the image is low.

    A prompt counts where typing it gives its tokens again; others are passed over. Losses are
    compared at the same noise throughout a search.

    Attributes:
        starts: Where searches begin, the one that knows least first.
        lengths: Words of a prompt that is searched from scratch, rising; None for all that the
            text encoder takes, as from the other starts.
        caption: Whether words of the caption may be used.
        steps: Prompts that are evaluated on the way of soft tokens.
        embedding_steps: Steps of the search for the embedding that words begin at.
        noise_batch: Noise samples of a prompt.
        between: Share of the schedule, from 0 (clean) to 1 (noise), that they are from: words
            decide what an image shows while little of it is there.
        lr: Adam's learning rate of soft tokens, in root mean squares of the vocabulary.
        decay: Weight decay, as a share of the learning rate.
        rounds: Rounds of swaps.
        swaps: Prompts that are evaluated in a round, each with one word swapped.
        candidates: Words that the gradient promises most of, at each place.
        images: Images that are drawn of what a search found.
    """

    name: str = "words"
    starts: tuple[Start, ...] = ("random", "embedding", "caption")
    lengths: tuple[int | None, ...] = (3, 8, None)
    caption: bool = True
    steps: int = 30
    embedding_steps: int = 20
    noise_batch: int = 4
    between: tuple[float, float] = (0.4, 1.0)
    lr: float = 1.0
    decay: float = 0.1
    rounds: int = 1
    swaps: int = 8
    candidates: int = 64
    images: int = 2
    holds: Holds = field(default="words", init=False)

    def __post_init__(self) -> None:
        for name in ("starts", "lengths", "between"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if wrong := self._wrong():
            raise InputError(wrong, where=f"certify.attacks.{self.name}")

    def _wrong(self) -> str:
        """What no search can do; empty where all is well."""
        known, (low, high) = get_args(Start), self.between
        counted = [math.inf if length is None else length for length in self.lengths]
        if not self.starts or len(set(self.starts)) < len(self.starts):
            return "starts must name each start once"
        if stray := [start for start in self.starts if start not in known]:
            return f"starts must be among {', '.join(known)}, got {', '.join(stray)}"
        if not counted or counted != sorted(set(counted)) or counted[0] < 1:
            return f"lengths must rise from 1 on, null at the end, got {list(self.lengths)}"
        if "caption" in self.starts and not self.caption:
            return "no search starts from the caption without its words: starts=[random,embedding]"
        if min(self.steps, self.embedding_steps, self.noise_batch, self.images) < 1:
            return "steps, embedding_steps, noise_batch and images must be >= 1"
        if min(self.rounds, self.swaps, self.candidates) < 0:
            return "rounds, swaps and candidates must be >= 0"
        if not 0 <= low < high <= 1:
            return f"between must rise within 0 and 1, got [{low}, {high}]"
        if not (0 < self.lr < math.inf and 0 <= self.decay < math.inf):
            return f"lr must be positive and decay >= 0, got {self.lr} and {self.decay}"
        return ""

    def check(self, plan: Plan) -> None:
        """Refuse what has no words, or words that are no prompt.

        Raises:
            InputError: The family has other text encoders than CLIP's, or the checkpoint has no
                tokenizer of its own.
        """
        refuse_family(
            self, plan, FAMILIES, "it reads prompts with T5, and words of CLIP are searched"
        )
        if not plan.own_tokenizer:
            raise InputError(
                f"attack {self.name} searches words, and the checkpoint has no tokenizer of its "
                f"own that knows any",
                where="checkpoint, certify.paths",
                fix=f"a checkpoint that was trained, or leave {self.name} out of certify.paths",
            )

    def rows(self, plan: Plan) -> int:
        """All prompts from every start, and their images."""
        each = self._searched + self._drawn(plan.sampling)
        first = self._embedding_rows if "embedding" in self.starts else 0
        return len(self._levels) * each + first

    @property
    def _levels(self) -> list[tuple[Start, int | None]]:
        """Starts and lengths, in order."""
        return [
            (start, length)
            for start in self.starts
            for length in (self.lengths if start == "random" else (None,))
        ]

    def _drawn(self, sampling: Sampling) -> int:
        """Rows through the denoiser of a prompt's images."""
        return self.images * sampling.steps * sampling.rows_per_step

    @property
    def _searched(self) -> int:
        """Rows through the denoiser of a search."""
        swapped = self.rounds * (1 + self.swaps) if self.swaps else 0
        return (self.steps + swapped) * self.noise_batch

    @property
    def _embedding_rows(self) -> int:
        return self.embedding_steps * self.noise_batch

    def run(self, subject: Subject, pairs: Sequence[Pair], attempt: Attempt) -> None:
        """Search from each start, short prompts first."""
        del pairs
        model, vocabulary = subject.model, subject.model.vocabulary()
        noise = subject.starting_noise(self.images)
        for start, length in self._levels:
            level = f"{length or 'all'} words {_STARTS[start]}"
            left = attempt.left(level)
            if not left:
                return
            rows = self._searched + self._drawn(subject.sampling)
            embeddings: Mapping[str, torch.Tensor] = {}
            if start == "embedding":
                embeddings = self._embeddings(subject, left)
                rows += self._embedding_rows
            count = min(length or vocabulary.limit, vocabulary.limit)
            with subject.carried():
                words = self._search(subject, left, start, count, embeddings)
                prompts = {name: vocabulary.prompt(own) for name, own in words.items()}
                encoded = {
                    name: model.encode_prompts([prompt])[0].cpu()
                    for name, prompt in prompts.items()
                }
                images = subject.draw(encoded, noise=dict.fromkeys(encoded, noise))
            attempt.add(level, images, rows=rows, notes=prompts)

    def _embeddings(self, subject: Subject, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        """Pair id to an adversarial embedding (T, D), searched from its prompt."""
        settings = whole_search(
            subject.context.attack,
            "prompt",
            steps=self.embedding_steps,
            noise_batch=self.noise_batch,
            lr=0.1,  # the published one
        )
        found = search(subject, settings, pairs, "prompt", 0)
        return {name: own.embeddings[0, -1] for name, own in found.items()}

    def _search(
        self,
        subject: Subject,
        pairs: Sequence[Pair],
        start: Start,
        count: int,
        embeddings: Mapping[str, torch.Tensor],
    ) -> dict[str, list[int]]:
        """Pair id to the places of its best words; the model carries its edit already."""
        model, seed = subject.model, subject.context.seed
        vocabulary = model.vocabulary()
        losses = _Losses(subject, pairs, self.noise_batch, self.between)
        own_words = [vocabulary.places(pair.prompt) for pair in pairs]
        allowed = [vocabulary.allowed(() if self.caption else own) for own in own_words]
        first = []
        for pair, own, mask in zip(pairs, own_words, allowed, strict=True):
            places = mask.nonzero()[:, 0]
            generator = keyed_generator("words", seed, pair.id, count)
            drawn = torch.randint(len(places), (count,), generator=generator)
            random = places[drawn.to(places.device)].tolist()
            begin = own[:count] if start == "caption" else []
            first.append([*begin, *random[len(begin) :]])
        with model.frozen(), torch.enable_grad():
            if start == "embedding":
                wanted = [embeddings[pair.id].to(model.device) for pair in pairs]
                first = [
                    self._nearest_prompt(model, *each)
                    for each in zip(first, allowed, wanted, strict=True)
                ]
            best = self._soft(losses, first, allowed)
            for turn in range(self.rounds if self.swaps else 0):
                best = self._swap(losses, best, allowed, (seed, start, count, turn))
        return {pair.id: words for pair, (words, _) in zip(pairs, best, strict=True)}

    def _nearest_prompt(
        self,
        model: LatentDiffusion,
        places: list[int],
        allowed: torch.Tensor,
        wanted: torch.Tensor,
    ) -> list[int]:
        """Words whose encoding is near to an embedding (T, D); the denoiser is not asked."""
        table = model.vocabulary().inputs
        soft = _SoftTokens(table[places][None], table, lr=self.lr, decay=self.decay)
        best, lowest = places, math.inf
        for _ in range(_TEXT_STEPS):
            tokens = table[places][None].requires_grad_(True)
            distance = F.mse_loss(model.encode_tokens(tokens)[0], wanted)
            value = float(distance.detach())
            if value < lowest and model.vocabulary().survives(places):
                best, lowest = places, value
            (gradient,) = torch.autograd.grad(distance, tokens)
            soft.step(gradient)
            places = soft.nearest([allowed])[0]
        return best

    def _soft(
        self,
        losses: "_Losses",
        places: list[list[int]],
        allowed: Sequence[torch.Tensor],
    ) -> list["Found"]:
        """PEZ: soft tokens move by the gradient at their nearest words; the best of the way."""
        table = losses.vocabulary.inputs
        soft = _SoftTokens(
            torch.stack([table[own] for own in places]), table, lr=self.lr, decay=self.decay
        )
        best: list[Found] = [(own, math.inf) for own in places]
        for step in range(self.steps):
            distributed.check()
            values, gradient = losses.with_gradient(places)
            best = [
                (own, value) if value < known[1] and losses.vocabulary.survives(own) else known
                for own, value, known in zip(places, values, best, strict=True)
            ]
            if step + 1 == self.steps:
                break
            # the loss of the same words is the same: go on until there are others
            before, moving = places, torch.ones(len(places), dtype=torch.bool)
            for _ in range(_IDLE_STEPS):
                soft.step(gradient, moving)
                places = soft.nearest(allowed)
                moving = torch.tensor([a == b for a, b in zip(places, before, strict=True)])
                if not bool(moving.any()):
                    break
        return best

    def _swap(
        self,
        losses: "_Losses",
        best: Sequence["Found"],
        allowed: Sequence[torch.Tensor],
        key: tuple[int | str, ...],
    ) -> list["Found"]:
        """One round of greedy coordinate search: the best of prompts with a word swapped."""
        table = losses.vocabulary.inputs
        values, gradient = losses.with_gradient([words for words, _ in best])
        tried: list[list[list[int]]] = []
        for pair_id, (words, _), slope, mask in zip(
            losses.ids, best, gradient, allowed, strict=True
        ):
            promise = slope @ table.T
            promise[:, ~mask] = math.inf
            promise[range(len(words)), words] = math.inf
            kept = min(self.candidates, max(0, int(mask.sum()) - 1))
            top = promise.topk(kept, dim=1, largest=False).indices.tolist()
            choices = [(k, word) for k, row in enumerate(top) for word in row]
            generator = keyed_generator("swaps", pair_id, *key)
            order = torch.randperm(len(choices), generator=generator).tolist()
            swapped = (_with_word(words, *choices[place]) for place in order)
            survivors = filter(losses.vocabulary.survives, swapped)
            own = [*islice(survivors, self.swaps)]
            tried.append(own + [words] * (self.swaps - len(own)))
        found = losses.of(tried)
        return [
            min([(words, value), *zip(own, each, strict=True)], key=lambda one: one[1])
            for (words, _), value, own, each in zip(best, values, tried, found, strict=True)
        ]


def _with_word(words: list[int], place: int, word: int) -> list[int]:
    return [*words[:place], word, *words[place + 1 :]]


Found = tuple[list[int], float]
"""Places of words, and their loss."""


class _SoftTokens:
    """Points between words (N, n, W) that move by Adam, and the words nearest to them."""

    def __init__(
        self, rows: torch.Tensor, table: torch.Tensor, *, lr: float, decay: float
    ) -> None:
        self.rows, self.table = rows.clone(), F.normalize(table, dim=-1)
        self.unit = table.square().mean().sqrt()
        self.optimizer = RowAdam(self.rows, lr=lr)
        self.shrink = 1 - lr * decay

    @torch.no_grad()
    def step(self, gradient: torch.Tensor, moving: torch.Tensor | None = None) -> None:
        """Move by the gradient (N, n, W) of their nearest words; ``moving`` (N,) says which do."""
        if moving is None:
            moving = torch.ones(len(gradient), dtype=torch.bool)
        moving = moving.to(gradient.device) & gradient.flatten(1).isfinite().all(1)
        shrunk = torch.where(moving[:, None, None], self.rows * self.shrink, self.rows)
        self.rows = self.unit * self.optimizer.step(
            shrunk / self.unit, self.unit * gradient, moving
        )

    def nearest(self, allowed: Sequence[torch.Tensor]) -> list[list[int]]:
        """Places of the nearest allowed words by cosine."""
        found = []
        for row, mask in zip(self.rows, allowed, strict=True):
            alike = F.normalize(row, dim=-1) @ self.table.T
            found.append(alike.masked_fill(~mask, -math.inf).argmax(1).tolist())
        return found


class _Losses:
    """Denoising losses of prompts on their pairs' images, always at the same noise."""

    def __init__(
        self,
        subject: Subject,
        pairs: Sequence[Pair],
        noise_batch: int,
        between: tuple[float, float],
    ) -> None:
        model, seed = subject.model, subject.context.seed
        self.model, self.ids = model, [pair.id for pair in pairs]
        self.vocabulary, self.batch = model.vocabulary(), noise_batch
        self.at_once = min(noise_batch, subject.context.attack.samples_per_forward or noise_batch)
        shape = (noise_batch, *model.latent_shape)
        noise = [
            torch.randn(shape, generator=keyed_generator("noise of words", seed, name))
            for name in self.ids
        ]
        low, high = between
        shares = low + (high - low) * (torch.arange(noise_batch) + 0.5) / noise_batch
        times = (shares * model.num_train_timesteps).long()
        self.noise = torch.cat(noise).to(model.device)
        self.timesteps = times.repeat(len(pairs)).to(model.device)
        self.latents = subject.latents(pairs).to(model.device).repeat_interleave(noise_batch, 0)

    def with_gradient(self, places: Sequence[list[int]]) -> tuple[list[float], torch.Tensor]:
        """Losses of prompts, and their gradients (N, n, W) at the words' inputs."""
        table = self.vocabulary.inputs
        tokens = torch.stack([table[own] for own in places]).requires_grad_(True)
        encoded = self.model.encode_tokens(tokens)
        loss, slope = loss_and_gradient(
            self.model,
            self.ids,
            encoded.detach(),
            self.latents,
            self.noise,
            self.timesteps,
            at_once=self.at_once,
        )
        (gradient,) = torch.autograd.grad(encoded, tokens, slope)
        return loss.tolist(), gradient

    @torch.no_grad()
    def of(self, prompts: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        """Losses of several prompts of each pair."""
        model, table, width = self.model, self.vocabulary.inputs, len(prompts[0])
        tokens = torch.stack([table[own] for each in prompts for own in each])
        encoded = model.encode_tokens(tokens)

        @torch.no_grad()
        def losses(rows: list[int]) -> list[float]:
            owners = [row // width for row in rows]
            every = [owner * self.batch + k for owner in owners for k in range(self.batch)]
            found = model.denoising_loss(
                self.latents[every],
                self.noise[every],
                self.timesteps[every],
                encoded[rows].repeat_interleave(self.batch, 0),
                pair_ids=[self.ids[owner] for owner in owners for _ in range(self.batch)],
            )
            values: list[float] = found.view(len(rows), self.batch).mean(1).tolist()
            return values

        found = map_batches(
            losses, range(len(tokens)), at_once=pairs_at_once(model), model=model, backoff=_MEMORY
        )
        return [found[k : k + width] for k in range(0, len(found), width)]
