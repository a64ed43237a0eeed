import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open

from dori_lightning.report.record import read_report
from dori_lightning.types import InputError
from support.runs import run_task, write_pairs
from support.tiny import write_tiny

SMALL = (
    "pairs=folder",
    "attack.budget.steps=3",
    "attack.snapshots=[1]",
    "attack.noise_batch=2",
    "attack.inits=[prompt,random]",
    "sampling.steps=3",
    "sampling.images_per_pair=2",
    "checkpoint.name=tiny",
    "checkpoint.device=cpu",
    "trainer=cpu",
    # random weights: their autoencoder reconstructs nothing to calibrate a threshold on
    "metrics.descriptors.local_correlation.threshold=0.5",
)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("material")
    write_tiny(place / "checkpoint")
    write_pairs(place / "pairs")
    return place


def overrides(material: Path) -> tuple[str, ...]:
    return (
        *SMALL,
        f"pairs.path={material / 'pairs'}",
        f"checkpoint.source={material / 'checkpoint'}",
    )


@pytest.fixture(scope="module")
def finished(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_task(folder, *overrides(material))
    return folder


def comparable(folder: Path) -> dict[str, object]:
    """What must not depend on interruptions: cells, pictures, embeddings, losses."""
    report = read_report(folder)
    pictures = {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("pictures/**/*.png")
    }
    attacks = {}
    for path in folder.glob("attacks/**/*.safetensors"):
        with safe_open(path, framework="np") as file:  # the header's order is not part of it
            tensors = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
            attacks[str(path.relative_to(folder))] = (tensors, file.metadata())
    return {
        "cells": report["cells"],
        "pairs": report["pairs"],
        "pictures": pictures,
        "attacks": attacks,
    }


def test_the_run_folder_holds_what_the_contract_names(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    conditions = {
        (c["attack"], c["init"], c["budget"]["steps"], c["kind"], c["n"]) for c in report["cells"]
    }
    assert conditions == {
        (attack, init, steps, kind, n)
        for attack, init, steps in (
            ("prompt", None, 0),
            ("dori", "prompt", 1),
            ("dori", "prompt", 3),
            ("dori", "random", 1),
            ("dori", "random", 3),
        )
        for kind, n in (("vm", 2), ("control", 3))
    }
    for cell in report["cells"]:
        assert {
            "checkpoint", "mitigation", "attack", "init", "budget", "kind", "n", "mr", "mr_ci95",
            "similarity", "descriptor", "threshold",
        } <= cell.keys()  # fmt: skip
        assert cell["mr_ci95"][0] <= cell["mr"] <= cell["mr_ci95"][1]
        assert cell["threshold"] == 0.5
    rows = pd.read_parquet(finished / "pairs.parquet")
    assert len(rows) == 5 * 5 * 2, "pairs x conditions x pictures"
    page = (finished / "report.html").read_text()
    assert page.count("data:image/") >= 10
    assert list((finished / "figures").glob("*.png"))


def test_the_embeddings_are_kept_with_what_they_were_made_from(finished: Path) -> None:
    with safe_open(
        finished / "attacks" / "random" / "pair1.r0.safetensors", framework="pt"
    ) as file:
        metadata = file.metadata()
        assert file.get_tensor("embeddings").shape == (2, 8, 12)
        assert file.get_tensor("losses").shape == (3,)
    assert metadata["snapshots"] == "[1, 3]"
    assert {"checkpoint", "edit", "attack", "seed", "pair", "init"} <= metadata.keys()


def test_golden_numbers_of_a_tiny_audit(finished: Path) -> None:
    """Losses of the first attack steps on fixed random weights: a change of the method shows."""
    losses = []
    for name in ("pair0", "pair3"):
        path = finished / "attacks" / "prompt" / f"{name}.r0.safetensors"
        with safe_open(path, framework="np") as file:
            losses.append(file.get_tensor("losses"))
    assert np.allclose(losses, GOLDEN_LOSSES, rtol=1e-3), np.array2string(
        np.array(losses), precision=6
    )


GOLDEN_LOSSES = [[1.124319, 1.084437, 1.060386], [1.109535, 1.096017, 1.169250]]


def test_running_again_computes_nothing_and_changes_nothing(
    material: Path, finished: Path
) -> None:
    before = comparable(finished)
    times = {p: p.stat().st_mtime_ns for p in finished.glob("attacks/**/*.safetensors")}
    run_task(finished, *overrides(material))
    assert comparable(finished) == before
    assert times
    assert times == {p: p.stat().st_mtime_ns for p in times}


def test_batch_width_changes_no_bit(material: Path, finished: Path, tmp_path: Path) -> None:
    run_task(
        tmp_path / "wide", *overrides(material), "attack.pairs_per_forward=1", "sampling.batch=3"
    )
    assert comparable(tmp_path / "wide") == comparable(finished)


def test_other_settings_in_the_same_folder_are_refused_by_name(
    material: Path, finished: Path
) -> None:
    with pytest.raises(InputError, match=r"attack\.lr: 0\.1 there, 0\.2 now"):
        run_task(finished, *overrides(material), "attack.lr=0.2")


def command(material: Path, output: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "dori_lightning", "+experiment=audit", *overrides(material),
        "attack.other_inits=null", f"paths.output={output}", "name=run", *more,
    ]  # fmt: skip


def killed_and_resumed(material: Path, tmp_path: Path, *, files: int) -> dict[str, object]:
    """Kill the audit once ``files`` results exist, run it again, return what it found."""
    process = subprocess.Popen(
        command(material, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    folder, deadline = tmp_path / "run", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        done = len(list(folder.glob("attacks/**/*.safetensors"))) + len(
            list(folder.glob("pictures/**/*.png"))
        )
        if done >= files:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was to be killed in the middle"
    assert not (folder / "report.json").exists()
    again = subprocess.run(
        command(material, tmp_path), capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == str(folder)
    return comparable(folder)


def test_killed_in_the_middle_it_finishes_the_rest_with_identical_results(
    material: Path, finished: Path, tmp_path: Path
) -> None:
    assert killed_and_resumed(material, tmp_path, files=4) == comparable(finished)


def test_two_processes_find_what_one_finds(material: Path, finished: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        command(material, tmp_path, "trainer=ddp", "trainer.accelerator=cpu"),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [str(tmp_path / "run")]
    assert comparable(tmp_path / "run") == comparable(finished)


@pytest.mark.kill
@pytest.mark.parametrize("files", [1, 2, 7, 10, 11, 15, 23, 31, 44, 58])
def test_killed_anywhere_it_finishes_with_identical_results(
    material: Path, finished: Path, tmp_path: Path, files: int
) -> None:
    assert killed_and_resumed(material, tmp_path, files=files) == comparable(finished)


def fails(material: Path, tmp_path: Path, *more: str) -> str:
    """Run a command that must end with exit code 2 and one message; return the message."""
    ended = subprocess.run(
        command(material, tmp_path / "out", *more),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    return ended.stderr


def test_a_prompt_too_long_for_the_encoder_is_refused_when_strict(
    material: Path, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "long")
    table = (
        (pairs / "metadata.csv").read_text().replace("a red boat on sea", "a red boat on sea " * 3)
    )
    (pairs / "metadata.csv").write_text(table)
    message = fails(material, tmp_path, f"pairs.path={pairs}", "task.strict_prompts=true")
    assert "pair0" in message
    assert "8" in message


def test_a_missing_picture_stops_before_the_model_loads(material: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "lost")
    (pairs / "1.png").unlink()
    message = fails(
        material, tmp_path, f"pairs.path={pairs}", "checkpoint.source=no/such/checkpoint"
    )
    assert "1.png" in message, "pairs are checked before the checkpoint"


def test_no_controls_and_no_threshold_is_explained(material: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "none", control=0)
    message = fails(
        material,
        tmp_path,
        f"pairs.path={pairs}",
        "metrics.descriptors.local_correlation.threshold=null",
    )
    assert "control" in message
