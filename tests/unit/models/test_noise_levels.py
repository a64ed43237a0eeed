import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from dori_lightning.models.noise_levels import NoiseLevels

CPU = torch.device("cpu")


def levels(kind: str) -> NoiseLevels:
    if kind == "velocity":
        return NoiseLevels.of(FlowMatchEulerDiscreteScheduler(shift=3.0), CPU)
    return NoiseLevels.of(DDIMScheduler(prediction_type=kind), CPU)


def test_flow_is_trained_on_the_shifted_share_of_noise():
    flow = levels("velocity")
    assert torch.allclose(flow.signal + flow.noise, torch.ones(1000))
    assert flow.noise[[499, 999]].tolist() == pytest.approx([0.75, 1.0])
    assert flow.times(torch.tensor([499])).tolist() == pytest.approx([750.0])
    image_sized = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    assert float(NoiseLevels.of(image_sized, CPU).noise[499]) == pytest.approx(0.5)


def test_what_a_sampler_visits_is_found_in_the_table():
    flow, scheduler = levels("velocity"), FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(2)
    first, last = flow.nearest(scheduler.timesteps).tolist()
    assert (first, float(flow.noise[last])) == (999, pytest.approx(0.009, abs=1e-3))
    whole = torch.tensor([901, 1])
    assert levels("epsilon").nearest(whole) is whole
    assert levels("epsilon").nearest(torch.tensor([901.4, 0.2])).tolist() == [901, 0]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "velocity"])
def test_the_target_implies_what_was_mixed(kind):
    table, timesteps = levels(kind), torch.tensor([0, 300, 999])
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noised, target = (f(latents, noise, timesteps) for f in (table.noised, table.target))
    assert torch.allclose(table.implied_noise(target, noised, timesteps), noise, atol=1e-5)
    assert torch.allclose(table.implied_clean(target, noised, timesteps), latents, atol=1e-3)
