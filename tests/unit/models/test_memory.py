"""What a pass of the attack holds, and how many pairs are chosen by it."""

import logging
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from dori_lightning.models import memory
from dori_lightning.models.memory import (
    ATTACK,
    MAX_PAIRS,
    PARALLEL_PAIRS,
    BatchMemory,
    PeakMemory,
    estimate_batch_size,
    free_memory,
    measure_batch,
)
from dori_lightning.models.stable_diffusion import StableDiffusion


def test_tensors_count_while_they_are_alive():
    outside = torch.ones(1000)
    with PeakMemory() as seen:
        kept = torch.ones(100)
        view = kept[:50].view(5, 10)
        for _ in range(3):
            torch.ones(200)
        outside.view(10, 100)
    assert seen.peak == 4 * (100 + 200)
    del view


def test_a_graph_keeps_its_tensors_alive():
    start = torch.ones(100, requires_grad=True)
    with PeakMemory() as seen:
        value = start
        for _ in range(5):
            value = value.exp()
    assert seen.peak == 4 * 5 * 100


def test_a_pass_is_measured_and_scales_with_its_samples(model):
    evaluations = model.unet_evaluations
    found = measure_batch(model)
    assert model.unet_evaluations == evaluations
    assert all(p.grad is None for p in model.parameters())
    with PeakMemory() as seen:
        memory._run(model, 6, None)
    assert found.total(6) == pytest.approx(seen.peak, rel=0.05)
    assert found.sample > 10 * 4 * torch.Size(model.latent_shape).numel()


def test_checkpointing_takes_less_and_gives_the_same_gradient(model):
    def gradient():
        torch.manual_seed(0)
        rows = torch.randn(2, *model.embedding_shape, requires_grad=True)
        latents = torch.randn(2, *model.latent_shape)
        with model.frozen():
            loss = model.denoising_loss(latents, latents, torch.tensor([3, 900]), rows)
            return torch.autograd.grad(loss.sum(), rows)[0]

    whole, plain = measure_batch(model), gradient()
    model.denoiser().enable_gradient_checkpointing()
    try:
        less, again = measure_batch(model), gradient()
    finally:
        model.denoiser().disable_gradient_checkpointing()
    assert less.sample < 0.6 * whole.sample
    assert torch.equal(plain, again)


def on(device: str) -> StableDiffusion:
    """What is asked of a model before it is measured."""
    return cast(
        "StableDiffusion",
        SimpleNamespace(
            device=torch.device(device),
            max_batch_sizes={},
            parameters=lambda: iter([torch.ones(3)]),
        ),
    )


def gpu_pairs(gib: float, wanted: int | None = None) -> int:
    return estimate_batch_size(on("cuda"), noise_batch=8, wanted=wanted, free=int(gib * 2**30))


@pytest.fixture
def measured(monkeypatch):
    """Passes take 1 GiB whatever the number and 0.5 GiB a sample; by whom it was measured."""
    whose: list[str | None] = []

    def measure(_, *, pair_id):
        whose.append(pair_id)
        return BatchMemory(2**30, 2**29)

    monkeypatch.setattr(memory, "measure_batch", measure)
    return whose


def test_pairs_are_chosen_by_what_is_free(measured, caplog):
    with caplog.at_level(logging.INFO):
        # a fifth is left alone
        assert [gpu_pairs(gib) for gib in (6.3, 11.3, 16.3, 1000)] == [1, 2, 3, MAX_PAIRS]
        assert (
            "a sample takes 512 MiB and every batch 1.00 GiB besides, 11.30 GiB are free: 2 pairs"
            in (caplog.text)
        )
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert gpu_pairs(4) == 1
        assert "checkpoint.gradient_checkpointing=true" in caplog.text
    assert len(measured) == 5
    assert gpu_pairs(1, wanted=3) == 3
    assert len(measured) == 5, "nothing is measured where it is fixed"


def test_on_the_cpu_the_one_shape_of_all_batches_follows_memory(measured):
    def limit(gib, wanted):
        model = on("cpu")
        for _ in range(2):
            size = estimate_batch_size(
                model, noise_batch=8, wanted=wanted, free=int(gib * 2**30), pair_id="boat"
            )
            assert size == (wanted or PARALLEL_PAIRS)
        return model.max_batch_sizes.get(ATTACK)

    # with memory for all, shapes stay as they are, and so results the same in any batch
    assert limit(1000, None) is None
    assert limit(1000, 3) is None
    assert limit(16.3, None) == 3
    assert limit(16.3, 8) == 3
    assert limit(16.3, 2) == 2
    assert limit(4, None) == 1
    assert measured == ["boat"] * 6, "once for each model"


def test_more_noise_is_measured_again_and_never_widens(measured):
    model = on("cpu")
    for samples, pairs in ((2, 3), (8, 1), (2, 1)):
        estimate_batch_size(model, noise_batch=samples, wanted=None, free=6 * 2**30)
        assert model.max_batch_sizes[ATTACK] == pairs
    assert len(measured) == 2


def test_free_memory_is_what_a_container_leaves(tmp_path):
    free = free_memory(torch.device("cpu"))
    assert free is not None
    assert free > 2**20
    assert memory._of_control_group(tmp_path) is None
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._of_control_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory._of_control_group(tmp_path) == 4000
