"""Kill runs of the program, again and again: ``python -m support.killed_runs PLAN.json``.

One process imports everything once and forks a child for each run, which SIGKILL ends at a random
moment: by the clock, or in the middle of a file, between the bytes and the name. What is left is
finished by the same command and held against a run that nobody disturbed.
"""

import importlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dori_lightning import cli
from dori_lightning.tasks import audit as _imported_once  # noqa: F401
from support.records import report_json, tensors_of
from support.runs import spared

PATIENCE = 300.0
"""Seconds after which a run that should have ended has hung."""


@dataclass
class Account:
    """What happened.

    Attributes:
        seconds: How long the undisturbed run took.
        kills: Runs that were killed, by how.
        finished: Folders that were finished and compared.
        stages: Kills by what was there already when they came.
        problems: What was lost, done twice or different.
    """

    seconds: float = 0.0
    kills: dict[str, int] = field(default_factory=lambda: {"clock": 0, "write": 0})
    finished: int = 0
    stages: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def run(
    arguments: list[str],
    log: Path,
    *,
    dies_at_write: int | None = None,
    modules: Path | None = None,
) -> int:
    """Fork a child that runs the program; returns its process id.

    What it imported is listed in ``modules``.
    """
    child = os.fork()
    if child:
        return child
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.getLogger().handlers.clear()
    code = 70
    try:
        if dies_at_write is not None:
            _die_at_write(dies_at_write)
        sys.argv = ["dori-lightning", *arguments]
        code = cli.main()
        if modules is not None:
            modules.write_text("\n".join(sorted(sys.modules)), encoding="utf-8")
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    finally:
        os._exit(code)


def _die_at_write(number: int) -> None:
    """End this process by SIGKILL as the bytes of its ``number``-th file are being synced."""
    real, seen = os.fsync, [0]

    def counting(descriptor: int) -> None:
        seen[0] += 1
        if seen[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = counting


def ended(child: int, *, seconds: float | None = None) -> int:
    """Exit code of a child; after ``seconds`` it is killed."""
    deadline = time.monotonic() + (PATIENCE if seconds is None else seconds)
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if seconds is None:
        raise TimeoutError(f"a run did not end within {PATIENCE:.0f} s")
    return status


def results(output: Path) -> dict[str, Any]:
    """What must not depend on kills, by file: bytes, or tensors where a header has no order."""
    found: dict[str, Any] = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.suffix == ".safetensors":
            tensors, note = tensors_of(path)
            found[name] = (tensors, {k: v for k, v in note.items() if k != "origin"})
        elif path.suffix in (".png", ".parquet") or path.name == "method.json":
            found[name] = path.read_bytes()
        elif path.name == "report.json":
            document = report_json(path.parent)
            found[name] = {k: v for k, v in document.items() if k != "provenance"}
    return found


def done(output: Path) -> dict[Path, int]:
    """Finished pieces of work and when they were written: attacks, edits, whole sets of images.

    The images of one embedding are made together, so a set with one missing is none yet.
    """
    kept = [*output.glob("run/attacks/*/*.safetensors"), *output.glob("cache/edits/*.safetensors")]
    sets: dict[Path, list[Path]] = {}
    for image in output.rglob("*.png"):
        if "figures" not in image.parts:
            sets.setdefault(image.parent, []).append(image)
    kept += [image for own in sets.values() if len(own) == IMAGES for image in own]
    return {path: path.stat().st_mtime_ns for path in kept}


IMAGES = 2


def stage(output: Path) -> str:
    """How far a run had come, by what it left."""
    marks = {
        "report": "run/pairs.parquet",
        "sampling": "run/pictures/*/*/*.png",
        "attack": "run/attacks/*/*.safetensors",
        "edit written": "cache/edits/*.safetensors",
        "fine-tuning": "cache/edits/unfinished/*/step-*.ckpt",
        "begun": "run/method.json",
    }
    return next((name for name, mark in marks.items() if any(output.glob(mark))), "nothing yet")


def suffer(command: Callable[[Path], list[str]], place: Path, *, kills: int, seed: int) -> Account:
    """Kill and resume until there were ``kills``; every second one in the middle of a file."""
    account, dice = Account(), random.Random(seed)
    whole = place / "whole"
    begun = time.monotonic()
    code = ended(run(command(whole), place / "log", modules=place / "modules"))
    account.seconds = time.monotonic() - begun
    if code:
        raise RuntimeError(f"the undisturbed run ended with {code}: {(place / 'log').read_text()}")
    for name in (place / "modules").read_text("utf-8").split():
        with suppress(ImportError):  # made up at run time, so not to be found again
            importlib.import_module(name)
    wanted, files = results(whole), sum(1 for p in whole.rglob("*") if p.is_file())
    number = 0
    while sum(account.kills.values()) < kills:
        output = place / f"killed{number}"
        number += 1
        before: dict[Path, int] = {}
        while True:
            left = kills - sum(account.kills.values())
            how = "write" if account.kills["write"] < account.kills["clock"] else "clock"
            if not left:
                code = ended(run(command(output), place / "log"))
            elif how == "write":
                at = dice.randint(1, files)
                code = ended(run(command(output), place / "log", dies_at_write=at))
            else:
                # that run imported what later ones have from their parent
                seconds = dice.uniform(0.0, 0.7 * account.seconds)
                code = ended(run(command(output), place / "log"), seconds=seconds)
            after = done(output)
            lost = [p.name for p, t in before.items() if after.get(p) != t]
            if lost:
                account.problems.append(f"lost or done twice: {', '.join(lost)}")
            before = after
            if code == -signal.SIGKILL:
                account.kills[how] += 1
                account.stages[stage(output)] = account.stages.get(stage(output), 0) + 1
                continue
            if code:
                account.problems.append(f"a resumed run ended with {code}")
            break
        account.problems += differences(wanted, results(output), output)
        account.finished += 1
        shutil.rmtree(output)
    return account


def differences(wanted: dict[str, Any], found: dict[str, Any], output: Path) -> list[str]:
    """What a finished folder has otherwise than the undisturbed one."""
    said = [f"missing: {name}" for name in wanted.keys() - found.keys()]
    said += [f"too much: {name}" for name in found.keys() - wanted.keys()]
    said += [f"different: {n}" for n in wanted.keys() & found.keys() if wanted[n] != found[n]]
    said += [f"left behind: {p.name}" for p in (output / "run").rglob(".*.tmp")]
    return said


def main(plan: str) -> None:
    """Carry out a plan and print the account as JSON."""
    torch.set_num_threads(1)
    held = json.loads(Path(plan).read_text("utf-8"))

    def command(output: Path) -> list[str]:
        return [*held["arguments"], f"paths.output={output}", "name=run"]

    with nullcontext() if held["whole"] else spared():
        account = suffer(command, Path(held["place"]), kills=held["kills"], seed=held["seed"])
    sys.stdout.write(json.dumps(asdict(account)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
