"""What every family of checkpoints shares: counted passes, noise, losses, drawing, layers.

An adapter of a family is a subclass that says how prompts become embeddings and how the denoiser
is called; ``models/README.md`` shows what it has to say.
"""

from __future__ import annotations

import copy
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn import functional as F

from dori_lightning.models.components import Component, Components, Family
from dori_lightning.models.conditioning import (
    ORDINARY_PROMPTS,
    Part,
    Spread,
    free_cells,
    matrix_shape,
    pack,
    read_rows,
    without_padding,
)
from dori_lightning.models.noise_levels import NoiseLevels, flow_settings, sampler_from
from dori_lightning.models.protocol import (
    ROLE_ALIASES,
    Cut,
    EmbeddingFilter,
    LayerRole,
    Sampler,
    Sampling,
)
from dori_lightning.models.vocabulary import Vocabulary
from dori_lightning.runtime import distributed
from dori_lightning.runtime.batching import OomBackoff, map_batches, parallel_batches
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.types import CoderRows, FusedLora, InputError, ReplacedPart

_MEMORY = OomBackoff(
    "generate",
    "image",
    "checkpoint.precision=bf16, a smaller checkpoint.resolution, or a device with more memory",
)


def _put_words(
    words: torch.Tensor, table: nn.Module, ids: tuple[torch.Tensor], output: torch.Tensor
) -> torch.Tensor:
    """Put inputs (1, n, W) of words in the place of a prompt's own, after its start token."""
    del table, ids
    count = words.shape[1]
    return torch.cat([output[:, :1], words.to(output), output[:, count + 1 :]], 1)


class LatentDiffusion(ABC):
    """A checkpoint of some family; ``models.protocol.TextToImage`` documents its methods.

    Attributes:
        family: Its components and their classes.
        layer_names: Role and stage to a pattern that matches the whole name of such layers; every
            role in the order of the stages.
        pruned_stages: Role to the stages that methods look at by default; all where it is not.
        closed_stages: Stretches of the denoiser with no layers of their own for text, and why
            nothing can be edited there.
        text_stream: Whether text passes the blocks beside the image, as in joint attention.
        text_weights: Pattern at whose match within its name text enters through a weight.
        outer_weights: The same of weights outside of all blocks.
        word_encoders: Text encoders that share a vocabulary, and all that a prompt is encoded by;
            none where words cannot be searched.
        patch: Side of the latent squares that the denoiser takes as one token.
    """

    family: ClassVar[Family]
    layer_names: ClassVar[Mapping[tuple[LayerRole, str], str]]
    pruned_stages: ClassVar[Mapping[LayerRole, tuple[str, ...]]] = {}
    closed_stages: ClassVar[Mapping[str, str]] = {}
    text_stream: ClassVar[bool] = False
    text_weights: ClassVar[str]
    outer_weights: ClassVar[str]
    word_encoders: ClassVar[tuple[Component, ...]] = ()
    patch: int = 1

    def __init__(
        self,
        components: Components,
        *,
        name: str,
        fingerprint: str,
        resolution: int | None = None,
        autocast: torch.dtype | None = None,
        replaced: Sequence[ReplacedPart] = (),
        loras: Sequence[FusedLora] = (),
        lend_encoders: bool = False,
        commit: str | None = None,
    ) -> None:
        """Join the components.

        Args:
            components: What fits each other; see ``models.soundness``.
            name: How reports call the checkpoint.
            fingerprint: Hash of everything that decides results; see ``models.fingerprint``.
            resolution: Image side in pixels; None for the checkpoint's own.
            autocast: Compute the denoiser and autoencoder in this dtype; None for the weights'
                own.
            replaced: Components whose weights are from other files than the checkpoint's.
            loras: What was added to the weights since.
            lend_encoders: Keep text encoders in the host's memory; they come to the device for
                prompts, and go when the denoiser is asked next.
            commit: Commit of the hub id that it was loaded from; None for other sources.

        Raises:
            InputError: There are no latents of that resolution.
        """
        self.name, self.fingerprint, self.autocast = name, fingerprint, autocast
        self.replaced, self.loras, self.commit = tuple(replaced), tuple(loras), commit
        for module in components.modules.values():
            module.eval()
        self._components = components
        self._denoiser: nn.Module = components.denoiser
        self.autoencoder, self.scheduler = components.autoencoder, components.scheduler
        self.device = next(self._denoiser.parameters()).device
        self.parts = self._lay_out(components)
        self.embedding_shape = matrix_shape(self.parts)
        factor = 2 ** (len(self.autoencoder.config["block_out_channels"]) - 1)
        multiple = factor * self.patch
        self.resolution = resolution or self._latent_side(components) * factor
        if self.resolution < 1 or self.resolution % multiple:
            raise InputError(
                f"the side of an image must be a multiple of {multiple} pixels, got "
                f"{self.resolution}",
                where=f"checkpoint.resolution, or sample_size in "
                f"{self.family.denoiser}/config.json",
            )
        side = self.resolution // factor
        self.latent_shape = (int(self.autoencoder.config["latent_channels"]), side, side)
        self.num_train_timesteps = int(self.scheduler.config["num_train_timesteps"])
        self.levels = NoiseLevels.of(self.scheduler, self.device)
        self.prediction_type = self.levels.prediction
        self.samplers: tuple[Sampler, ...] = tuple(self.family.samplers)
        self.stages = tuple(dict.fromkeys(stage for _, stage in self.layer_names))
        self.unet_evaluations, self.coder_rows = 0, CoderRows()
        self.max_batch_sizes: dict[str, int] = {}
        self.embedding_filter: EmbeddingFilter | None = None
        self._lend_encoders, self._encoders_on = lend_encoders, torch.device("cpu")
        self._counting = threading.Lock()
        self._of_thread = threading.local()
        self._empty: torch.Tensor | None = None
        self._spread: Spread | None = None
        self._vocabulary: Vocabulary | None = None

    # What a family says

    @classmethod
    @abstractmethod
    def _lay_out(cls, components: Components) -> tuple[Part, ...]:
        """The parts of an embedding."""

    @abstractmethod
    def _encode(self, prompt: str) -> dict[str, torch.Tensor]:
        """Part name to a prompt's values (1, rows, columns), by the text encoders."""

    @abstractmethod
    def _forward(
        self,
        noised: torch.Tensor,
        times: torch.Tensor,
        embeddings: torch.Tensor,
        distilled_guidance: float | None,
    ) -> torch.Tensor:
        """What the denoiser predicts (N, C, h, w), in the dtype of its weights.

        Args:
            noised: Noised latents (N, C, h, w) in that dtype.
            times: What the scheduler calls their times (N,).
            embeddings: Embeddings (N, T, D), fp32.
            distilled_guidance: For denoisers with such an input; None where a loss is computed.
        """

    def _latent_side(self, components: Components) -> int:
        """Side of the latents that the checkpoint was made for."""
        return int(components.denoiser.config["sample_size"])

    @classmethod
    @abstractmethod
    def unlike_the_family(
        cls, components: Components
    ) -> Iterator[tuple[str, tuple[Component, ...]]]:
        """What no checkpoint of the family has, or what does not fit; with the components."""

    @property
    def smallest_side(self) -> int:
        """Side of the smallest latents that the denoiser can be tried on."""
        levels = self._components.denoiser.config.get("block_out_channels", ())
        # two pixels a side are left in the middle: some layers normalize over them
        return 2 ** len(levels) if levels else 4 * self.patch

    @property
    def takes_distilled_guidance(self) -> bool:
        """Whether the denoiser has an input for the guidance that it was distilled from."""
        return False

    # What it consists of

    @property
    def components(self) -> Components:
        """Its components, with whatever edit it carries now."""
        return self._components.with_module(self.family.denoiser, self._denoiser)

    @property
    def text_encoder(self) -> Any:
        """The first text encoder."""
        return self._components.text_encoder

    @property
    def tokenizer(self) -> Any:
        """The first text encoder's tokenizer."""
        return self._components.tokenizer

    def denoiser(self) -> nn.Module:
        """UNet or transformer."""
        return self._denoiser

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weights of the denoiser."""
        return self._denoiser.parameters()

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast where the model has it."""
        # without a dtype of its own it leaves a Trainer's mixed precision in force
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    # Prompts and images

    def cuts(self, prompt: str) -> tuple[Cut, ...]:
        """What text encoders leave of a prompt that is too long for them."""
        found, spelled = [], self._spelled(prompt)
        for name, (encoder, tokenizer) in self._components.encoders.items():
            ids = tokenizer(spelled, truncation=False, verbose=False).input_ids
            limit = self._components.prompt_length(name.replace("text_encoder", "tokenizer"))
            if len(ids) > limit:
                kind = "T5" if type(encoder).__name__.startswith("T5") else "CLIP"
                # the end token takes the last place
                lost = str(tokenizer.decode(ids[limit - 1 : -1])).strip()
                found.append(Cut(f"{kind} ({name})", len(ids), limit, lost))
        return tuple(found)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts to embeddings (N, T, D), fp32."""
        if self._lend_encoders:
            self._move_encoders(self.device)
        with self._counting:
            self.coder_rows.prompts += len(prompts)
        # one by one, so that a prompt's embedding never depends on its neighbours
        return torch.cat([pack(self.parts, self._encode(prompt)) for prompt in prompts])

    def vocabulary(self) -> Vocabulary:
        """Words that somebody can type, read once."""
        if not self.word_encoders:
            raise InputError(
                f"{self.family.title} reads prompts with T5, besides or instead of CLIP, in whose "
                f"vocabulary words are searched",
                where=f"checkpoint.family={self.family.name}",
                fix="leave words out of certify.paths",
            )
        if self._vocabulary is None:
            encoders = {name: self._components.encoders[name] for name in self.word_encoders}
            components = self._components
            limit = min(map(components.prompt_length, components.tokenizers)) - 2
            self._vocabulary = Vocabulary.of(encoders, limit=limit, device=self.device)
        return self._vocabulary

    def encode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Input embeddings of words to embeddings; differentiable."""
        vocabulary, count = self.vocabulary(), tokens.shape[1]
        if self._lend_encoders:
            self._move_encoders(self.device)
        with self._counting:
            self.coder_rows.prompts += len(tokens)
        repeated = ([place] * count for place in range(len(vocabulary.ids)))
        # its words are replaced; it says where the end token stands
        prompt = vocabulary.prompt(next(filter(vocabulary.survives, repeated)))
        encoders = [self._components.modules[name] for name in self.word_encoders]
        tables: list[Any] = [encoder.get_input_embeddings() for encoder in encoders]  # type: ignore[operator]
        rows = []
        # one by one, as prompts are
        for row in torch.split(tokens.to(self.device), 1):
            own = torch.split(row, [table.embedding_dim for table in tables], -1)
            with ExitStack() as hooks:
                for table, values in zip(tables, own, strict=True):
                    hook = table.register_forward_hook(partial(_put_words, values))
                    hooks.callback(hook.remove)
                rows.append(pack(self.parts, self._encode(prompt)))
        return torch.cat(rows)

    def _move_encoders(self, device: torch.device) -> None:
        """Move lent text encoders, where they are elsewhere."""
        if self._encoders_on != device:
            for encoder, _ in self._components.encoders.values():
                encoder.to(device)
            self._encoders_on = device

    def _spelled(self, prompt: str) -> str:
        """A prompt as its tokenizers are given it."""
        return prompt

    def _tokens(self, prompt: str, tokenizer: Component) -> tuple[torch.Tensor, torch.Tensor]:
        """A prompt's tokens (1, length), padded and cut to the text encoder's length, and a mask.

        The mask (1, length) is 1 for tokens and 0 for padding.
        """
        found = self._components.tokenizers[tokenizer](
            self._spelled(prompt),
            padding="max_length",
            truncation=True,
            max_length=self._components.prompt_length(tokenizer),
            return_tensors="pt",
            return_attention_mask=True,
        )
        return found.input_ids.to(self.device), found.attention_mask.to(self.device)

    def _token_ids(self, prompt: str, tokenizer: Component) -> torch.Tensor:
        """A prompt's tokens (1, length), padded and cut to the text encoder's length."""
        return self._tokens(prompt, tokenizer)[0]

    def empty_embedding(self) -> torch.Tensor:
        """Embedding (1, T, D) of the empty prompt, the unconditional branch of guidance."""
        if self._empty is None:
            self._empty = self._unconditional()
        return self._empty

    def _unconditional(self) -> torch.Tensor:
        return self.encode_prompts([""])

    def free(self, which: Sequence[str] | None = None) -> torch.Tensor:
        """Cells (T, D) that a search may move."""
        return free_cells(self.parts, which)

    def read(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Rows (..., T) that the denoiser reads."""
        return read_rows(self.parts, embeddings)

    def spread(self) -> Spread:
        """Usual values of the conditioning, measured once."""
        if self._spread is None:
            with progress_bar("usual values of the text", len(ORDINARY_PROMPTS)) as advance:

                def each() -> Iterator[torch.Tensor]:
                    for prompt in ORDINARY_PROMPTS:
                        yield self.encode_prompts([prompt])[0]
                        advance(1)

                self._spread = Spread.measured(self.parts, each())
        return self._spread

    def random_start(
        self, normal: torch.Tensor, *, scale: float = 1.0, parts: Sequence[str] | None = None
    ) -> torch.Tensor:
        """Random embeddings, with no trace of a prompt."""
        start = self.searched_alone(self.spread().start(normal, scale), parts)
        return without_padding(self.parts, start)

    def searched_alone(
        self, embeddings: torch.Tensor, parts: Sequence[str] | None = None
    ) -> torch.Tensor:
        """Embeddings of which only the searched parts are left."""
        cells = free_cells(self.parts, parts, with_masks=True)
        if bool(cells.all()):
            return embeddings
        empty = self.empty_embedding()[0].to(embeddings)
        return torch.where(cells.to(embeddings.device), embeddings, empty)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] to scaled latents (N, C, h, w): posterior mode, fp32."""
        dtype = next(self.autoencoder.parameters()).dtype
        images = images.to(self.device, dtype) * 2 - 1
        with self._counting:
            self.coder_rows.encoded += len(images)
        rows = [
            self.autoencoder.encode(image[None]).latent_dist.mode().float() for image in images
        ]
        latents, shift = torch.cat(rows), self._latent_shift
        return (latents if shift is None else latents - shift) * self._latent_scale

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (N, C, h, w) to images (N, 3, H, W) in [0, 1], fp32."""
        dtype, shift = next(self.autoencoder.parameters()).dtype, self._latent_shift
        latents = latents / self._latent_scale
        latents = (latents if shift is None else latents + shift).to(dtype)
        with self._counting:
            self.coder_rows.decoded += len(latents)
        with self._decoding():
            images: torch.Tensor = self.autoencoder.decode(latents).sample
        return (images.float() / 2 + 0.5).clamp_(0, 1)

    def _decoding(self) -> AbstractContextManager[Any]:
        """Precision of the autoencoder's decoder."""
        return self.precision()

    @property
    def _latent_scale(self) -> float:
        """What latents are multiplied by to have about unit standard deviation."""
        return float(self.autoencoder.config["scaling_factor"])

    @property
    def _latent_shift(self) -> float | None:
        """What is taken from latents before, to have about zero mean; None where nothing is."""
        shift = self.autoencoder.config.get("shift_factor")
        return None if shift is None else float(shift)

    # Passes

    @property
    def row_pairs(self) -> tuple[str, ...] | None:
        """Whose rows this thread's current or last pass holds."""
        return getattr(self._of_thread, "row_pairs", None)

    @row_pairs.setter
    def row_pairs(self, ids: tuple[str, ...] | None) -> None:
        self._of_thread.row_pairs = ids

    def _denoise(
        self,
        noised: torch.Tensor,
        times: torch.Tensor,
        embeddings: torch.Tensor,
        pair_ids: Sequence[str] | None,
        distilled_guidance: float | None = None,
    ) -> torch.Tensor:
        """One pass of the denoiser, at times of the scheduler; counts its rows."""
        if pair_ids is not None and len(pair_ids) != len(noised):
            raise ValueError(f"{len(noised)} rows, but {len(pair_ids)} pair ids")
        # stays until the next pass: gradient checkpointing runs the layers again in the backward
        self.row_pairs = None if pair_ids is None else tuple(pair_ids)
        if self._lend_encoders:
            self._move_encoders(torch.device("cpu"))
        with self._counting:
            self.unet_evaluations += len(noised)
        dtype = next(self._denoiser.parameters()).dtype
        with self.precision():
            output = self._forward(noised.to(dtype), times, embeddings, distilled_guidance)
        return output.float()

    # Noise and losses

    def scales(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of latent and noise."""
        return self.levels.signal[timesteps], self.levels.noise[timesteps]

    def variances(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Squares of the factors."""
        return self.levels.signal_variance[timesteps], self.levels.noise_variance[timesteps]

    def noised(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Forward process."""
        return self.levels.noised(latents, noise, timesteps)

    def denoising_loss(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor,
        *,
        pair_ids: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """Mean squared error of whatever the model predicts."""
        output = self._denoise(
            self.noised(latents, noise, timesteps),
            self.levels.times(timesteps),
            embeddings,
            pair_ids,
        )
        target = self.levels.target(latents, noise, timesteps)
        return F.mse_loss(output, target, reduction="none").flatten(1).mean(1)

    def predict_noise(
        self,
        noised: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor,
        *,
        pair_ids: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """Noise in noised latents, whatever the model predicts."""
        output = self._denoise(noised, self.levels.times(timesteps), embeddings, pair_ids)
        return self.levels.implied_noise(output, noised, timesteps)

    def predict_clean_and_noise(
        self,
        noised: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor,
        *,
        guidance: float = 1.0,
        pair_ids: Sequence[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean latents and noise that a prediction implies."""
        output = self._guided(
            noised, self.levels.times(timesteps), embeddings, guidance, pair_ids=pair_ids
        )
        return (
            self.levels.implied_clean(output, noised, timesteps),
            self.levels.implied_noise(output, noised, timesteps),
        )

    def _guided(
        self,
        noised: torch.Tensor,
        times: torch.Tensor,
        embeddings: torch.Tensor,
        guidance: float,
        *,
        distilled_guidance: float | None = None,
        pair_ids: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """What the denoiser predicts under classifier-free guidance: two rows in one pass."""
        if guidance == 1.0:
            return self._denoise(noised, times, embeddings, pair_ids, distilled_guidance)
        output = self._denoise(
            torch.cat([noised, noised]),
            torch.cat([times, times]),
            torch.cat([self.empty_embedding().expand_as(embeddings), embeddings]),
            None if pair_ids is None else [*pair_ids, *pair_ids],
            distilled_guidance,
        )
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    # Drawing

    def sampling_timesteps(self, sampling: Sampling) -> torch.Tensor:
        """Timesteps (S,) that a sampler visits."""
        return self.levels.nearest(self.scheduler_of(sampling).timesteps).to(self.device)

    def scheduler_of(self, sampling: Sampling) -> Any:
        """A scheduler of diffusers, set up for its steps.

        Raises:
            InputError: The family has no such sampler, or not as many steps.
        """
        if sampling.steps > self.num_train_timesteps:
            raise InputError(
                f"sampling.steps={sampling.steps} is more than the {self.num_train_timesteps} "
                f"timesteps that {self.name} was trained with"
            )
        known = self.family.samplers
        if sampling.sampler not in known:
            raise InputError(
                f"{self.name} cannot be drawn from with sampling.sampler={sampling.sampler}, "
                f"which does not fit the noise of {self.family.title}",
                where="sampling.sampler",
                fix=f"one of {', '.join(known)}, with the steps and guidance that suit it",
            )
        distilled = sampling.distilled_guidance
        if (distilled is not None) != self.takes_distilled_guidance:
            raise InputError(
                f"{self.name} has {'an' if self.takes_distilled_guidance else 'no'} input for a "
                f"guidance that it was distilled from, but sampling.distilled_guidance is "
                f"{'null' if distilled is None else distilled}",
                where="sampling.distilled_guidance",
                fix="give the scale that it is drawn with, such as 3.5"
                if self.takes_distilled_guidance
                else "sampling.distilled_guidance=null; sampling.guidance is what it has",
            )
        config = self.scheduler.config
        unsaid = {k: v for k, v in self.family.sampler_settings.items() if k not in config}
        if sampling.sampler == "flow_dpm++":
            unsaid |= flow_settings(config)
        scheduler = sampler_from(known[sampling.sampler], config, **unsaid)
        self._set_timesteps(scheduler, sampling.steps)
        return scheduler

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        """Choose what a sampler visits."""
        # on the host: schedulers look tables up by it, and would wait for a GPU at each step
        scheduler.set_timesteps(steps, device="cpu")

    @torch.no_grad()
    def generate(
        self,
        embeddings: torch.Tensor,
        noise: torch.Tensor,
        sampling: Sampling,
        *,
        pair_ids: Sequence[str] | None = None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> torch.Tensor:
        """Embeddings to images, in batches of ``sampling.batch``."""

        # autograd's mode belongs to a thread
        @torch.no_grad()
        def draw(rows: list[int]) -> torch.Tensor:
            own, starts = embeddings[rows].to(self.device), noise[rows]
            if self.embedding_filter is not None:
                own = self.embedding_filter(own, starts.to(self.device), sampling)
            ids = None if pair_ids is None else [pair_ids[row] for row in rows]
            return self.decode_latents(self.denoise(own, starts, sampling, ids))

        images = map_batches(
            draw,
            range(len(embeddings)),
            at_once=sampling.batch * parallel_batches(self),
            model=self,
            backoff=_MEMORY,
            pad=False,
            advance=advance,
        )
        return torch.stack(images)

    @torch.no_grad()
    def denoise(
        self,
        embeddings: torch.Tensor,
        noise: torch.Tensor,
        sampling: Sampling,
        pair_ids: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """Run the sampler."""
        scheduler = self.scheduler_of(sampling)
        context = embeddings.to(self.device)
        # flow matching begins at the noise itself, and takes latents as they are
        x: torch.Tensor = noise.to(self.device) * getattr(scheduler, "init_noise_sigma", 1.0)
        scaled = getattr(scheduler, "scale_model_input", lambda latents, _: latents)
        places = scheduler.timesteps.to(self.device)
        for place, t in zip(places, scheduler.timesteps, strict=True):
            distributed.check()
            output = self._guided(
                scaled(x, t),
                place.expand(len(x)),
                context,
                sampling.guidance,
                distilled_guidance=sampling.distilled_guidance,
                pair_ids=pair_ids,
            )
            x = scheduler.step(output, t, x, return_dict=False)[0]
        return x

    # Layers and weights

    def _role(self, role: LayerRole | str) -> LayerRole:
        """A role by its name or an older one.

        Raises:
            InputError: The family has no such layers.
        """
        known = dict.fromkeys(role for role, _ in self.layer_names)
        found = ROLE_ALIASES.get(role, role)
        for name in known:
            if name == found:
                return name
        raise InputError(
            f"{self.family.title} has no layers of the role {role}",
            fix=f"one of {', '.join(known)}",
        )

    def layers(
        self, role: LayerRole | str, stages: Sequence[str] | None = None
    ) -> dict[str, nn.Module]:
        """Layers of the denoiser by role."""
        role = self._role(role)
        chosen = self.stages if stages is None else tuple(stages)
        self.require_open(chosen)
        strangers = [stage for stage in chosen if stage not in self.stages]
        found = {
            name: module
            for stage in self.stages
            if stage in chosen and (role, stage) in self.layer_names
            for name, module in self._denoiser.named_modules()
            if re.fullmatch(self.layer_names[role, stage], name)
        }
        if strangers or not found:
            raise InputError(
                f"{self.name} has no layers of the role {role} in the stages "
                f"{', '.join(strangers or chosen) or 'that are named (none)'}",
                where="mitigation.stages",
                fix=f"some of {', '.join(self.stages)}, or null for the usual ones",
            )
        return found

    @classmethod
    def require_open(cls, stages: Sequence[str]) -> None:
        """Refuse stages in which nothing can be edited.

        Raises:
            InputError: One is among ``closed_stages``.
        """
        for stage in stages:
            if stage in cls.closed_stages:
                having = dict.fromkeys(stage for _, stage in cls.layer_names)
                raise InputError(
                    f"nothing can be edited in the stage {stage} of {cls.family.title}: "
                    f"{cls.closed_stages[stage]}",
                    where="mitigation.stages",
                    fix=f"some of {', '.join(having)}, or null for the usual ones",
                )

    def default_stages(self, role: LayerRole | str) -> tuple[str, ...]:
        """Stages that methods look at where nothing else is said."""
        role = self._role(role)
        having = tuple(stage for stage in self.stages if (role, stage) in self.layer_names)
        return self.pruned_stages.get(role, having)

    def value_input(self, embeddings: torch.Tensor) -> torch.Tensor:
        """What value layers take, in families where that is the text alone."""
        del embeddings
        raise InputError(
            f"what the value layers of {self.name} take is known in passes of the denoiser only"
        )

    def is_text_weight(self, name: str) -> bool:
        """Whether text enters the picture through a weight."""
        return re.search(self.text_weights, name) is not None

    def is_outer_weight(self, name: str) -> bool:
        """Whether a weight lies outside of all blocks."""
        return re.search(self.outer_weights, name) is not None

    def frozen_copy(self) -> Self:
        """The same model with a copy of the denoiser."""
        twin = copy.copy(self)
        twin._denoiser = copy.deepcopy(self._denoiser).eval().requires_grad_(False)
        twin.unet_evaluations, twin._of_thread = 0, threading.local()
        return twin

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Evaluation mode and no weight gradients while open."""
        denoiser = self._denoiser
        training = denoiser.training
        flags = [(p, p.requires_grad) for p in denoiser.parameters()]
        denoiser.eval().requires_grad_(False)
        try:
            yield
        finally:
            denoiser.train(training)
            for parameter, requires_grad in flags:
                parameter.requires_grad_(requires_grad)
