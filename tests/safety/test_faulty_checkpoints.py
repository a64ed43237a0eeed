"""Every fault of a checkpoint's folder is refused with the name of its file, or harmless.

Faults are injected one by one into a folder that loads: each file removed, emptied, cut and
replaced, each value of each configuration changed or left out, each tensor dropped or reshaped.
What still loads either gives the same answers, or a changed value makes it another legal
checkpoint, which its fingerprint then says.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from dori_lightning.models.generation import generation_noise
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.protocol import Sampling
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.types import InputError
from support.tiny import write_tiny

PROMPTS = ("a red boat on sea", "photo of a cat")
QUICK = 97
"""Of how many faults one is injected in the quick test; prime, so that it meets every kind."""


class Fault(NamedTuple):
    """A change of one file.

    Attributes:
        file: Which, relative to the folder.
        what: For messages.
        inject: Changes it.
        legal: Whether the result may be another checkpoint.
    """

    file: str
    what: str
    inject: Callable[[Path], Any]
    legal: bool = False


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("faults") / "tiny")


def load(folder: Path) -> StableDiffusion:
    return load_checkpoint(name="x", source=str(folder), device="cpu")


def answers(model: StableDiffusion) -> list[torch.Tensor]:
    """What an audit rests on: embeddings, noise, images, latents and the samplers' timesteps."""
    embeddings = model.encode_prompts(PROMPTS)
    noise = generation_noise(0, model.latent_shape)[None]
    with torch.no_grad():
        predicted = model.predict_noise(noise, torch.tensor([500]), embeddings[:1])
    images = model.decode_latents(noise)
    steps = [model.sampling_timesteps(Sampling(name, steps=3)) for name in ("ddim", "dpm++")]
    return [embeddings, predicted, images, model.encode_images(images), *steps]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def faults_of_files(folder: Path) -> Iterator[Fault]:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        file, size = str(path.relative_to(folder)), path.stat().st_size
        yield Fault(file, "removed", Path.unlink)
        for what, content in (
            ("emptied", b""),
            ("cut", path.read_bytes()[: size // 2]),
            ("cut by a byte", path.read_bytes().rstrip()[:-1]),
            ("an empty object", b"{}"),
            ("a list", b"[]"),
            ("a web page", b"<!doctype html><html></html>"),
        ):
            yield Fault(file, what, lambda p, content=content: p.write_bytes(content))


def other_values(value: Any) -> list[Any]:
    """Values of the same kind, and of others."""
    if isinstance(value, bool):
        return [not value, "nonsense"]
    if isinstance(value, int | float):
        return [0, -value - 1, value * 2, value + 1, "nonsense", None]
    if isinstance(value, str):
        return ["nonsense", "", 3, None]
    if isinstance(value, list):
        return [[], value[:-1], [*value, value[-1]], "nonsense"]
    return [1, "nonsense", [1, 2]]


def faults_of_values(folder: Path) -> Iterator[Fault]:
    for path in sorted(folder.glob("*/*config.json")):
        file, held = str(path.relative_to(folder)), json.loads(path.read_text("utf-8"))
        for key, value in held.items():
            changed = [{**held, key: other} for other in other_values(value)]
            for config in (*changed, {k: v for k, v in held.items() if k != key}):
                text = json.dumps(config)
                yield Fault(
                    file,
                    f"{key} {config.get(key, 'left out')!r}",
                    lambda p, text=text: p.write_text(text),
                    legal=True,
                )


def faults_of_tensors(folder: Path) -> Iterator[Fault]:
    changes = [
        ("dropped", None),
        ("longer", lambda t: torch.cat([t, t])),
        ("flat", lambda t: t.reshape(1, -1)),
    ]

    def inject(path, name, make):
        state = load_file(path)
        tensor = state.pop(name)
        if make is not None:
            state[name] = make(tensor)
        save_file(state, path, metadata={"format": "pt"})

    for path in sorted(folder.glob("*/*.safetensors")):
        file = str(path.relative_to(folder))
        for k, name in enumerate(sorted(load_file(path))):
            what, make = changes[k % len(changes)]
            yield Fault(file, f"{name} {what}", lambda p, n=name, m=make: inject(p, n, m))


def faults_of_tokens(folder: Path) -> Iterator[Fault]:
    path = folder / "tokenizer" / "tokenizer.json"
    file, text = str(path.relative_to(folder)), path.read_text("utf-8")

    def without(model: dict[str, Any], what: str) -> None:
        merged = "".join(model["merges"][-1])
        if what == "the last merge":
            model["merges"].pop()
        elif what == "a merged token":
            del model["vocab"][merged]
        elif what == "a letter":
            del model["vocab"]["q"]
        else:
            model[what].clear()

    for what in ("the last merge", "a merged token", "a letter", "vocab", "merges"):
        held = json.loads(text)
        without(held["model"], what)
        content = json.dumps(held)
        yield Fault(file, f"without {what}", lambda p, content=content: p.write_text(content))


def all_faults(folder: Path) -> list[Fault]:
    kinds = (faults_of_files, faults_of_values, faults_of_tensors, faults_of_tokens)
    return [fault for kind in kinds for fault in kind(folder)]


def complaints(folder: Path, faults: list[Fault]) -> list[str]:
    """What is wrong with how faults end; the folder is as before afterwards."""
    sound = load(folder)
    expected, found = answers(sound), []
    for fault in faults:
        path = folder / fault.file
        before, what = path.read_bytes(), f"{fault.file}, {fault.what}"
        try:
            fault.inject(path)
            model = load(folder)
            is_same = model.fingerprint == sound.fingerprint
            if is_same and not same(answers(model), expected):
                found.append(f"{what}: other answers under the same fingerprint")
            elif not is_same and not fault.legal:
                found.append(f"{what}: another checkpoint without a word")
        except InputError as refused:
            said = str(refused)
            if not (path.name in said and path.parent.name in said):
                found.append(f"{what}: the message does not name the file: {said}")
        except Exception as error:
            found.append(f"{what}: {type(error).__name__} {error}")
        finally:
            path.write_bytes(before)
    return found


def test_some_faults_are_refused_by_name_or_harmless(folder):
    assert complaints(folder, all_faults(folder)[::QUICK]) == []


@pytest.mark.slow
def test_every_fault_is_refused_by_name_or_harmless(folder):
    faults = all_faults(folder)
    assert len(faults) >= 200
    assert {fault.file for fault in faults} == {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    }
    assert complaints(folder, faults) == []
