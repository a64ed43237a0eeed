from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dori_lightning.bench.attack import Subject, attack_rows, fair, hand_written, naive, own_attack
from dori_lightning.bench.measure import counted, counted_operations, matmul_peak, seconds_alone
from dori_lightning.models.memory import PARALLEL_PAIRS
from dori_lightning.models.stable_diffusion import StableDiffusion


def test_every_loop_solves_the_same_problem_and_asks_what_it_should(subject: Subject) -> None:
    task, model = subject.task(3, steps=3, noise_batch=2), subject.model
    found, asked = {}, {}
    for name, run in {
        "ours": partial(own_attack, subject),
        "naive": partial(naive, model),
        "fair": partial(fair, model),
        "by hand": partial(hand_written, model, share=2),
    }.items():
        with counted(model) as counts:
            found[name] = run(task)
        asked[name] = (counts.unet, counts.unet_passes, counts.encoded, counts.prompts)
        assert torch.allclose(found[name].embeddings, found["ours"].embeddings, atol=2e-4)
        assert torch.allclose(found[name].losses, found["ours"].losses, atol=1e-4)
    assert not torch.allclose(found["ours"].embeddings, task.initial, atol=0.05), "it moved"
    assert all(p.grad is None for p in model.parameters())
    assert asked == {
        # and three passes of one, one and two rows, which measure memory once for a model
        "ours": (PARALLEL_PAIRS * 2 * 3 + 4, 3 + 3, 0, 0),
        "naive": (3 * 2 * 3, 9, 9, 0),
        "fair": (3 * 2 * 3, 9, 0, 0),
        "by hand": (4 * 2 * 3, 6, 0, 0),
    }


def test_operations_are_those_that_torch_counts(model: StableDiffusion) -> None:
    def forward(start: torch.Tensor) -> torch.Tensor:
        rows = len(start)
        return model.denoising_loss(
            torch.ones(rows, *model.latent_shape),
            torch.ones(rows, *model.latent_shape),
            torch.full((rows,), 5),
            start,
        ).sum()

    start = torch.randn(2, *model.embedding_shape, requires_grad=True)
    with model.frozen():
        theirs = FlopCounterMode(display=False)
        with theirs:
            # not a leaf, which their mode cannot have a gradient of
            forward(start * 1.0).backward()
        mine = counted_operations(lambda: forward(start * 1.0).backward())
        attention = [c for c in mine.calls if "attention" in str(c.function)]
        once = counted_operations(lambda: forward(start[:1] * 1.0).backward())
    assert attention
    assert mine.flop > theirs.get_total_flops() > 0, "torch's table lacks the CPU's attention"
    assert mine.flop == 2 * once.flop

    product = counted_operations(lambda: torch.ones(3, 4) @ torch.ones(4, 5))
    assert product.flop == 2 * 3 * 4 * 5
    seconds = seconds_alone(mine, torch.device("cpu"), repeats=1)
    assert 0 < seconds < 60
    assert matmul_peak(torch.device("cpu"), torch.float32, side=64, repeats=2) > 0


@pytest.mark.slow
def test_rows_say_cost_quality_and_why_one_is_missing(subject: Subject) -> None:
    task = subject.task(3, steps=2, noise_batch=2)
    longer = subject.task(1, steps=1, noise_batch=2)
    rows, limits = attack_rows(
        subject.model, task, ours=partial(own_attack, subject), repeats=1, compiled=False,
        title="attack", quality={"subject": subject, "task": longer},
    )  # fmt: skip
    by_name = {row.name: row for row in rows}
    assert list(by_name) == ["B0", "B1", "B2", "ours", "by hand"]
    assert by_name["B2"].skipped
    assert not by_name["B2"].seconds
    for name in ("B0", "B1", "ours", "by hand"):
        row = by_name[name]
        assert len(row.seconds) == 1
        assert row.peak_share is not None
        assert row.peak_share > 0
        assert row.values["memorization"]["n"] == 1
        assert row.values["furthest_from_ours"] < 1e-3
    gflop = {name: row.gflop for name, row in by_name.items() if row.seconds}
    # one at a time needs what the limits say, weight gradients and encoding come on top
    assert gflop["B1"] == pytest.approx(limits.gflop_needed, rel=1e-6)
    assert gflop["B0"] > 1.3 * gflop["B1"]
    # three pairs fill a pass of four
    assert gflop["ours"] == pytest.approx(gflop["by hand"], rel=1e-6)
    assert gflop["ours"] == pytest.approx(gflop["B1"] * PARALLEL_PAIRS / 3, rel=1e-6)
    memory = {name: row.peak_bytes for name, row in by_name.items() if row.seconds}
    assert memory["B0"] > memory["B1"] > 0
    # filled up to four pairs, one pair at a time
    assert 2 < memory["by hand"] / memory["B1"] < 5
    assert by_name["ours"].samples == PARALLEL_PAIRS * 2 * 2
    assert by_name["B0"].values["encoded_each_step"] == 3
