"""Adapter for FLUX.1 dev and schnell: packed latents, T5 and a pooled vector of CLIP.

FLUX.1 dev was distilled from guided images: its guidance scale is an input. FLUX.1 schnell has no
such input; ``guidance_embeds`` in the transformer's configuration tells them apart.

Reference: Black Forest Labs (2024), https://github.com/black-forest-labs/flux.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from dori_lightning.models.components import Component, Components, Family
from dori_lightning.models.conditioning import Part, stacked, unpack
from dori_lightning.models.flow import (
    JOINT_OUTER_WEIGHTS,
    JOINT_TEXT_WEIGHTS,
    joint_layers,
    shift_of_tokens,
)
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.protocol import LayerRole

LOSS_GUIDANCE = 1.0
"""Guidance that losses are computed at: the field of a guided scale is no regression of data."""

USUAL_SIDE = 128
"""Side of latents where the autoencoder's configuration says no size, as in diffusers."""

POSITIONS = 3
"""Numbers of a token's position: one that is always zero, row, column."""


class Flux(LatentDiffusion):
    """A FLUX.1 checkpoint.

    ``t5`` holds T5's states of all tokens, padding too, which the transformer attends to like any
    other; ``pooled`` the end token of CLIP's text encoder.
    """

    family: ClassVar[Family] = Family(
        name="flux",
        title="FLUX.1",
        pipeline="FluxPipeline",
        example="black-forest-labs/FLUX.1-dev",
        denoiser="transformer",
        modules={
            "transformer": FluxTransformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
            "text_encoder_2": T5EncoderModel,
        },
        tokenizers={"tokenizer": CLIPTokenizer, "tokenizer_2": T5Tokenizer},
        scheduler=FlowMatchEulerDiscreteScheduler,
        samplers={"flow_euler": FlowMatchEulerDiscreteScheduler},
        index={"feature_extractor": [None, None], "image_encoder": [None, None]},
        max_tokens={"tokenizer_2": 512},
    )
    layer_names: ClassVar[Mapping[tuple[LayerRole, str], str]] = joint_layers("double")
    closed_stages: ClassVar[Mapping[str, str]] = {
        "single": "the single blocks of FLUX.1 have one layer for tokens of text and of the image "
        "alike, and one output for attention and feed-forward together: an edit there would "
        "change the image's own tokens too"
    }
    text_stream: ClassVar[bool] = True
    text_weights: ClassVar[str] = JOINT_TEXT_WEIGHTS
    outer_weights: ClassVar[str] = JOINT_OUTER_WEIGHTS
    patch = 2

    @classmethod
    def _lay_out(cls, components: Components) -> tuple[Part, ...]:
        clip: Any = components.modules["text_encoder"]
        t5: Any = components.modules["text_encoder_2"]
        return stacked(
            ("t5", components.prompt_length("tokenizer_2"), int(t5.config.d_model)),
            ("pooled", 1, int(clip.config.hidden_size)),
        )

    def _latent_side(self, components: Components) -> int:
        """Side of the images that the autoencoder's configuration names, in latents."""
        config = components.autoencoder.config
        if "sample_size" in config.get("_use_default_values", ()):
            return USUAL_SIDE
        levels = len(config["block_out_channels"])
        return int(config["sample_size"]) // int(2 ** (levels - 1))

    @classmethod
    def unlike_the_family(
        cls, components: Components
    ) -> Iterator[tuple[str, tuple[Component, ...]]]:
        """Other channels, as Fill, Depth and Canny have, or text of another width."""
        config = components.denoiser.config
        takes, gives = config["in_channels"], config["out_channels"] or config["in_channels"]
        packed = cls.patch**2 * int(components.autoencoder.config["latent_channels"])
        if not takes == gives == packed or config["patch_size"] != 1:
            yield (
                f"the transformer takes {takes} channels and gives {gives} in patches of "
                f"{config['patch_size']}, but the autoencoder's latents make {packed}: an "
                f"inpainting, depth or editing model is no text-to-image checkpoint",
                ("transformer", "vae"),
            )
        for name, given, wanted in (
            ("text_encoder_2", "d_model", "joint_attention_dim"),
            ("text_encoder", "hidden_size", "pooled_projection_dim"),
        ):
            width = int(getattr(components.modules[name].config, given))
            if width != config[wanted]:
                yield (
                    f"the {name} gives width {width}, but the transformer takes "
                    f"{config[wanted]} ({wanted})",
                    (name, "transformer"),
                )

    @property
    def takes_distilled_guidance(self) -> bool:
        """True for dev, false for schnell."""
        return bool(self._components.denoiser.config["guidance_embeds"])

    def _encode(self, prompt: str) -> dict[str, torch.Tensor]:
        """T5's last hidden state, and CLIP's at the end token after the final norm."""
        clip, t5 = (self._components.modules[n] for n in ("text_encoder", "text_encoder_2"))
        return {
            "t5": t5(self._token_ids(prompt, "tokenizer_2")).last_hidden_state,
            "pooled": clip(self._token_ids(prompt, "tokenizer")).pooler_output[:, None],
        }

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        """Even noise levels from 1 down to 1 / steps, shifted by the image's tokens."""
        scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1 / steps, steps),
            mu=shift_of_tokens(scheduler.config, self._side_in_tokens**2),
            device="cpu",
        )

    @property
    def _side_in_tokens(self) -> int:
        side: int = self.latent_shape[1] // self.patch
        return side

    def _forward(
        self,
        noised: torch.Tensor,
        times: torch.Tensor,
        embeddings: torch.Tensor,
        distilled_guidance: float | None,
    ) -> torch.Tensor:
        given = unpack(self.parts, embeddings)
        dtype, rows, side = noised.dtype, len(noised), noised.shape[-1] // self.patch
        guidance = None
        if self.takes_distilled_guidance:
            scale = LOSS_GUIDANCE if distilled_guidance is None else distilled_guidance
            guidance = torch.full((rows,), scale, device=noised.device)
        transformer: Any = self._denoiser
        output: torch.Tensor = transformer(
            hidden_states=pack_latents(noised),
            encoder_hidden_states=given["t5"].to(dtype),
            pooled_projections=given["pooled"][:, 0].to(dtype),
            timestep=times / 1000,
            img_ids=_image_positions(side, noised.device),
            txt_ids=torch.zeros(given["t5"].shape[1], POSITIONS, device=noised.device),
            guidance=guidance,
            return_dict=False,
        )[0]
        return unpack_latents(output, side)


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, h, w) to tokens (N, (h/2)(w/2), 4 C): squares of 2 x 2, row by row."""
    squares = torch.nn.functional.pixel_unshuffle(latents, Flux.patch)
    return squares.flatten(2).transpose(1, 2)


def unpack_latents(tokens: torch.Tensor, side: int) -> torch.Tensor:
    """Tokens (N, side * side, 4 C) to latents (N, C, 2 side, 2 side)."""
    squares = tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)
    return torch.nn.functional.pixel_shuffle(squares, Flux.patch)


def _image_positions(side: int, device: torch.device) -> torch.Tensor:
    """Positions (side * side, 3) of image tokens: zero, row, column."""
    rows = torch.arange(side, dtype=torch.float32, device=device)
    return torch.cartesian_prod(rows.new_zeros(1), rows, rows)
