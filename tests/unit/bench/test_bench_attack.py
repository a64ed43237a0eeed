from functools import partial

import torch

from dori_lightning.bench.attack import (
    ALONE,
    attack_rows,
    attack_task,
    audit_attack,
    fair,
    solver_attack,
)
from dori_lightning.bench.measure import BenchSettings, counted
from dori_lightning.models.memory import pairs_at_once


def test_every_loop_solves_the_same_problem_in_its_own_passes(bench):
    task, model = attack_task(bench, 3, steps=3, noise_batch=2), bench.model
    found, asked = {}, {}
    for name, attack in {
        "ours": partial(audit_attack, bench),
        "solver": partial(solver_attack, model),
        "fair": partial(fair, model),
    }.items():
        with counted(model.unet) as counts:
            found[name] = attack(task)
        asked[name] = (counts.samples, counts.passes)
        assert torch.allclose(found[name].embeddings, found["ours"].embeddings, atol=2e-4)
        assert torch.allclose(found[name].losses, found["ours"].losses, atol=1e-4)
    assert torch.equal(found["ours"].embeddings, found["solver"].embeddings)
    assert not torch.allclose(found["ours"].embeddings, task.initial, atol=0.05), "it moved"
    assert all(p.grad is None for p in model.parameters())
    # filled up to what the package computes at once, in one pass or side by side
    assert asked["solver"][0] == pairs_at_once(model) * 2 * 3
    assert asked["fair"] == (3 * 2 * 3, 9), "one pair at a time"


def test_rows_hold_times_memory_and_limits_and_say_why_one_is_missing(bench):
    task = attack_task(bench, 3, steps=2, noise_batch=1)
    settings = BenchSettings(repeats=1, compile=False)
    ours = {"ours": partial(solver_attack, bench.model)}
    rows = attack_rows(bench.model, task, ours, settings)
    by_name = {row.name: row for row in rows}
    assert list(by_name) == ["B1", "B2", "ours", ALONE]
    assert by_name["B2"].skipped
    assert not by_name["B2"].seconds
    for name in ("B1", "ours"):
        assert by_name[name].seconds
        assert by_name[name].warm_up > 0
        assert by_name[name].values["furthest_from_ours"] < 1e-3
    assert by_name["B1"].samples == 3 * 2
    memory = {name: by_name[name].peak_bytes or 0 for name in ("B1", "ours")}
    assert 0 < memory["B1"] < memory["ours"], "one pair at a time holds less"
    assert 0 < by_name[ALONE].per_pair < by_name["B1"].per_pair
