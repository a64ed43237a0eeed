"""Whether the components of a checkpoint are themselves and fit each other, tried out on loading.

A tokenizer without its vocabulary loads, and so does a UNet that asks for more than text; what an
audit of them says is no statement about the checkpoint. So each component answers a small
question.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dori_lightning.models.components import Component, Components
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.noise_levels import PREDICTIONS, NoiseLevels
from dori_lightning.models.protocol import Sampling
from dori_lightning.types import CoderRows, InputError, first_line

PROBES = ("", "a", "b", "photo of a red boat", "two dogs, 3 chairs", "the end.")
"""Prompts that must give different tokens and embeddings."""

PADDED_TOKENS = 128
"""How many tokens more than the tokenizer knows an encoder may have: tables of embeddings are
padded to round sizes."""

DENOISER_WORDS = {"unet": "UNet", "transformer": "transformer"}
"""How messages call the denoiser, by its component."""

_SCHEDULE = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule"}
"""Settings of a noise schedule that every checkpoint states; a library's own are another's."""

_ONE = "get the checkpoint's folder again, or the file that was changed in it"


@contextmanager
def blamed(what: str, where: str, fix: str = _ONE) -> Iterator[None]:
    """Turn whatever a library raises over somebody's files into one message that names them.

    Too little memory is no fault of a file and passes.

    Raises:
        InputError: In the place of any other error.
    """
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"{what}: {first_line(error)}", where=where, fix=fix) from error


def check_components(kind: type[LatentDiffusion], components: Components, home: str) -> None:
    """Refuse components that do not fit each other, or are none of the family.

    Args:
        kind: Adapter of the family.
        components: Which.
        home: Folder or hub id with the configuration, for messages.

    Raises:
        InputError: Says which, and names the file.
    """
    for what, names in kind.unlike_the_family(components):
        raise InputError(
            what,
            where="; ".join(f"{home}/{name}/config.json" for name in names),
            fix=f"give a checkpoint of {kind.family.title} that generates from text alone",
        )
    _check_sizes(components, home)
    _check_schedule(components.scheduler, home)
    for name, (encoder, tokenizer) in components.encoders.items():
        files = _tokenizer_files(home, name)
        with blamed("the tokenizer does not work", files):
            _check_tokens(tokenizer, encoder, files, f"{home}/{name}/config.json")


def check_answers(model: LatentDiffusion, home: str) -> None:
    """Ask each component of a loaded checkpoint a small question; the smallest denoiser pass.

    Args:
        model: Which.
        home: Folder or hub id with the configuration, for messages.

    Raises:
        InputError: A component does not run, or its answer cannot be one; names its file.
    """
    _check_samplers(model, home)
    files = "; ".join(
        f"{home}/{name}/config.json; {home}/{name}/model.safetensors"
        for name in model.components.encoders
    )
    with blamed("the text encoder does not run", files):
        embeddings = model.encode_prompts(PROBES)
        _require(
            tuple(embeddings.shape) == (len(PROBES), *model.embedding_shape)
            and bool(embeddings.isfinite().all()),
            "the text encoder gives no numbers, or embeddings of another shape",
            files,
        )
        same = _first_twins([row.tobytes() for row in embeddings.cpu().numpy()])
        _require(
            same is None,
            f"the text encoder gives the prompts {same} the same embedding",
            files,
        )
    factor = model.resolution // model.latent_shape[1]
    side = model.smallest_side
    generator = torch.Generator("cpu").manual_seed(0)
    with blamed("the autoencoder does not run", f"{home}/vae/config.json"):
        image = torch.rand(1, 3, side * factor, side * factor, generator=generator)
        latents = model.encode_images(image)
        again = model.decode_latents(latents)
        _require(
            tuple(latents.shape) == (1, model.latent_shape[0], side, side)
            and again.shape == image.shape
            and bool(latents.isfinite().all() and again.isfinite().all()),
            f"the autoencoder gives no numbers, or turns an image of {image.shape[-1]} pixels "
            f"into latents of shape {tuple(latents.shape[1:])} and an image of "
            f"{again.shape[-1]} pixels",
            f"{home}/vae/config.json",
        )
    called = DENOISER_WORDS[model.family.denoiser]
    where = f"{home}/{model.family.denoiser}/config.json"
    with blamed(f"the {called} does not run", where), torch.no_grad():
        places = torch.tensor([model.num_train_timesteps // 2], device=model.device)
        noise = model.predict_noise(latents, places, embeddings[1:2])
        _require(
            noise.shape == latents.shape and bool(noise.isfinite().all()),
            f"the {called} gives no numbers, or noise of another shape than its latents; in half "
            f"precision try checkpoint.precision=fp32",
            where,
        )
    # what a checkpoint is asked when it is loaded is no part of a run's work
    model.unet_evaluations, model.coder_rows = 0, CoderRows()


def _check_sizes(components: Components, home: str) -> None:
    side = components.denoiser.config.get("sample_size")
    scale = components.autoencoder.config["scaling_factor"]
    _require(
        side is None or (isinstance(side, int) and side > 0),
        f"sample_size must be a whole number of latent pixels, got {side!r}",
        f"{home}/{components.family.denoiser}/config.json",
    )
    _require(
        isinstance(scale, int | float) and math.isfinite(scale) and scale > 0,
        f"scaling_factor must be a number above 0, got {scale!r}",
        f"{home}/vae/config.json",
    )


def _check_schedule(scheduler: Any, home: str) -> None:
    where = f"{home}/scheduler/scheduler_config.json"
    with blamed("the noise schedule cannot be used", where):
        levels = NoiseLevels.of(scheduler, torch.device("cpu"))
        count = int(scheduler.config["num_train_timesteps"])
        unsaid = set(scheduler.config.get("_use_default_values", ())) & _SCHEDULE
        _require(
            levels.flow or not unsaid or scheduler.config["trained_betas"] is not None,
            f"the noise schedule is not said: {', '.join(sorted(unsaid))} is missing",
            where,
        )
        _require(
            levels.prediction in PREDICTIONS,
            f"prediction type must be epsilon or v_prediction, got {levels.prediction!r}",
            where,
        )
        left = levels.signal_variance
        _require(
            len(left) == count > 1
            and bool((left >= 0).all() and (left <= 1).all())
            and bool((left.diff() <= 0).all() and left[0] > left[-1]),
            f"the noise schedule must fall from below 1 towards 0 over {count} timesteps; it has "
            f"{len(left)} and goes from {float(left[0]):.3g} to {float(left[-1]):.3g}",
            where,
        )


def _check_samplers(model: LatentDiffusion, home: str) -> None:
    """Take the first steps of each sampler."""
    where = f"{home}/scheduler/scheduler_config.json"
    last = model.num_train_timesteps - 1
    generator = torch.Generator("cpu").manual_seed(0)
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=generator)
    distilled = 1.0 if model.takes_distilled_guidance else None
    for name in model.family.samplers:
        for steps in (1, min(50, last)):
            with blamed(f"the sampler {name} does not run", where):
                scheduler = model.scheduler_of(Sampling(name, steps, distilled_guidance=distilled))
                places, x = scheduler.timesteps, latents
                _require(
                    len(places) > 0
                    and int(places.min()) >= 0
                    and int(places.max()) <= last + model.levels.flow,
                    f"the sampler {name} visits timesteps {int(places.min())} to "
                    f"{int(places.max())}; the noise schedule has 0 to {last}",
                    where,
                )
                for place in places[:2]:
                    if hasattr(scheduler, "scale_model_input"):
                        scheduler.scale_model_input(x, place)
                    x = scheduler.step(noise, place, x, return_dict=False)[0]
                _require(bool(x.isfinite().all()), f"the sampler {name} gives no numbers", where)


def _check_tokens(tokenizer: Any, text_encoder: Any, where: str, config: str) -> None:
    known, takes = len(tokenizer), text_encoder.config.vocab_size
    _require(
        known <= takes < known + PADDED_TOKENS,
        f"the tokenizer knows {known} tokens, but the text encoder has embeddings of {takes}",
        f"{where}; {config}",
        "give both of one checkpoint: tokenizer.json, or vocab.json with merges.txt",
    )
    length = tokenizer.model_max_length
    _require(length >= 3, f"prompts of {length} tokens hold no word", where)
    _require(
        set(tokenizer.get_vocab().values()) == set(range(known)),
        f"the ids of the tokenizer's {known} tokens are not 0 to {known - 1}: some are missing",
        where,
    )
    unreachable = _unreachable(tokenizer)
    _require(
        not unreachable,
        f"{len(unreachable)} of the tokenizer's {known} tokens are the result of no merge "
        f"({', '.join(unreachable[:5])}): its merges are missing or those of another",
        where,
    )
    padded = {"padding": "max_length", "truncation": True, "max_length": 77}
    tokens = [tuple(tokenizer(prompt, **padded).input_ids) for prompt in PROBES]
    same = _first_twins(tokens)
    _require(
        same is None,
        f"the tokenizer turns the prompts {same} into the same tokens: its vocabulary is missing",
        where,
    )


def _tokenizer_files(home: str, encoder: Component) -> str:
    name = encoder.replace("text_encoder", "tokenizer")
    return f"{home}/{name}: tokenizer.json, or vocab.json with merges.txt; tokenizer_config.json"


def _unreachable(tokenizer: Any) -> list[str]:
    """Tokens of more than one letter that no merge makes; special tokens need none."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if "merges" not in state["model"]:
        return []
    model, special = state["model"], {token["content"] for token in state["added_tokens"]}
    ending = model["end_of_word_suffix"] or ""
    made = {"".join(merge) for merge in model["merges"]}
    return [
        token
        for token in model["vocab"]
        if len(token.removesuffix(ending)) > 1 and token not in made and token not in special
    ]


def _first_twins(answers: list[Any]) -> str | None:
    """The first two probes with the same answer."""
    seen: dict[Any, str] = {}
    for prompt, answer in zip(PROBES, answers, strict=True):
        if answer in seen:
            return f"{seen[answer]!r} and {prompt!r}"
        seen[answer] = prompt
    return None


def _require(good: bool, what: str, where: str, fix: str = _ONE) -> None:
    if not good:
        raise InputError(what, where=where, fix=fix)
