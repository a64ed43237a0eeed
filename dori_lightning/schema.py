"""Typed root of the configuration, where its files lie, and the checks that need no model."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from dori_lightning.targets import ALLOWED_TARGETS, check_signatures, check_targets, closest
from dori_lightning.types import InputError

__all__ = [
    "ALLOWED_TARGETS",
    "CONF",
    "MEANINGS",
    "Config",
    "Images",
    "Paths",
    "Report",
    "check_keys",
    "check_missing",
    "check_signatures",
    "check_targets",
    "closest",
    "groups",
    "launchers",
    "register",
]

_PACKAGE = Path(__file__).resolve().parent
#: The yaml files: inside the package when it was installed from a wheel, beside it in a checkout.
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


class Images(StrEnum):
    """Which pictures a report shows."""

    full = "full"
    blurred = "blurred"
    none = "none"


@dataclass
class Report:
    """What the report shows.

    Attributes:
        images: Pictures as they are, blurred beyond recognition, or none.
        max_pairs: Pairs that are shown with their pictures; every pair is in the tables.
    """

    images: Images = Images.full
    max_pairs: int = 60


@dataclass
class Paths:
    """Where things are written.

    Attributes:
        output: Parent of every run folder.
        cache: Latents, embeddings and edits that several runs share.
    """

    output: str = "outputs"
    cache: str = "${paths.output}/cache"


@dataclass
class Config:
    """Root of every composed config; a key that is not here does not exist.

    Attributes:
        name: Run folder below ``paths.output``; the same name resumes.
        sweep: Folder of a sweep below ``paths.output/sweeps``.
        seed: Seed of every random draw except generation seeds (``sampling.seed``).
        task: What to do: ``name`` is a module of `dori_lightning.tasks`, the rest its settings.
        checkpoint: The model under audit.
        pairs: Prompts and pictures.
        corpus: Ordinary prompts and pictures, which mitigations calibrate on and utility is
            measured on.
        mitigation: What is done to the checkpoint before the audit.
        utility: How much is measured of what the mitigation costs.
        attack: The search for embeddings that bring a picture back.
        sampling: How pictures are generated.
        metrics: How pictures are compared.
        trainer: Lightning's Trainer.
        logger: Loggers by name; empty for none. Each is partial and is called with ``save_dir``.
        report: What the report shows.
        paths: Where things are written.
    """

    name: str = MISSING
    sweep: str = MISSING
    seed: int = 0
    task: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    pairs: dict[str, Any] = field(default_factory=dict)
    corpus: dict[str, Any] = field(default_factory=dict)
    mitigation: dict[str, Any] = field(default_factory=dict)
    utility: dict[str, Any] = field(default_factory=dict)
    attack: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    report: Report = field(default_factory=Report)
    paths: Paths = field(default_factory=Paths)


def register() -> None:
    """Tell Hydra and OmegaConf about the typed root and the two resolvers; may be called again."""
    ConfigStore.instance().store(name="base_config", node=Config)
    OmegaConf.register_new_resolver("folder_name", _folder_name, replace=True)
    OmegaConf.register_new_resolver("group_options", _group_options, replace=True)


def groups() -> dict[str, dict[str, str]]:
    """Config groups: name to options, each with the first comment line of its file."""
    # what a mitigation sets for one checkpoint comes with the checkpoint, nobody chooses it
    return _options(lambda group: not group.startswith(("hydra", "mitigation/tuned")))


def launchers() -> dict[str, dict[str, str]]:
    """The project's launchers of a sweep's jobs, in the same form."""
    return _options(lambda group: group == "hydra/launcher")


def _options(wanted: Callable[[str], bool]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for file in sorted(CONF.rglob("*.yaml")):
        group = file.parent.relative_to(CONF).as_posix()
        if group == "." or not wanted(group):
            continue
        comments = (
            line[1:].strip() for line in file.read_text("utf-8").splitlines() if line[:1] == "#"
        )
        claim = next((line for line in comments if not line.startswith("@package")), "")
        found.setdefault(group, {})[file.stem] = claim
    return dict(sorted(found.items()))


def check_keys(cfg: DictConfig) -> None:
    """Refuse keys that were forced in with ``+`` where the schema has none.

    Raises:
        InputError: Names the key and its nearest neighbour.
    """
    for path, node, kind in (
        ("", cfg, Config),
        ("report.", cfg.report, Report),
        ("paths.", cfg.paths, Paths),
    ):
        known = [item.name for item in fields(kind)]
        for key in node:
            if key not in known:
                guess = closest(str(key), known)
                raise InputError(
                    f"unknown key {path}{key!s}\n"
                    f"  where: +{path}{key!s}\n"
                    f"  mend:  {f'did you mean {path}{guess}?' if guess else 'remove it'}"
                )


MEANINGS = {
    "checkpoint.source": "a diffusers folder, a hub id, or a single .safetensors file",
    "pairs.path": "the list of prompts and pictures, or the folder that holds both",
    "pairs.images": "the folder with the list's pictures",
    "pairs.kind": "vm (reproduced verbatim), tm (template) or control (never seen)",
    "corpus.path": "ordinary captions, or a folder of ordinary pictures with a metadata.csv",
    "metrics.descriptors.sscd.weights": "SSCD's model, the file sscd_disc_mixup.torchscript.pt of "
    "facebookresearch/sscd-copy-detection; nothing is downloaded",
    "utility.inception.weights": "the Inception network of FID, a local file",
    "task.runs": "the folder of a sweep, or [FOLDER,FOLDER] of runs",
}
"""What is wanted where the yaml files leave a value to the user (``???``)."""


def check_missing(cfg: DictConfig) -> None:
    """Refuse a config with mandatory values left open.

    Raises:
        InputError: Names every open key, and says what it wants.
    """
    # parts[0] as Hydra's command line writes it: parts.0
    missing = sorted(re.sub(r"\[(\d+)\]", r".\1", key) for key in OmegaConf.missing_keys(cfg))
    if missing:
        meanings = {key: MEANINGS.get(re.sub(r"\.parts\.\d+", "", key)) for key in missing}
        raise InputError(
            f"missing value for {', '.join(missing)}\n"
            f"  where: the composed config\n"
            f"  mend:  add {' '.join(f'{key}=VALUE' for key in missing)}"
            + "".join(f"\n         {key}: {text}" for key, text in meanings.items() if text)
        )


def _folder_name(text: str) -> str:
    """One folder name from a sweep job's overrides: no separators, short enough anywhere."""
    name = re.sub(r"[^A-Za-z0-9._,=+\[\]-]", ".", text) or "defaults"
    if len(name) <= 120:
        return name
    return f"{name[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _group_options() -> str:
    """The groups for ``--help``, a line per option."""
    hints = {
        "experiment": "   (write +experiment=NAME)",
        "hydra/launcher": "   (of a sweep's jobs, with -m)",
    }
    lines = []
    for group, options in {**groups(), **launchers()}.items():
        width = max(map(len, options)) + 2
        lines.append(f"{group}{hints.get(group, '')}")
        lines += [f"    {name:<{width}}{claim}".rstrip() for name, claim in options.items()]
    return "\n".join(lines).replace("$", "")
