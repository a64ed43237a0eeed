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
from transformers import PreTrainedConfig

from dori_lightning.models.components import Component, Components
from dori_lightning.models.noise_levels import sampler_from

_OF_A_TOKENIZER = ("added_tokens", "model", "normalizer", "pre_tokenizer", "post_processor")
"""Sections of a serialized tokenizer that decide a prompt's tokens. Its padding and truncation are
whatever the last call asked for."""

_NAMES = {"vae": "autoencoder"}
"""What fingerprints have always called a component."""


def fingerprint_of(
    states: Iterable[Mapping[str, torch.Tensor]], configuration: Mapping[str, Any]
) -> str:
    """First 16 hex digits of the SHA-256 over all weights and everything else that counts.

    Args:
        states: Weights of denoiser, autoencoder and text encoders, in this order; their names,
            shapes and fp32 values count.
        configuration: See ``configuration_of``.
    """
    digest = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode())
    for state in states:
        for name, tensor in sorted(state.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def configuration_of(components: Components) -> dict[str, Any]:
    """Everything besides the weights that decides a checkpoint's results, as plain containers.

    Values that are a class's own are left out, so that a file that states them and one that does
    not are the same, also under a later library with more settings. Where the samplers' own values
    differ, each sampler's are told.
    """
    found: dict[str, Any] = {
        _NAMES.get(name, name): _of_module(name, module)
        for name, module in components.modules.items()
    }
    for name, tokenizer in components.tokenizers.items():
        found[name] = _of_tokenizer(tokenizer, components.prompt_length(name))
    found["samplers"] = {
        name: _unlike_defaults(kind, sampler_from(kind, components.scheduler.config).config)
        for name, kind in components.family.samplers.items()
    }
    if components.switches:
        found["switches"] = dict(components.switches)
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _of_module(name: Component, module: Any) -> dict[str, Any]:
    if name.startswith("text_encoder"):
        return _of_text_encoder(module.config)
    return _unlike_defaults(type(module), module.config)


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


def _of_text_encoder(config: PreTrainedConfig) -> dict[str, Any]:
    """Settings of the architecture, without those that every configuration of the library has."""
    default, general = type(config)().to_dict(), PreTrainedConfig().to_dict()
    own = config.to_dict()
    return {
        name: own[name]
        for name, value in default.items()
        if name not in general and name != "model_type" and own[name] != value
    }


def _of_tokenizer(tokenizer: Any, length: int) -> dict[str, Any]:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        **{name: state[name] for name in _OF_A_TOKENIZER},
        "pad": tokenizer.pad_token_id,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "length": length,
    }
