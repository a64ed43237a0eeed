"""The locality study: search triggers of a few images, and find out where they work.

A trigger is the end of an attack that replicates its image on the model that it was searched on.
How far it transfers is asked of that model (with fewer steps, and on lines between two triggers)
and of others.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import quote

import torch
from torch import nn

from dori_lightning.attacks.embedding_attack import (
    Conditioning,
    attack_rounds,
    run_attacks,
)
from dori_lightning.audit.context import AuditContext
from dori_lightning.audit.evaluation import (
    calibrate,
    generate,
    generate_ordinary,
    image_folder,
    measure,
    measure_all,
    prompt_conditionings,
)
from dori_lightning.locality.embeddings import (
    Attempt,
    Group,
    ImageKind,
    PromptGroup,
    held_as,
)
from dori_lightning.locality.estimates import Rate, rate_of
from dori_lightning.locality.layers import (
    SELECTION,
    ActivationFindings,
    Method,
    Selection,
    WeightFindings,
    activation_findings,
    feed_forward_distances,
    value_distances,
    weight_findings,
)
from dori_lightning.metrics.calibration import ReferenceImages
from dori_lightning.metrics.replication import is_copy
from dori_lightning.mitigations.base import (
    EditResult,
    Mitigation,
    edit_key,
    layers_of,
    settings_fingerprint,
)
from dori_lightning.mitigations.edits import Edit
from dori_lightning.mitigations.nemo import NeMo
from dori_lightning.mitigations.wanda import Wanda
from dori_lightning.models.generation import GenerationRequest, generate_images, generation_noise
from dori_lightning.runtime.cache import TENSORS, Cache, Tensors
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Calibration, Condition, Init, InputError, Pair

log = logging.getLogger(__name__)

AT_ONCE = 32
"""Embeddings that NeMo is run with before its selections are stored."""

K = TypeVar("K")
Part = Literal["embeddings", "activations", "weights", "triggers"]
Toward = Literal["same_image", "other_image", "random"]
TOWARDS: tuple[Toward, ...] = ("same_image", "other_image", "random")


@dataclass(frozen=True)
class LocalitySettings:
    """The task's settings; see ``conf/task/locality.yaml``.

    Attributes:
        parts: Which questions are answered.
        images: Memorized images under study, the first of kind vm.
        control_images: Control images that are attacked in the same way.
        prompts: Prompts that triggers are compared with, of each kind.
        start: Whose triggers are traced through layers, weights, budgets and lines.
        places: Shares of the way on a line, in (0, 1).
        lines: Lines per image and kind, at most.
        activation_step: Step of the sampler.
        noise_seed: Seed of the starting noise.
        nemo: NeMo as it is run with each embedding.
        wanda: Wanda as it is run with each embedding.
        transfer_to: Mitigations whose models triggers are tried on.
    """

    parts: tuple[Part, ...]
    images: int
    control_images: int
    prompts: int
    start: Init
    places: tuple[float, ...]
    lines: int
    activation_step: int
    noise_seed: int
    nemo: NeMo
    wanda: Wanda
    transfer_to: tuple[Mitigation, ...]


@dataclass(frozen=True)
class BudgetPoint:
    """Success after some steps, on the model that was attacked.

    Attributes:
        held: Whether the images are ``memorized`` or ``control``.
        start: Where the attacks began.
        steps: Steps spent.
        rate: Attacks that replicate their image.
        diverged: Attacks that stopped being finite; left out of the rate.
    """

    held: ImageKind
    start: Init
    steps: int
    rate: Rate
    diverged: int


@dataclass(frozen=True)
class LinePoint:
    """Success at one place of lines.

    Attributes:
        toward: Where the lines end: at another trigger of the ``same_image``, at a trigger of an
            ``other_image``, or at a ``random`` embedding, both as controls.
        place: Share of the way, 0 at the trigger.
        rate: Embeddings there that replicate the image of the line's beginning.
    """

    toward: Toward
    place: float
    rate: Rate


@dataclass(frozen=True)
class Transfer:
    """Success of triggers on one model.

    Attributes:
        model: Name of the mitigation, ``none`` for the checkpoint as it is.
        searched: Whether this is the model that the triggers were searched on.
        held: Whether the images are ``memorized`` or ``control``.
        start: Where the attacks began; ``prompt_itself`` for the unattacked prompt.
        rate: Embeddings that replicate their image. Of memorized images only triggers that work
            on the searched model are tried.
    """

    model: str
    searched: bool
    held: ImageKind
    start: Init | Literal["prompt_itself"]
    rate: Rate


@dataclass(frozen=True)
class TransferFindings:
    """How often embeddings replicate the image.

    Attributes:
        budget: Success against steps.
        lines: Success between two triggers.
        transfers: Success by model.
    """

    budget: tuple[BudgetPoint, ...]
    lines: tuple[LinePoint, ...]
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True)
class Study:
    """What is studied and with what.

    Attributes:
        audit: Model, pairs, attack and sampling, as an audit has them; snapshots of the attack
            hold 0, the start.
        settings: The task's settings.
        studied: Memorized images whose triggers are searched.
        controls: Control images that are attacked in the same way.
        prompts: Of other memorized images, and of controls.
        calibration: What counts as replicating an image.
        replications: Folder of images to whether they replicate their image, as far as judged.
    """

    audit: AuditContext
    settings: LocalitySettings
    studied: tuple[Pair, ...]
    controls: tuple[Pair, ...]
    prompts: Mapping[PromptGroup, Group]
    calibration: Calibration
    replications: dict[Path, bool] = field(default_factory=dict)

    def find_edit(self, mitigation: Mitigation) -> EditResult:
        """A mitigation's edit for the images under study, made or read from the cache."""
        return self.audit.for_mitigations.find(mitigation, self.audit.model, self.studied)

    def replicates(
        self, queries: Sequence[tuple[str, Conditioning]], *, edit: str, title: str
    ) -> list[bool]:
        """Generate from embeddings on the model as it is now, and decide as an audit does.

        Args:
            queries: Folder of the images, below the run's, one for each model and kind of
                embedding; and what to generate from.
            edit: Identity of the edit that the model carries.
            title: What the progress line says.

        Returns:
            Whether each embedding replicates its image.
        """
        audit, known = self.audit, self.replications
        folders = [audit.folder / "pictures" / name for name, _ in queries]
        requests = [
            GenerationRequest(image_folder(folder, one), one.embedding, one.pair.id)
            for folder, (_, one) in zip(folders, queries, strict=True)
        ]
        with progress_bar(title, len(requests) * audit.sampling.images_per_pair) as advance:
            generate_images(audit.model, requests, audit.sampling, edit=edit, advance=advance)
        for folder, request, (_, one) in zip(folders, requests, queries, strict=True):
            if request.folder not in known:
                outcome = measure(audit, one, folder)
                known[request.folder] = is_copy(outcome, self.calibration)
        return [known[request.folder] for request in requests]


def find_threshold(audit: AuditContext) -> Calibration:
    """What counts as replicating an image: the list's fixed threshold, or as an audit sets it.

    Raises:
        InputError: No threshold separates.
    """
    measures = audit.references.measures
    fixed = measures.descriptors[measures.decider].threshold
    if fixed is not None:
        return Calibration(measures.decider, fixed, "fixed", (), (), float("nan"), ())
    prompts, folder = prompt_conditionings(audit), audit.unmitigated
    generate_ordinary(audit)
    generate(audit, prompts, folder, title="calibrate")
    return calibrate(audit, measure_all(audit, prompts, folder, title="score prompts"))


@dataclass(frozen=True)
class SearchedTriggers:
    """What the attacks found.

    Attributes:
        attacks: One per image, start, restart and snapshot, those of controls too.
        attempts: The whole attacks, by start and then by image; those that diverged left out.
    """

    attacks: tuple[Conditioning, ...]
    attempts: tuple[Attempt, ...]

    @property
    def working(self) -> list[Attempt]:
        """Attacks on memorized images whose end is a trigger."""
        return [own for own in self.attempts if own.works and own.held == "memorized"]


def search(study: Study, *, edit: str) -> SearchedTriggers:
    """Attack the images under study and the controls, and see which ends replicate their image.

    Args:
        study: The study; its model carries the edit.
        edit: Identity of the edit.
    """
    audit = study.audit
    pairs = [*study.studied, *study.controls]
    # few pairs and many restarts: attacks of one pair share batches, too
    jobs = list(chain.from_iterable(attack_rounds(audit.attack, pairs)))
    attacks = run_attacks(audit.attack_context(edit), [jobs], strict=True)
    order = {pair.id: k for k, pair in enumerate(pairs)}
    attacks.sort(key=lambda attack: order[attack.pair.id])
    finite = [
        a for a in attacks if a.condition.budget.steps == audit.budget.steps and a.status == "ok"
    ]
    queries = [("searched", attack) for attack in finite]
    works = study.replicates(queries, edit=edit, title="generate from ends")
    starts = {_attack(a): a.embedding for a in attacks if a.condition.budget.steps == 0}
    attempts = [
        Attempt(a.pair, init, a.restart, starts[_attack(a)], a.embedding, success)
        for init in audit.attack.inits
        for a, success in zip(finite, works, strict=True)
        if a.condition.init == init
    ]
    return SearchedTriggers(tuple(attacks), tuple(attempts))


def _attack(attack: Conditioning) -> tuple[str, str | None, int]:
    return attack.pair.id, attack.condition.init, attack.restart


def _rates(
    keys: Iterable[K], embeddings: Iterable[Conditioning], works: Iterable[bool]
) -> dict[K, Rate]:
    """Success rates by key, in the order of first appearance."""
    outcomes: dict[K, list[tuple[bool, str]]] = {}
    for key, embedding, success in zip(keys, embeddings, works, strict=True):
        outcomes.setdefault(key, []).append((success, embedding.pair.id))
    return {key: rate_of(*zip(*own, strict=True)) for key, own in outcomes.items()}


def transfer_findings(
    study: Study, triggers: SearchedTriggers, models: Mapping[str, Edit]
) -> TransferFindings:
    """How often embeddings replicate their image: with fewer steps, on lines, on other models.

    Args:
        study: The study; its model carries no edit.
        triggers: What the attacks found.
        models: Name of each model to its edit; the first is the one that was searched.
    """
    (searched, edit), *others = models.items()
    with edit.applied(study.audit.model):
        budget = _budget_points(study, triggers, edit=edit.identity)
        lines = _line_points(study, triggers, edit=edit.identity)
        transfers = _transfers(study, triggers, model=searched, edit=edit.identity)
    for name, other in others:
        with other.applied(study.audit.model):
            transfers += _transfers(study, triggers, model=name, edit=other.identity)
    return TransferFindings(budget, lines, transfers)


def _budget_points(
    study: Study, triggers: SearchedTriggers, *, edit: str
) -> tuple[BudgetPoint, ...]:
    """Success against steps from ``settings.start``, and after all steps from every start."""

    def key(attack: Conditioning) -> tuple[ImageKind, Init | None, int]:
        return held_as(attack.pair), attack.condition.init, attack.condition.budget.steps

    steps = study.audit.budget.steps
    attacks = [
        attack
        for attack in triggers.attacks
        if attack.condition.init == study.settings.start or attack.condition.budget.steps == steps
    ]
    finite = [attack for attack in attacks if attack.status == "ok"]
    queries = [("searched", attack) for attack in finite]
    works = study.replicates(queries, edit=edit, title="generate against budget")
    rates = _rates(map(key, finite), finite, works)
    diverged = [key(attack) for attack in attacks if attack.status == "diverged"]
    kinds: tuple[ImageKind, ...] = ("memorized", "control")
    return tuple(
        BudgetPoint(kind, init, spent, rates.get(point) or rate_of((), ()), diverged.count(point))
        for kind in kinds
        for init in study.audit.attack.inits
        for spent in sorted({attack.condition.budget.steps for attack in attacks})
        if (point := (kind, init, spent)) in rates or point in diverged
    )


def on_lines(
    triggers: Sequence[Attempt],
    places: Sequence[float],
    condition: Condition,
    *,
    count: int,
    random_start: Callable[[torch.Tensor], torch.Tensor] = lambda normal: normal,
    seed: int = 0,
) -> Iterator[tuple[Toward, float, Conditioning]]:
    """Embeddings on straight lines from triggers of each image.

    Lines go from trigger k of an image to the next one of the same image, to trigger k of the next
    image, and to a random embedding. Where an image has one trigger, or is alone, the
    lines that would need another are left out.

    Args:
        triggers: Of all images, from one start.
        places: Shares of the way, 0 at the trigger.
        condition: How the triggers were found.
        count: Lines of each kind and image, at most.
        random_start: Makes a random embedding of standard normal numbers (T, D).
        seed: Of the random embeddings.

    Yields:
        Where the line ends, the share of the way, and the embedding there.
    """
    images: dict[str, list[Attempt]] = {}
    for trigger in triggers:
        images.setdefault(trigger.pair.id, []).append(trigger)
    sets = list(images.values())
    for own, following in zip(sets, sets[1:] + sets[:1], strict=True):
        # a line there and the same line back would be counted twice
        lines = 1 if len(own) == 2 else len(own)
        for k, first in enumerate(own[: min(count, lines)]):
            generator = keyed_generator("line", seed, first.pair.id, k)
            normal = torch.randn(first.end.shape, generator=generator)
            ends: dict[Toward, torch.Tensor] = {"random": random_start(normal)}
            if len(own) > 1:
                ends["same_image"] = own[(k + 1) % len(own)].end
            if len(sets) > 1:
                ends["other_image"] = following[k % len(following)].end
            for toward, last in ends.items():
                for place in places:
                    embedding = (1 - place) * first.end + place * last
                    yield toward, place, Conditioning(first.pair, condition, k, embedding)


def _line_points(study: Study, triggers: SearchedTriggers, *, edit: str) -> tuple[LinePoint, ...]:
    """Success on lines from triggers."""
    settings, audit = study.settings, study.audit
    points = list(
        on_lines(
            [own for own in triggers.working if own.init == settings.start],
            settings.places,
            Condition("dori", settings.start, audit.budget),
            count=settings.lines,
            random_start=audit.model.random_start,
            seed=audit.seed,
        )
    )
    queries = [(f"lines/{toward}/{place:g}", one) for toward, place, one in points]
    works = study.replicates(queries, edit=edit, title="generate on lines")
    keys = [(toward, place) for toward, place, _ in points]
    rates = _rates(keys, [one for _, one in queries], works)
    order = product(TOWARDS, settings.places)
    return tuple(LinePoint(*point, rates[point]) for point in order if point in rates)


def _transfers(
    study: Study, triggers: SearchedTriggers, *, model: str, edit: str
) -> tuple[Transfer, ...]:
    """Success of prompts and of triggers on one model, which carries the edit."""
    audit = study.audit
    searched = model == audit.mitigation.name
    prompts = {prompt.pair.id: prompt for prompt in prompt_conditionings(audit)}
    embeddings = [prompts[pair.id] for pair in (*study.studied, *study.controls)]
    keys: list[tuple[ImageKind, Init | Literal["prompt_itself"]]] = [
        (held_as(prompt.pair), "prompt_itself") for prompt in embeddings
    ]
    controls = [own for own in triggers.attempts if own.held == "control"]
    for own in (*triggers.working, *controls):
        condition = Condition("dori", own.init, audit.budget)
        embeddings.append(Conditioning(own.pair, condition, own.restart, own.end))
        keys.append((own.held, own.init))
    folder = "searched" if searched else f"on_{quote(model, safe='')}"
    queries = [(folder, one) for one in embeddings]
    works = study.replicates(queries, edit=edit, title=f"generate on {model}")
    return tuple(
        Transfer(model, searched, kind, start, rate)
        for (kind, start), rate in _rates(keys, embeddings, works).items()
    )


def groups_of(study: Study, triggers: SearchedTriggers) -> tuple[Group, ...]:
    """Embeddings that are compared layer by layer; a group of fewer than two is left out."""
    start = study.settings.start
    working = [own for own in triggers.working if own.init == start]
    if len(working) > 1:
        return (
            Group.of("triggers", working),
            Group.of("starts", working),
            *study.prompts.values(),
        )
    log.warning(
        "%d working triggers from %s: there is nothing to compare in layers but prompts",
        len(working), start,
    )  # fmt: skip
    return tuple(study.prompts.values())


def compare_activations(study: Study, groups: Sequence[Group]) -> ActivationFindings:
    """Compare what embeddings activate in the layers that NeMo and Wanda look at.

    Raises:
        InputError: The sampler has no step ``settings.activation_step``.
    """
    settings, model = study.settings, study.audit.model
    steps = model.sampling_timesteps(study.audit.sampling)
    if not 0 <= settings.activation_step < len(steps):
        raise InputError(
            f"task.activation_step must be in 0..{len(steps) - 1}, the sampler's steps, got "
            f"{settings.activation_step}"
        )
    timestep = steps[settings.activation_step]
    embeddings = torch.cat([group.embeddings for group in groups])
    layers: dict[Method, Mapping[str, nn.Module]] = {
        "nemo": layers_of(model, "text.value", settings.nemo.stages),
        "wanda": layers_of(model, "feed_forward.out", settings.wanda.stages),
    }
    compare: dict[Method, Callable[[], Tensors]] = {
        "nemo": partial(
            value_distances, layers["nemo"], model.value_input(embeddings), model.read(embeddings)
        ),
        "wanda": partial(
            feed_forward_distances, model, layers["wanda"], embeddings, timestep=timestep,
            noise=generation_noise(settings.noise_seed, model.latent_shape),
        ),
    }  # fmt: skip
    key: dict[str, str | int] = {
        "checkpoint": model.fingerprint,
        "latents": str(model.latent_shape),
        "timestep": int(timestep),
        "noise_seed": settings.noise_seed,
        "embeddings": _hash(embeddings),
    }
    cache = Cache(study.audit.folder / "activations")
    compared = {
        method: (
            list(own),
            cache.get(method, {**key, "layers": ",".join(own)}, compare[method], TENSORS),
        )
        for method, own in layers.items()
    }
    return activation_findings(
        compared,
        groups,
        timestep=int(timestep),
        noise_seed=settings.noise_seed,
        seed=study.audit.seed,
    )


def compare_weights(study: Study, groups: Sequence[Group]) -> WeightFindings:
    """Run NeMo and Wanda with each embedding and compare what they select."""
    audit, settings = study.audit, study.settings
    names = [f"{g.name}.{label}.{k}" for g in groups for k, label in enumerate(g.labels)]
    pairs = [pair for group in groups for pair in group.pairs]
    embeddings = torch.cat([group.embeddings for group in groups])
    methods: dict[Method, Mitigation] = {"nemo": settings.nemo, "wanda": settings.wanda}
    selections: dict[Method, list[Selection]] = {}
    for method, mitigation in methods.items():
        cache = Cache(audit.folder / "selections" / method)
        identity = edit_key(mitigation, audit.model, (), audit.for_mitigations)
        keys = [
            {
                "method": identity,
                "image": "|".join(own.sha256 for own in pair.references),
                "embedding": _hash(embedding),
            }
            for embedding, pair in zip(embeddings, pairs, strict=True)
        ]
        found = [cache.read(name, key, SELECTION) for name, key in zip(names, keys, strict=True)]
        missing = [k for k, selection in enumerate(found) if selection is None]
        if method == "nemo":
            made = _run_nemo(study, names, pairs, embeddings, missing)
        else:
            made = _run_wanda(study, embeddings, missing)
        for k, selection in zip(missing, made, strict=True):
            cache.write(names[k], selection, keys[k], SELECTION)
            found[k] = selection
        selections[method] = [selection for selection in found if selection is not None]
    return weight_findings(
        selections,
        groups,
        settings={method: settings_fingerprint(own) for method, own in methods.items()},
        seed=audit.seed,
    )


def _run_nemo(
    study: Study,
    names: Sequence[str],
    pairs: Sequence[Pair],
    embeddings: torch.Tensor,
    missing: Sequence[int],
) -> Iterator[Selection]:
    """Select with the ``missing`` embeddings; each is a pair of its own to NeMo."""
    audit, nemo = study.audit, study.settings.nemo
    references = audit.references
    for first in range(0, len(missing), AT_ONCE):
        chunk = missing[first : first + AT_ONCE]
        images = references.images[[references.places[pairs[k].id] for k in chunk]]
        renamed = [replace(pairs[k], id=names[k]) for k in chunk]
        others = references.others_of([pairs[k] for k in chunk])
        own_references = ReferenceImages(renamed, images, references.measures, others=others)
        found = nemo.find(
            audit.model,
            {names[k]: embeddings[k] for k in chunk},
            replace(audit.for_mitigations, references=own_references),
        )
        for k in chunk:
            memorized = bool(found.notes[names[k]]["memorized"])
            yield Selection.of(found.masks[names[k]], memorized=memorized)
        # calibrated once is enough
        nemo = replace(nemo, criterion=nemo.criterion.calibrated(found.threshold))


def _run_wanda(
    study: Study, embeddings: torch.Tensor, missing: Sequence[int]
) -> Iterator[Selection]:
    if missing:
        audit = study.audit
        masks = study.settings.wanda.find(
            audit.model, embeddings[list(missing)], audit.for_mitigations
        )
        for own in masks:
            yield Selection.of(own, memorized=None)


def _hash(embeddings: torch.Tensor) -> str:
    return hashlib.sha256(embeddings.detach().cpu().float().numpy().tobytes()).hexdigest()
