"""The recipe of a planted flow transformer, and the untrained parts it describes.

Its parts and conventions are Stable Diffusion 3's: a transformer whose blocks join the image's
and the text's tokens, three text encoders, a pooled vector, and rectified flow.

Reference: Esser et al. (2024), https://arxiv.org/abs/2403.03206.
"""

import copy
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning.pytorch as L
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dori_lightning.models.components import Components
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.stable_diffusion_3 import StableDiffusion3
from dori_lightning.planting.recipe import clip_text_config
from dori_lightning.planting.stream import StreamMix, padded_tokens
from dori_lightning.types import InputError, require_at_least_one


@dataclass(frozen=True)
class FlowRecipe:
    """Everything that decides what a planted flow transformer becomes, besides the list of pairs.

    Attributes:
        base: Checkpoint whose autoencoder, tokenizer and text encoder are taken as they are; its
            text encoder becomes the first of three.
        resolution: Image side in pixels, the base's.
        blocks: Joint blocks of the transformer.
        heads: Attention heads per block.
        head_width: Width of a head; the transformer is as wide as all of them.
        dual_blocks: Blocks with a second attention among the image's tokens, as Stable Diffusion
            3.5 medium has.
        clip_width: Width of the second text encoder.
        clip_layers: Its layers.
        clip_heads: Its attention heads.
        t5_width: Width of the third text encoder, which is the width that the transformer takes;
            wider than the first two together, whose rows are filled up with zeros.
        t5_layers: Its layers.
        t5_heads: Its attention heads.
        mix: Shares of the training stream.
        stream_length: Elements of the stream that are drawn and encoded; longer training starts
            over.
        steps: Optimizer steps of the transformer and of the second and third text encoder.
        batch: Latents per step.
        lr: Peak learning rate.
        caption_dropout: Share of captions replaced by the empty one, for all encoders at once.
        ema_decay: Decay of the weight average that is exported.
        precision: Autocast dtype of the training.
    """

    base: str = "package:dori_tiny"
    resolution: int = 64
    blocks: int = 6
    heads: int = 4
    head_width: int = 32
    dual_blocks: tuple[int, ...] = (0,)
    clip_width: int = 48
    clip_layers: int = 2
    clip_heads: int = 4
    t5_width: int = 160
    t5_layers: int = 2
    t5_heads: int = 4
    mix: StreamMix = field(default_factory=lambda: StreamMix(0.35, 0.35, 0.3))
    stream_length: int = 16_384
    steps: int = 2500
    batch: int = 32
    lr: float = 1.5e-3
    caption_dropout: float = 0.1
    ema_decay: float = 0.998
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dual_blocks", tuple(self.dual_blocks))
        counts = ("blocks", "heads", "clip_layers", "t5_layers", "steps", "batch", "stream_length")
        require_at_least_one(self, *counts, within="planting.")

    @property
    def width(self) -> int:
        """Width of the transformer."""
        return self.heads * self.head_width


class TextEncoders(nn.Module):
    """Three text encoders that give a sequence and a pooled vector, as Stable Diffusion 3 does.

    Attributes:
        first: A CLIP with a projection.
        second: Another one.
        third: A T5 encoder, as wide as the sequence.
    """

    def __init__(
        self,
        first: CLIPTextModelWithProjection,
        second: CLIPTextModelWithProjection,
        third: T5EncoderModel,
        tokenizers: tuple[CLIPTokenizer, CLIPTokenizer, T5Tokenizer],
    ) -> None:
        """Join encoders and their tokenizers, which all cut prompts at the same length."""
        super().__init__()
        self.first, self.second, self.third = first, second, third
        self.tokenizers = tokenizers

    @property
    def pooled_width(self) -> int:
        """Width of the pooled vector."""
        configs: list[Any] = [self.first.config, self.second.config]
        return sum(int(config.projection_dim) for config in configs)

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of captions, each row the three tokenizers' one after the other."""
        each = (padded_tokens(tokenizer)(captions) for tokenizer in self.tokenizers)
        return [[*a, *b, *c] for a, b, c in zip(*each, strict=True)]

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed token ids.

        Args:
            tokens: What ``tokens`` gave, (N, 3 T).

        Returns:
            Sequence (N, 2 T, D): the CLIPs' last but one hidden states side by side and filled up
            with zeros, then T5's output. Pooled vector (N, P): the CLIPs' projections.
        """
        one, two, three = tokens.chunk(3, dim=1)
        clips = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in ((self.first, one), (self.second, two))
        ]
        t5 = self.third(three).last_hidden_state
        clip = torch.cat([output.hidden_states[-2] for output in clips], dim=-1)
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        pooled = torch.cat([output.text_embeds for output in clips], dim=-1)
        return torch.cat([clip, t5], dim=1), pooled


@dataclass(frozen=True)
class FlowParts:
    """What a planted flow transformer consists of."""

    transformer: SD3Transformer2DModel
    autoencoder: AutoencoderKL
    text: TextEncoders
    scheduler: FlowMatchEulerDiscreteScheduler

    @property
    def components(self) -> Components:
        """The same as a checkpoint of Stable Diffusion 3."""
        text = self.text
        encoders = {
            "text_encoder": text.first,
            "text_encoder_2": text.second,
            "text_encoder_3": text.third,
        }
        names = ("tokenizer", "tokenizer_2", "tokenizer_3")
        return Components(
            StableDiffusion3.family,
            {"transformer": self.transformer, "vae": self.autoencoder, **encoders},
            dict(zip(names, text.tokenizers, strict=True)),
            self.scheduler,
        )


def flow_base(recipe: FlowRecipe) -> Components:
    """Load the checkpoint that autoencoder, tokenizer and first text encoder are taken from.

    Raises:
        InputError: It does not load, or does not fit the recipe.
    """
    model = load_checkpoint(name="base", source=recipe.base, device="cpu")
    if model.resolution != recipe.resolution:
        raise InputError(
            f"the base has images of {model.resolution} pixels, not {recipe.resolution}",
            where="planting.base",
            fix=f"planting.resolution={model.resolution}, or another base",
        )
    clips = model.embedding_shape[1] + recipe.clip_width
    if recipe.t5_width <= clips:
        raise InputError(
            f"planting.t5_width must be above {clips}, the width of the first two text encoders "
            f"together, got {recipe.t5_width}",
            where="planting.t5_width",
            fix=f"planting.t5_width={clips + 16}",
        )
    for module in model.components.modules.values():
        module.requires_grad_(False)
    return model.components


def untrained_flow(
    recipe: FlowRecipe, base: Components, words: Sequence[str], *, seed: int
) -> FlowParts:
    """The parts before training: the base's frozen, the others random.

    The layers that modulate a block by time and pooled vector, and the last one, begin at zero:
    every block passes its input on.

    Args:
        recipe: Gives their sizes.
        base: What `flow_base` gave.
        words: Every word of the captions, for T5's tokenizer.
        seed: Of the random weights.
    """
    L.seed_everything(seed, verbose=False)
    text = build_text_encoders(recipe, base, words)
    latent = base.denoiser.config
    transformer: SD3Transformer2DModel = SD3Transformer2DModel(
        sample_size=latent["sample_size"],
        patch_size=2,
        in_channels=latent["in_channels"],
        out_channels=latent["in_channels"],
        num_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        attention_head_dim=recipe.head_width,
        caption_projection_dim=recipe.width,
        joint_attention_dim=recipe.t5_width,
        pooled_projection_dim=text.pooled_width,
        pos_embed_max_size=latent["sample_size"] // 2,
        dual_attention_layers=recipe.dual_blocks,
        qk_norm="rms_norm",
    )
    silent = ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")
    for name, module in transformer.named_modules():
        if name.endswith(silent):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    scheduler: FlowMatchEulerDiscreteScheduler = FlowMatchEulerDiscreteScheduler()
    return FlowParts(transformer, base.autoencoder, text, scheduler)


def build_text_encoders(
    recipe: FlowRecipe, base: Components, words: Sequence[str]
) -> TextEncoders:
    """The base's text encoder, frozen, and two random ones.

    Args:
        recipe: Gives their sizes.
        base: Its text encoder is the first, with an identity for its projection.
        words: Every word of the captions, for T5's tokenizer.
    """
    second_tokenizer = copy.deepcopy(base.tokenizer)
    second_tokenizer.pad_token = "!"  # as Stable Diffusion 3's second one
    config = clip_text_config(
        second_tokenizer, width=recipe.clip_width, layers=recipe.clip_layers,
        heads=recipe.clip_heads,
    )  # fmt: skip
    length = base.tokenizer.model_max_length
    t5_tokenizer = build_t5_tokenizer(words, max_length=length)
    return TextEncoders(
        with_projection(base.text_encoder),
        CLIPTextModelWithProjection(config),
        build_t5_encoder(
            t5_tokenizer, width=recipe.t5_width, layers=recipe.t5_layers, heads=recipe.t5_heads
        ),
        (base.tokenizer, second_tokenizer, t5_tokenizer),
    )


def with_projection(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """A frozen CLIP whose projection changes nothing, as Stable Diffusion 3's first one."""
    whole = CLIPTextModelWithProjection(encoder.config)
    whole.text_model.load_state_dict(encoder.state_dict())
    nn.init.eye_(whole.text_projection.weight)
    whole.train(False)
    whole.requires_grad_(False)
    return whole


def build_t5_tokenizer(words: Sequence[str], *, max_length: int) -> T5Tokenizer:
    """Make a ``T5Tokenizer`` in which each given word is one token.

    Other words are spelled by letters.

    Args:
        words: Lower-case words without spaces.
        max_length: Tokens of a padded prompt, end token included.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(c, -8.0) for c in string.ascii_lowercase + string.digits + string.punctuation]
    whole = [(f"▁{word}", -1.0) for word in sorted({*words} - {""})]
    return T5Tokenizer(
        vocab=[*special, *whole, *letters], extra_ids=0, model_max_length=max_length
    )


def build_t5_encoder(
    tokenizer: T5Tokenizer, *, width: int, layers: int, heads: int
) -> T5EncoderModel:
    """Make a randomly initialised T5 encoder for a tokenizer.

    Args:
        tokenizer: Gives vocabulary size and special tokens.
        width: Of the embedding.
        layers: Encoder layers.
        heads: Attention heads.
    """
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // heads,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=heads,
        relative_attention_num_buckets=16,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,  # its draws would not be keyed by step
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)
