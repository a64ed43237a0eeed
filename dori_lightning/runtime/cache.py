"""Keep what was computed once: one file per artifact, valid for one key.

The key holds everything that the artifact depends on and is stored inside the file. A file that is
damaged or has another key is computed anew and replaced; readers never see half a file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save

from dori_lightning.runtime import signals
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.runtime.logging import waiting_for
from dori_lightning.runtime.signals import Interrupted

T = TypeVar("T")
Key = Mapping[str, str | int | float | bool | None]
Tensors = dict[str, torch.Tensor]

log = logging.getLogger(__name__)


class DamagedError(ValueError):
    """A file does not hold what its codec writes."""


@dataclass(frozen=True)
class Codec(Generic[T]):
    """How a kind of artifact becomes a file.

    Attributes:
        suffix: End of the file's name.
        encode: Value and key (as strings) to bytes.
        decode: Path to value and key. Raises `DamagedError`, OSError, KeyError, TypeError or
            ValueError for a damaged file.
    """

    suffix: str
    encode: Callable[[T, dict[str, str]], bytes]
    decode: Callable[[Path], tuple[T, dict[str, str]]]

    def mapped(self, encode: Callable[[Any], T], decode: Callable[[T], Any]) -> Codec[Any]:
        """The same file format for values that ``encode`` turns into what this codec takes."""

        def read(path: Path) -> tuple[Any, dict[str, str]]:
            value, key = self.decode(path)
            return decode(value), key

        return Codec(self.suffix, lambda value, key: self.encode(encode(value), key), read)


def _encode_tensors(value: Tensors, key: dict[str, str]) -> bytes:
    return save({name: t.detach().cpu().contiguous() for name, t in value.items()}, key)


def tensors_and_note(data: bytes) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a safetensors file's content.

    Raises:
        DamagedError: It is none.
    """
    try:
        # cloned: tensors from a file share its memory
        tensors = {name: tensor.clone() for name, tensor in load(data).items()}
    except (RuntimeError, SafetensorError) as error:
        raise DamagedError(str(error)) from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__", {})


def _decode_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    # read, not mapped: a mapped file that another process cuts short kills this one (SIGBUS)
    return tensors_and_note(path.read_bytes())


def _encode_json(value: Any, key: dict[str, str]) -> bytes:
    return (json.dumps({"key": key, "value": value}, indent=1, sort_keys=True) + "\n").encode()


def _decode_json(path: Path) -> tuple[Any, dict[str, str]]:
    document = json.loads(path.read_text(encoding="utf-8"))
    return document["value"], document["key"]


TENSORS: Codec[Tensors] = Codec(".safetensors", _encode_tensors, _decode_tensors)
"""Tensors by name, as safetensors; the key is the file's metadata."""

JSON: Codec[Any] = Codec(".json", _encode_json, _decode_json)
"""Plain containers."""


@dataclass(frozen=True)
class Cache:
    """Artifacts below one folder.

    Attributes:
        folder: Where the files are; made when the first one is written.
    """

    folder: Path

    def path(self, name: str, codec: Codec[Any] = TENSORS) -> Path:
        """Where an artifact lies; ``name`` may hold slashes."""
        return self.folder / f"{name}{codec.suffix}"

    def read(self, name: str, key: Key, codec: Codec[T]) -> T | None:
        """A stored artifact, or None where there is none that is undamaged and has this key."""
        path = self.path(name, codec)
        if not path.is_file():
            return None
        try:
            value, stored = codec.decode(path)
        except (DamagedError, OSError, KeyError, TypeError, ValueError) as error:
            log.warning("%s is damaged and is computed anew: %s", path, error)
            return None
        differing = [k for k, v in _strings(key).items() if stored.get(k) != v]
        if differing:
            log.warning(
                "%s was made with another %s and is computed anew", path, ", ".join(differing)
            )
            return None
        return value

    def write(self, name: str, value: T, key: Key, codec: Codec[T]) -> Path:
        """Store an artifact, whole or not at all; returns its path."""
        return write_atomically(self.path(name, codec), codec.encode(value, _strings(key)))

    def get(self, name: str, key: Key, compute: Callable[[], T], codec: Codec[T]) -> T:
        """Read an artifact, or compute and store it while other processes wait for it.

        Args:
            name: File name without suffix, unique in the folder.
            key: Everything that the artifact depends on.
            compute: Called where there is no valid file.
            codec: File format, `TENSORS` or `JSON` or one derived by `Codec.mapped`.
        """
        return self.share({name: key}, lambda _: compute(), codec)[name]

    def share(
        self,
        keys: Mapping[str, Key],
        compute: Callable[[str], T],
        codec: Codec[T],
        *,
        found: Callable[[str], object] = lambda _: None,
    ) -> dict[str, T]:
        """Read artifacts, or compute the missing ones together with whoever else wants them.

        An artifact that another process is computing is left for last and then waited for, so that
        jobs of a sweep, or the processes of one job, compute each of them once and side by side.

        Args:
            keys: File name without suffix, unique in the folder, to everything that the artifact
                depends on.
            compute: Given a name; called where there is no valid file. It waits for no process.
            codec: File format.
            found: Called with the name of each artifact that was not computed here.

        Returns:
            Name to artifact, in order.
        """
        values: dict[str, T] = {}
        for wait in (False, True):
            for name, key in [(name, key) for name, key in keys.items() if name not in values]:
                path = self.path(name, codec)
                before, value, made = _version(path), self.read(name, key, codec), False
                if value is None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    lock = Path(f"{path}.lock")
                    with suppress(Timeout), held(lock, path.name, wait=wait), _removed(lock):
                        # somebody else may have written it since
                        if _version(path) != before:
                            value = self.read(name, key, codec)
                        if value is None:
                            value, made = compute(name), True
                            self.write(name, value, key, codec)
                if value is not None:
                    values[name] = value
                    if not made:
                        found(name)
        return {name: values[name] for name in keys}


def _version(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is replaced; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def _removed(lock: Path) -> Iterator[None]:
    """Remove a lock's file when done; whoever waits for it still sees what was written."""
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


@contextmanager
def held(path: Path, what: str, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock, and say so while another process is waited for.

    Args:
        path: The lock's file.
        what: What its holder makes.
        wait: Whether to wait for it.

    Raises:
        Timeout: Another process holds it, and it is not to be waited for.
        Interrupted: The run was told to leave while it waited.
    """
    lock = FileLock(path)
    with waiting_for(f"another process, which makes {what}") if wait else nullcontext():
        while not lock.is_locked:
            try:
                lock.acquire(timeout=1 if wait else 0)
            except Timeout:
                if not wait:
                    raise
                if signum := signals.received():
                    raise Interrupted(signum) from None
    try:
        yield
    finally:
        lock.release()


def _strings(key: Key) -> dict[str, str]:
    return {name: str(value) for name, value in key.items()}
