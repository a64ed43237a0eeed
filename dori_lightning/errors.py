"""From exceptions to messages: what the user did, where, and how to fix it."""

import errno
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from dori_lightning import config
from dori_lightning.runtime import peers
from dori_lightning.runtime.redaction import walk
from dori_lightning.types import InputError, first_line

_LAUNCHERS = ("submitit_local", "submitit_slurm")
_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited")
"""How gloo and NCCL say that the other side of a connection has ended."""

_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""A disk or quota that is full, a file larger than allowed, a file system gone read-only."""

_CONFIG_FOLDERS = ("--config-dir", "-cd", "--config-path", "-cp")

_COMPOSED = "the command line or the config it composes"
_HELP = "python -m dori_lightning --help lists what there is"


def explain(error: BaseException, arguments: list[str]) -> str | None:
    """Explain an exception from before the task began.

    Args:
        error: What Hydra raised.
        arguments: The command line after the program.

    Returns:
        One message, or None where the user is not at fault.
    """
    links = list(chain(error))
    for link in links:
        if isinstance(link, InputError):
            return str(link)
        if isinstance(link, OverrideParseException):
            return _message("cannot read an override", link.override, _quoting(link.override))
        if isinstance(link, yaml.YAMLError | UnicodeDecodeError):
            return _unreadable_file(link, arguments)
        if isinstance(link, ValueError) and str(link).startswith("Config group override must"):
            given = [a for a in arguments if a.partition("=")[0] in config.groups()]
            return _message(
                "a group takes the name of an option",
                " ".join(given),
                f"write GROUP=NAME; {_HELP}",
            )
        if isinstance(link, ValueError) and str(link).startswith("Invalid defaults list"):
            return _message(
                first_line(link), "a yaml file of yours", "write a list: - group: name"
            )
        if isinstance(link, MissingConfigException):
            return _unknown_option(link)
    for link in links:
        if isinstance(link, OSError):
            return _message(
                f"cannot write the run folder: {link.strerror or link}",
                str(link.filename or "paths.output"),
                "choose another place with paths.output=FOLDER, or free this one",
            )
    if isinstance(error, ConfigCompositionException):
        return _composition(error, links, arguments)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _message(first_line(error), _COMPOSED, _HELP)
    return None


def _quoting(override: str) -> str:
    """How to write an override that cannot be read: quoted for Hydra, then for the shell."""
    name, equals, value = override.partition("=")
    if not equals or value[:1] in ("'", '"'):  # quoted already, only not to the end
        return "write NAME=VALUE, and close every quote and bracket"
    brackets = "close every bracket; or where it is a text, " if value[:1] in "[{" else ""
    return f"{brackets}quote it: {_quoted(name, value)}"


def _quoted(name: str, value: str) -> str:
    """An override as a shell takes it, whose value is read as the text that it is."""
    return shlex.quote(f"{name}={QuotedString(value, Quote.double).with_quotes()}")


def _unreadable_file(error: yaml.YAMLError | UnicodeDecodeError, arguments: list[str]) -> str:
    """Say where in a configuration file of the user's the mistake is."""
    if isinstance(error, UnicodeDecodeError):
        files = ", ".join(map(str, filter(_is_not_utf8, _yaml_files(arguments))))
        return _message("a yaml file is not UTF-8", files or _COMPOSED, "save it as UTF-8")
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or first_line(error)
    place = f"{mark.name}, line {mark.line + 1}" if mark else getattr(error, "name", _COMPOSED)
    fix = "indent with spaces: yaml takes no tab" if "\\t" in what else "correct the file"
    return _message(f"cannot read a yaml file: {what}", place, fix)


def _yaml_files(arguments: list[str]) -> Iterator[Path]:
    """Files of the folders that ``--config-dir`` and its kin name."""
    for argument, following in pairwise([*arguments, ""]):
        flag, equals, value = argument.partition("=")
        if flag in _CONFIG_FOLDERS:
            yield from sorted(Path(value if equals else following).rglob("*.yaml"))


def _is_not_utf8(path: Path) -> bool:
    try:
        path.read_text("utf-8")
    except UnicodeDecodeError:
        return True
    except OSError:
        return False
    return False


def explain_in_task(error: BaseException) -> str | None:
    """Explain an exception from inside a task; None where the program is at fault."""
    for link in chain(error):
        if isinstance(link, InputError):
            return str(link)
        if isinstance(link, MissingMandatoryValue):
            return _message(
                first_line(link), "the composed config", "give the value on the command line"
            )
        if isinstance(link, OSError) and link.errno in _CANNOT_WRITE:
            return _message(
                f"cannot write: {link.strerror}; finished results are kept",
                str(link.filename or "the run folder or the cache"),
                "free space (or raise the quota) and give the same command again, which finishes "
                "what is missing; or choose other places with paths.output=FOLDER and "
                "paths.cache=FOLDER",
            )
    return None


def lost_process(error: BaseException) -> str | None:
    """Explain a broken connection to another process of the run; None for other errors."""
    for link in chain(error):
        if isinstance(link, RuntimeError) and _GONE.search(str(link)):
            who, log = peers.dead_peers()
            return _message(
                f"{who} is gone: {first_line(link)}",
                f"its own log, {log} in the run folder",
                "give the same command again; finished results are kept",
            )
    return None


def _composition(
    error: ConfigCompositionException, links: list[BaseException], arguments: list[str]
) -> str:
    text = str(error)
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(
        r"Key '([^']+)' not in 'Config'", "\n".join(map(str, links))
    )
    if unknown is not None:
        return _unknown_key(unknown[1], arguments)
    cause = next((link for link in links if isinstance(link, OmegaConfBaseException)), error)
    merging = re.search(r"Error merging override (.*)", text)
    if merging is not None and cause is not error:
        return _message(first_line(cause), merging[1], "give a value of that type")
    ambiguous = re.search(r"Ambiguous value for argument '(([^=]*)=(.*))'", text)
    if ambiguous is not None:
        override, name, value = ambiguous.groups()
        return _message(
            "several values for one key",
            override,
            f"add -m to run a job for each; write {name}=[{value}] for a list; or where the comma "
            f"is part of a text, quote it: {_quoted(name, value)}",
        )
    lines = text.strip().splitlines() or [first_line(cause)]
    # a line that ends in a colon only says which file it is of
    return _message(" ".join(lines[: 1 + lines[0].endswith(":")]), _COMPOSED, _HELP)


def _unknown_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = list(error.options or config.groups().get(group, {}))
    if group == "hydra/launcher" and option in _LAUNCHERS:
        return _message(
            f"{group}={option} needs a package that is not installed",
            group,
            "pip install 'dori_lightning[slurm]'",
        )
    guess = config.closest(option, options)
    fix = f"did you mean {group}={guess}? " if guess else ""
    return _message(
        f"no option {option!r} in the group {group!r}",
        f"{group}={option}",
        f"{fix}options: {', '.join(options) or 'none'}",
    )


def _unknown_key(key: str, arguments: list[str]) -> str:
    where = next((a for a in arguments if a.lstrip("+~").partition("=")[0] == key), key)
    added = next((a for a in arguments if a.startswith("+experiment=")), None)
    if added is not None and (key == "experiment" or "@experiment." in key):
        file = f"experiment/{added.partition('=')[2]}.yaml"
        return _message(
            f"{file} does not say that its keys belong to the whole configuration",
            added,
            f"begin {file} with the line: # @package _global_",
        )
    if key == "experiment":
        return _message(
            "an experiment is added, not changed", where, f"write +{where.lstrip('+')}"
        )
    guess = config.closest(key, [*_known_keys(arguments), *config.groups()])
    fix = f"did you mean {guess}? Otherwise: {_HELP}" if guess else _HELP
    return _message(f"unknown key {key}", where, fix)


def _known_keys(arguments: list[str]) -> list[str]:
    """Keys of the config that the user's choices of groups compose, or else of the default."""
    groups = config.groups()
    chosen = [a for a in arguments if a.lstrip("+").partition("=")[0] in groups and "," not in a]
    for overrides in (chosen, []):
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(config.CONF), version_base="1.3"):
                node = OmegaConf.to_container(compose("config", overrides))
        except (HydraException, OmegaConfBaseException):
            continue
        return [place for place, _ in walk(node) if place and "[" not in place]
    return []


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _message(what: str, where: str, fix: str) -> str:
    return str(InputError(what, where=where, fix=fix))
