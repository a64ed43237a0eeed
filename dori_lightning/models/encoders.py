"""What stands before and behind a denoiser: text encoder and image autoencoder."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

__all__ = ["Encoders"]


class Encoders:
    """Prompts to embeddings, images to latents and back.

    Attributes:
        embedding_shape: Tokens and width (T, D) of an embedding.
        factor: Pixels to a latent's element, along a side.
        device: Where all of it is computed.
    """

    def __init__(
        self,
        *,
        autoencoder: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:
        """Join the parts.

        Args:
            autoencoder: Image autoencoder.
            text_encoder: CLIP text encoder.
            tokenizer: Its tokenizer.
            device: Where their weights are.
            autocast: Compute in this dtype; None for the weights' own.
        """
        self.autoencoder = autoencoder.eval()
        text_encoder.eval()  # type: ignore[no-untyped-call]
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.device, self.autocast = device, autocast
        # a tokenizer without a length of its own claims an astronomical one
        length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
        self.embedding_shape = (int(length), int(text_encoder.config.hidden_size))
        self.factor = 2 ** (len(autoencoder.config["block_out_channels"]) - 1)
        self._empty: torch.Tensor | None = None

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast where the model has it."""
        # without a dtype of its own it leaves a Trainer's mixed precision in force
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def token_count(self, prompt: str) -> int:
        """Tokens of a prompt with its start and end token, before truncation."""
        return len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids)

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt that does not fit, as the tokenizer spells it."""
        ids = self.tokenizer(prompt, truncation=False, verbose=False).input_ids
        # the end token takes the last place
        lost = ids[self.embedding_shape[0] - 1 : -1]
        return str(self.tokenizer.decode(lost)) if len(ids) > self.embedding_shape[0] else ""

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts to embeddings (N, T, D), fp32: last hidden state after the final layer norm."""
        rows = []
        # one by one, so that a prompt's embedding never depends on its neighbours
        for prompt in prompts:
            ids = self.tokenizer(
                prompt,
                padding="max_length",
                truncation=True,
                max_length=self.embedding_shape[0],
                return_tensors="pt",
            ).input_ids
            rows.append(self.text_encoder(ids.to(self.device)).last_hidden_state.float())
        return torch.cat(rows)

    def empty_embedding(self) -> torch.Tensor:
        """Embedding (1, T, D) of the empty prompt, the unconditional branch of guidance."""
        if self._empty is None:
            self._empty = self.encode_prompts([""])
        return self._empty

    @property
    def _latent_scale(self) -> float:
        """What latents are multiplied by to have about unit standard deviation."""
        return float(self.autoencoder.config["scaling_factor"])

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] to scaled latents (N, C, h, w): posterior mode, fp32."""
        dtype = next(self.autoencoder.parameters()).dtype
        images = images.to(self.device, dtype) * 2 - 1
        rows = [
            self.autoencoder.encode(image[None]).latent_dist.mode().float() for image in images
        ]
        return torch.cat(rows) * self._latent_scale

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (N, C, h, w) to images (N, 3, H, W) in [0, 1], fp32."""
        dtype = next(self.autoencoder.parameters()).dtype
        latents = (latents / self._latent_scale).to(dtype)
        with self.precision():
            images: torch.Tensor = self.autoencoder.decode(latents).sample
        return (images.float() / 2 + 0.5).clamp_(0, 1)
