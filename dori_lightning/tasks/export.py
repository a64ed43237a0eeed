"""Write a checkpoint with an edit in its weights, for other programs to open."""

import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock
from hydra.utils import instantiate
from omegaconf import DictConfig

from dori_lightning.audit.context import reference_images
from dori_lightning.audit.targets import aimed_pairs
from dori_lightning.config import groups
from dori_lightning.mitigations.base import Mitigation
from dori_lightning.mitigations.edits import Edit, read_edit, write_edit
from dori_lightning.models.components import Components
from dori_lightning.models.export import (
    DTYPES,
    Weights,
    check_written,
    weights_of,
    write_configs,
    write_folder,
    write_single,
)
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.loading import resolve_source
from dori_lightning.report.model_card import Changed, Exported, model_card
from dori_lightning.report.record import EDIT_FILE, AuditRecord, read_edit_record, read_record
from dori_lightning.runtime import distributed
from dori_lightning.runtime.artifacts import claim_folder, write_atomically
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.tasks.audit import make_context, make_trainer
from dori_lightning.tasks.run_record import git_sha, logged, package_versions
from dori_lightning.types import InputError, Pair

log = logging.getLogger(__name__)

FORMATS = ("diffusers", "single_file")


@dataclass(frozen=True)
class _Chosen:
    """The edit that goes into the weights, and what the card says of it.

    Attributes:
        edit: One set of weights for all.
        mitigation: Name of what found it.
        pairs: Kind to number of the pairs it was made for; None where unknown.
        seed: Run seed; None where unknown.
    """

    edit: Edit
    mitigation: str
    pairs: Mapping[str, int] | None
    seed: int | None


@logged
def run(cfg: DictConfig, folder: Path) -> None:
    """Export a checkpoint into ``folder``.

    Formats that are there already are left; the model card is written anew each time, so that an
    audit can be added to it later.

    Raises:
        InputError: No checkpoint can hold the edit, the audit is of something else, or the folder
            holds another export.
    """
    formats = _check_settings(cfg)
    audit = None if cfg.task.audit is None else Path(cfg.task.audit).expanduser()
    record = None if audit is None else read_record(audit)
    given = None if cfg.task.edit is None else read_edit(Path(cfg.task.edit).expanduser())
    mitigation = instantiate(cfg.mitigation)
    if given is None:  # all processes make the edit
        distributed.launch(make_trainer(cfg, None))
    pairs = [] if given is not None else instantiate(cfg.pairs).read()
    model: LatentDiffusion = instantiate(cfg.checkpoint)
    if given is not None:
        # what it was calibrated on is not known
        name = (given.origin and given.origin.mitigation) or "unnamed"
        chosen = _Chosen(_for_one_checkpoint(given, cfg.task.pair, name), name, None, None)
    else:
        chosen = _from_mitigation(cfg, model, mitigation, pairs)
    if not distributed.is_first():  # all processes make the edit, one of them writes
        return
    changed = _changed(model, chosen.edit, chosen.mitigation)
    folder.mkdir(parents=True, exist_ok=True)
    with chosen.edit.applied(model), FileLock(folder / ".export.lock"):
        components = model.components
        weights = weights_of(components, cfg.task.dtype)
        if audit is not None and record is not None:
            _check_audit(audit, record, model=model, edit=chosen.edit, weights=weights)
        exported = _describe(cfg, model, chosen, weights, changed)
        decides = {
            "checkpoint": {"name": exported.checkpoint, "fingerprint": exported.fingerprint},
            "edit": {"mitigation": exported.mitigation, "identity": exported.edit},
            "exported": {"dtype": cfg.task.dtype, "fingerprint": exported.exported},
        }
        claim_folder(folder, decides)
        if chosen.edit.kind:
            write_edit(folder / "edit.safetensors", chosen.edit)
        card = model_card(exported, record).encode()
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{model.name}-{chosen.mitigation}").strip(".-")
        with progress_bar("export", len(formats)) as advance:
            if "diffusers" in formats:
                _write_once(
                    folder / "diffusers", partial(_write_folder, components, weights, card)
                )
                advance(1)
            if "single_file" in formats:
                notes = {
                    "fingerprint": exported.exported,
                    "original": exported.fingerprint,
                    "edit": exported.edit,
                }
                single = folder / f"{name or 'checkpoint'}.safetensors"
                _write_once(single, partial(_write_single, components, weights, notes))
                advance(1)
        home = folder / "diffusers"
        write_atomically((home if home.is_dir() else folder) / "README.md", card)
    log.info("exported to %s with fingerprint %s", folder, weights.fingerprint)


def _check_settings(cfg: DictConfig) -> tuple[str, ...]:
    asked, dtype = cfg.task.formats, cfg.task.dtype
    formats = tuple(dict.fromkeys([asked] if isinstance(asked, str) else asked or []))
    if not formats or not set(formats) <= set(FORMATS):
        raise InputError(
            f"task.formats must name one or more of {', '.join(FORMATS)}, got {list(formats)}"
        )
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"task.dtype must be one of {', '.join(DTYPES)} or null, got {dtype!r}")
    return formats


def _from_mitigation(
    cfg: DictConfig, model: LatentDiffusion, mitigation: Mitigation, listed: Sequence[Pair]
) -> _Chosen:
    """Find the edit that an audit of the same configuration finds."""
    pairs = [pair for pair in listed if pair.role == "audit"]
    context = make_context(cfg, model, pairs)
    aimed = aimed_pairs(
        pairs,
        context.references,
        model=model,
        sampling=context.sampling,
        cache=Path(cfg.paths.cache),
    )
    if aimed != tuple(pairs):
        pairs = [*aimed]
        context = replace(
            context,
            data=context.data.with_pairs(pairs),
            references=reference_images(pairs, model.resolution, context.references.measures),
        )
    suspected = [pair for pair in pairs if pair.kind != "control"]
    edit = context.find(mitigation, model, suspected).edit
    return _Chosen(
        _for_one_checkpoint(edit, cfg.task.pair, mitigation.name),
        mitigation.name,
        pairs=Counter(pair.kind for pair in suspected),
        seed=cfg.seed,
    )


def _for_one_checkpoint(edit: Edit, pair: str | None, mitigation: str) -> Edit:
    """An edit as one set of weights.

    Raises:
        InputError: It has one for each pair and none is named, or the other way round.
    """
    pair = None if pair is None else str(pair)
    if edit.pairs and pair is None:
        raise InputError(
            f"{mitigation} prunes other weights for each of {len(edit.pairs)} pairs, and one "
            f"checkpoint has one set of weights\n"
            f"  where: task.pair\n"
            f"  fix:   task.pair=ID uses the masks of one pair; or choose a mitigation that "
            f"prunes once for all pairs: mitigation={_unions()}"
        )
    if edit.pairs and pair not in edit.pairs:
        raise InputError(
            f"the edit has no masks of the pair {pair}\n"
            f"  where: task.pair\n"
            f"  fix:   one of {', '.join(edit.pairs)}; quote numbers: 'task.pair=\"0001\"'"
        )
    if pair is not None and not edit.pairs:
        raise InputError(
            f"{mitigation} makes one edit for all pairs, so it has none of {pair} alone\n"
            f"  where: task.pair\n"
            f"  fix:   leave task.pair out"
        )
    return edit if pair is None else edit.for_pair(pair)


def _unions() -> str:
    """Presets that say so by their name."""
    return " or ".join(n for n in groups().get("mitigation", {}) if "union" in n) or "NAME"


def _changed(model: LatentDiffusion, edit: Edit, mitigation: str) -> dict[str, Changed]:
    """Count what an edit changes, by block of the UNet; the model carries no edit yet.

    Raises:
        InputError: It changes no weights, but how images are generated.
    """
    changed = edit.changed(model)
    if changed is None:
        raise InputError(
            f"{mitigation} changes how images are generated and no weight, so no checkpoint can "
            f"hold it\n"
            f"  where: mitigation\n"
            f"  fix:   choose a mitigation that prunes or trains"
        )
    parameters = dict(model.denoiser().named_parameters())
    found: dict[str, Changed] = {}
    for name, count in changed.items():
        block = name.partition(".")[0]
        old = found.get(block, Changed(0, 0, 0))
        found[block] = Changed(
            old.tensors + (count > 0), old.weights + count, old.total + parameters[name].numel()
        )
    return {block: part for block, part in found.items() if part.weights}


def _check_audit(
    folder: Path, record: AuditRecord, *, model: LatentDiffusion, edit: Edit, weights: Weights
) -> None:
    """Refuse the audit of anything but this edit of this checkpoint, or the exported weights.

    Raises:
        InputError: Names what was audited and what is exported.
    """
    audited = read_edit_record(folder)
    if audited is None:
        raise InputError(
            f"{folder / EDIT_FILE} does not exist, so it is unknown which edit was audited\n"
            f"  fix:   run the audit's command again; it finishes what is missing"
        )
    fingerprint = record.provenance.fingerprint
    if (fingerprint, audited.identity) not in (
        (model.fingerprint, edit.identity),
        (weights.fingerprint, "none"),
    ):
        raise InputError(
            f"{folder} is the audit of checkpoint {fingerprint} under edit {audited.identity}, "
            f"but this exports checkpoint {model.fingerprint} under edit {edit.identity}, which "
            f"is checkpoint {weights.fingerprint}\n"
            f"  where: task.audit\n"
            f"  fix:   give the audit of the same checkpoint, mitigation and pairs, or audit what "
            f"was exported: checkpoint=custom checkpoint.source=FOLDER"
        )


def _describe(
    cfg: DictConfig,
    model: LatentDiffusion,
    chosen: _Chosen,
    weights: Weights,
    changed: Mapping[str, Changed],
) -> Exported:
    source = str(cfg.checkpoint.get("source", "package:random weights"))
    revision = cfg.checkpoint.get("revision")
    public = source.startswith("package:") or isinstance(resolve_source(source), str)
    origin = chosen.edit.origin
    return Exported(
        checkpoint=model.name,
        source=source if public else None,
        revision=model.commit or (revision if public else None),
        fingerprint=model.fingerprint,
        exported=weights.fingerprint,
        dtypes=weights.dtypes,
        exact=weights.exact,
        mitigation=chosen.mitigation,
        settings=origin.settings if origin else {},
        cost=origin.cost if origin else {},
        edit=chosen.edit.identity,
        changed=changed,
        pairs=chosen.pairs,
        pair=None if cfg.task.pair is None else str(cfg.task.pair),
        seed=chosen.seed,
        git_sha=git_sha(),
        packages=package_versions(),
        replaced=model.replaced,
        loras=model.loras,
    )


def _write_folder(components: Components, weights: Weights, card: bytes, place: Path) -> None:
    """Write a diffusers folder with its card."""
    write_folder(place, components, weights)
    (place / "README.md").write_bytes(card)
    check_written(place, weights, family=components.family.name)


def _write_single(
    components: Components, weights: Weights, notes: Mapping[str, str], place: Path
) -> None:
    """Write a single file with ``notes`` in its header."""
    with TemporaryDirectory() as config:
        write_configs(Path(config), components)
        write_single(place, components, weights, notes)
        check_written(place, weights, family=components.family.name, config=Path(config))


def _write_once(place: Path, write: Callable[[Path], None]) -> None:
    """Have a file or folder written, unless it is there; it appears in one step, once complete.

    Whoever calls this holds the folder's lock, so a private place in use was left by a killed run.
    """
    if place.exists():
        log.info("%s is there already", place)
        return
    private = place.with_name(f".partial-{place.name}")
    _remove(private)
    try:
        write(private)
        for path in (private, *sorted(private.rglob("*"))):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # before its name says that it is complete
        private.rename(place)
    finally:
        _remove(private)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
