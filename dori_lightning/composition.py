"""What no composed configuration may hold, checked before Hydra does anything with it.

Hydra itself builds callbacks and logging handlers, and writes configurations down, before a task
begins: a check inside of the task would come too late for a yaml file that somebody else wrote.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dori_lightning.redaction import REDACTED, is_secret_name, redact, secrets_in
from dori_lightning.targets import allow_target, find_target, targets_in
from dori_lightning.types import InputError

__all__ = ["check_composed", "guard", "refuse_secrets"]

_PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")
_HYDRAS_TARGETS = ("dori_lightning.", "hydra.experimental.callbacks.", "hydra_plugins.")
_LOGGING_CLASSES = {
    "logging.FileHandler",
    "logging.Formatter",
    "logging.NullHandler",
    "logging.StreamHandler",
    "dori_lightning.logfiles.ProcessFileHandler",
    "dori_lightning.redaction.RedactingFormatter",
}
_REFERENCES = {
    "ext://sys.stderr",
    "ext://sys.stdout",
    "${hydra.runtime.output_dir}/${hydra.job.name}.log",
}

_FOLDERS = ("paths.output", "paths.cache", "hydra.run.dir", "hydra.sweep.dir")
_FROM_ENVIRONMENT = re.compile(r"oc\.env:\s*([A-Za-z_][A-Za-z0-9_]*)")


def guard() -> None:
    """Have Hydra check every configuration that it composes; may be called again.

    That are also those of ``--config-dir`` and of each job of a sweep, on a cluster's node too.
    Hydra has no place of its own for this, so its loader is wrapped.
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
    """Refuse what must not be written down, and what Hydra must not build or call.

    Args:
        cfg: The root, with Hydra's own node; nothing in it need be resolvable yet.

    Raises:
        InputError: A secret, a folder that is an address, or something that is not on the lists of
            what may be built.
    """
    composed = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(composed, dict)
    plain = {str(key): value for key, value in composed.items()}
    hydra = plain.pop("hydra", None) or {}
    given = hydra.get("overrides") or {}
    refuse_secrets([*(given.get("task") or []), *(given.get("hydra") or [])])
    _refuse_secret_values({**plain, "hydra": _without_keys_of_hydra(hydra)})
    _refuse_addresses(cfg)
    for path, node in targets_in(hydra, "hydra"):
        if path in ("hydra.launcher", "hydra.sweeper"):
            # of these Hydra builds nothing but the plugins that it finds installed
            allow_target(path, node["_target_"], _PLUGINS)
        else:
            find_target(path, node["_target_"], _HYDRAS_TARGETS)
    for name in ("job_logging", "hydra_logging"):
        for place, value in _calls_of_logging(hydra.get(name), f"hydra.{name}"):
            raise InputError(
                f"refused to have logging call {value!r}\n"
                f"  where: {place}\n"
                f"  mend:  use {', '.join(sorted(_LOGGING_CLASSES | _REFERENCES))}"
            )


def refuse_secrets(overrides: Iterable[str]) -> None:
    """Refuse keys, tokens and passwords on the command line.

    Args:
        overrides: Arguments as they were typed.

    Raises:
        InputError: One holds a secret; it is not repeated.
    """
    for override in overrides:
        # escapes and quotes would hide an address and its password
        plain = re.sub(r"\\(.)", r"\1", override)
        key, _, value = plain.lstrip("+~").partition("=")
        where = f"{key}={REDACTED}" if value and is_secret_name(key) else redact(plain)
        if where != plain or _secret_variable(plain):
            raise _no_secrets(where)


def _refuse_secret_values(plain: Mapping[str, Any]) -> None:
    for place in secrets_in(plain):
        raise _no_secrets(place)
    for place, text in _texts(plain, ""):
        if _secret_variable(text):
            raise _no_secrets(f"{place}={text}")


def _without_keys_of_hydra(hydra: Mapping[str, Any]) -> dict[str, Any]:
    """Hydra's node without what only sounds like secrets: ``key=value`` in its help, key names."""
    job = {name: value for name, value in (hydra.get("job") or {}).items() if name != "config"}
    rest = {name: value for name, value in hydra.items() if name not in ("help", "hydra_help")}
    return {**rest, "job": job}


def _secret_variable(text: str) -> bool:
    """Whether a text takes over an environment variable that holds a secret."""
    return any(is_secret_name(name) for name in _FROM_ENVIRONMENT.findall(text))


def _no_secrets(where: str) -> InputError:
    return InputError(
        "a configuration holds no secrets: it is written into the run folder and the report\n"
        f"  where: {where}\n"
        "  mend:  remove it; keys come from the environment, WANDB_API_KEY (or wandb login) for "
        "Weights & Biases and HF_TOKEN for the Hugging Face hub"
    )


def _refuse_addresses(cfg: DictConfig) -> None:
    """Refuse ``s3://...`` as a folder: it would become a folder of that name on this machine."""
    for key in _FOLDERS:
        try:
            value = str(OmegaConf.select(cfg, key))
        except OmegaConfBaseException:
            continue  # left open, or part of another's mistake; told where it is used
        if "://" in value or redact(value) != value:
            raise InputError(
                f"results go to a folder of this machine, not to {redact(value)}\n"
                f"  where: {key}\n"
                f"  mend:  give a folder, and copy what is finished from there"
            )


def _texts(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every text of a config with its place."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _texts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _texts(value, f"{path}[{index}]")
    elif isinstance(node, str):
        yield path, node


def _calls_of_logging(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What ``logging.config`` would call or import and that is not known to be harmless."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            place = f"{path}.{key}"
            if key == "()" or (key == "class" and value not in _LOGGING_CLASSES):
                yield place, value
            else:
                yield from _calls_of_logging(value, place)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _calls_of_logging(value, f"{path}[{index}]")
    elif isinstance(node, str) and ("://" in node or "${" in node) and node not in _REFERENCES:
        yield path, node
