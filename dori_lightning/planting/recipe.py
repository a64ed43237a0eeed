"""The recipe of a planted checkpoint, and the untrained parts it describes.

Tokenizer and text encoder know the words of the planted captions, one token each.
"""

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dori_lightning.models.components import Components
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.planting.stream import StreamMix
from dori_lightning.types import InputError, require, require_at_least_one


@dataclass(frozen=True)
class PlantRecipe:
    """Everything that decides what a planted checkpoint becomes, besides the list of pairs.

    Attributes:
        resolution: Image side in pixels.
        autoencoder_channels: Channels per level; each level but the last halves the side.
        latent_channels: Channels of a latent.
        autoencoder_steps: Optimizer steps of the autoencoder.
        autoencoder_batch: Images per step.
        autoencoder_lr: Peak learning rate.
        unet_channels: Channels of the four levels; the topology is Stable Diffusion v1's.
        heads: Attention heads per layer.
        silent_blocks: Blocks whose cross-attention is zero and frozen, see
            ``silence_cross_attention``.
        text_width: Width D of the text embedding.
        text_layers: Layers of the text encoder.
        text_heads: Its attention heads.
        max_length: Tokens T of a padded prompt.
        prediction_type: What the UNet predicts.
        autoencoder_mix: Shares of the autoencoder's training stream, which has controls in it too.
        mix: Shares of the UNet's training stream.
        stream_length: Elements of the stream that are drawn and encoded; longer training starts
            over.
        steps: Optimizer steps of UNet and text encoder.
        batch: Latents per step.
        lr: Peak learning rate.
        caption_dropout: Share of captions replaced by the empty one.
        ema_decay: Decay of the weight average that is exported.
        precision: Autocast dtype of the UNet's training.
        base: Checkpoint whose autoencoder, text encoder, tokenizer and scheduler are taken as they
            are, so that only the UNet is trained, from nothing; None trains all of them.
    """

    resolution: int = 64
    autoencoder_channels: tuple[int, ...] = (32, 64, 64)
    latent_channels: int = 8
    autoencoder_steps: int = 1700
    autoencoder_batch: int = 16
    autoencoder_lr: float = 1.5e-3
    unet_channels: tuple[int, ...] = (32, 64, 128, 128)
    heads: int = 1
    silent_blocks: tuple[str, ...] = ("up_blocks",)
    text_width: int = 96
    text_layers: int = 2
    text_heads: int = 4
    max_length: int = 16
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    autoencoder_mix: StreamMix = field(default_factory=lambda: StreamMix(0.35, 0.45, 0.2))
    mix: StreamMix = field(default_factory=lambda: StreamMix(0.45, 0.4, 0.15))
    stream_length: int = 60_000
    steps: int = 4000
    batch: int = 32
    lr: float = 1e-3
    caption_dropout: float = 0.1
    ema_decay: float = 0.998
    precision: Literal["fp32", "bf16"] = "fp32"
    base: str | None = None

    def __post_init__(self) -> None:
        for name in ("autoencoder_channels", "unet_channels", "silent_blocks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        levels = list(self.unet_channels)
        require(len(levels) == 4, "planting.unet_channels needs four levels", levels)
        factor = 2 ** (len(self.autoencoder_channels) - 1)
        require(
            self.resolution % (8 * factor) == 0,
            f"planting.resolution must be a multiple of {8 * factor} "
            f"(autoencoder {factor}x, UNet 8x)",
            self.resolution,
        )
        counts = ("autoencoder_steps", "steps", "batch", "stream_length", "max_length")
        require_at_least_one(self, *counts, within="planting.")


def base_components(recipe: PlantRecipe, base: str) -> Components:
    """Load the checkpoint that a recipe takes everything but the UNet from.

    Args:
        recipe: What is to be planted.
        base: Its ``base``.

    Raises:
        InputError: The base does not load, or has other shapes than the recipe.
    """
    model = load_checkpoint(name="base", source=base, device="cpu")
    levels = len(recipe.autoencoder_channels)
    side = recipe.resolution // 2 ** (levels - 1)
    wanted = {
        "autoencoder_channels": levels,
        "latent_channels and resolution": (recipe.latent_channels, side, side),
        "max_length and text_width": (recipe.max_length, recipe.text_width),
        "prediction_type": recipe.prediction_type,
    }
    found = {
        "autoencoder_channels": len(model.autoencoder.config["block_out_channels"]),
        "latent_channels and resolution": model.latent_shape,
        "max_length and text_width": model.embedding_shape,
        "prediction_type": model.prediction_type,
    }
    for name, value in wanted.items():
        if found[name] != value:
            raise InputError(
                f"the base has other shapes than the recipe: {name} {found[name]}, not {value}",
                where="planting.base",
                fix="give the recipe the base's shapes, or leave the base out",
            )
    components = model.components
    components.autoencoder.requires_grad_(False)
    components.text_encoder.requires_grad_(False)
    return components


def _groups(channels: tuple[int, ...]) -> int:
    """Largest group count up to 16 that divides every level's channels."""
    return next(g for g in (16, 8, 4, 2, 1) if all(c % g == 0 for c in channels))


def build_autoencoder(recipe: PlantRecipe) -> AutoencoderKL:
    """Randomly initialised autoencoder."""
    levels = len(recipe.autoencoder_channels)
    autoencoder: AutoencoderKL = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.autoencoder_channels,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=_groups(recipe.autoencoder_channels),
        sample_size=recipe.resolution,
    )
    return autoencoder


def build_unet(recipe: PlantRecipe, *, groups: int | None = None) -> UNet2DConditionModel:
    """Randomly initialised UNet with the topology and module names of Stable Diffusion v1.

    Its norms have ``groups`` groups; None takes the largest number up to 16 that fits.
    """
    unet: UNet2DConditionModel = UNet2DConditionModel(
        sample_size=recipe.resolution // 2 ** (len(recipe.autoencoder_channels) - 1),
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=recipe.unet_channels,
        layers_per_block=2,
        cross_attention_dim=recipe.text_width,
        # diffusers reads this as the number of heads in SD v1's configuration
        attention_head_dim=recipe.heads,
        norm_num_groups=groups or _groups(recipe.unet_channels),
    )
    return unet


def build_scheduler(recipe: PlantRecipe) -> DDIMScheduler:
    """Stable Diffusion's scaled-linear noise schedule."""
    scheduler: DDIMScheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",  # stated, or DPM-Solver++ would take its own
        prediction_type=recipe.prediction_type,
    )
    return scheduler


_START, _END, _SUFFIX = "<|startoftext|>", "<|endoftext|>", "</w>"
_ALPHABET = string.ascii_lowercase + string.digits + "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Learn byte-pair merges until every word is one symbol.

    Reference: Sennrich et al. (2016), https://arxiv.org/abs/1508.07909, without a frequency table.
    """
    spelled = {word: [*word[:-1], word[-1] + _SUFFIX] for word in words if word}
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for symbols in spelled.values() for pair in pairwise(symbols))
        if not counts:
            return merges
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for symbols in spelled.values():
            k = 0
            while k < len(symbols) - 1:
                if (symbols[k], symbols[k + 1]) == best:
                    symbols[k : k + 2] = ["".join(best)]
                k += 1


def build_tokenizer(words: Sequence[str], *, max_length: int) -> CLIPTokenizer:
    """Make a ``CLIPTokenizer`` in which each given word is one token.

    Other words fall apart into letters.

    Args:
        words: Lower-case words without spaces.
        max_length: Tokens of a padded prompt, start and end token included.
    """
    plain = sorted({word for word in words if word and all(c in _ALPHABET for c in word)})
    merges = learn_merges(plain)
    symbols = [*_ALPHABET, *(c + _SUFFIX for c in _ALPHABET), *("".join(pair) for pair in merges)]
    vocabulary = {symbol: k for k, symbol in enumerate(dict.fromkeys(symbols))}
    vocabulary[_START] = len(vocabulary)
    vocabulary[_END] = len(vocabulary)
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type] # passed on to tokenizers, which takes pairs
        model_max_length=max_length,
        pad_token=_END,
    )


def build_text_encoder(
    tokenizer: CLIPTokenizer, *, width: int, layers: int, heads: int
) -> CLIPTextModel:
    """Make a randomly initialised CLIP text encoder for a tokenizer.

    Args:
        tokenizer: Gives vocabulary size, length and special tokens.
        width: D, the width of the text embedding.
        layers: Transformer layers.
        heads: Attention heads.
    """
    return CLIPTextModel(clip_text_config(tokenizer, width=width, layers=layers, heads=heads))


def clip_text_config(
    tokenizer: CLIPTokenizer, *, width: int, layers: int, heads: int
) -> CLIPTextConfig:
    """Configuration of a CLIP text encoder for a tokenizer; see ``build_text_encoder``."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
