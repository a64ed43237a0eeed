"""Adapter for PixArt-Sigma: a diffusion transformer that reads T5 by cross-attention and a mask.

Reference: Chen et al. (2024), https://arxiv.org/abs/2403.04692.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from transformers import T5EncoderModel, T5Tokenizer

from dori_lightning.models.components import Component, Components, Family
from dori_lightning.models.conditioning import Part, stacked, unpack
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.protocol import LayerRole

_BLOCK = r"transformer_blocks\.\d+\."


class PixArt(LatentDiffusion):
    """A PixArt-Sigma checkpoint.

    ``t5`` holds T5's output, ``mask`` which of its tokens are the prompt's: 1, or 0 for padding,
    which the transformer does not read. The transformer predicts noise and, in as many channels
    again, a variance that samplers here do not use.
    """

    family: ClassVar[Family] = Family(
        name="pixart",
        title="PixArt-Sigma",
        pipeline="PixArtSigmaPipeline",
        example="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        denoiser="transformer",
        modules={
            "transformer": PixArtTransformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": T5EncoderModel,
        },
        tokenizers={"tokenizer": T5Tokenizer},
        scheduler=DPMSolverMultistepScheduler,
        samplers={"dpm++": DPMSolverMultistepScheduler, "ddim": DDIMScheduler},
        # the class's own, which DPM-Solver's scheduler does not say, would cut latents off at 1
        sampler_settings={"clip_sample": False},
        max_tokens={"tokenizer": 300},
    )
    layer_names: ClassVar[Mapping[tuple[LayerRole, str], str]] = {
        ("text.value", "block"): _BLOCK + r"attn2\.to_v",
        ("text.key", "block"): _BLOCK + r"attn2\.to_k",
        ("feed_forward.out", "block"): _BLOCK + r"ff\.net\.2",
    }
    text_weights: ClassVar[str] = r"\.attn2\.|^caption_projection\."
    outer_weights: ClassVar[str] = r"^(adaln_single|proj_out)\.|^scale_shift_table$"
    patch = 2

    @classmethod
    def _lay_out(cls, components: Components) -> tuple[Part, ...]:
        tokens = components.prompt_length()
        width = int(components.text_encoder.config.d_model)
        return stacked(("t5", tokens, width), ("mask", 1, tokens), masks={"mask": "t5"})

    @classmethod
    def unlike_the_family(
        cls, components: Components
    ) -> Iterator[tuple[str, tuple[Component, ...]]]:
        """Other channels, sizes as inputs (PixArt-alpha), or text of another width."""
        config = components.denoiser.config
        takes, gives = config["in_channels"], components.denoiser.out_channels
        own = components.autoencoder.config["latent_channels"]
        if takes != own or gives not in (own, 2 * own) or config["patch_size"] != cls.patch:
            yield (
                f"the transformer takes {takes} channels and gives {gives} in patches of "
                f"{config['patch_size']}, but the autoencoder's latents have {own}, a variance "
                f"as many, and patches are of {cls.patch}",
                ("transformer", "vae"),
            )
        if components.denoiser.use_additional_conditions:
            yield (
                "the transformer takes an image's resolution and aspect ratio, as PixArt-alpha "
                "does and PixArt-Sigma does not (use_additional_conditions)",
                ("transformer",),
            )
        width, wanted = int(components.text_encoder.config.d_model), config["caption_channels"]
        if width != wanted:
            yield (
                f"T5 gives width {width}, but the transformer takes {wanted} (caption_channels)",
                ("text_encoder", "transformer"),
            )

    def _spelled(self, prompt: str) -> str:
        """In small letters, as captions were in training."""
        return prompt.lower().strip()

    def _encode(self, prompt: str) -> dict[str, torch.Tensor]:
        """T5's last hidden state, and which tokens are no padding."""
        ids, mask = self._tokens(prompt, "tokenizer")
        states = self.text_encoder(ids, attention_mask=mask).last_hidden_state
        return {"t5": states, "mask": mask[:, None]}

    @torch.no_grad()
    def value_input(self, embeddings: torch.Tensor) -> torch.Tensor:
        """T5's states as the transformer projects them; behind a prompt's end, its end token.

        The values of an empty prompt in the place of a longer one's then give what the empty
        prompt gives by itself.
        """
        dtype = next(self._denoiser.parameters()).dtype
        states = unpack(self.parts, embeddings)["t5"]
        tokens = self.read(embeddings)[..., : states.shape[1]]
        end = tokens.sum(-1, keepdim=True).clamp_min(1) - 1
        places = torch.arange(states.shape[1], device=states.device).minimum(end)
        filled = states.gather(1, places[..., None].expand_as(states))
        transformer: Any = self._denoiser
        projected: torch.Tensor = transformer.caption_projection(filled.to(self.device, dtype))
        return projected

    def _forward(
        self,
        noised: torch.Tensor,
        times: torch.Tensor,
        embeddings: torch.Tensor,
        distilled_guidance: float | None,
    ) -> torch.Tensor:
        del distilled_guidance
        states = unpack(self.parts, embeddings)["t5"]
        transformer: Any = self._denoiser
        output: torch.Tensor = transformer(
            noised,
            encoder_hidden_states=states.to(noised.dtype),
            encoder_attention_mask=self.read(embeddings)[:, : states.shape[1]],
            timestep=times,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : noised.shape[1]]
