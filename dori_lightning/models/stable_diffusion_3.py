"""Adapter for Stable Diffusion 3 and 3.5: a transformer that joins image and text, and flow.

Reference: Esser et al. (2024), https://arxiv.org/abs/2403.03206.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from dori_lightning.models.components import Component, Components, Family
from dori_lightning.models.conditioning import Part, stacked, unpack
from dori_lightning.models.flow import JOINT_OUTER_WEIGHTS, JOINT_TEXT_WEIGHTS, joint_layers
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.protocol import LayerRole
from dori_lightning.types import InputError

T5_TOKENS = 256
"""Tokens that T5's prompts are padded and cut to; as many zeros stand for them without T5."""

CLIPS: tuple[Component, ...] = ("text_encoder", "text_encoder_2")


class StableDiffusion3(LatentDiffusion):
    """An SD3 or SD3.5 checkpoint, with or without T5.

    ``clip`` holds the last but one hidden states of both CLIPs side by side, without a final norm;
    ``t5`` T5's output; ``pooled`` both CLIPs' projected end tokens. The transformer takes a
    sequence as wide as T5's: the CLIPs' rows are filled up with zeros, which no search moves.
    """

    family: ClassVar[Family] = Family(
        name="sd3",
        title="Stable Diffusion 3 and 3.5",
        pipeline="StableDiffusion3Pipeline",
        example="stabilityai/stable-diffusion-3.5-medium",
        denoiser="transformer",
        modules={
            "transformer": SD3Transformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModelWithProjection,
            "text_encoder_2": CLIPTextModelWithProjection,
            "text_encoder_3": T5EncoderModel,
        },
        tokenizers={
            "tokenizer": CLIPTokenizer,
            "tokenizer_2": CLIPTokenizer,
            "tokenizer_3": T5Tokenizer,
        },
        scheduler=FlowMatchEulerDiscreteScheduler,
        samplers={
            "flow_euler": FlowMatchEulerDiscreteScheduler,
            "flow_dpm++": DPMSolverMultistepScheduler,
        },
        optional=frozenset({"text_encoder_3", "tokenizer_3"}),
        index={"feature_extractor": [None, None], "image_encoder": [None, None]},
        max_tokens={"tokenizer_3": T5_TOKENS},
    )
    layer_names: ClassVar[Mapping[tuple[LayerRole, str], str]] = joint_layers("joint")
    text_stream: ClassVar[bool] = True
    text_weights: ClassVar[str] = JOINT_TEXT_WEIGHTS
    outer_weights: ClassVar[str] = JOINT_OUTER_WEIGHTS
    patch = 2

    def __init__(self, components: Components, **given: Any) -> None:
        """Join the components; see ``LatentDiffusion``.

        Raises:
            InputError: The transformer has no positions for so large an image.
        """
        super().__init__(components, **given)
        most = int(components.denoiser.config["pos_embed_max_size"]) * self.patch
        side = self.latent_shape[1]
        if side > most:
            raise InputError(
                f"{self.name} has positions for images of {most * self.resolution // side} pixels "
                f"a side at most, got {self.resolution}",
                where="checkpoint.resolution",
                fix="a smaller one, or null for the checkpoint's own",
            )

    @classmethod
    def _lay_out(cls, components: Components) -> tuple[Part, ...]:
        encoders = components.encoders
        parts = [("clip", components.prompt_length(), _sum(components, "hidden_size"))]
        if "text_encoder_3" in encoders:
            t5, _ = encoders["text_encoder_3"]
            parts.append(("t5", components.prompt_length("tokenizer_3"), int(t5.config.d_model)))
        return stacked(*parts, ("pooled", 1, _sum(components, "projection_dim")))

    @classmethod
    def unlike_the_family(
        cls, components: Components
    ) -> Iterator[tuple[str, tuple[Component, ...]]]:
        """Other channels, or text and pooled vectors of other widths."""
        config: Any = components.denoiser.config
        takes, gives = config["in_channels"], components.denoiser.out_channels
        own = components.autoencoder.config["latent_channels"]
        if not takes == gives == own or config["patch_size"] != cls.patch:
            yield (
                f"the transformer takes {takes} channels and gives {gives} in patches of "
                f"{config['patch_size']}, but the autoencoder's latents have {own}, and patches "
                f"are of {cls.patch}",
                ("transformer", "vae"),
            )
        width, clip = int(config["joint_attention_dim"]), _sum(components, "hidden_size")
        if clip > width:
            yield (
                f"the two CLIPs together give width {clip}, but the transformer takes {width}",
                (*CLIPS, "transformer"),
            )
        third = components.modules.get("text_encoder_3")
        t5 = width if third is None else int(_config(third).d_model)
        if t5 != width:
            yield (
                f"T5 gives width {t5}, but the transformer takes {width}",
                ("text_encoder_3", "transformer"),
            )
        pooled, wanted = _sum(components, "projection_dim"), config["pooled_projection_dim"]
        if pooled != wanted:
            yield (
                f"the two CLIPs' projections together have width {pooled}, but the transformer "
                f"takes {wanted}",
                (*CLIPS, "transformer"),
            )
        lengths = [components.prompt_length(name) for name in ("tokenizer", "tokenizer_2")]
        if lengths[0] != lengths[1]:
            yield (
                f"the two CLIPs' prompts have {lengths[0]} and {lengths[1]} tokens, but lie side "
                f"by side",
                (*CLIPS, "tokenizer", "tokenizer_2"),
            )

    def _encode(self, prompt: str) -> dict[str, torch.Tensor]:
        """Both CLIPs' last but one hidden states and projected end tokens, and T5's output."""
        encoders = self._components.encoders
        clips = [
            encoders[name][0](
                self._token_ids(prompt, name.replace("text_encoder", "tokenizer")),
                output_hidden_states=True,
            )
            for name in CLIPS
        ]
        values = {
            "clip": torch.cat([output.hidden_states[-2] for output in clips], -1),
            "pooled": torch.cat([output.text_embeds for output in clips], -1)[:, None],
        }
        if "text_encoder_3" in encoders:
            t5, _ = encoders["text_encoder_3"]
            # without a mask: the transformer attends to what stands for padding, too
            values["t5"] = t5(self._token_ids(prompt, "tokenizer_3")).last_hidden_state
        return values

    def _forward(
        self,
        noised: torch.Tensor,
        times: torch.Tensor,
        embeddings: torch.Tensor,
        distilled_guidance: float | None,
    ) -> torch.Tensor:
        del distilled_guidance
        transformer: Any = self._denoiser
        given = unpack(self.parts, embeddings)
        clip, width = given["clip"], int(transformer.config["joint_attention_dim"])
        clip = F.pad(clip, (0, width - clip.shape[-1]))
        if "t5" in given:
            sequence = torch.cat([clip, given["t5"]], 1)
        else:
            sequence = F.pad(clip, (0, 0, 0, T5_TOKENS))
        output: torch.Tensor = transformer(
            hidden_states=noised,
            encoder_hidden_states=sequence.to(noised.dtype),
            pooled_projections=given["pooled"][:, 0].to(noised.dtype),
            timestep=times,
            return_dict=False,
        )[0]
        return output


def _config(module: Any) -> Any:
    return module.config


def _sum(components: Components, name: str) -> int:
    """A width of both CLIPs together."""
    return sum(int(getattr(_config(components.modules[clip]), name)) for clip in CLIPS)
