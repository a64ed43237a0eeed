"""Whether the parts of a checkpoint are themselves and fit each other, tried out on loading.

A tokenizer without its vocabulary loads, and so does a UNet that asks for more than text; what an
audit of them says is no statement about the checkpoint. So each part answers a small question.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPTextModel, CLIPTokenizer

from dori_lightning.models.stable_diffusion import SAMPLERS, Parts, StableDiffusion
from dori_lightning.types import CoderRows, InputError, first_line

PROBES = ("", "a", "b", "photo of a red boat", "two dogs, 3 chairs", "the end.")
"""Prompts that must give different tokens and embeddings."""

PADDED_TOKENS = 128
"""How many tokens more than the tokenizer knows an encoder may have: tables of embeddings are
padded to round sizes."""

_CONDITIONING = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)
"""Settings of a UNet that asks for more than latents, a timestep and text."""

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


def check_parts(parts: Parts, home: str) -> None:
    """Refuse parts that do not fit each other, or are none of a text-to-image checkpoint.

    Args:
        parts: Which.
        home: Folder or hub id with the configuration, for messages.

    Raises:
        InputError: Says which, and names the file.
    """
    _check_channels(parts.unet, parts.autoencoder, home)
    _check_schedule(parts.scheduler, home)
    _check_samplers(parts.scheduler, home)
    width = parts.text_encoder.config.hidden_size
    wanted = parts.unet.config["cross_attention_dim"]
    _require(
        {width} == ({wanted} if isinstance(wanted, int) else set(wanted)),
        f"the text encoder gives width {width}, but the UNet's cross-attention takes {wanted}",
        f"{home}/text_encoder/config.json; {home}/unet/config.json",
    )
    with blamed("the tokenizer does not work", _tokenizer_files(home)):
        _check_tokens(parts.tokenizer, parts.text_encoder, home)


def check_answers(model: StableDiffusion, home: str) -> None:
    """Ask each part of a loaded checkpoint a small question; a UNet pass of the smallest size.

    Args:
        model: Which.
        home: Folder or hub id with the configuration, for messages.

    Raises:
        InputError: A part does not run, or its answer cannot be one; names its file.
    """
    files = f"{home}/text_encoder/config.json; {home}/text_encoder/model.safetensors"
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
    factor = 2 ** (len(model.autoencoder.config["block_out_channels"]) - 1)
    # two pixels a side are left in the middle: some layers normalize over them
    side = 2 ** len(model.unet.config["block_out_channels"])
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
    with blamed("the UNet does not run", f"{home}/unet/config.json"), torch.no_grad():
        places = torch.tensor([model.num_train_timesteps // 2], device=model.device)
        noise = model.predict_noise(latents, places, embeddings[1:2])
        _require(
            noise.shape == latents.shape and bool(noise.isfinite().all()),
            "the UNet gives no numbers, or noise of another shape than its latents; in half "
            "precision try checkpoint.precision=fp32",
            f"{home}/unet/config.json",
        )
    # what a checkpoint is asked when it is loaded is no part of a run's work
    model.unet_evaluations, model.coder_rows = 0, CoderRows()


def _check_channels(unet: UNet2DConditionModel, autoencoder: AutoencoderKL, home: str) -> None:
    takes, gives = unet.config["in_channels"], unet.config["out_channels"]
    own = autoencoder.config["latent_channels"]
    _require(
        takes == gives == own,
        f"the UNet takes {takes} channels and gives {gives}, but the autoencoder's latents have "
        f"{own}: an inpainting, depth or editing model is no text-to-image checkpoint",
        f"{home}/unet/config.json; {home}/vae/config.json",
        "give a checkpoint that generates from text alone",
    )
    more = [name for name in _CONDITIONING if unet.config.get(name) is not None]
    _require(
        not more,
        f"the UNet asks for conditioning besides text ({', '.join(more)}), as Stable Diffusion "
        f"XL and distilled or class-conditional models do",
        f"{home}/unet/config.json",
        "give a checkpoint of Stable Diffusion 1 or 2 that generates from text alone",
    )
    side, scale = unet.config["sample_size"], autoencoder.config["scaling_factor"]
    _require(
        isinstance(side, int) and side > 0,
        f"sample_size must be a whole number of latent pixels, got {side!r}",
        f"{home}/unet/config.json",
    )
    _require(
        isinstance(scale, int | float) and math.isfinite(scale) and scale > 0,
        f"scaling_factor must be a number above 0, got {scale!r}",
        f"{home}/vae/config.json",
    )


def _check_schedule(scheduler: DDIMScheduler, home: str) -> None:
    where = f"{home}/scheduler/scheduler_config.json"
    with blamed("the noise schedule cannot be used", where):
        alphas = torch.as_tensor(scheduler.alphas_cumprod)
        count = int(scheduler.config["num_train_timesteps"])
        unsaid = set(scheduler.config.get("_use_default_values", ())) & _SCHEDULE
        _require(
            not unsaid or scheduler.config["trained_betas"] is not None,
            f"the noise schedule is not said: {', '.join(sorted(unsaid))} is missing",
            where,
        )
        kind = scheduler.config["prediction_type"]
        _require(
            kind in ("epsilon", "v_prediction"),
            f"prediction type must be epsilon or v_prediction, got {kind!r}",
            where,
        )
        _require(
            len(alphas) == count > 1
            and bool((alphas >= 0).all() and (alphas <= 1).all())
            and bool((alphas.diff() <= 0).all() and alphas[0] > alphas[-1]),
            f"the noise schedule must fall from below 1 towards 0 over {count} timesteps; it has "
            f"{len(alphas)} and goes from {float(alphas[0]):.3g} to {float(alphas[-1]):.3g}",
            where,
        )


def _check_samplers(configured: DDIMScheduler, home: str) -> None:
    """Take the first steps of each sampler."""
    where = f"{home}/scheduler/scheduler_config.json"
    last = int(configured.config["num_train_timesteps"]) - 1
    generator = torch.Generator("cpu").manual_seed(0)
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=generator)
    for name, kind in SAMPLERS.items():
        for steps in (1, min(50, last)):
            with blamed(f"the sampler {name} does not run", where):
                scheduler: Any = kind.from_config(configured.config)
                scheduler.set_timesteps(steps, device="cpu")
                places, x = scheduler.timesteps, latents
                _require(
                    len(places) > 0 and int(places.min()) >= 0 and int(places.max()) <= last,
                    f"the sampler {name} visits timesteps {int(places.min())} to "
                    f"{int(places.max())}; the noise schedule has 0 to {last}",
                    where,
                )
                for place in places[:2]:
                    x = scheduler.step(noise, place, x, return_dict=False)[0]
                _require(bool(x.isfinite().all()), f"the sampler {name} gives no numbers", where)


def _check_tokens(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, home: str) -> None:
    where = _tokenizer_files(home)
    known, takes = len(tokenizer), text_encoder.config.vocab_size
    _require(
        known <= takes < known + PADDED_TOKENS,
        f"the tokenizer knows {known} tokens, but the text encoder has embeddings of {takes}",
        f"{where}; {home}/text_encoder/config.json",
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


def _tokenizer_files(home: str) -> str:
    return (
        f"{home}/tokenizer: tokenizer.json, or vocab.json with merges.txt; tokenizer_config.json"
    )


def _unreachable(tokenizer: CLIPTokenizer) -> list[str]:
    """Tokens of more than one letter that no merge makes; special tokens need none."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
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
