"""How often embeddings draw the image: against budget, between two triggers, on other models."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.attacks.embedding_attack import (
    AttackContext,
    Conditioning,
    ControlPrompts,
    attack_rounds,
    run_attacks,
)
from dori_lightning.audit.context import AuditContext
from dori_lightning.audit.evaluation import calibrate, generate, measure, prompt_conditionings
from dori_lightning.locality.embeddings import Group, GroupName, PromptSet, TriggerSet
from dori_lightning.locality.estimates import Rate, rate_of
from dori_lightning.locality.layers import (
    ActivationFindings,
    Compared,
    Selections,
    SelectionStore,
    WeightFindings,
    activation_findings,
    feed_forward_distances,
    value_distances,
    weight_findings,
)
from dori_lightning.metrics.calibration import ReferenceImages
from dori_lightning.metrics.replication import per_pair
from dori_lightning.mitigations.base import (
    Context,
    EditResult,
    Mitigation,
    edit_key,
    settings_fingerprint,
)
from dori_lightning.mitigations.edits import Edit
from dori_lightning.mitigations.nemo import NeMo
from dori_lightning.mitigations.wanda import Wanda
from dori_lightning.models.generation import (
    GenerationRequest,
    generate_images,
    generation_noise,
    image_seeds,
    load_images,
)
from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.pairs.datamodule import Encoded, PairsDataModule
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Budget, Init, InputError, Pair

Part = Literal["embeddings", "activations", "weights", "triggers"]


@dataclass(frozen=True)
class LocalitySettings:
    """What is looked at; see ``conf/task/locality.yaml``.

    Attributes:
        parts: Which questions are answered.
        images: Memorized images under study.
        ids: Their ids, instead of the first ones.
        control_images: Control images that are attacked in the same way.
        prompts: Prompts that triggers are compared with, of each kind.
        start: Whose triggers are traced through layers, weights, budgets and lines.
        forget: Whether the edit is that of all ``suspected`` pairs or of those ``studied``.
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
    ids: tuple[str, ...] | None
    control_images: int
    prompts: int
    start: Init
    forget: Literal["suspected", "studied"]
    places: tuple[float, ...]
    lines: int
    activation_step: int
    noise_seed: int
    nemo: NeMo
    wanda: Wanda
    transfer_to: tuple[Mitigation, ...]


# -------- large

Toward = Literal["same_image", "other_image", "random"]
TOWARDS: tuple[Toward, ...] = ("same_image", "other_image", "random")


@dataclass(frozen=True)
class BudgetPoint:
    """Success after some steps, on the model that was attacked.

    Attributes:
        held: Whether the images are ``memorized`` or ``control``.
        start: Where the attacks began.
        steps: Steps spent.
        rate: Attacks that draw their image.
        diverged: Attacks that stopped being finite; left out of the rate.
    """

    held: Literal["memorized", "control"]
    start: Init
    steps: int
    rate: Rate
    diverged: int


@dataclass(frozen=True)
class Line:
    """A straight line from one trigger to another embedding.

    Attributes:
        pair: The image whose trigger it begins with, and whose picture is looked for.
        toward: Where it ends: another trigger of the ``same_image``, a trigger of an
            ``other_image``, or a ``random`` embedding, both as controls.
        number: Which line of the image.
        first: Where it begins (T, D).
        last: Where it ends (T, D).
    """

    pair: str
    toward: Toward
    number: int
    first: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True)
class LinePoint:
    """Success at one place of lines.

    Attributes:
        toward: Which lines.
        place: Share of the way, 0 at the trigger.
        rate: Embeddings there that draw the image of the line's beginning.
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
        rate: Embeddings that draw their image. Of memorized images only triggers that work on the
            searched model are asked.
    """

    model: str
    searched: bool
    held: Literal["memorized", "control"]
    start: Init | Literal["prompt_itself"]
    rate: Rate


@dataclass(frozen=True)
class Transfers:
    """How often embeddings draw the image.

    Attributes:
        budget: Success against steps.
        lines: Success between two triggers.
        transfers: Success on other models.
    """

    budget: tuple[BudgetPoint, ...]
    lines: tuple[LinePoint, ...]
    transfers: tuple[Transfer, ...]


def lines_between(triggers: Sequence[TriggerSet], *, count: int, seed: int = 0) -> list[Line]:
    """Lines from triggers of each image to another one's, another image's, and random ones.

    Trigger k of an image is paired with the next one of the same image, with trigger k of the next
    image, and with a standard normal embedding. Where an image has one trigger, or is alone, the
    lines that would need another are left out.

    Args:
        triggers: Working triggers of the images, from one start.
        count: Lines of each kind and image, at most.
        seed: Of the random embeddings.
    """
    lines = []
    sets = [own for own in triggers if len(own.ends)]
    for place, own in enumerate(sets):
        # a line there and the same line back would be counted twice
        pairs = 1 if len(own.ends) == 2 else len(own.ends)
        for k in range(min(count, pairs)):
            if len(own.ends) > 1:
                other = own.ends[(k + 1) % len(own.ends)]
                lines.append(Line(own.pair.id, "same_image", k, own.ends[k], other))
            if len(sets) > 1:
                stranger = sets[(place + 1) % len(sets)]
                last = stranger.ends[k % len(stranger.ends)]
                lines.append(Line(own.pair.id, "other_image", k, own.ends[k], last))
            noise = torch.randn(
                own.ends[k].shape, generator=keyed_generator("line", seed, own.pair.id, k)
            )
            lines.append(Line(own.pair.id, "random", k, own.ends[k], noise))
    return lines


def points_on(line: Line, places: Sequence[float]) -> torch.Tensor:
    """Embeddings (P, T, D) at shares of the way, 0 at the line's beginning and 1 at its end."""
    way = torch.tensor(places, dtype=line.first.dtype)[:, None, None]
    return (1 - way) * line.first + way * line.last


# -------- locality_layers
# Run the checkpoint with each embedding: activations of its layers, selections of its weights.
#
# Always the checkpoint as it is, whatever model the triggers were searched on: what is asked is
# where *it* holds the image.

log = logging.getLogger(__name__)

AT_ONCE = 32
"""Embeddings that NeMo is run with before its selections are kept."""

Method = Literal["nemo", "wanda"]


def groups_of(study: Study, triggers: SearchedTriggers) -> tuple[Group, ...]:
    """Embeddings that are compared layer by layer; a group of fewer than two is left out."""
    sets = triggers.working(study.settings.start)
    labels = tuple(own.pair.id for own in sets for _ in own.ends)
    pairs = tuple(own.pair for own in sets for _ in own.ends)
    groups = []
    if len(labels) > 1:
        groups = [
            Group("triggers", labels, pairs, torch.cat([own.ends for own in sets])),
            Group("starts", labels, pairs, torch.cat([own.starts for own in sets])),
        ]
    else:
        log.warning(
            "%d working triggers from %s: there is nothing to compare in layers but prompts",
            len(labels),
            study.settings.start,
        )
    asked: dict[GroupName, PromptSet] = {
        "memorized_prompts": study.memorized,
        "control_prompts": study.ordinary,
    }
    for name, prompts in asked.items():
        everybody = ("prompts",) * len(prompts.pairs)
        groups.append(Group(name, everybody, prompts.pairs, prompts.embeddings))
    return tuple(groups)


def look_at_activations(study: Study, groups: Sequence[Group]) -> ActivationFindings:
    """Compare what embeddings activate in the layers that NeMo and Wanda look at."""
    settings, model = study.settings, study.model
    steps = model.sampling_timesteps(study.desk.sampling)
    if not 0 <= settings.activation_step < len(steps):
        raise InputError(
            f"task.activation_step must be in 0..{len(steps) - 1}, the sampler's steps, got "
            f"{settings.activation_step}"
        )
    timestep = steps[settings.activation_step]
    everything = torch.cat([group.embeddings for group in groups])
    noise = generation_noise(settings.noise_seed, model.latent_shape)
    digest = hashlib.sha256(
        f"{model.fingerprint}|{model.latent_shape}|{int(timestep)}|{settings.noise_seed}|"
        f"{settings.nemo.stages}|{settings.wanda.stages}".encode()
    )
    digest.update(everything.contiguous().float().numpy().tobytes())
    path, identity = study.folder / "activations.safetensors", digest.hexdigest()[:24]
    compared = _read_compared(path, identity)
    if compared is None:
        compared = {
            "nemo": value_distances(model, everything, settings.nemo.stages),
            "wanda": feed_forward_distances(
                model, everything, settings.wanda.stages, noise=noise, timestep=timestep
            ),
        }
        _write_compared(path, identity, compared)
    return activation_findings(
        compared,
        groups,
        timestep=int(timestep),
        noise_seed=settings.noise_seed,
        seed=study.seed,
    )


def look_at_weights(study: Study, groups: Sequence[Group]) -> WeightFindings:
    """Run NeMo and Wanda with each embedding and compare what they select."""
    settings = study.settings
    names = [f"{g.name}.{label}.{k}" for g in groups for k, label in enumerate(g.labels)]
    pairs = [pair for group in groups for pair in group.pairs]
    embeddings = torch.cat([group.embeddings for group in groups])
    methods: dict[Method, Any] = {"nemo": settings.nemo, "wanda": settings.wanda}
    found: dict[Method, Selections] = {}
    for method, own in methods.items():
        store = SelectionStore(
            study.folder / "selections" / method,
            edit_key(own, study.model, (), study.context),
        )
        identities = [
            store.identity_of(embedding, pair.sha256)
            for embedding, pair in zip(embeddings, pairs, strict=True)
        ]
        missing = [k for k, i in enumerate(identities) if not store.holds(names[k], i)]
        select = _run_nemo if method == "nemo" else _run_wanda
        select(study, store, names, identities, pairs, embeddings, missing)
        found[method] = Selections(
            parameters=store.parameters(names[0]),
            masks=_Masks(store, names),
            memorized=tuple(store.memorized(name) for name in names),
        )
    return weight_findings(
        found,
        groups,
        settings={method: settings_fingerprint(own) for method, own in methods.items()},
        seed=study.seed,
    )


class _Masks:
    """Masks of one weight for all embeddings, read as they are asked for."""

    def __init__(self, store: SelectionStore, names: Sequence[str]) -> None:
        self.store, self.names = store, names

    def __call__(self, parameter: str) -> list[torch.Tensor]:
        return self.store.masks(self.names, parameter)


def _run_nemo(
    study: Study,
    store: SelectionStore,
    names: Sequence[str],
    identities: Sequence[str],
    pairs: Sequence[Pair],
    embeddings: torch.Tensor,
    missing: Sequence[int],
) -> None:
    nemo = study.settings.nemo
    for first in range(0, len(missing), AT_ONCE):
        chunk = missing[first : first + AT_ONCE]
        # one embedding each, where NeMo knows pairs: the same image under as many names
        twins = [replace(pairs[k], id=names[k]) for k in chunk]
        references = study.context.references
        images = references.images[[references.places[pairs[k].id] for k in chunk]]
        context = replace(
            study.context, references=ReferenceImages(twins, images, references.measures)
        )
        found = nemo.find(
            study.model,
            {names[k]: Encoded(study.data.encoded(pairs[k]).latent, embeddings[k]) for k in chunk},
            context,
        )
        for k in chunk:
            store.write(
                names[k],
                identities[k],
                found.masks[names[k]],
                memorized=bool(found.notes[names[k]]["memorized"]),
            )
        # calibrated once is enough
        nemo = replace(nemo, criterion=nemo.criterion.calibrated(found.threshold))


def _run_wanda(
    study: Study,
    store: SelectionStore,
    names: Sequence[str],
    identities: Sequence[str],
    pairs: Sequence[Pair],
    embeddings: torch.Tensor,
    missing: Sequence[int],
) -> None:
    del pairs
    if not missing:
        return
    masks = study.settings.wanda.find(study.model, embeddings[list(missing)], study.context)
    for k, own in zip(missing, masks, strict=True):
        store.write(names[k], identities[k], own, memorized=None)


def _write_compared(
    path: Path, identity: str, compared: Mapping[Method, Mapping[str, Compared]]
) -> None:
    tensors, order = {}, []
    for method, layers in compared.items():
        for layer, values in layers.items():
            order.append([method, layer])
            tensors[f"{method}|{layer}|distance"] = values.distance.contiguous()
            tensors[f"{method}|{layer}|length"] = values.length.contiguous()
    note = {"identity": identity, "order": json.dumps(order)}
    write_atomically(path, save(tensors, metadata=note))


def _read_compared(path: Path, identity: str) -> dict[Method, dict[str, Compared]] | None:
    """What was compared before, None where nothing was or something else."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            note = file.metadata() or {}
            if note.get("identity") != identity:
                return None
            found: dict[Method, dict[str, Compared]] = {}
            for method, layer in json.loads(note["order"]):
                found.setdefault(method, {})[layer] = Compared(
                    file.get_tensor(f"{method}|{layer}|distance"),
                    file.get_tensor(f"{method}|{layer}|length"),
                )
            return found
    except (SafetensorError, OSError) as error:
        log.warning("%s is damaged and is computed anew: %s", path, error)
        return None


# -------- locality_pictures
# Ask models for pictures, and whether those show the image; what was asked once is kept.


@dataclass(frozen=True)
class Rule:
    """What counts as drawing an image.

    Attributes:
        descriptor: Name of the deciding descriptor.
        threshold: Similarity above which an embedding draws the image.
    """

    descriptor: str
    threshold: float


@dataclass(frozen=True)
class Query:
    """An embedding whose pictures are looked at.

    Attributes:
        place: Folder of the pictures below the desk's.
        pair: The image that is looked for.
        embedding: Text embedding (T, D).
    """

    place: str
    pair: Pair
    embedding: torch.Tensor


@dataclass
class ReplicationJudge:
    """Draws pictures and compares them with references.

    Attributes:
        model: Model that draws, with whatever edit is applied when it is asked.
        sampling: How.
        references: What pictures are compared with.
        rule: What counts as drawing an image.
        folder: Where pictures go.
        record: File that keeps similarities of pictures by their content.
        known: What that file holds.
    """

    model: TextToImage
    sampling: Sampling
    references: ReferenceImages
    rule: Rule
    folder: Path
    record: Path
    known: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.record.is_file():
            try:
                self.known = dict(json.loads(self.record.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                log.warning("%s is damaged and is computed anew: %s", self.record, error)

    def draws(self, asked: Sequence[Query], *, edit: str, title: str) -> list[bool]:
        """Whether each embedding draws its image on the model as it is now.

        Args:
            asked: What to draw.
            edit: Identity of the edit that is applied.
            title: What is being done.
        """
        orders = [GenerationRequest(self.folder / a.place, a.embedding, a.pair.id) for a in asked]
        with progress_bar(title, len(orders) * self.sampling.images_per_pair) as advance:
            generate_images(self.model, orders, self.sampling, edit=edit, advance=advance)
        return [value > self.rule.threshold for value in self._similarities(asked)]

    def _similarities(self, asked: Sequence[Query]) -> list[float]:
        seeds = image_seeds(self.sampling)
        values = []
        for one in asked:
            folder = self.folder / one.place
            digest = hashlib.sha256(f"{self.rule.descriptor}|{one.pair.sha256}".encode())
            for seed in seeds:
                digest.update((folder / f"{seed}.png").read_bytes())
            key = digest.hexdigest()[:24]
            if key not in self.known:
                self.known[key] = self._similarity(one.pair, load_images(folder, seeds))
            values.append(self.known[key])
        write_atomically(self.record, (json.dumps(self.known) + "\n").encode())
        return values

    def _similarity(self, pair: Pair, pictures: torch.Tensor) -> float:
        measures = self.references.measures
        descriptor = measures.descriptors[self.rule.descriptor]
        place = self.references.places[pair.id]
        original = self.references.features[self.rule.descriptor][place : place + 1]
        values = descriptor.compare(descriptor.describe(pictures), original)[:, 0]
        return float(per_pair(values.numpy(), measures.aggregation))


def rule_of(context: AuditContext) -> Rule:
    """The threshold as an audit of the same list sets it: fixed, or calibrated on all its pairs.

    Raises:
        InputError: No threshold separates.
    """
    measures = context.references.measures
    fixed = measures.descriptors[measures.decider].threshold
    if fixed is not None:
        return Rule(measures.decider, fixed)
    prompts, folder = prompt_conditionings(context), context.unmitigated
    generate(context, prompts, folder, title="calibrate")
    calibration = calibrate(context, [measure(context, c, folder) for c in prompts])
    return Rule(calibration.descriptor, calibration.threshold)


# -------- locality_study
# Everything that the questions about locality share: images, model, edit, triggers.


@dataclass(frozen=True)
class Study:
    """What is studied and with what.

    Attributes:
        folder: Run folder.
        seed: Run seed.
        settings: The task's settings.
        attack: Attack settings; snapshots hold 0, the start.
        budget: The attack's budget, resolved.
        control_prompts: Where attacks from ``control_prompt`` begin.
        pairs: Every pair of the list.
        studied: Memorized images whose triggers are searched.
        controls: Control images that are attacked in the same way.
        memorized: Prompts of other memorized images.
        ordinary: Control prompts.
        model: The checkpoint.
        data: Encoded pairs.
        context: What mitigations work with.
        desk: Draws and judges pictures.
        mitigation: Whose model triggers are searched on.
    """

    folder: Path
    seed: int
    settings: LocalitySettings
    attack: AttackSettings
    budget: Budget
    control_prompts: ControlPrompts
    pairs: tuple[Pair, ...]
    studied: tuple[Pair, ...]
    controls: tuple[Pair, ...]
    memorized: PromptSet
    ordinary: PromptSet
    model: StableDiffusion
    data: PairsDataModule
    context: Context
    desk: ReplicationJudge
    mitigation: Mitigation

    def edit_of(self, mitigation: Mitigation) -> EditResult:
        """A mitigation's edit: read from the cache, or made and kept there."""
        suspected = [pair for pair in self.pairs if pair.kind != "control"]
        forgotten = self.studied if self.settings.forget == "studied" else suspected
        return self.context.find(mitigation, self.model, forgotten)


@dataclass(frozen=True)
class SearchedTriggers:
    """What the attacks found.

    Attributes:
        everything: One per image, start, restart and snapshot, those of controls too.
        memorized: Attacks on memorized images, one set per image and start, those that diverged
            left out.
        controls: The same for control images.
    """

    everything: tuple[Conditioning, ...]
    memorized: tuple[TriggerSet, ...]
    controls: tuple[TriggerSet, ...]

    def working(self, start: Init) -> tuple[TriggerSet, ...]:
        """Triggers of memorized images from one start that draw their image."""
        return tuple(own.only_working() for own in self.memorized if own.start == start)


def search(study: Study, *, edit: str) -> SearchedTriggers:
    """Attack the images under study and the controls, and see which ends draw their image.

    Args:
        study: The study; its model carries the edit.
        edit: Identity of the edit.
    """
    context = AttackContext(
        model=study.model,
        data=study.data,
        settings=study.attack,
        budget=study.budget,
        controls=study.control_prompts,
        folder=study.folder / "attacks",
        seed=study.seed,
        edit=edit,
    )
    # few pairs and many restarts: attacks of one pair share batches, too
    rounds = attack_rounds(study.attack, [*study.studied, *study.controls])
    found = run_attacks(context, [list(chain.from_iterable(rounds))], strict=True)
    last = [t for t in found if t.condition.budget.steps == study.budget.steps]
    finite = [t for t in last if not t.diverged]
    asked = [Query(searched_folder(t, "searched"), t.pair, t.embedding) for t in finite]
    works = study.desk.draws(asked, edit=edit, title="draw from ends")
    drawn = dict(zip(map(_key, finite), works, strict=True))
    starts = {_key(t): t.embedding for t in found if t.condition.budget.steps == 0}
    return SearchedTriggers(
        everything=tuple(found),
        memorized=_sets(study, study.studied, finite, starts, drawn),
        controls=_sets(study, study.controls, finite, starts, drawn),
    )


def searched_folder(trigger: Conditioning, model: str) -> str:
    """Folder for the pictures of a trigger on a model."""
    condition = trigger.condition
    return (
        f"{model}/{condition.init}/s{condition.budget.steps}/{trigger.pair.id}.r{trigger.restart}"
    )


def _key(trigger: Conditioning) -> tuple[str, str, int]:
    return trigger.pair.id, str(trigger.condition.init), trigger.restart


def _sets(
    study: Study,
    pairs: Sequence[Pair],
    ends: Sequence[Conditioning],
    starts: dict[tuple[str, str, int], torch.Tensor],
    works: dict[tuple[str, str, int], bool],
) -> tuple[TriggerSet, ...]:
    sets = []
    for init in study.attack.inits:
        for pair in pairs:
            own = [t for t in ends if t.pair == pair and t.condition.init == init]
            if own:
                sets.append(
                    TriggerSet(
                        pair=pair,
                        start=init,
                        prompt=study.data.encoded(pair).embedding,
                        restarts=tuple(t.restart for t in own),
                        starts=torch.stack([starts[_key(t)] for t in own]),
                        ends=torch.stack([t.embedding for t in own]),
                        working=tuple(works[_key(t)] for t in own),
                    )
                )
    return tuple(sets)


# -------- locality_large
# Ask the searched model and others how often embeddings draw the image.

Held = Literal["memorized", "control"]
HELD: tuple[Held, ...] = ("memorized", "control")


@dataclass(frozen=True)
class OnSearched:
    """What was asked of the model that triggers were searched on."""

    budget: tuple[BudgetPoint, ...]
    lines: tuple[LinePoint, ...]
    transfers: tuple[Transfer, ...]


def ask_searched_model(study: Study, triggers: SearchedTriggers, *, edit: str) -> OnSearched:
    """Success against budget and on lines; the model carries the edit."""
    return OnSearched(
        budget=_budget(study, triggers, edit=edit),
        lines=_lines(study, triggers, edit=edit),
        transfers=_transfers(
            study, triggers, model=study.mitigation.name, searched=True, edit=edit
        ),
    )


def ask_other_models(
    study: Study, triggers: SearchedTriggers, others: Sequence[tuple[str, Edit]]
) -> tuple[Transfer, ...]:
    """Success on models that the triggers were not searched on.

    Args:
        study: The study; its model carries no edit.
        triggers: What was found.
        others: Name and edit of each model.
    """
    found: list[Transfer] = []
    for name, edit in others:
        with edit.applied(study.model):
            found += _transfers(study, triggers, model=name, searched=False, edit=edit.identity)
    return tuple(found)


def join(searched: OnSearched, others: Sequence[Transfer]) -> Transfers:
    """Everything in one record."""
    return Transfers(searched.budget, searched.lines, (*searched.transfers, *others))


def _budget(study: Study, triggers: SearchedTriggers, *, edit: str) -> tuple[BudgetPoint, ...]:
    start = study.settings.start
    # ends were drawn already, from every start
    own = [
        t
        for t in triggers.everything
        if t.condition.init == start or t.condition.budget.steps == study.budget.steps
    ]
    finite = [t for t in own if not t.diverged]
    works = study.desk.draws(
        [Query(searched_folder(t, "searched"), t.pair, t.embedding) for t in finite],
        edit=edit,
        title="draw against budget",
    )
    points = []
    for held, pairs in zip(HELD, (study.studied, study.controls), strict=True):
        ids = [pair.id for pair in pairs]
        for init in study.attack.inits:
            for steps in sorted({t.condition.budget.steps for t in own}):
                outcomes: dict[str, list[bool]] = {name: [] for name in ids}
                diverged = 0
                for trigger, success in zip(finite, works, strict=True):
                    condition = trigger.condition
                    if (condition.init, condition.budget.steps) == (init, steps):
                        outcomes.get(trigger.pair.id, []).append(success)
                for trigger in own:
                    condition = trigger.condition
                    if (condition.init, condition.budget.steps) == (init, steps):
                        diverged += trigger.diverged and trigger.pair.id in ids
                rate = rate_of(outcomes)
                if rate.n or diverged:
                    points.append(BudgetPoint(held, init, steps, rate, diverged))
    return tuple(points)


def _lines(study: Study, triggers: SearchedTriggers, *, edit: str) -> tuple[LinePoint, ...]:
    settings = study.settings
    sets = triggers.working(settings.start)
    lines = lines_between(sets, count=settings.lines, seed=study.seed)
    by_id = {pair.id: pair for pair in study.studied}
    asked, keys = [], []
    for line in lines:
        for place, embedding in zip(
            settings.places, points_on(line, settings.places), strict=True
        ):
            name = f"lines/{line.toward}/{place:g}/{line.pair}.{line.number}"
            asked.append(Query(name, by_id[line.pair], embedding))
            keys.append((line.toward, place, line.pair))
    works = study.desk.draws(asked, edit=edit, title="draw on lines")
    points = []
    for toward in TOWARDS:
        for place in settings.places:
            outcomes: dict[str, list[bool]] = {name: [] for name in by_id}
            for key, success in zip(keys, works, strict=True):
                if key[:2] == (toward, place):
                    outcomes[key[2]].append(success)
            rate = rate_of(outcomes)
            if rate.n:
                points.append(LinePoint(toward, place, rate))
    return tuple(points)


def _transfers(
    study: Study, triggers: SearchedTriggers, *, model: str, searched: bool, edit: str
) -> tuple[Transfer, ...]:
    place = "searched" if searched else f"on_{quote(model, safe='')}"
    asked: list[Query] = []
    keys: list[tuple[Held, Init | Literal["prompt_itself"]]] = []
    for held, pairs in zip(HELD, (study.studied, study.controls), strict=True):
        for pair in pairs:
            embedding = study.data.encoded(pair).embedding
            asked.append(Query(f"{place}/prompt_itself/{pair.id}", pair, embedding))
            keys.append((held, "prompt_itself"))
    steps = study.budget.steps
    for held, sets in zip(HELD, (triggers.memorized, triggers.controls), strict=True):
        for own in sets:
            chosen = own.only_working() if held == "memorized" else own
            for restart, embedding in zip(chosen.restarts, chosen.ends, strict=True):
                name = f"{place}/{own.start}/s{steps}/{own.pair.id}.r{restart}"
                asked.append(Query(name, own.pair, embedding))
                keys.append((held, own.start))
    works = study.desk.draws(asked, edit=edit, title=f"draw on {model}")
    found = []
    for key in dict.fromkeys(keys):
        held, start = key
        outcomes: dict[str, list[bool]] = {}
        for one, own_key, success in zip(asked, keys, works, strict=True):
            if own_key == key:
                outcomes.setdefault(one.pair.id, []).append(success)
        found.append(Transfer(model, searched, held, start, rate_of(outcomes)))
    return tuple(found)
