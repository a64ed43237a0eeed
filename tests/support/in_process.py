"""The program in this process: quick, and as it is from the command line."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dori_lightning import cli, config
from support.runs import spared

Program = Callable[..., int]


@contextmanager
def program_in(place: Path) -> Iterator[Program]:
    """Yield ``run(*arguments, task=function)``, which returns the exit code.

    The task is a stand-in; with ``task=None`` it is the real one, spared of what takes longest.
    """
    root = logging.getLogger()
    handlers, level, mask = root.handlers[:], root.level, os.umask(0o022)
    environment = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)

        def run(
            *arguments: str, task: Callable[..., Any] | None = lambda cfg, folder: None
        ) -> int:
            with patch.context() as inner:
                inner.setattr(sys, "argv", ["dori-lightning", *arguments])
                if task is not None:
                    inner.setattr(cli, "_task", lambda name: SimpleNamespace(run=task))
                    inner.setattr(config, "check_signatures", lambda cfg: None)
                    inner.setattr(cli, "check_inputs", lambda cfg: None)
                try:
                    with spared() if task is None else nullcontext():
                        return cli.main()
                except SystemExit as leaving:
                    return int(leaving.code or 0)

        try:
            yield run
        finally:
            for handler in root.handlers[:]:
                if handler not in handlers:
                    handler.close()
            root.handlers[:], root.level = handlers, level
            os.umask(mask)
            os.environ.clear()
            os.environ.update(environment)


def bytes_with(canary: str, place: Path) -> list[Path]:
    """Files and folders below ``place`` that hold a text, in their content or in their name."""
    return [
        path
        for path in place.rglob("*")
        if canary in path.name or (path.is_file() and canary.encode() in path.read_bytes())
    ]
