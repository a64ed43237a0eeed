"""Run the checkpoint with each embedding: activations of its layers, selections of its weights.

Always the checkpoint as it is, whatever model the triggers were searched on: what is asked is
where *it* holds the image.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dori_lightning.files import write_atomically
from dori_lightning.locality.activations import (
    ActivationFindings,
    Compared,
    activation_findings,
    feed_forward_distances,
    value_distances,
)
from dori_lightning.locality.groups import Group
from dori_lightning.locality.selections import SelectionStore
from dori_lightning.locality.weights import Selections, WeightFindings, weight_findings
from dori_lightning.metrics.measure import Originals
from dori_lightning.mitigations.base import edit_key, settings_of
from dori_lightning.models.pictures import generation_noise
from dori_lightning.pairs.datamodule import Encoded
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from dori_lightning.locality.groups import GroupName, PromptSet
    from dori_lightning.tasks._locality_study import SearchedTriggers, Study
    from dori_lightning.types import Pair

__all__ = ["groups_of", "look_at_activations", "look_at_weights"]

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
            edit_key(own, study.model, (), study.workshop),
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
        settings={method: settings_of(own) for method, own in methods.items()},
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
        originals = study.workshop.originals
        images = originals.images[[originals.places[pairs[k].id] for k in chunk]]
        workshop = replace(study.workshop, originals=Originals(twins, images, originals.measures))
        found = nemo.find(
            study.model,
            {names[k]: Encoded(study.data.encoded(pairs[k]).latent, embeddings[k]) for k in chunk},
            workshop,
        )
        for k in chunk:
            store.write(
                names[k],
                identities[k],
                found.masks[names[k]],
                memorized=bool(found.notes[names[k]]["memorized"]),
            )
        if nemo.criterion == "noise_ssim":
            nemo = replace(nemo, threshold=found.threshold)  # calibrated once is enough


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
    masks = study.settings.wanda.find(study.model, embeddings[list(missing)], study.workshop)
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
