"""Adapter for the Stable Diffusion family: SD 1.x and 2.x, epsilon and v prediction, any width.

Everything that depends on the architecture is read from the checkpoint's own configuration:
prediction type, latent channels, resolution, embedding width and length, linear or convolutional
attention projections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from transformers import CLIPTextModel, CLIPTokenizer

from dori_lightning.models.components import Component, Components, Family
from dori_lightning.models.conditioning import Part, Spread, stacked
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.protocol import LayerRole

_ENDINGS: dict[LayerRole, str] = {
    "text.value": "attn2.to_v",
    "text.key": "attn2.to_k",
    "feed_forward.out": "ff.net.2",
}
_BLOCKS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}

UNET_LAYERS: Mapping[tuple[LayerRole, str], str] = {
    (role, stage): rf"{block}\..*\.{ending.replace('.', chr(92) + '.')}"
    for role, ending in _ENDINGS.items()
    for stage, block in _BLOCKS.items()
}
"""Names of a UNet's layers, by role and stage."""

_CONDITIONING = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)
"""Settings of a UNet that asks for more than latents, a timestep and text."""


class StableDiffusion(LatentDiffusion):
    """A Stable Diffusion checkpoint, conditioned on one sequence of tokens."""

    family: ClassVar[Family] = Family(
        name="sd",
        title="Stable Diffusion 1 and 2",
        pipeline="StableDiffusionPipeline",
        example="stable-diffusion-v1-5/stable-diffusion-v1-5",
        denoiser="unet",
        modules={
            "unet": UNet2DConditionModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
        },
        tokenizers={"tokenizer": CLIPTokenizer},
        scheduler=DDIMScheduler,
        samplers={"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler},
        index={
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
        },
    )
    layer_names: ClassVar[Mapping[tuple[LayerRole, str], str]] = UNET_LAYERS
    # the seven layers of Finding NeMo
    pruned_stages: ClassVar[Mapping[LayerRole, tuple[str, ...]]] = {"text.value": ("down", "mid")}
    text_weights: ClassVar[str] = r"\.attn2\."
    outer_weights: ClassVar[str] = r"^(time_embedding|conv_norm_out|conv_out)\."
    word_encoders: ClassVar[tuple[Component, ...]] = ("text_encoder",)

    @classmethod
    def _lay_out(cls, components: Components) -> tuple[Part, ...]:
        width = int(components.text_encoder.config.hidden_size)
        return stacked(("sequence", components.prompt_length(), width))

    @classmethod
    def unlike_the_family(
        cls, components: Components
    ) -> Iterator[tuple[str, tuple[Component, ...]]]:
        """Other channels, conditioning besides text, or text of another width."""
        yield from unet_misfits(components, width=components.text_encoder.config.hidden_size)
        config = components.denoiser.config
        more = [name for name in _CONDITIONING if config.get(name) is not None]
        if more:
            yield (
                f"the UNet asks for conditioning besides text ({', '.join(more)}), as Stable "
                f"Diffusion XL and distilled or class-conditional models do",
                ("unet",),
            )

    def spread(self) -> Spread:
        """Standard normal, in absolute numbers: those of the published attack."""
        return Spread.published(self.parts)

    def value_input(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The sequence, which is all there is."""
        return embeddings

    def _encode(self, prompt: str) -> dict[str, torch.Tensor]:
        """Last hidden state after the final layer norm."""
        ids = self._token_ids(prompt, "tokenizer")
        return {"sequence": self.text_encoder(ids).last_hidden_state}

    def _forward(
        self,
        noised: torch.Tensor,
        times: torch.Tensor,
        embeddings: torch.Tensor,
        distilled_guidance: float | None,
    ) -> torch.Tensor:
        del distilled_guidance
        unet: Any = self._denoiser
        output: torch.Tensor = unet(
            noised,
            times,
            encoder_hidden_states=embeddings.to(noised.dtype),
            return_dict=False,
        )[0]
        return output


def unet_misfits(
    components: Components, *, width: int
) -> Iterator[tuple[str, tuple[Component, ...]]]:
    """What does not fit a UNet that generates images from text of some width alone."""
    config = components.denoiser.config
    takes, gives = config["in_channels"], config["out_channels"]
    own, wanted = components.autoencoder.config["latent_channels"], config["cross_attention_dim"]
    if not takes == gives == own:
        yield (
            f"the UNet takes {takes} channels and gives {gives}, but the autoencoder's latents "
            f"have {own}: an inpainting, depth or editing model is no text-to-image checkpoint",
            ("unet", "vae"),
        )
    if {width} != ({wanted} if isinstance(wanted, int) else set(wanted)):
        yield (
            f"the text encoder gives width {width}, but the UNet's cross-attention takes {wanted}",
            (*components.encoders, "unet"),
        )


def stable_diffusion(
    *,
    unet: UNet2DConditionModel,
    autoencoder: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
) -> Components:
    """The components of a checkpoint that was made rather than loaded."""
    return Components(
        StableDiffusion.family,
        {"unet": unet, "vae": autoencoder, "text_encoder": text_encoder},
        {"tokenizer": tokenizer},
        scheduler,
    )
