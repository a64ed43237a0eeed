"""Killed at any moment, a run is finished by the same command to the same files.

The run has everything that is worth killing: a fine-tuning with checkpoints, the cache of edits,
attacks, images and a report.
"""

import json

import pytest

from support.processes import ended
from support.runs import SMALL, on_tiny, write_material


def suffered(place, **how):
    """Account of runs that were killed: how often, by which dice, with figures or spared."""
    write_material(place, vm=2, control=2)
    arguments = on_tiny(
        place, *SMALL, "corpus=none", "sampling.images_per_pair=2", "attack.pairs_per_forward=2",
        "mitigation=esd_x", "mitigation.steps=3", "mitigation.batch=2",
        "mitigation.sampling_steps=2", "mitigation.finetune.checkpoint_every=1",
    )  # fmt: skip
    plan = place / "plan.json"
    plan.write_text(json.dumps({"arguments": arguments, "place": str(place), **how}))
    done = ended(place, "support.killed_runs", str(plan))
    return json.loads(done.stdout.splitlines()[-1])


def assert_unharmed(account, kills):
    assert account["problems"] == [], account
    assert sum(account["kills"].values()) == kills
    assert min(account["kills"].values()) >= kills // 2, "by the clock and in the middle of files"
    assert account["finished"] >= 1


def test_four_kills_lose_nothing(tmp_path):
    assert_unharmed(suffered(tmp_path, kills=4, seed=1, whole=False), 4)


@pytest.mark.kill
def test_fifty_kills_lose_nothing(tmp_path):
    account = suffered(tmp_path, kills=50, seed=2, whole=True)
    assert_unharmed(account, 50)
    assert {"fine-tuning", "attack", "sampling"} <= account["stages"].keys(), account["stages"]
