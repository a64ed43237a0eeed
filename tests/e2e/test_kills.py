"""Killed at any moment, a run is finished by the same command to the same files.

The run has everything that is worth killing: a fine-tuning with checkpoints, the cache of edits,
attacks, pictures and a report.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.runs import write_pairs
from support.tiny import write_tiny

ROOT = Path(__file__).resolve().parents[2]


def suffered(place, *, kills, seed):
    """Account of runs that were killed ``kills`` times."""
    write_tiny(place / "checkpoint")
    write_pairs(place / "pairs", vm=2, control=2)
    arguments = [
        "pairs=folder", f"pairs.path={place / 'pairs'}", "corpus=none",
        "checkpoint.name=tiny", f"checkpoint.source={place / 'checkpoint'}",
        "checkpoint.device=cpu", "trainer=cpu",
        "mitigation=esd_x", "mitigation.steps=3", "mitigation.batch=2",
        "mitigation.sampling_steps=2", "mitigation.finetune.checkpoint_every=1", "utility=none",
        "attack.budget.steps=2", "attack.noise_batch=2", "attack.inits=[prompt]",
        "attack.snapshots=[]", "attack.pairs_per_forward=2",
        "sampling.steps=2", "sampling.images_per_pair=2", "report.images=none",
        "metrics.descriptors.local_correlation.threshold=0.5",
    ]  # fmt: skip
    plan = place / "plan.json"
    plan.write_text(
        json.dumps({"arguments": arguments, "place": str(place), "kills": kills, "seed": seed})
    )
    ended = subprocess.run(
        [sys.executable, "-m", "support.killed_runs", str(plan)],
        cwd=place,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    account: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return account


def assert_unharmed(account, kills):
    assert account["problems"] == [], account
    assert sum(account["kills"].values()) == kills
    assert min(account["kills"].values()) >= kills // 2, "by the clock and in the middle of files"
    assert account["finished"] >= 1


def test_ten_kills_lose_nothing(tmp_path):
    assert_unharmed(suffered(tmp_path, kills=10, seed=1), 10)


@pytest.mark.kill
def test_fifty_kills_lose_nothing(tmp_path):
    account = suffered(tmp_path, kills=50, seed=2)
    assert_unharmed(account, 50)
    assert {"fine-tuning", "attack", "sampling"} <= account["stages"].keys(), account["stages"]
