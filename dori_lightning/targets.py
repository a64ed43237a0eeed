"""What a config may build, and whether its values fit the signature of what they build."""

import difflib
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import MISSING, DictConfig, OmegaConf

from dori_lightning.types import InputError

__all__ = [
    "ALLOWED_TARGETS",
    "allow_target",
    "check_signatures",
    "check_targets",
    "closest",
    "find_target",
    "targets_in",
]

#: What a config may build.
ALLOWED_TARGETS = ("dori_lightning.", "torch.optim.", "lightning.pytorch.")


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant."""
    known = list(known)
    whole = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if whole:
        return whole[0]
    # A key given without its group, or under another one: compare the last part alone.
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(known)}
    leaf = difflib.get_close_matches(word.rpartition(".")[2], by_leaf, n=1, cutoff=0.75)
    return by_leaf[leaf[0]] if leaf else None


def check_targets(cfg: DictConfig) -> None:
    """Refuse a config that names a thing outside `ALLOWED_TARGETS` to build; imports nothing.

    Raises:
        InputError: Names the key and the target.
    """
    for path, node in targets_in(OmegaConf.to_container(cfg, resolve=True)):
        allow_target(path, node["_target_"])


def check_signatures(cfg: DictConfig) -> None:
    """Check every node that builds something against the signature of what it builds.

    Imports the targets, builds nothing.

    Raises:
        InputError: A key the target does not take, one it needs, or a value of the wrong type.
    """
    for path, node in targets_in(OmegaConf.to_container(cfg, resolve=True)):
        thing = find_target(path, node["_target_"])
        _check_node(path, node, thing)


def find_target(path: str, target: Any, allowed: tuple[str, ...] = ALLOWED_TARGETS) -> Any:
    """Import what a ``_target_`` names, if it may be built.

    Args:
        path: Place of the node in the config.
        target: What it names.
        allowed: What the name, and the home of the thing itself, must begin with.

    Raises:
        InputError: It may not be built, or there is no such thing.
    """
    allow_target(path, target, allowed)
    try:
        thing = get_object(target)
    except ImportError as error:
        raise InputError(
            f"cannot import {target}\n  where: {path}._target_\n  mend:  {error}"
        ) from error
    # An allowed module also holds names that it imported: the thing itself must live inside.
    home = getattr(thing, "__module__", None)
    allow_target(path, f"{home}.{getattr(thing, '__qualname__', target)}", allowed)
    return thing


def _check_node(path: str, node: Mapping[str, Any], thing: Any) -> None:
    signature = inspect.signature(thing)
    values = {str(key): value for key, value in node.items() if key not in _RESERVED}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for key in values:
        if key not in signature.parameters and not takes_any:
            guess = closest(key, signature.parameters)
            raise InputError(
                f"unknown key {path}.{key}\n"
                f"  where: {node['_target_']} does not take it\n"
                f"  mend:  {f'did you mean {path}.{guess}?' if guess else 'remove it'}"
            )
    try:
        (signature.bind_partial if node.get("_partial_") else signature.bind)(**values)
    except TypeError as error:
        raise InputError(
            f"{path} is not complete: {error}\n  where: {node['_target_']}\n  mend:  add the value"
        ) from None
    for key, hint in _hints(thing).items():
        if key in values and not _fits(values[key], hint):
            raise InputError(
                f"{path}.{key} cannot be {values[key]!r}\n"
                f"  where: {node['_target_']}\n"
                f"  mend:  {_mend(f'{path}.{key}', values[key], hint)}"
            )


_RESERVED = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


def targets_in(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Nodes with a ``_target_``, outer ones first, with their place in the config."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path or "the config", node
        for key, value in node.items():
            yield from targets_in(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for index, value in enumerate(node):
            yield from targets_in(value, f"{path}[{index}]")


def allow_target(path: str, target: Any, allowed: tuple[str, ...] = ALLOWED_TARGETS) -> None:
    """Refuse a ``_target_`` whose name does not begin as it may; imports nothing."""
    if not isinstance(target, str) or not target.startswith(allowed):
        raise InputError(
            f"refused to build {target!r}\n"
            f"  where: {path}._target_\n"
            f"  mend:  a config may only name {', '.join(f'{p}*' for p in allowed)}"
        )


def _hints(thing: Any) -> dict[str, Any]:
    """Types of the arguments, as far as they can be resolved without type-checking imports."""
    try:
        return get_type_hints(thing.__init__ if inspect.isclass(thing) else thing)
    except (AttributeError, NameError, TypeError):
        return {}


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


def _mend(key: str, value: Any, hint: Any) -> str:
    """What to write instead of a value; a lone one that belongs into a list is put there."""
    if _fits([value], hint):
        return f"give a list: '{key}=[{value}]'"
    return f"give {_describe(hint)}"


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (list, tuple, Sequence, Iterable):
        of = f", each of it {_describe(arguments[0])}" if arguments else ""
        return f"a list [...]{of}"
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(choice) for choice in arguments)
    if origin in (list, tuple, Sequence, Iterable):
        return "a list" + (f", each of it {_describe(arguments[0])}" if arguments else "")
    if hint is type(None):
        return "null"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(hint, str(getattr(hint, "__name__", hint)))
