"""What a checkpoint is known by: one hash of everything that decides its results.

Caches, run folders, edits, records and comparisons use it, so two checkpoints with one fingerprint
give the same numbers. It is taken from what was loaded, not from files: a folder that was moved or
whose notes (README, names, versions) changed keeps it.
"""

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedConfig

from dori_lightning.models.stable_diffusion import SAMPLERS, Parts, prompt_length

_OF_A_TOKENIZER = ("added_tokens", "model", "normalizer", "pre_tokenizer", "post_processor")
"""Sections of a serialized tokenizer that decide a prompt's tokens. Its padding and truncation are
whatever the last call asked for."""


def fingerprint_of(
    states: Iterable[Mapping[str, torch.Tensor]], configuration: Mapping[str, Any]
) -> str:
    """First 16 hex digits of the SHA-256 over all weights and everything else that counts.

    Args:
        states: Weights of UNet, autoencoder and text encoder, in this order; their names, shapes
            and fp32 values count.
        configuration: See ``configuration_of``.
    """
    digest = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode())
    for state in states:
        for name, tensor in sorted(state.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def configuration_of(parts: Parts) -> dict[str, Any]:
    """Everything besides the weights that decides a checkpoint's results, as plain containers.

    Values that are a class's own are left out, so that a file that states them and one that does
    not are the same, also under a later library with more settings. Where the samplers' own values
    differ, each sampler's are told.
    """
    found = {
        "unet": _unlike_defaults(type(parts.unet), parts.unet.config),
        "autoencoder": _unlike_defaults(type(parts.autoencoder), parts.autoencoder.config),
        "text_encoder": _of_text_encoder(parts.text_encoder.config),
        "tokenizer": _of_tokenizer(
            parts.tokenizer, prompt_length(parts.tokenizer, parts.text_encoder)
        ),
        "samplers": {
            name: _unlike_defaults(kind, kind.from_config(parts.scheduler.config).config)
            for name, kind in SAMPLERS.items()
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _unlike_defaults(kind: type[Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a diffusers class that are not its defaults."""
    parameters = inspect.signature(kind.__init__).parameters
    return {
        name: config[name]
        for name, parameter in parameters.items()
        if name in config and plain_value(config[name]) != plain_value(parameter.default)
    }


def plain_value(value: Any) -> Any:
    """A value of a configuration as its file has it: libraries read its lists as tuples, too."""
    return list(value) if isinstance(value, tuple) else value


def _of_text_encoder(config: CLIPTextConfig) -> dict[str, Any]:
    """Settings of the architecture, without those that every configuration of the library has."""
    default, general = CLIPTextConfig().to_dict(), PreTrainedConfig().to_dict()
    own = config.to_dict()
    return {
        name: own[name]
        for name, value in default.items()
        if name not in general and name != "model_type" and own[name] != value
    }


def _of_tokenizer(tokenizer: CLIPTokenizer, length: int) -> dict[str, Any]:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        **{name: state[name] for name in _OF_A_TOKENIZER},
        "pad": tokenizer.pad_token_id,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "length": length,
    }
