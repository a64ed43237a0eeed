"""The configuration: its typed root, where its files lie, and the checks that need no model.

Configurations may come from strangers, and Hydra itself builds callbacks and log handlers before a
task begins. So every composed configuration is checked before Hydra builds or writes anything:
only names on the lists below are built, and nothing that looks like a secret is written down.
"""

import difflib
import functools
import hashlib
import inspect
import os
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dori_lightning.runtime.redaction import REDACTED, is_secret_name, redact, secrets_in, walk
from dori_lightning.types import InputError

_PACKAGE = Path(__file__).resolve().parent
#: The yaml files: inside the package when it was installed from a wheel, beside it in a checkout.
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"

#: What a config may build.
ALLOWED_TARGETS = ("dori_lightning.", "torch.optim.", "lightning.pytorch.")
#: What Hydra's own node may build: callbacks, and launcher and sweeper out of installed plugins.
_HYDRAS_TARGETS = ("dori_lightning.", "hydra.experimental.callbacks.", "hydra_plugins.")
_PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")
_LOGGING_CLASSES = {
    "logging.FileHandler",
    "logging.Formatter",
    "logging.NullHandler",
    "logging.StreamHandler",
    "dori_lightning.runtime.logging.ProcessFileHandler",
    "dori_lightning.runtime.redaction.RedactingFormatter",
}
_LOGGING_REFERENCES = {
    "ext://sys.stderr",
    "ext://sys.stdout",
    "${hydra.runtime.output_dir}/${hydra.job.name}.log",
}

_RESERVED = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
_FOLDERS = ("paths.output", "paths.cache", "hydra.run.dir", "hydra.sweep.dir")
_NOT_EMPTY = ("name", "sweep", "paths.output", "paths.cache")
_READ_FROM = {
    "audit", "base", "config", "edit", "expected", "lora", "path", "source", "statistics",
    "text_encoder", "text_encoder_2", "transformer", "unet", "vae", "weights",
}  # fmt: skip
"""Last part of keys that name a file or folder to be read."""

_HOME = re.compile(r"~[\w.-]*(/|$)")
_FROM_ENVIRONMENT = re.compile(r"oc\.env:\s*([A-Za-z_][A-Za-z0-9_]*)")

MEANINGS = {
    "reference.source": "a checkpoint that never saw the images: a folder, hub id or single file",
    "checkpoint.source": "a diffusers folder, a hub id, or a single .safetensors file",
    "pairs.path": "the list of prompts and images, or the folder that holds both",
    "pairs.images": "the folder with the list's images",
    "pairs.kind": "vm (reproduced verbatim), tm (template) or control (never seen)",
    "corpus.path": "ordinary captions, or a folder of ordinary images with a metadata.csv",
    "metrics.descriptors.sscd.weights": "SSCD's model, the file sscd_disc_mixup.torchscript.pt of "
    "facebookresearch/sscd-copy-detection; nothing is downloaded",
    "utility.inception.weights": "the Inception network of FID, a local file",
    "task.runs": "the folder of a sweep, or [FOLDER,FOLDER] of runs",
}
"""Meaning of the values that the yaml files leave to the user (``???``)."""


class Images(StrEnum):
    """Which images a report shows."""

    full = "full"
    blurred = "blurred"
    none = "none"


@dataclass
class Report:
    """What the report shows.

    Attributes:
        images: Images as they are, blurred beyond recognition, or none.
        max_pairs: Pairs that are shown with their images; every pair is in the tables.
    """

    images: Images = Images.full
    max_pairs: int = 60


@dataclass
class Paths:
    """Where files are written.

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
        pairs: Prompts and images.
        corpus: Ordinary prompts and images: mitigations calibrate on them, utility is measured on
            them.
        mitigation: What is done to the checkpoint before the audit.
        utility: How much is measured of what the mitigation costs.
        attack: The search for embeddings that reproduce an image.
        evidence: How sure the verdict has to be of each image.
        reference: A model that never saw the images; empty for none.
        power: How it is measured whether the attack could have found an image.
        certify: The attacks of ``task=certify``; empty for other tasks.
        planting: The recipe of ``task=plant``.
        sampling: How images are generated.
        metrics: How images are compared.
        trainer: Lightning's Trainer.
        logger: Loggers by name; empty for none. Each is partial and is called with ``save_dir``.
        report: What the report shows.
        paths: Where files are written.
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
    evidence: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    power: dict[str, Any] = field(default_factory=dict)
    certify: dict[str, Any] = field(default_factory=dict)
    planting: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    report: Report = field(default_factory=Report)
    paths: Paths = field(default_factory=Paths)


def register() -> None:
    """Register the typed root and the two resolvers; may be called again."""
    ConfigStore.instance().store(name="base_config", node=Config)
    OmegaConf.register_new_resolver("folder_name", _folder_name, replace=True)
    OmegaConf.register_new_resolver("group_options", _group_options, replace=True)


def groups() -> dict[str, dict[str, str]]:
    """Config groups: name to options, each with the first comment line of its file."""
    # what a mitigation sets for one checkpoint comes with the checkpoint, nobody chooses it
    return {
        group: options
        for group, options in _all_groups().items()
        if not group.startswith(("hydra", "mitigation/tuned"))
    }


def launchers() -> dict[str, dict[str, str]]:
    """The project's launchers of a sweep's jobs, in the same form."""
    return {"hydra/launcher": _all_groups()["hydra/launcher"]}


def _all_groups() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for file in sorted(CONF.glob("*/**/*.yaml")):
        lines = file.read_text("utf-8").splitlines()
        comments = (line[1:].strip() for line in lines if line.startswith("#"))
        claim = next((line for line in comments if not line.startswith("@package")), "")
        found.setdefault(file.parent.relative_to(CONF).as_posix(), {})[file.stem] = claim
    return dict(sorted(found.items()))


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


def _folder_name(text: str) -> str:
    """One folder name from a sweep job's overrides: no separators, short enough anywhere."""
    name = re.sub(r"[^A-Za-z0-9._,=+\[\]-]", ".", text) or "defaults"
    if len(name) <= 120:
        return name
    return f"{name[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant."""
    known = list(known)
    whole = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if whole:
        return whole[0]
    # a key given without its group, or under another one: compare the last part alone
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(known)}
    leaf = difflib.get_close_matches(word.rpartition(".")[2], by_leaf, n=1, cutoff=0.75)
    return by_leaf[leaf[0]] if leaf else None


def check_keys(cfg: DictConfig) -> None:
    """Refuse keys that were forced in with ``+`` where the typed root has none.

    Raises:
        InputError: Names the key and its nearest neighbour.
    """
    typed = (("", cfg, Config), ("report.", cfg.report, Report), ("paths.", cfg.paths, Paths))
    for path, node, kind in typed:
        known = [item.name for item in fields(kind)]
        for key in node:
            if key not in known:
                guess = closest(str(key), known)
                raise InputError(
                    f"unknown key {path}{key!s}",
                    where=f"+{path}{key!s}",
                    fix=f"did you mean {path}{guess}?" if guess else "remove it",
                )


def check_missing(cfg: DictConfig) -> None:
    """Refuse a config with mandatory values left open.

    Raises:
        InputError: Names every open key, and says what it means.
    """
    # parts[0] as Hydra's command line writes it: parts.0
    missing = sorted(re.sub(r"\[(\d+)\]", r".\1", key) for key in OmegaConf.missing_keys(cfg))
    if missing:
        meanings = {key: _meaning(key) for key in missing}
        raise InputError(
            f"missing value for {', '.join(missing)}",
            where="the composed config",
            fix=f"add {' '.join(f'{key}=VALUE' for key in missing)}"
            + "".join(f"\n         {key}: {text}" for key, text in meanings.items() if text),
        )


def _meaning(key: str) -> str | None:
    """What a value is that the yaml files leave to the user; None for other keys."""
    return MEANINGS.get(re.sub(r"\.parts(\.|\[)\d+\]?", "", key))


def check_files(cfg: DictConfig) -> None:
    """Refuse names of files and folders to be read that are not there.

    Only what can be nothing but a path is looked at: absolute, or beginning with ``./`` or
    ``../``. Lists of pairs say more of theirs.

    Raises:
        InputError: Names the first that is missing.
    """
    composed: Any = OmegaConf.to_container(cfg, resolve=True)
    read = {
        key: value for key, value in composed.items() if key not in ("hydra", "pairs", "paths")
    }
    for place, value in walk(read):
        named = re.split(r"[.\[]", place)[-1] in _READ_FROM
        is_path = named and isinstance(value, str) and re.match(r"\.{0,2}/", value)
        if is_path and not Path(value).exists():
            raise InputError(
                f"there is no file or folder {value}",
                where=place,
                fix=_meaning(place) or "correct the path",
            )


def check_targets(cfg: DictConfig) -> None:
    """Refuse a config that would build something outside `ALLOWED_TARGETS`; imports nothing.

    Raises:
        InputError: Names the key and the target.
    """
    for path, node in targets(cfg):
        _check_name(path, node["_target_"], ALLOWED_TARGETS)


def check_signatures(cfg: DictConfig, *, under: str = "") -> None:
    """Check every node that builds something against the signature of what it builds.

    Imports the targets, builds nothing.

    Args:
        cfg: The root.
        under: Only nodes of this key; empty for all.

    Raises:
        InputError: A key the target does not take, one it needs, or a value of the wrong type.
    """
    for path, node in targets(cfg, under):
        _check_arguments(path, node, _import_target(path, node["_target_"], ALLOWED_TARGETS))


_OF_THE_MACHINE = (
    "precision", "channels_last", "gradient_checkpointing", "storage", "text_encoders", "device",
    "resolution",
)  # fmt: skip
"""Settings of a checkpoint under audit that its base shares: how it is computed, at which size."""

_MENDED = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "prediction_type")
"""Settings by which a checkpoint differs from its source."""


def base_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """What builds the checkpoint that another one was tuned from; None for none.

    Args:
        checkpoint: The resolved node of the other one. Its ``base`` is ``none``, an option of
            ``conf/checkpoint``, or a source as ``checkpoint.source`` takes it, of its family; with
            ``auto``, a checkpoint with a LoRA was tuned from itself without it.

    Raises:
        InputError: The option is of another family.
    """
    base = str(checkpoint.get("base", "none"))
    without = {**checkpoint, "lora": None, "base": "none"}
    if base == "none" or (base == "auto" and not checkpoint.get("lora")):
        return None
    if base == "auto":
        return {**without, "name": f"{checkpoint['name']} without LoRA"}
    option = CONF / "checkpoint" / f"{base}.yaml"
    if base in groups()["checkpoint"]:
        named: Any = OmegaConf.to_container(OmegaConf.load(option))
        own = {key: value for key, value in named.items() if key != "defaults"}
        family, other = checkpoint.get("family", "sd"), own.get("family", "sd")
        if family != other:
            raise InputError(
                f"checkpoint.base={base} is of the family {other}, the checkpoint of {family}",
                where="checkpoint.base",
                fix="give the checkpoint that it was tuned from, or checkpoint.base=none",
            )
        shared = {key: checkpoint[key] for key in _OF_THE_MACHINE if key in checkpoint}
        shared = {key: value for key, value in shared.items() if key in own}
        return {**own, **shared}
    untouched = {key: None for key in (*_MENDED, "revision", "variant") if key in checkpoint}
    return {**without, **untouched, "source": base, "name": base.rstrip("/").rpartition("/")[2]}


def targets(cfg: DictConfig, under: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Nodes that build something, of the whole config or of one key, with their places."""
    whole: Any = OmegaConf.to_container(cfg, resolve=True)
    return _targets(whole[under] if under else whole, under)


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Nodes with a ``_target_``, outer ones first, with their place in the config."""
    for place, value in walk(node, path):
        if isinstance(value, Mapping) and "_target_" in value:
            yield place or "the config", value


def _check_name(path: str, target: Any, allowed: tuple[str, ...]) -> None:
    """Refuse a ``_target_`` whose name does not begin as it may; imports nothing."""
    if not isinstance(target, str) or not target.startswith(allowed):
        raise InputError(
            f"refused to build {target!r}",
            where=f"{path}._target_",
            fix=f"a config may only name {', '.join(f'{prefix}*' for prefix in allowed)}",
        )


def _import_target(path: str, target: Any, allowed: tuple[str, ...]) -> Any:
    """Import what a ``_target_`` names, if its name and its home begin as they may."""
    _check_name(path, target, allowed)
    try:
        thing = get_object(target)
    except ImportError as error:
        raise InputError(
            f"cannot import {target}", where=f"{path}._target_", fix=str(error)
        ) from error
    # an allowed module also holds names that it imported: the thing itself must live inside
    home = getattr(thing, "__module__", None)
    _check_name(path, f"{home}.{getattr(thing, '__qualname__', target)}", allowed)
    return thing


def _check_arguments(path: str, node: Mapping[str, Any], thing: Any) -> None:
    """Refuse arguments that a target does not take, lacks, or cannot be given."""
    signature = inspect.signature(thing)
    values = {str(key): value for key, value in node.items() if key not in _RESERVED}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for key in values:
        if key not in signature.parameters and not takes_any:
            guess = closest(key, signature.parameters)
            raise InputError(
                f"unknown key {path}.{key}",
                where=f"{node['_target_']} does not take it",
                fix=f"did you mean {path}.{guess}?" if guess else "remove it",
            )
    try:
        (signature.bind_partial if node.get("_partial_") else signature.bind)(**values)
    except TypeError as error:
        raise InputError(
            f"{path} is not complete: {error}", where=node["_target_"], fix="add the value"
        ) from None
    try:
        hints = get_type_hints(thing.__init__ if inspect.isclass(thing) else thing)
    except (AttributeError, NameError, TypeError):  # types that only type checkers import
        return
    for key, hint in hints.items():
        if key in values and not _fits(values[key], hint):
            # a lone value that belongs into a list
            lone = f"give a list: '{path}.{key}=[{values[key]}]'"
            raise InputError(
                f"{path}.{key} cannot be {values[key]!r}",
                where=node["_target_"],
                fix=lone if _fits([values[key]], hint) else f"give {_describe(hint)}",
            )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain config value may be of a type; anything but plain types passes."""
    if value == MISSING or (isinstance(value, Mapping) and "_target_" in value):
        return True
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in arguments)
    if origin in (list, tuple, Sequence, Iterable):
        inner = arguments[0] if arguments else Any
        return isinstance(value, list | tuple) and all(_fits(item, inner) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint is type(None):
        return value is None
    return value is not None or not isinstance(hint, type)


def _describe(hint: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (list, tuple, Sequence, Iterable):
        return "a list [...]" + (f", each of it {_describe(arguments[0])}" if arguments else "")
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(choice) for choice in arguments)
    if hint is type(None):
        return "null"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(hint, str(getattr(hint, "__name__", hint)))


def guard() -> None:
    """Have Hydra check every configuration that it composes; may be called again.

    These include the configurations of ``--config-dir`` and of each job of a sweep, on a cluster's
    node too. Hydra has no hook for this, so its loader is wrapped.
    """
    compose = ConfigLoaderImpl.load_configuration
    if hasattr(compose, "__wrapped__"):
        return

    @functools.wraps(compose)
    def checked(*args: Any, **kwargs: Any) -> DictConfig:
        cfg = compose(*args, **kwargs)
        check_composed(cfg)
        return cfg

    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]


def check_composed(cfg: DictConfig) -> None:
    """Refuse what must not be written down or is lacking, and what Hydra must not build or call.

    A ``~`` at the beginning of a path becomes the home folder, in every setting.

    Args:
        cfg: The root, with Hydra's own node; nothing in it need be resolvable yet.

    Raises:
        InputError: A secret, a part that was deleted, a value that is empty, a folder that is an
            address, or a target that is on no list.
    """
    composed: Any = OmegaConf.to_container(cfg, resolve=False)
    hydra = composed.get("hydra") or {}
    given = hydra.get("overrides") or {}
    overrides = given.get("task") or []
    refuse_secrets([*overrides, *(given.get("hydra") or [])])
    _refuse_secret_values(composed)
    if OmegaConf.get_type(cfg) is Config:
        _refuse_incomplete(composed, overrides)
    _refuse_empty(composed)
    _expand_home(cfg, composed)
    _refuse_addresses(cfg)
    for path, node in _targets(hydra, "hydra"):
        if path in ("hydra.launcher", "hydra.sweeper"):
            # of these Hydra builds nothing but the plugins that it finds installed
            _check_name(path, node["_target_"], _PLUGINS)
        else:
            _import_target(path, node["_target_"], _HYDRAS_TARGETS)
    for name in ("job_logging", "hydra_logging"):
        _refuse_calls_of_logging(hydra.get(name), f"hydra.{name}")


def refuse_secrets(overrides: Iterable[str]) -> None:
    """Refuse keys, tokens and passwords on the command line.

    Args:
        overrides: Arguments as they were typed.

    Raises:
        InputError: One holds a secret; it is not repeated.
    """
    for override in overrides:
        plain = unescaped(override)
        key, _, value = plain.lstrip("+~").partition("=")
        where = f"{key}={REDACTED}" if value and is_secret_name(key) else redact(plain)
        if where != plain or _secret_variable(plain):
            raise _no_secrets(where)


def unescaped(override: str) -> str:
    """An override without escapes, which would hide an address and its password."""
    return re.sub(r"\\(.)", r"\1", override)


def _refuse_incomplete(composed: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuse a configuration that lacks a group or a key, or merges several options of a group.

    Of all groups only ``logger`` may be none or several.
    """
    options = {name: found for name, found in groups().items() if name != "logger"}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        line, names, key = str(override.input_line), override.value(), override.key_or_group
        if override.is_delete() and key.replace(".", "/") in options:
            raise _deleted(key, line, chosen=True)
        if key in options and isinstance(names, list):
            each = ",".join(map(str, names)) or "NAME"
            raise InputError(
                f"{key} takes one option, not a list",
                where=line,
                fix=f"one job for each, with -m: {key}={each}",
            )
    chosen = composed["hydra"]["runtime"]["choices"]
    for name in (item.name for item in fields(Config)):
        if name not in composed or (name in options and name not in chosen):
            line = next((o for o in overrides if o.startswith(f"~{name}")), name)
            raise _deleted(name, line, chosen=name in options)


def _deleted(key: str, where: str, *, chosen: bool) -> InputError:
    """What is said of a deleted key; of a group another option may be ``chosen``."""
    fix = f"; to choose another one: {key.replace('.', '/')}=NAME" if chosen else ""
    return InputError(
        f"{key} was deleted, and no run goes without", where=where, fix=f"leave that out{fix}"
    )


def _refuse_empty(composed: Mapping[str, Any]) -> None:
    """Refuse an empty text where a file, a folder or a name is to be."""
    for place, value in walk(dict(composed)):
        if value == "" and (place in _NOT_EMPTY or _meaning(place)):
            raise InputError(
                f"{place} is empty",
                where=f"{place}=",
                fix=_meaning(place) or "give a value, or leave it out; is a shell variable unset?",
            )


def _expand_home(cfg: DictConfig, composed: Mapping[str, Any]) -> None:
    """Replace a leading ``~`` or ``~user`` by the home folder, as a shell does.

    Raises:
        InputError: There is no such user: a folder of that name would be made here.
    """
    hydra = composed.get("hydra") or {}
    own = {key: value for key, value in composed.items() if key != "hydra"}
    folders = {"run": hydra.get("run"), "sweep": hydra.get("sweep")}
    for place, value in (*walk(own), *walk(folders, "hydra")):
        if not isinstance(value, str) or not _HOME.match(value):
            continue
        expanded = os.path.expanduser(value)  # noqa: PTH111  # leaves users that are not here
        if expanded.startswith("~") and "/" in expanded:
            user = expanded.partition("/")[0][1:]
            raise InputError(
                f"{value} begins with the home folder of {user}, and there is no such user",
                where=place,
                fix="write the whole path",
            )
        OmegaConf.update(cfg, place, expanded)


def _refuse_secret_values(composed: Mapping[Any, Any]) -> None:
    """Refuse secrets in a composed config, but for what only sounds like one in Hydra's node."""
    hydra = dict(composed.get("hydra") or {})
    for name in ("help", "hydra_help"):  # examples of key=value
        hydra.pop(name, None)
    hydra["job"] = {k: v for k, v in (hydra.get("job") or {}).items() if k != "config"}
    plain = {**composed, "hydra": hydra}
    for place in secrets_in(plain):
        raise _no_secrets(place)
    for place, text in walk(plain):
        if isinstance(text, str) and _secret_variable(text):
            raise _no_secrets(f"{place}={text}")


def _secret_variable(text: str) -> bool:
    """Whether a text takes over an environment variable that holds a secret."""
    return any(is_secret_name(name) for name in _FROM_ENVIRONMENT.findall(text))


def _no_secrets(where: str) -> InputError:
    return InputError(
        "a configuration holds no secrets: it is written into the run folder and the report",
        where=where,
        fix="remove it; keys come from the environment, WANDB_API_KEY (or wandb login) for "
        "Weights & Biases and HF_TOKEN for the Hugging Face hub",
    )


def _refuse_addresses(cfg: DictConfig) -> None:
    """Refuse ``s3://...`` as a folder: it would become a folder of that name on this machine."""
    for key in _FOLDERS:
        try:
            value = str(OmegaConf.select(cfg, key))
        except OmegaConfBaseException:
            continue  # left open, or part of another error, which is reported where it is used
        if "://" in value or redact(value) != value:
            raise InputError(
                f"results go to a folder of this machine, not to {redact(value)}",
                where=key,
                fix="give a local folder, and copy finished results from there",
            )


def _refuse_calls_of_logging(node: Any, path: str) -> None:
    """Refuse what ``logging.config`` would call or import and that is not on the lists."""
    for place, value in walk(node, path):
        refused = {}
        if isinstance(value, Mapping):
            refused = {
                f"{place}.{key}": item
                for key, item in value.items()
                if key == "()" or (key == "class" and str(item) not in _LOGGING_CLASSES)
            }
        elif isinstance(value, str) and ("://" in value or "${" in value):
            refused = {} if value in _LOGGING_REFERENCES else {place: value}
        for where, what in refused.items():
            raise InputError(
                f"refused to have logging call {what!r}",
                where=where,
                fix=f"use {', '.join(sorted(_LOGGING_CLASSES | _LOGGING_REFERENCES))}",
            )
