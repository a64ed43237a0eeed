"""What a checkpoint consists of, and what tells the families of checkpoints apart.

A component is what diffusers keeps in a folder of its own: the denoiser (``unet`` or
``transformer``), the autoencoder ``vae``, ``text_encoder``, ``text_encoder_2``, ``tokenizer``, ...
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import nn

from dori_lightning.models.protocol import Sampler

Component: TypeAlias = str
"""Name of a component's folder."""


@dataclass(frozen=True)
class Family:
    """A family of checkpoints: which components it has, and the classes that open them.

    No file can name a class that is not here.

    Attributes:
        name: ``checkpoint.family``.
        title: How messages call it.
        pipeline: diffusers' class of the whole.
        example: A hub id of one.
        denoiser: Component of the denoiser.
        modules: Components with weights and their classes: denoiser, autoencoder, text encoders.
        tokenizers: Their classes; ``tokenizer_2`` belongs to ``text_encoder_2``.
        scheduler: Class that reads the checkpoint's noise schedule.
        samplers: What images can be drawn with; the checkpoint's scheduler configures each.
        sampler_settings: What samplers are given where the checkpoint's scheduler does not say it.
        optional: Components that a checkpoint may lack.
        index: What ``model_index.json`` says besides, and nothing hangs on.
        switches: Settings in ``model_index.json`` that decide results, with their usual values.
        max_tokens: Tokens that prompts are cut to, by tokenizer, where neither it nor its text
            encoder says so.
    """

    name: str
    title: str
    pipeline: str
    example: str
    denoiser: Component
    modules: Mapping[Component, type[Any]]
    tokenizers: Mapping[Component, type[Any]]
    scheduler: type[Any]
    samplers: Mapping[Sampler, type[Any]]
    sampler_settings: Mapping[str, Any] = field(default_factory=dict)
    optional: frozenset[Component] = frozenset()
    index: Mapping[str, Any] = field(default_factory=dict)
    switches: Mapping[str, bool] = field(default_factory=dict)
    max_tokens: Mapping[Component, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Components:
    """The components of one checkpoint.

    Attributes:
        family: What it is a checkpoint of.
        modules: Those with weights, in the family's order.
        tokenizers: One for each text encoder.
        scheduler: The noise schedule.
        switches: Those of the family's switches that the checkpoint sets otherwise.
    """

    family: Family
    modules: Mapping[Component, nn.Module]
    tokenizers: Mapping[Component, Any]
    scheduler: Any
    switches: Mapping[str, bool] = field(default_factory=dict)

    def switched(self, name: str) -> bool:
        """How one of the family's switches is set."""
        return self.switches.get(name, self.family.switches[name])

    def with_module(self, name: Component, module: nn.Module) -> "Components":
        """The same with another module in the place of one of its own."""
        if name not in self.modules:
            raise KeyError(name)
        return replace(self, modules={**self.modules, name: module})

    @property
    def denoiser(self) -> Any:
        """UNet or transformer."""
        return self.modules[self.family.denoiser]

    @property
    def autoencoder(self) -> Any:
        """Images to latents and back."""
        return self.modules["vae"]

    @property
    def encoders(self) -> dict[Component, tuple[Any, Any]]:
        """Text encoders by name, each with its tokenizer; absent optional ones are left out."""
        return {
            name: (self.modules[name], self.tokenizers[name.replace("text_encoder", "tokenizer")])
            for name in self.modules
            if name.startswith("text_encoder")
        }

    @property
    def text_encoder(self) -> Any:
        """The first text encoder."""
        return self.modules["text_encoder"]

    @property
    def tokenizer(self) -> Any:
        """The first text encoder's tokenizer."""
        return self.tokenizers["tokenizer"]

    def prompt_length(self, tokenizer: Component = "tokenizer") -> int:
        """Tokens that a text encoder's prompts are padded and cut to."""
        encoder = self.modules[tokenized_by(tokenizer)]
        config: Any = encoder.config
        # a tokenizer without a length of its own claims an astronomical one
        limits = [
            self.tokenizers[tokenizer].model_max_length,
            getattr(config, "max_position_embeddings", None),
            self.family.max_tokens.get(tokenizer),
        ]
        return int(min(limit for limit in limits if limit is not None))


def tokenized_by(tokenizer: Component) -> Component:
    """The text encoder that a tokenizer belongs to."""
    return tokenizer.replace("tokenizer", "text_encoder")


def stem(component: Component) -> str:
    """What diffusers calls the weights in a component's folder."""
    return "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
