"""Adapter for Stable Diffusion XL: two text encoders, a pooled vector and image sizes.

Reference: Podell et al. (2023), https://arxiv.org/abs/2307.01952.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dori_lightning.models.components import Component, Components, Family
from dori_lightning.models.conditioning import Part, pack, stacked, unpack
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.protocol import LayerRole
from dori_lightning.models.stable_diffusion import UNET_LAYERS, unet_misfits

TIME_IDS = 6
"""Height and width of the training image, top and left of its crop, height and width of the
generated image."""


class StableDiffusionXL(LatentDiffusion):
    """An SD XL checkpoint.

    ``sequence`` holds the last but one hidden states of both text encoders side by side, without
    a final norm; ``pooled`` the second one's projected end token; ``time_ids`` says that the image
    is of the model's resolution and was not cropped.
    """

    family: ClassVar[Family] = Family(
        name="sdxl",
        title="Stable Diffusion XL",
        pipeline="StableDiffusionXLPipeline",
        example="stabilityai/stable-diffusion-xl-base-1.0",
        denoiser="unet",
        modules={
            "unet": UNet2DConditionModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
            "text_encoder_2": CLIPTextModelWithProjection,
        },
        tokenizers={"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer},
        scheduler=EulerDiscreteScheduler,
        samplers={
            "euler": EulerDiscreteScheduler,
            "ddim": DDIMScheduler,
            "dpm++": DPMSolverMultistepScheduler,
        },
        # the class's own, which a scheduler of Euler does not say, would cut latents off at 1
        sampler_settings={"clip_sample": False},
        index={"feature_extractor": [None, None], "image_encoder": [None, None]},
        switches={"force_zeros_for_empty_prompt": True},
    )
    layer_names: ClassVar[Mapping[tuple[LayerRole, str], str]] = UNET_LAYERS
    text_weights: ClassVar[str] = r"\.attn2\."
    outer_weights: ClassVar[str] = r"^(time_embedding|add_embedding|conv_norm_out|conv_out)\."
    word_encoders: ClassVar[tuple[Component, ...]] = ("text_encoder", "text_encoder_2")

    @classmethod
    def _lay_out(cls, components: Components) -> tuple[Part, ...]:
        rows = min(map(components.prompt_length, components.tokenizers))
        return stacked(
            ("sequence", rows, _width(components)),
            ("pooled", 1, _pooled_width(components)),
            ("time_ids", 1, TIME_IDS),
            fixed=("time_ids",),
        )

    @classmethod
    def unlike_the_family(
        cls, components: Components
    ) -> Iterator[tuple[str, tuple[Component, ...]]]:
        """Other channels, text of another width, or another kind of conditioning."""
        config = components.denoiser.config
        kind = config.get("addition_embed_type")
        if kind != "text_time":
            yield (
                f"the UNet of Stable Diffusion XL asks for pooled text and sizes "
                f"(addition_embed_type text_time), this one for {kind}",
                ("unet",),
            )
            return
        yield from unet_misfits(components, width=_width(components))
        takes = config["projection_class_embeddings_input_dim"]
        pooled = _pooled_width(components)
        gives = TIME_IDS * config["addition_time_embed_dim"] + pooled
        if takes != gives:
            yield (
                f"the UNet takes {takes} numbers of sizes and pooled text, but there are {gives}: "
                f"a refiner, or the text encoder of another checkpoint",
                ("unet", "text_encoder_2"),
            )
        if config.get("time_cond_proj_dim") is not None:
            yield "the UNet was distilled from guidance (time_cond_proj_dim)", ("unet",)

    def _encode(self, prompt: str) -> dict[str, torch.Tensor]:
        """Last but one hidden states, and the second encoder's projected end token."""
        states, pooled = [], torch.empty(0)
        for name, (encoder, _) in self.components.encoders.items():
            ids = self._token_ids(prompt, name.replace("text_encoder", "tokenizer"))
            output = encoder(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            if name == "text_encoder_2":
                pooled = output.text_embeds
        return {
            "sequence": torch.cat(states, -1),
            "pooled": pooled[:, None],
            "time_ids": self._time_ids(),
        }

    def value_input(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The sequence of both encoders."""
        return self.parts[0].of(embeddings)

    def _decoding(self) -> AbstractContextManager[Any]:
        """The weights' own where the autoencoder overflows in half precision, and says so."""
        if self.autocast is torch.float16 and self.autoencoder.config.get("force_upcast"):
            return nullcontext()
        return self.precision()

    def _time_ids(self) -> torch.Tensor:
        side = self.resolution
        ids = torch.tensor([[[side, side, 0, 0, side, side]]], dtype=torch.float32)
        return ids.to(self.device)

    def _unconditional(self) -> torch.Tensor:
        """Zeros, unless the checkpoint says that it encodes the empty prompt."""
        if not self.components.switched("force_zeros_for_empty_prompt"):
            return super()._unconditional()
        zeros = {part.name: torch.zeros(1, *part.shape, device=self.device) for part in self.parts}
        return pack(self.parts, {**zeros, "time_ids": self._time_ids()})

    def _forward(
        self,
        noised: torch.Tensor,
        times: torch.Tensor,
        embeddings: torch.Tensor,
        distilled_guidance: float | None,
    ) -> torch.Tensor:
        del distilled_guidance
        given = unpack(self.parts, embeddings)
        unet: Any = self._denoiser
        output: torch.Tensor = unet(
            noised,
            times,
            encoder_hidden_states=given["sequence"].to(noised.dtype),
            added_cond_kwargs={
                "text_embeds": given["pooled"][:, 0].to(noised.dtype),
                "time_ids": given["time_ids"][:, 0],
            },
            return_dict=False,
        )[0]
        return output


def _width(components: Components) -> int:
    return sum(int(encoder.config.hidden_size) for encoder, _ in components.encoders.values())


def _pooled_width(components: Components) -> int:
    encoder: Any = components.modules["text_encoder_2"]
    return int(encoder.config.projection_dim)
