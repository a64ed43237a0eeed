"""What the attack and the sampler ask of a device, without a clock."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import pytest
import torch

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.attacks.solver import AttackProblem, solve
from dori_lightning.attacks.timesteps import BINS
from dori_lightning.bench.measure import counted
from dori_lightning.models.memory import PARALLEL_PAIRS
from dori_lightning.models.protocol import Sampling
from dori_lightning.types import Budget
from support.families import FAMILIES, load_family
from support.fetches import Fetches, FetchingKernels

STEPS = 4
OTHER_FAMILIES = [name for name in FAMILIES if name != "sd"]
ONE_NOISE = AttackSettings(noise_batch=1)


@contextmanager
def watched() -> Iterator[tuple[Fetches, FetchingKernels]]:
    methods, kernels = Fetches(), FetchingKernels()
    with kernels, methods:
        yield methods, kernels


def test_values_are_noticed_where_they_are_fetched():
    with watched() as (methods, kernels):
        value = torch.ones(3)
        float(value.sum())
        value[value > 0]
        if value.any():
            value.cpu()
        torch.arange(3).tolist()
    assert methods.found == ["__float__", "__bool__", "cpu"]
    assert len(kernels.found) >= 2


def fetched_by_step(model, problem, **settings) -> list[int]:
    """Values fetched in each step of an attack but the first."""
    seen: list[int] = []
    with watched() as (methods, kernels):
        solve(
            model, problem, budget=Budget("l2", 5.0, STEPS),
            settings=AttackSettings(noise_batch=2, **settings),
            density=torch.full((BINS,), 1 / BINS, dtype=torch.float64),
            on_step=lambda _: seen.append(len(methods.found) + len(kernels.found)),
        )  # fmt: skip
    return [after - before for before, after in pairwise(seen)]


def at(*snapshots: int) -> list[int]:
    """One fetch, of the embedding that is kept, at each of these steps and at the last."""
    return [int(step in {*snapshots, STEPS}) for step in range(2, STEPS + 1)]


@pytest.mark.parametrize("snapshots", [(), (1, 2)])
def test_the_attack_fetches_values_at_its_beginning_and_at_snapshots_alone(
    model, problem, snapshots
):
    assert fetched_by_step(model, problem, snapshots=snapshots) == at(*snapshots)


@pytest.mark.parametrize("timesteps", ["stratified", "importance", (0.2, 0.6)])
def test_however_timesteps_are_drawn_nothing_more_is_fetched(model, problem, timesteps):
    assert fetched_by_step(model, problem, timesteps=timesteps) == at()


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_of_every_family_nothing_more_is_fetched(family):
    """Neither by searches in parts with units of their own nor between steps of a sampler."""
    model, generator = load_family(family), torch.Generator().manual_seed(1)
    latents = torch.randn((2, *model.latent_shape), generator=generator)
    embeddings = model.encode_prompts(["a cat", "a boat"])
    problem = AttackProblem(("cat", "boat"), (0, 0), latents, embeddings.cpu())
    assert fetched_by_step(model, problem, snapshots=(2,)) == at(2)
    for sampling in FAMILIES[family].sampling:
        with Fetches(embeddings, latents) as methods:
            drawn = model.denoise(embeddings, latents, sampling)
            assert methods.found == [], sampling.sampler
            float(drawn.sum())
            assert methods.found == ["__float__"], "it looks"


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_the_sampler_fetches_no_values_between_its_steps(model, sampler):
    sampling = Sampling(sampler, 5, 2.0, 2)
    context, noise = model.encode_prompts(["a cat", "a boat"]), torch.randn(2, *model.latent_shape)
    with counted(model.denoiser()) as counts, Fetches(context, noise) as methods:
        latents = model.denoise(context, noise, sampling)
        assert methods.found == []
        float(latents.sum())
        assert methods.found == ["__float__"], "it looks"
    assert counts.passes == 5, "both halves of the guidance in one pass"


def test_scheduler_arithmetic_stays_on_the_host(model, monkeypatch):
    """A step number that lies on a device has to be waited for."""
    monkeypatch.setattr(model, "device", torch.device("meta"))
    for sampler in ("ddim", "dpm++"):
        scheduler = model.scheduler_of(Sampling(sampler, 5, 2.0, 2))
        assert scheduler.timesteps.device.type == "cpu"


def test_nothing_before_the_first_cross_attention_is_differentiated(model, problem):
    """The backward pass ends there by itself, unless the noised latent needs a gradient."""
    needs: dict[str, bool] = {}
    inputs: list[bool] = []

    def note(name):
        def look(_, __, output):
            needs[name] = output.requires_grad

        return look

    def enter(_, arguments):
        inputs.append(arguments[0].requires_grad)

    names = dict(model.denoiser().named_modules())
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    chosen = ("conv_in", "time_embedding", "down_blocks.0.resnets.0", f"{block}.attn1")
    handles = [names[n].register_forward_hook(note(n)) for n in (*chosen, f"{block}.attn2")]
    handles.append(model.denoiser().register_forward_pre_hook(enter))
    try:
        solve(model, problem, budget=Budget(steps=1), settings=ONE_NOISE)
    finally:
        for handle in handles:
            handle.remove()
    assert needs == {**dict.fromkeys(chosen, False), f"{block}.attn2": True}
    assert inputs == [False, False]


def test_one_attack_takes_as_few_passes_a_step_as_hold_its_pairs(model, problem):
    others = (model.autoencoder.encoder, model.autoencoder.decoder, model.text_encoder)
    with ExitStack() as stack:
        counts = stack.enter_context(counted(model.denoiser()))
        unused = [stack.enter_context(counted(module)) for module in others]
        settings = AttackSettings(noise_batch=2, snapshots=(1, 2))
        solve(model, problem, budget=Budget(steps=3), settings=settings)
    assert (counts.passes, counts.samples) == (3 * 2, 3 * 2 * PARALLEL_PAIRS * 2)
    assert [each.passes for each in unused] == [0, 0, 0]


@pytest.mark.slow
def test_a_compiled_denoiser_is_compiled_once(model, problem, monkeypatch):
    """Neither steps nor a second attack, with its flags put back in between, compile again.

    With the backend that generates no code: which graphs there are does not depend on it.
    """
    compiled: list[object] = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    plain = solve(model, problem, budget=Budget(steps=2), settings=ONE_NOISE)
    monkeypatch.setattr(model, "_denoiser", torch.compile(model.denoiser(), backend=backend))
    with torch._dynamo.config.patch(error_on_recompile=True):
        once = solve(model, problem, budget=Budget(steps=2), settings=ONE_NOISE)
        graphs = len(compiled)
        solve(model, problem, budget=Budget(steps=2), settings=ONE_NOISE)
    assert 1 <= graphs == len(compiled)
    assert torch.allclose(once.embeddings, plain.embeddings, atol=1e-4)
    torch._dynamo.reset()
