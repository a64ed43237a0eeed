"""Is memorization local? Many embeddings that draw one image, compared in every place.

Reference: Finding DoRI (2507.16880), section on locality.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Console

from dori_lightning.locality.embeddings import embedding_findings
from dori_lightning.mitigations.edits import EmptyEdit
from dori_lightning.report.locality.page import write_locality_files
from dori_lightning.report.locality.record import LocalityReport, StudiedImage
from dori_lightning.report.locality.text import answers
from dori_lightning.tasks._locality_large import ask_other_models, ask_searched_model, join
from dori_lightning.tasks._locality_layers import groups_of, look_at_activations, look_at_weights
from dori_lightning.tasks._locality_study import prepare, search
from dori_lightning.tasks._locality_tracking import track_locality
from dori_lightning.tasks._provenance import provenance_of
from dori_lightning.tasks._tracking import tracked

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from omegaconf import DictConfig

    from dori_lightning.locality.embeddings import EmbeddingFindings
    from dori_lightning.locality.groups import TriggerSet
    from dori_lightning.mitigations.edits import Edit
    from dori_lightning.tasks._locality_study import SearchedTriggers, Study
    from dori_lightning.tracking.tracker import Tracker

__all__ = ["run"]


def run(cfg: DictConfig, folder: Path) -> float | None:
    """Search triggers, compare them, and write record, figures and page into ``folder``.

    Returns:
        Share of attacks from ``task.start`` that draw their image, for sweepers; None where all
        of them diverged.
    """
    tags = (str(cfg.checkpoint.name), str(cfg.mitigation.name))
    with tracked(cfg, folder, tags=tags) as tracker:
        return _study(cfg, folder, tracker)


def _study(cfg: DictConfig, folder: Path, tracker: Tracker) -> float | None:
    started = datetime.now(UTC)
    study = prepare(cfg, folder)
    parts = study.settings.parts
    edit = study.edit_of(study.mitigation).edit
    others = _other_models(study, edit) if "triggers" in parts else []
    with edit.applied(study.model):
        triggers = search(study, edit=edit.identity)
        at_large = (
            ask_searched_model(study, triggers, edit=edit.identity)
            if "triggers" in parts
            else None
        )
    transfers = ask_other_models(study, triggers, others)
    groups = groups_of(study, triggers)
    report = LocalityReport(
        checkpoint=study.model.name,
        mitigation=study.mitigation.name,
        start=study.settings.start,
        restarts=study.attack.restarts,
        budget=study.budget,
        descriptor=study.desk.rule.descriptor,
        threshold=study.desk.rule.threshold,
        pictures_each=study.desk.sampling.images_per_pair,
        images=_images(triggers),
        memorized_prompts=tuple(pair.id for pair in study.memorized.pairs),
        control_prompts=tuple(pair.id for pair in study.ordinary.pairs),
        embeddings=_embeddings(study, triggers) if "embeddings" in parts else None,
        activations=look_at_activations(study, groups) if "activations" in parts else None,
        weights=look_at_weights(study, groups) if "weights" in parts else None,
        at_large=join(at_large, transfers) if at_large else None,
        provenance=provenance_of(cfg, study.model, study.pairs, started=started),
    )
    page = write_locality_files(report, folder)
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else 120)
    for answer in answers(report):
        console.print(f"{answer.question} {answer.text}")
    console.print(f"page: {page}", soft_wrap=True)
    asked = sum(image.attacked.get(study.settings.start, 0) for image in report.studied)
    works = sum(image.working.get(study.settings.start, 0) for image in report.studied)
    rate = works / asked if asked else None
    track_locality(tracker, report, folder, objective=rate)
    return rate


def _other_models(study: Study, searched: Edit) -> list[tuple[str, Edit]]:
    """The checkpoint as it is, and the mitigated models that triggers are tried on."""
    original: list[tuple[str, Edit]] = (
        [] if isinstance(searched, EmptyEdit) else [("none", EmptyEdit())]
    )
    return [
        *original,
        *((own.name, study.edit_of(own).edit) for own in study.settings.transfer_to),
    ]


def _embeddings(study: Study, triggers: SearchedTriggers) -> EmbeddingFindings:
    return embedding_findings(
        [own.only_working() for own in triggers.memorized],
        triggers.controls,
        memorized_prompts=study.memorized,
        control_prompts=study.ordinary,
        seed=study.seed,
    )


def _images(triggers: SearchedTriggers) -> tuple[StudiedImage, ...]:
    by_id: dict[str, list[TriggerSet]] = {}
    everything: Sequence[TriggerSet] = (*triggers.memorized, *triggers.controls)
    for own in everything:
        by_id.setdefault(own.pair.id, []).append(own)
    return tuple(
        StudiedImage(
            id=name,
            kind=sets[0].pair.kind,
            prompt=sets[0].pair.prompt,
            attacked={own.start: len(own.working) for own in sets},
            working={own.start: sum(own.working) for own in sets},
        )
        for name, sets in by_id.items()
    )
