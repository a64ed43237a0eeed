import shutil
from functools import partial

import torch

from dori_lightning.bench.attack import (
    ALONE,
    attack_family,
    attack_task,
    audit_attack,
    compiled_family,
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
        with counted(model.denoiser()) as counts:
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


SMALL = BenchSettings(repeats=1, pairs=3, steps=2, noise_batch=1)


def test_rows_hold_times_memory_and_limits(bench):
    family = attack_family(bench, SMALL)
    by_name = {row.name: row for row in family.rows}
    assert list(by_name) == ["B0", "B1", "ours", "solver", ALONE]
    for name in ("B0", "B1", "ours"):
        assert by_name[name].seconds
        assert by_name[name].warm_up > 0
        assert by_name[name].values["furthest_from_ours"] < 1e-3
        assert 0 < (family.of_peak(by_name[name]) or 0) < 1
    assert (by_name["B0"].samples, by_name["B1"].samples) == (1 * 2, 3 * 2)
    assert by_name["B1"].flops == 3 * by_name["B0"].flops, "of the work, not of the way"
    memory = {name: by_name[name].peak_bytes or 0 for name in ("B0", "B1", "ours")}
    assert 0 < memory["B1"] < memory["ours"], "one pair at a time holds less"
    assert memory["B1"] < memory["B0"], "without gradients of the weights"
    assert 0.5 < memory["ours"] / (by_name["ours"].planned_bytes or 0) < 1.5
    assert 0 < by_name[ALONE].per_pair < by_name["B1"].per_pair
    assert all(p.grad is None for p in bench.model.parameters())


def test_the_compiled_loop_is_held_against_the_fair_one(bench, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    (missing,) = compiled_family(bench, SMALL).rows
    assert "no C++ compiler" in missing.skipped
    monkeypatch.setattr(shutil, "which", str)
    monkeypatch.setattr(torch, "compile", lambda module: module)
    family = compiled_family(bench, SMALL)
    fair_row, compiled = family.rows
    assert abs(compiled.values["last_loss"] - fair_row.values["last_loss"]) < 1e-3
    assert compiled.seconds
    assert fair_row.flops == compiled.flops
