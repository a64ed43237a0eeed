"""What a mitigation is: something that looks at a model and pairs and returns an edit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as L
import torch
from torch import nn

from dori_lightning import types
from dori_lightning.metrics.calibration import ReferenceImages
from dori_lightning.mitigations.edits import Edit, read_edit, write_edit
from dori_lightning.models.loading import FAMILIES
from dori_lightning.models.progress import encode_prompts
from dori_lightning.models.protocol import LayerRole, Sampling, TextToImage
from dori_lightning.pairs.corpus import Corpus, Split
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.pairs.encoded_corpus import EncodedCorpus
from dori_lightning.runtime import distributed
from dori_lightning.runtime.artifacts import content_hash
from dori_lightning.runtime.cache import Cache, held
from dori_lightning.types import InputError, Pair

STAGES: tuple[str, ...] = tuple(
    dict.fromkeys(
        stage
        for kind in FAMILIES.values()
        for stage in (*(stage for _, stage in kind.layer_names), *kind.closed_stages)
    )
)
"""Stages of all families' denoisers."""


class Mitigation(Protocol):
    """A way to make a model forget images.

    Implementations are frozen dataclasses: their fields are the settings that decide the edit.

    Attributes:
        name: How reports call it.
    """

    @property
    def name(self) -> str:
        """How reports call it."""
        ...

    def apply(self, model: TextToImage, pairs: Sequence[Pair], context: Context) -> Edit:
        """Find the edit that should make ``model`` forget ``pairs``; leave the model as it was.

        Args:
            model: Checkpoint to mitigate.
            pairs: Pairs to forget (vm and tm); nothing may be read of any other pair.
            context: What mitigations work with.
        """
        ...


@dataclass(frozen=True)
class Evaluations:
    """Work, in rows that go through the denoiser or the decoder.

    Attributes:
        forward: Without gradient.
        attack: With the gradient of the embedding.
        training: With the gradient of the weights.
        decoded: Latents that are decoded to images.
    """

    forward: int = 0
    attack: int = 0
    training: int = 0
    decoded: int = 0

    @classmethod
    def of_images(cls, count: int, sampling: Sampling) -> Evaluations:
        """Work of generating ``count`` images."""
        return cls(forward=count * sampling.steps * sampling.rows_per_step, decoded=count)

    def __add__(self, other: Evaluations) -> Evaluations:
        return Evaluations(
            self.forward + other.forward,
            self.attack + other.attack,
            self.training + other.training,
            self.decoded + other.decoded,
        )


@dataclass(frozen=True)
class CostEstimate:
    """What finding an edit takes, as far as a mitigation's settings tell.

    A mitigation may have a method ``estimate_cost(sampling, pairs)`` that returns this for a
    number of pairs to forget; plans of mitigations without one say that they do not count it.

    Attributes:
        work: Evaluations that find the edit.
        not_counted: Why these are not all of them, or may be fewer; empty where they are exact.
        stored_weights: Share of the denoiser's weights that the edit's file holds.
        evaluations_per_image: Evaluations with the embedding's gradient that the edit adds to
            every image generated under it, at most; as many more go without gradient.
        builds_on: Mitigations whose edits are found first.
    """

    work: Evaluations = Evaluations()
    not_counted: str = ""
    stored_weights: float = 0.0
    evaluations_per_image: int = 0
    builds_on: tuple[Mitigation, ...] = ()


@dataclass(frozen=True)
class EditResult:
    """An edit, and whether it had to be made.

    Attributes:
        edit: The edit.
        key: Hash of everything that decides it.
        made: Whether it was made now rather than read.
        path: Its file; None where it is not kept in one.
    """

    edit: Edit
    key: str
    made: bool
    path: Path | None


@dataclass(frozen=True)
class Context:
    """What mitigations work with besides the model and the pairs.

    Attributes:
        seed: Run seed; mitigations draw by keyed generators (``runtime.seeding``).
        corpus: Ordinary prompts and images.
        data: Encoded pairs, a superset of those to forget.
        references: Their images, described: what a surrogate must not resemble.
        sampling: How images are generated.
        trainer: Makes a Trainer for a fit, given its keyword arguments.
        folder: Where edits and encodings of ordinary images are kept, shared by the jobs of a
            sweep.
    """

    seed: int
    corpus: Corpus
    data: PairsDataModule
    references: ReferenceImages
    sampling: Sampling
    trainer: Callable[..., L.Trainer]
    folder: Path

    def prompts(self, model: TextToImage, split: Split, count: int) -> torch.Tensor:
        """Embeddings (N, T, D) of ordinary prompts."""
        return encode_prompts(model, self.corpus.prompts(split, count), "ordinary prompts")

    def ordinary(self, model: TextToImage, split: Split, count: int) -> EncodedCorpus:
        """Ordinary prompts and images, encoded as they are needed and kept beside the edits.

        Raises:
            InputError: The corpus has fewer, or no images.
        """
        cache = Cache(self.folder / "ordinary")
        return EncodedCorpus(self.corpus, model, split, count, cache=cache)

    def scratch(self, key: str) -> Path:
        """Where a fit keeps its checkpoints until its edit is written."""
        return self.folder / "unfinished" / key

    def find(
        self, mitigation: Mitigation, model: TextToImage, pairs: Sequence[Pair]
    ) -> EditResult:
        """Read a mitigation's edit where it is kept already, or make and keep it.

        Jobs that want the same edit at the same time wait for the one that makes it. The processes
        of one job make it together, and all go on with what the first of them wrote.

        Raises:
            InputError: The file is damaged; it is not made again behind the user's back.
        """
        key = edit_key(mitigation, model, pairs, self)
        path = self.folder / f"{key}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        first = distributed.is_first()
        lock, what = self.folder / f"{key}.lock", f"the edit of {mitigation.name}"
        with held(lock, what) if first else nullcontext():
            if distributed.broadcast_object(path.is_file()):
                edit = read_edit(path)
                if edit.origin is not None:
                    edit.origin.check(model)
                return EditResult(edit, key, made=False, path=path)
            started, evaluations = time.monotonic(), model.unet_evaluations
            edit = mitigation.apply(model, pairs, self)
            if edit.origin is not None:
                # an edit costs the same whether or not another one was found before it
                reused = edit.origin.cost.get("reused_evaluations", 0)
                cost = {
                    "unet_evaluations": model.unet_evaluations - evaluations + reused,
                    "seconds": round(time.monotonic() - started, 2),
                    **edit.origin.cost,
                }
                origin = replace(
                    edit.origin,
                    mitigation=mitigation.name,
                    settings=settings_fingerprint(mitigation),
                    cost=cost,
                )
                edit = replace(edit, origin=origin)
            if not edit.kind:
                return EditResult(edit, key, made=True, path=None)
            if first:
                write_edit(path, edit)
            distributed.barrier()
            if not first:
                edit = read_edit(path)
        return EditResult(edit, key, made=True, path=path)

    def discard(self, found: EditResult) -> None:
        """Remove an edit's file that nobody needs any more; called on every process."""
        distributed.barrier()  # the others may still read it
        if distributed.is_first() and found.path is not None:
            with held(self.folder / f"{found.key}.lock", "an edit that is removed"):
                found.path.unlink(missing_ok=True)


def settings_fingerprint(thing: Any) -> Any:
    """Settings of a mitigation as plain values, those of mitigations in it too.

    A mitigation that reads files has a method ``file_hashes``, which gives the hash of each: a
    file that was written anew makes another edit.
    """
    if is_dataclass(thing) and not isinstance(thing, type):
        settings = {
            item.name: settings_fingerprint(getattr(thing, item.name)) for item in fields(thing)
        }
        hashes: dict[str, str] = getattr(thing, "file_hashes", dict)()
        return {"kind": type(thing).__qualname__, **settings} | (
            {"file_hashes": hashes} if hashes else {}
        )
    if isinstance(thing, dict):
        return {str(key): settings_fingerprint(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [settings_fingerprint(item) for item in thing]
    if isinstance(thing, Path):
        return str(thing)
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    raise TypeError(f"settings of a mitigation must be plain values, got {thing!r}")


def edit_key(method: Any, model: TextToImage, pairs: Sequence[Pair], context: Context) -> str:
    """Hash of everything that decides an edit, or what edits are made from.

    A mitigation's name and the width of a generation batch are not among it.

    Args:
        method: A mitigation, or other settings, such as those of its surrogates.
        model: Checkpoint.
        pairs: Pairs to forget.
        context: What mitigations work with.
    """
    settings, sampling = settings_fingerprint(method), asdict(context.sampling)
    settings.pop("name", None)
    sampling.pop("batch")
    what = {
        "checkpoint": model.fingerprint,
        "latents": model.latent_shape,
        "settings": settings,
        "pairs": [
            (pair.id, pair.prompt, *(own.sha256 for own in pair.references)) for pair in pairs
        ],
        "corpus": context.corpus.identity,
        "seed": context.seed,
        "sampling": sampling,
        "decider": context.references.measures.decider,
    }
    return content_hash(what)[:24]


def check_family(mitigation: Mitigation, family: str) -> None:
    """Refuse what has no meaning on a family of checkpoints, before any is loaded.

    Raises:
        InputError: The mitigation, or one that it builds on, selects value neurons in another way
            than the family's follow from text, or edits a stage of the denoiser that cannot be.
    """
    kind = FAMILIES.get(family)
    if kind is None:
        return
    for own in _with_those_it_builds_on(mitigation):
        in_stream = getattr(own, "of_text_stream", None)
        if in_stream is not None:
            require_value_neurons(kind.family.title, kind.text_stream, in_stream=in_stream)
        stages = getattr(own, "stages", None) or ()
        kind.require_open(stages)
        known = dict.fromkeys(stage for _, stage in kind.layer_names)
        if strangers := [stage for stage in stages if stage not in known]:
            raise InputError(
                f"the denoiser of {kind.family.title} has no stage {', '.join(strangers)}",
                where="mitigation.stages",
                fix=f"some of {', '.join(known)}, or null for the usual ones",
            )


def require_value_neurons(model: str, text_stream: bool, *, in_stream: bool) -> None:
    """Refuse to select value neurons where they are not what a method selects.

    Args:
        model: What the model or its family is called.
        text_stream: See ``TextToImage``.
        in_stream: Whether the method selects in a stream of text.

    Raises:
        InputError: The model has no such stream, or has one and the method needs none.
    """
    if in_stream and not text_stream:
        raise InputError(
            f"{model} has no stream of text beside the image's: its value layers take the "
            f"prompt's embedding as it is",
            where="mitigation",
            fix="mitigation=nemo, or another preset of it that reads neurons off the prompt",
        )
    if text_stream and not in_stream:
        raise InputError(
            f"the value layers of {model} take text that has passed the image, noise and time of "
            f"earlier blocks, so their values do not follow from a prompt alone; methods that "
            f"read neurons off it are not defined there",
            where="mitigation",
            fix="mitigation=nemo_text_stream, which looks at passes of the denoiser; of random "
            "pruning mitigation@mitigation.like=nemo_text_stream; of adversarial fine-tuning "
            "mitigation.surrogates.source=null, which takes neighbours of the prompts; of "
            "task=locality task.parts=[embeddings,triggers]",
        )


def _with_those_it_builds_on(thing: Any) -> Iterator[Any]:
    if is_dataclass(thing):
        yield thing
        for item in fields(thing):
            yield from _with_those_it_builds_on(getattr(thing, item.name))


def require(good: bool, rule: str, got: Any) -> None:
    """Refuse a field below ``mitigation`` that breaks a rule; see `types.require`."""
    types.require(good, f"mitigation.{rule}", got)


def require_at_least_one(settings: Any, *names: str, within: str = "") -> None:
    """Refuse settings below 1; ``within`` names the field that holds them, with a dot."""
    types.require_at_least_one(settings, *names, within=f"mitigation.{within}")


def require_choices(settings: Any, *, within: str = "", **choices: Any) -> None:
    """Refuse settings that are none of a ``Literal``'s values; see `require_at_least_one`."""
    types.require_choices(settings, within=f"mitigation.{within}", **choices)


def require_stages(stages: Sequence[str] | None) -> None:
    """Refuse stages of the denoiser that no family has, and no stage at all."""
    good = stages is None or (bool(stages) and set(stages) <= set(STAGES))
    require(good, f"stages must be some of {', '.join(STAGES)}, or null", stages)


def layers_of(
    model: TextToImage, role: LayerRole, stages: Sequence[str] | None
) -> dict[str, nn.Linear]:
    """Linear layers of a role by name, in execution order.

    Args:
        model: The model.
        role: Which layers.
        stages: In which stages; None for those that are usual for the role.

    Raises:
        InputError: The model has none there, or some that are no linear layers.
    """
    chosen = model.default_stages(role) if stages is None else stages
    found = {}
    for name, layer in model.layers(role, chosen).items():
        if not isinstance(layer, nn.Linear):
            raise InputError(f"{name} of {model.name} is no linear layer")
        found[name] = layer
    return found


def require_pairs(pairs: Sequence[Pair], name: str) -> None:
    """Refuse to mitigate nothing.

    Raises:
        InputError: There is no pair to forget.
    """
    if not pairs:
        raise InputError(
            f"mitigation {name} has nothing to forget: the list has no pair of kind vm or tm\n"
            f"  where: pairs\n"
            f"  fix:   mitigation=none, or a list with suspected pairs"
        )
