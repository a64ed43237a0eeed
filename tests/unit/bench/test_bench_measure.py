import json
import math
import re
import time
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from pydantic import TypeAdapter

from dori_lightning.bench.measure import (
    Family,
    Operations,
    Row,
    peak_bytes,
    row_cost,
    seconds_alone,
    timed_in_turn,
)
from dori_lightning.planting.random_weights import random_checkpoint

CPU = torch.device("cpu")
B1 = Row("B1", "fair", pairs=4, seconds=(8.0, 9.0, 40.0), warm_up=1.0, samples=90)
OURS = replace(B1, name="ours", seconds=(4.0, 3.0, 5.0), peak_bytes=2**21)
ROWS = (B1, Row("B2", "", skipped="no compiler"), OURS)
FAMILY = Family("attack", "Attack", ROWS, peak=100.0, load=(0.1, 1.0))


def test_speeds_are_ratios_of_medians_per_pair():
    assert B1.per_pair == 2.25
    assert FAMILY.ratio("B1", OURS) == 2.25
    assert FAMILY.ratio("B2", OURS) is None, "not measured"
    assert [row.name for row in FAMILY.measured] == ["B1", "ours"]


def test_work_is_a_share_of_the_peak_where_both_are_known():
    assert FAMILY.of_peak(OURS) is None
    assert FAMILY.of_peak(replace(OURS, flops=40.0)) == 40 / 4 / 100
    assert replace(FAMILY, peak=0.0).of_peak(replace(OURS, flops=40.0)) is None


def test_a_family_is_read_back_as_it_was_written():
    assert TypeAdapter(Family).validate_python(json.loads(json.dumps(asdict(FAMILY)))) == FAMILY


def test_ways_are_timed_in_turn_after_one_run_of_each(bench):
    order = []

    def run(name: str, seconds: float) -> str:
        order.append(name)
        time.sleep(seconds)
        return name

    rows, results = timed_in_turn(
        {
            "slow": ("sleeps longer", lambda: run("slow", 0.21)),
            "quick": ("sleeps", lambda: run("quick", 0.03)),
        },
        model=bench.model, pairs=2, repeats=2, title="sleep",
    )  # fmt: skip
    assert results == {"slow": "slow", "quick": "quick"}
    assert order[:2] == ["slow", "quick"]
    rounds = "".join(name[0] for name in order[2:])
    assert re.fullmatch("(s+q+){2}", rounds), rounds
    assert rounds.count("q") > 2 * rounds.count("s"), "quick ways run several times in their turn"
    assert rows["slow"].per_pair == pytest.approx(0.105, rel=0.3)
    assert rows["slow"].samples == 0


def test_what_fails_or_has_no_time_is_left_out_with_the_reason(bench):
    def fails() -> None:
        raise RuntimeError("no kernel\nand more")

    timed = partial(timed_in_turn, model=bench.model, pairs=1, repeats=1, title="some")
    works = partial(time.sleep, 0.1)
    rows, results = timed({"ours": ("", works), "B2": ("", fails)})
    assert rows["ours"].seconds
    assert rows["B2"].skipped == "it failed: no kernel"
    assert list(results) == ["ours"]
    with pytest.raises(RuntimeError, match="no kernel"):
        timed({"ours": ("", fails)})
    rows, results = timed({"ours": ("", works), "B1": ("", works)}, until=-math.inf)
    assert list(results) == ["ours"], "the first runs once, whatever the time"
    assert not any(row.seconds for row in rows.values())
    assert all("no time left" in row.skipped for row in rows.values())


def test_a_row_of_stable_diffusion_costs_what_is_known_of_it():
    """By shapes alone: 0.803 TFLOP forward, and 0.866 more for the embedding's gradient."""
    shape = random_checkpoint(name="sd14_shape", precision="fp32", device="meta")
    assert sum(p.numel() for p in shape.parameters()) == 859_520_964
    cost = row_cost(shape)
    assert cost.forward == pytest.approx(0.8033e12, rel=0.01)
    assert cost.attack == pytest.approx(1.6692e12, rel=0.01)


def test_operations_are_those_of_forward_and_backward_by_shape(bench):
    model = bench.model
    start = torch.randn(2, *model.embedding_shape, requires_grad=True)
    latents = torch.ones(2, *model.latent_shape)
    operations = Operations()
    with model.frozen(), operations:
        loss = model.denoising_loss(latents, latents, torch.full((2,), 5), start)
        torch.autograd.grad(loss.sum(), start)
    names = " ".join(operations.calls)
    for kind in ("attention", "attention_for_cpu_backward", "convolution_backward", "addmm"):
        assert kind in names, kind


def test_operations_alone_take_time_by_their_shapes():
    factor = torch.ones(64, 64)
    operations = Operations()
    with operations:
        for matrix in (factor, factor, factor.T):
            factor @ matrix
    assert [times for times, _, _ in operations.calls.values()] == [2, 1], "by memory layout too"
    assert 0 < seconds_alone(lambda: factor @ factor, CPU) < 1


def test_peak_memory_is_of_tensors_alive_at_one_time():
    def run() -> None:
        for _ in range(5):
            torch.ones(1000, dtype=torch.uint8)

    assert 1000 <= peak_bytes(run, CPU) <= 3000
