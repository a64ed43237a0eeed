"""How value neurons react to ordinary prompts, and which value layers carry the conditioning.

The value layers of cross-attention see the text alone, so their activations need no denoising. In
joint attention they see what earlier blocks made of it beside the image: there they are heard in
passes of the denoiser, at one noise level and under a few noises.

Reference: Finding NeMo (Hintersdorf et al., 2024), section 3.2, https://arxiv.org/abs/2406.02366.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

from dori_lightning.models.progress import passes_shown
from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.runtime.artifacts import content_hash, write_atomically
from dori_lightning.runtime.cache import Cache, Codec, tensors_and_note
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import InputError

PROMPTS_AT_ONCE = 32
"""Prompts of a batch; what is kept between batches does not grow with their number."""
NOISES = 4
"""Noises under which a text is looked at where its values depend on them."""
PUBLISHED_STEPS = 50
"""Steps of the sampler that NeMo looks at the second one of."""
_FIX = "  fix:   python -m dori_lightning task=statistics writes one"


@dataclass(frozen=True)
class ActivationStatistics:
    """Mean and spread of each value neuron's activation over ordinary prompts.

    Attributes:
        means: Layer name to mean activation (C,), fp32.
        stds: Layer name to unbiased standard deviation (C,), fp32.
        prompts: How many prompts.
        fingerprint: Of the checkpoint.
    """

    means: Mapping[str, torch.Tensor]
    stds: Mapping[str, torch.Tensor]
    prompts: int
    fingerprint: str

    def z_scores(self, layer: str, activation: torch.Tensor) -> torch.Tensor:
        """How far activations are from the mean on either side, in standard deviations (C,).

        Both sides count in the paper's text and the released code; its algorithm 2 is one-sided.
        A neuron that no ordinary prompt moves has no spread: it scores 0 at its mean and infinity
        anywhere else, since nothing could be more out of the ordinary.

        Args:
            layer: Its name.
            activation: Activations (C,) of one prompt.
        """
        distance = (activation - self.means[layer]).abs()
        spread = self.stds[layer]
        return torch.where(distance == 0, torch.zeros_like(distance), distance / spread)

    @property
    def identity(self) -> str:
        """Content hash."""
        digest = hashlib.sha256(f"{self.fingerprint}|{self.prompts}".encode())
        for name in sorted(self.means):
            for tensors in (self.means, self.stds):
                digest.update(f"|{name}|".encode() + tensors[name].contiguous().numpy().tobytes())
        return digest.hexdigest()[:24]

    def save(self, path: Path) -> Path:
        """Write them as safetensors, whole or not at all."""
        return write_atomically(path, self.encoded())

    def encoded(self, more: Mapping[str, str] = MappingProxyType({})) -> bytes:
        """The content of their file, with ``more`` in its metadata."""
        tensors = {f"mean|{name}": value.contiguous() for name, value in self.means.items()}
        tensors |= {f"std|{name}": value.contiguous() for name, value in self.stds.items()}
        note = {
            **more,
            "kind": "activation_statistics",
            "fingerprint": self.fingerprint,
            "prompts": str(self.prompts),
            "identity": self.identity,
        }
        return save(tensors, metadata=note)

    @classmethod
    def decoded(cls, data: bytes) -> tuple[ActivationStatistics, dict[str, str]]:
        """The statistics that ``encoded`` gave, and their file's metadata.

        Raises:
            KeyError, TypeError or ValueError: It is something else, or damaged.
        """
        tensors, note = tensors_and_note(data)
        if note["kind"] != "activation_statistics":
            raise ValueError(f"it is a {note['kind']}")
        parts: dict[str, dict[str, torch.Tensor]] = {"mean": {}, "std": {}}
        for name, value in tensors.items():
            which, _, layer = name.partition("|")
            parts[which][layer] = value
        found = cls(parts["mean"], parts["std"], int(note["prompts"]), note["fingerprint"])
        if found.identity != note["identity"]:
            raise ValueError("its content does not fit the hash in it")
        return found, note

    @classmethod
    def load(cls, path: Path, model: TextToImage) -> ActivationStatistics:
        """Read what ``save`` wrote, for the checkpoint it was made for.

        Raises:
            InputError: No such file, a damaged one, or one of another checkpoint.
        """
        data = read_statistics(path)
        try:
            found, _ = cls.decoded(data)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{path} holds no activation statistics, or is damaged: {error}\n{_FIX}"
            ) from error
        if found.fingerprint != model.fingerprint:
            raise InputError(
                f"the statistics {path} are those of a checkpoint with fingerprint "
                f"{found.fingerprint}, but {model.name} has {model.fingerprint}\n{_FIX} for it"
            )
        return found


@torch.no_grad()
def activations(
    layer: nn.Module, text: torch.Tensor, read: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over tokens of a value layer's absolute output, (N, C), fp32 on the CPU.

    Computed in fp32 whatever the weights are kept in.

    Args:
        layer: A linear layer.
        text: What it takes (N, tokens, width); see ``TextToImage.value_input``.
        read: Which rows of the embeddings (N, T) the denoiser reads, the tokens first; the mean
            leaves padding out. None for all of them.
    """
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"a value layer must be linear, got {type(layer).__name__}")
    weight = layer.weight.float()
    bias = None if layer.bias is None else layer.bias.float()
    values = F.linear(text.to(weight.device, torch.float32), weight, bias).abs()
    tokens = None if read is None else read[:, : text.shape[1]].to(values)
    if tokens is None or bool(tokens.all()):
        return values.mean(1).cpu()
    return (values * (tokens / tokens.sum(1, keepdim=True))[..., None]).sum(1).cpu()


@contextmanager
def heard_inputs(
    layers: Mapping[str, nn.Module], listen: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Call ``listen`` with a layer's name and input at each of its passes while open."""
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(
                layer.register_forward_pre_hook(lambda _, inputs, name=name: listen(name, *inputs))
            )
        yield


def even_timestep(model: TextToImage, place: int) -> int:
    """Timestep at a place in NeMo's 50 steps, taken evenly down a checkpoint's schedule."""
    steps = model.num_train_timesteps
    return steps - 1 - place * steps // PUBLISHED_STEPS


@torch.no_grad()
def value_activations(
    model: TextToImage, layers: Mapping[str, nn.Module], embeddings: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Each value layer's activations (N, C) of embeddings (N, T, D); see ``activations``.

    Where text passes the blocks beside the image, means over its tokens and over passes from
    `NOISES` noises, the same for every text, at the second of NeMo's 50 steps. An embedding has
    passes of its own, so its activations do not depend on its company.

    Args:
        model: Checkpoint; left as it was.
        layers: Some of its layers ``text.value`` by name.
        embeddings: Embeddings.
    """
    if not model.text_stream:
        text, read = model.value_input(embeddings), model.read(embeddings)
        return {name: activations(layer, text, read) for name, layer in layers.items()}
    generator = keyed_generator("activations of the text stream")
    noise = torch.randn((NOISES, *model.latent_shape), generator=generator).to(model.device)
    timesteps = torch.full((NOISES,), even_timestep(model, 1), device=model.device)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def listen(name: str, inputs: torch.Tensor) -> None:
        found[name].append(activations(layers[name], inputs).mean(0))

    with model.frozen(), heard_inputs(layers, listen):
        for embedding in embeddings.to(model.device):
            model.predict_noise(noise, timesteps, embedding.expand(NOISES, -1, -1))
    return {name: torch.stack(rows) for name, rows in found.items()}


def activation_statistics(model: TextToImage, prompts: Sequence[str]) -> ActivationStatistics:
    """Statistics of all value layers of text of a checkpoint.

    One pass, in float64, by merging the moments of chunks (Chan et al., 1983), so that memory does
    not grow with the number of prompts.

    Args:
        model: The checkpoint.
        prompts: Ordinary prompts, at least two.

    Raises:
        InputError: There are fewer than two prompts.
    """
    if len(prompts) < 2:
        raise InputError(f"activation statistics need at least 2 prompts, got {len(prompts)}")
    layers = model.layers("text.value")
    at_once = 1 if model.text_stream else PROMPTS_AT_ONCE
    count = 0
    means: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    with progress_bar("activation statistics", len(prompts)) as advance:
        for start in range(0, len(prompts), at_once):
            embeddings = model.encode_prompts(prompts[start : start + at_once])
            added = len(embeddings)
            for name, activated in value_activations(model, layers, embeddings).items():
                values = activated.double()
                mean = values.mean(0)
                square = (values - mean).square().sum(0)
                if count == 0:
                    means[name], squares[name] = mean, square
                    continue
                away = mean - means[name]
                means[name] = means[name] + away * (added / (count + added))
                squares[name] += square + away.square() * (count * added / (count + added))
            count += added
            advance(added)
    return ActivationStatistics(
        {name: value.float() for name, value in means.items()},
        {name: (value / (count - 1)).sqrt().float() for name, value in squares.items()},
        count,
        model.fingerprint,
    )


STATISTICS: Codec[ActivationStatistics] = Codec(
    ".safetensors",
    ActivationStatistics.encoded,
    lambda path: ActivationStatistics.decoded(path.read_bytes()),
)


def kept_statistics(
    model: TextToImage, prompts: Sequence[str], cache: Cache
) -> ActivationStatistics:
    """As ``activation_statistics``, computed once for all mitigations of a sweep."""
    # no name that the file's own metadata has
    key = {
        "checkpoint": model.fingerprint,
        "device": model.device.type,  # roundings differ
        "captions": content_hash(list(prompts)),
    }
    return cache.get(
        content_hash(key)[:24], key, lambda: activation_statistics(model, prompts), STATISTICS
    )


def read_statistics(path: Path) -> bytes:
    """Bytes of a statistics file.

    Raises:
        InputError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read the statistics {path}: {error.strerror or error}\n{_FIX}"
        ) from error


@dataclass(frozen=True)
class LayerInfluence:
    """What it does to the predicted noise when one value layer sees the empty prompt instead.

    NeMo's seven layers are those that matter in Stable Diffusion v1; another checkpoint may carry
    its conditioning elsewhere, and then pruning them hides nothing.

    Attributes:
        change: Norm of the difference over the norm of the noise; mean over prompts.
        share: Norm of the difference over that of the difference which the empty prompt makes
            everywhere; 1 where this layer carries all that the prompt does. Shares need not add
            up to 1.
    """

    change: float
    share: float


@torch.no_grad()
def layer_influence(
    model: TextToImage,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    seed: int = 0,
    timestep: int | None = None,
) -> dict[str, LayerInfluence]:
    """Measure every value layer of text, in execution order.

    The latents are the model's own images of the prompts, noised again, so that no images are
    needed and the model sees what it would see while it generates.

    Args:
        model: The checkpoint.
        prompts: A few ordinary prompts, N.
        sampling: How their images are generated.
        seed: Of the two noises.
        timestep: Where the noise is predicted; None for the middle of the schedule.

    Raises:
        InputError: There is no such timestep.
    """
    when = model.num_train_timesteps // 2 if timestep is None else timestep
    if not 0 <= when < model.num_train_timesteps:
        raise InputError(
            f"task.timestep must be in 0..{model.num_train_timesteps - 1}, got {timestep}"
        )
    embeddings = model.encode_prompts(prompts)
    shape = (len(prompts), *model.latent_shape)
    start, noise = (
        torch.randn(shape, generator=keyed_generator("layer influence", seed, which)).to(
            model.device
        )
        for which in ("start", "noise")
    )
    timesteps = torch.full((len(prompts),), when, device=model.device)
    empty = model.empty_embedding().expand_as(embeddings)
    layers = model.layers("text.value")
    heard: dict[str, torch.Tensor] = {}
    passes = len(model.sampling_timesteps(sampling)) + 2 + len(layers)
    with model.frozen(), passes_shown(model, "influence of layers", passes):
        noised = model.noised(model.denoise(embeddings, start, sampling), noise, timesteps)
        usual = model.predict_noise(noised, timesteps, embeddings)
        with heard_inputs(layers, heard.__setitem__):
            without = model.predict_noise(noised, timesteps, empty)
        found = {}
        for name, layer in layers.items():
            with layer.register_forward_hook(_instead(heard[name])):
                changed = model.predict_noise(noised, timesteps, embeddings)
            found[name] = LayerInfluence(
                change=_ratio(changed - usual, usual),
                share=_ratio(changed - usual, without - usual),
            )
    return found


def _instead(given: torch.Tensor) -> Any:
    def hook(module: nn.Module, *_: Any) -> Any:
        # forward itself, which calls no hooks
        return module.forward(given)

    return hook


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> float:
    """Mean over rows of a ratio of norms; 0 where both are zero."""
    norms, scales = part.flatten(1).norm(dim=1), whole.flatten(1).norm(dim=1)
    return float(torch.where(norms == 0, torch.zeros_like(norms), norms / scales).mean())
