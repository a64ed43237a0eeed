"""Other processes that run code of this checkout, and the program as users start it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "dori_lightning"


def python(code, *arguments, **environment):
    """Start Python on a text; its streams are pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def begin(
    place: Path,
    *command: str,
    env: Mapping[str, str] | None = None,
    stderr: int = subprocess.STDOUT,
    **options: Any,
) -> "subprocess.Popen[str]":
    """Start ``python -m COMMAND`` in a folder.

    Args:
        place: Its working folder.
        command: A module and its arguments.
        env: Its environment; None for that of the tests.
        stderr: Where its errors go, by default among the rest of what it says.
        options: Others of ``subprocess.Popen``.
    """
    found = {**(os.environ if env is None else env)}
    given = [path for path in (found.get("PYTHONPATH"),) if path]
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *given])
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=place, env=found, stdout=subprocess.PIPE, stderr=stderr, text=True, **options,
    )  # fmt: skip


def ended(
    place: Path, *command: str, code: int = 0, seconds: float = 1800, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run ``python -m COMMAND`` to its end, which must have an exit code."""
    process = begin(place, *command, stderr=subprocess.PIPE, **options)
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == code, err
    return subprocess.CompletedProcess(command, code, out, err)


def said(*processes: "subprocess.Popen[str]", seconds: float = 1500) -> str:
    """What processes said until they ended; whatever happens, none is left."""
    try:
        return "\n".join(process.communicate(timeout=seconds)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()


def until(
    ready: Callable[[], Any], *processes: "subprocess.Popen[str]", seconds: float = 600
) -> None:
    """Wait for something that running processes do; they are ended where it does not come."""
    deadline = time.monotonic() + seconds
    try:
        while not ready():
            over = [process for process in processes if process.poll() is not None]
            assert not over, over[0].communicate()
            assert time.monotonic() < deadline, "it took too long"
            time.sleep(0.02)
    except BaseException:
        for process in processes:
            process.kill()
        raise
