"""What attacks, images and memory promise of a device: checked on the CPU, and on a GPU if any."""

import copy
import hashlib
import os
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.attacks.solver import AttackProblem, solve
from dori_lightning.models.memory import ATTACK, measure_batch
from dori_lightning.models.protocol import Sampling
from dori_lightning.planting.random_weights import random_checkpoint
from dori_lightning.runtime.batching import to_device
from dori_lightning.tasks.run_record import numerics
from dori_lightning.types import Budget, first_line
from support.devices import DEVICES, on_gpu
from support.processes import PROGRAM, ended
from support.runs import SMALL, on_tiny
from support.tiny import tiny_model, write_tiny


@pytest.fixture(scope="module", params=DEVICES)
def model(request, tmp_path_factory):
    """A loaded checkpoint of a few thousand weights, in fp32."""
    return tiny_model(tmp_path_factory.mktemp("tiny"), device=request.param)


@pytest.fixture(scope="module", params=DEVICES)
def wide(request):
    """Heads of 8 channels and more, as fused attention wants them; computes in bf16."""
    return random_checkpoint(
        name="wide", resolution=64, width=64, precision="bf16", device=request.param
    )


@pytest.fixture(scope="module")
def large():
    """On a GPU, with batches that take far more memory than kernels take for themselves."""
    return random_checkpoint(name="large", resolution=512, width=64, device="cuda")


def attack(model, *, pairs=3, noises=2, steps=3):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(pairs, *model.latent_shape, generator=generator)
    initial = torch.randn(pairs, *model.embedding_shape, generator=generator)
    names = tuple(f"pair{k}" for k in range(pairs))
    return solve(
        model,
        AttackProblem(names, (0,) * pairs, latents, initial),
        budget=Budget("none", None, steps),
        settings=AttackSettings(noise_batch=noises),
    )


def gradient(model):
    """Gradient (2, T, D) of the denoising loss, as the attack takes it."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, *model.latent_shape, generator=generator).to(model.device)
    start = torch.randn(2, *model.embedding_shape, generator=generator).to(model.device)
    start.requires_grad_(True)
    with model.frozen():
        timesteps = torch.tensor([100, 800], device=model.device)
        loss = model.denoising_loss(latents, latents.flip(0), timesteps, start)
        return torch.autograd.grad(loss.sum(), start)[0]


def alike(found, exact):
    return torch.cosine_similarity(found.flatten(), exact.flatten(), dim=0)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_the_embedding_under_attack_stays_fp32_in_half_precision(model, half):
    if half is torch.float16 and model.device.type == "cpu":
        pytest.skip("refused on the CPU")
    in_half = copy.copy(model)
    in_half.autocast = half
    found, exact = gradient(in_half), gradient(model)
    assert found.dtype == torch.float32
    assert alike(found, exact) > 0.99
    attacked, reference = attack(in_half), attack(model)
    assert attacked.embeddings.dtype == torch.float32
    assert attacked.embeddings.isfinite().all()
    assert not attacked.diverged.any()
    assert torch.allclose(attacked.losses, reference.losses, rtol=0.05)


def test_channels_last_gives_the_same_gradient(model):
    twin = model.frozen_copy()
    twin.denoiser().to(memory_format=torch.contiguous_format)
    plain = gradient(twin)
    twin.denoiser().to(memory_format=torch.channels_last)
    assert alike(gradient(twin), plain) > 0.9999


@pytest.mark.parametrize(
    "kernel",
    [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION],
)
def test_attention_kernels_agree(wide, kernel):
    with sdpa_kernel(SDPBackend.MATH):
        plain = gradient(wide)
    try:
        with sdpa_kernel(kernel):
            fused = gradient(wide)
    except RuntimeError as error:
        pytest.skip(f"not on this device: {first_line(error)}")
    assert alike(fused, plain) > 0.99


def test_one_layout_gives_the_same_bits_in_deterministic_mode(wide):
    sampling = Sampling("ddim", 2, 2.0, 2)
    noise = torch.randn(2, *wide.latent_shape, generator=torch.Generator().manual_seed(1))
    with deterministic():
        first, second = (attack(wide, pairs=2, noises=1) for _ in range(2))
        context = wide.encode_prompts(["a b", "c"])
        images = [wide.generate(context, noise, sampling) for _ in range(2)]
    assert torch.equal(first.embeddings, second.embeddings)
    assert torch.equal(first.losses, second.losses)
    assert torch.equal(*images)


def test_tf32_is_stated(monkeypatch):
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert numerics()["tf32_convolution"] is allowed
    assert numerics()["tf32_matmul"] is False, "torch's own choice"


@pytest.mark.parametrize("device", DEVICES)
def test_copies_to_a_device_are_whole_and_wait_for_nothing(device):
    values = torch.arange(1 << 20)
    if device == "cuda":
        to_device(values, torch.device(device))  # page-locked memory is made once
        torch.cuda._sleep(2_000_000_000)  # cycles: a second
    started = time.perf_counter()
    copied = to_device(values, torch.device(device))
    assert time.perf_counter() - started < 0.3
    assert torch.equal(copied.cpu(), values)


@on_gpu
def test_a_gpu_gives_what_the_cpu_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    here = tiny_model(tmp_path / "cpu")
    there = tiny_model(tmp_path / "gpu", device="cuda")
    assert there.fingerprint == here.fingerprint
    assert torch.allclose(attack(there).losses, attack(here).losses, rtol=1e-2)
    sampling = Sampling("dpm++", 5, 2.0, 2)
    noise = torch.randn(2, *here.latent_shape, generator=torch.Generator().manual_seed(1))
    images = [
        m.generate(m.encode_prompts(["a", "b"]), noise, sampling).cpu() for m in (here, there)
    ]
    assert (images[0] - images[1]).abs().max() < 0.01


@on_gpu
def test_checkpointing_takes_less_memory_for_the_same_gradient(large):
    whole, plain = measure_batch(large), gradient(large)
    large.denoiser().enable_gradient_checkpointing()
    try:
        less, again = measure_batch(large), gradient(large)
    finally:
        large.denoiser().disable_gradient_checkpointing()
    assert less.sample < 0.6 * whole.sample
    assert alike(again, plain) > 0.999


@on_gpu
def test_the_plan_is_what_a_batch_takes(large):
    planned = measure_batch(large).total(16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attack(large, pairs=4, noises=4, steps=1)
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(planned, rel=0.15)


@on_gpu
def test_batches_are_halved_where_the_allocator_gives_no_more(large):
    whole, plan = attack(large, pairs=8, noises=4, steps=1), measure_batch(large)
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + plan.total(3 * 4)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        halved = attack(large, pairs=8, noises=4, steps=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert large.max_batch_sizes.pop(ATTACK) in (1, 2)
    assert torch.allclose(halved.losses, whole.losses, rtol=0.05)


ATTACKED = """
import sys
import torch
from test_devices import attack, deterministic, digest
from support.tiny import load_tiny
with deterministic():
    print(digest(attack(load_tiny(sys.argv[1], device="cuda"))))
"""


def digest(result):
    return hashlib.sha256(result.embeddings.numpy().tobytes()).hexdigest()


@on_gpu
def test_two_processes_share_a_card_and_agree(tmp_path):
    folder = str(write_tiny(tmp_path / "tiny"))
    code = f"import sys; sys.path[:0] = {sys.path!r}\n{ATTACKED}"
    command = [sys.executable, "-c", code, folder]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert said[0] == said[1] != ""


@on_gpu
def test_a_whole_audit_gives_equal_bits_in_deterministic_mode(material, tmp_path):
    """As a user starts it: nothing but the program itself prepares cuBLAS."""
    given = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}
    on_cpu = ("checkpoint.device=", "trainer=")
    tiny = [o for o in on_tiny(material, *SMALL) if not o.startswith(on_cpu)]
    found = []
    for name in ("first", "second"):
        ended(
            tmp_path, PROGRAM, "+experiment=audit", *tiny, "trainer=gpu",
            "trainer.deterministic=true", f"name={name}", f"paths.output={tmp_path / name}",
            env=given, seconds=120,
        )  # fmt: skip
        files = (tmp_path / name / name / "attacks").rglob("*.safetensors")
        found.append({path.name: path.read_bytes() for path in files})
    assert found[0] == found[1] != {}
