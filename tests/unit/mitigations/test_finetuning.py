import copy
import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from dori_lightning.mitigations.base import Context
from dori_lightning.mitigations.edits import WeightEdit
from dori_lightning.mitigations.finetuning import (
    FinetuneSettings,
    Finetuning,
    finetune,
    shuffled_indices,
)
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.runtime.checkpoints import checkpoint_step
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import InputError
from support.context import make_context
from support.unchanged import unchanged

STEPS = 3
FAST = {"lr": 1e-2, "weight_decay": 0.0, "clip": None}


class Plain(Finetuning):
    """Fits noise at the timestep that its step draws."""

    broken_at: int | None = None
    dtype: torch.dtype | None = None

    def training_step(self, *_: Any) -> torch.Tensor:
        loss = plain_loss(self.model, self.global_step)
        if self.global_step == self.broken_at:
            loss = loss * torch.nan
        self.dtype = self.model.denoiser().conv_in(torch.zeros(1, 4, 16, 16)).dtype
        return loss


def plain_loss(model: StableDiffusion, step: int) -> torch.Tensor:
    generator = keyed_generator("plain", step)
    noise = torch.randn(2, *model.latent_shape, generator=generator)
    timesteps = torch.randint(1000, (2,), generator=generator)
    prompts = torch.randn(2, *model.embedding_shape, generator=generator)
    return model.denoising_loss(torch.zeros_like(noise), noise, timesteps, prompts).mean()


class Stop(L.Callback):
    """Raises after a step before its checkpoint is written, or (None) after the last one's."""

    def __init__(self, step: int | None, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error

    def on_train_end(self, *_: Any) -> None:
        if self.step is None:
            raise self.error


def stopping(context: Context, step: int | None, error: BaseException) -> Context:
    """A context whose fits are stopped at a step."""
    return with_callback(context, Stop(step, error))


def with_callback(context: Context, callback: L.Callback) -> Context:
    def trainer(**settings):
        settings["callbacks"] = [*settings["callbacks"], callback]
        return context.trainer(**settings)

    changed = copy.copy(context)
    object.__setattr__(changed, "trainer", trainer)
    return changed


def run(
    model: StableDiffusion,
    context: Context,
    *,
    trained: Callable[[str], bool] = lambda _: True,
    steps: int = STEPS,
    prepare: Callable[[Plain], None] = lambda _: None,
    **settings: Any,
) -> WeightEdit:
    def make():
        module = Plain(model, FinetuneSettings(**{**FAST, **settings}), trained=trained)
        prepare(module)
        return module

    return finetune(make, model, context, steps=steps, key="fit", title="plain")


def kept_steps(context: Context) -> list[int]:
    """Steps after which the fit's folder holds checkpoints."""
    return sorted(checkpoint_step(path) for path in context.scratch("fit").glob("*"))


def by_hand(
    model: StableDiffusion, *, clip: float | None, warmup: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Weights after each step of the same training, written out."""
    twin = model.frozen_copy()
    weights = dict(twin.denoiser().named_parameters())
    for weight in weights.values():
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0.0)
    kept = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (step + 1) / (warmup + 1))
        plain_loss(twin, step).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(weights.values(), clip)
        optimizer.step()
        optimizer.zero_grad()
        kept.append({name: weight.detach().clone() for name, weight in weights.items()})
    return kept


@pytest.fixture(scope="module")
def written_out(model):
    return by_hand(model, clip=None)


@pytest.fixture(scope="module")
def whole(model, pairs, tmp_path_factory):
    """What an uninterrupted fit gives."""
    return run(model, make_context(tmp_path_factory.mktemp("whole"), model, pairs))


def same(found: WeightEdit, wanted: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(v, wanted[n], atol=1e-6) for n, v in found.weights.items())


def test_a_fit_is_adamw_with_warm_up_and_clipping(model, context, whole, written_out):
    assert set(whole.weights) == {n for n, _ in model.denoiser().named_parameters()}
    assert same(whole, written_out[-1])
    # Adam's step does not depend on the gradient's length, but on how it changes between steps
    clipped = run(model, context, clip=0.2, warmup=1)
    assert same(clipped, by_hand(model, clip=0.2, warmup=1)[-1])
    assert not same(clipped, by_hand(model, clip=None, warmup=1)[-1])


def test_the_model_is_put_back_bit_for_bit(model, context):
    model.denoiser().conv_in.weight.requires_grad_(False)
    model.denoiser().mid_block.train()
    try:
        with unchanged(model):
            edit = run(model, context, steps=1)
    finally:
        model.denoiser().conv_in.weight.requires_grad_(True)
        model.denoiser().eval()
    now = dict(model.denoiser().named_parameters())
    assert any(not torch.equal(now[name], value) for name, value in edit.weights.items())
    with edit.applied(model):
        assert all(torch.equal(now[name], value) for name, value in edit.weights.items())


def test_half_precision_weights_are_trained_in_fp32_and_narrowed_again(model, context):
    half = model.frozen_copy()
    half.denoiser().half()
    seen: list[torch.dtype] = []
    with unchanged(half):
        edit = run(
            half, context, steps=1, prepare=lambda m: seen.append(next(m.parameters()).dtype)
        )
    assert seen == [torch.float32]
    assert {value.dtype for value in edit.weights.values()} == {torch.float16}


def test_only_chosen_weights_change(model, context):
    edit = run(model, context, trained=lambda name: "attn2.to_v" in name, steps=2)
    assert set(edit.weights) == {
        f"{name}.weight" for name in model.layers("cross_attention.value")
    }


def test_a_choice_of_no_weights_is_an_error(model, context):
    with unchanged(model), pytest.raises(InputError, match="no weights"):
        run(model, context, trained=lambda _: False)


def test_an_interrupted_fit_goes_on_to_the_same_bits(model, context, whole):
    evaluations = []
    for step in (2, None):  # more than once: a resumed fit's checkpoints count too
        used = model.unet_evaluations
        with unchanged(model), pytest.raises(RuntimeError, match="power cut"):
            run(model, stopping(context, step, RuntimeError("power cut")), checkpoint_every=1)
        evaluations.append((model.unet_evaluations - used) // 2)
        assert kept_steps(context) == ([1] if step == 2 else [2, 3])
    assert evaluations == [2, 2], "what is in a checkpoint is not done again"
    used = model.unet_evaluations
    resumed = run(model, context, checkpoint_every=1)
    assert model.unet_evaluations == used
    assert resumed.identity == whole.identity
    assert not context.scratch("fit").exists()


def test_ctrl_c_stays_ctrl_c(model, context):
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        run(model, stopping(context, 2, KeyboardInterrupt()))


def test_a_damaged_checkpoint_is_not_used(model, context, whole, caplog):
    with pytest.raises(RuntimeError, match="power cut"):
        run(model, stopping(context, 2, RuntimeError("power cut")), checkpoint_every=1)
    (last,) = context.scratch("fit").glob("step-00000001-*.ckpt")
    last.write_bytes(last.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        again = run(model, context)
    assert "IS DAMAGED" in caplog.text
    assert "begins anew" in caplog.text
    assert again.identity == whole.identity


def test_a_loss_that_is_no_number_is_an_error_and_leaves_no_checkpoint(model, context):
    def break_first(module):
        module.broken_at = 0

    with (
        unchanged(model),
        pytest.raises(RuntimeError, match="loss stopped being finite at step 1"),
    ):
        run(model, context, prepare=break_first, checkpoint_every=1)
    assert kept_steps(context) == []


def test_a_fit_that_ends_early_is_no_edit(model, context):
    class Enough(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    with pytest.raises(RuntimeError, match="ended after 1 of 3 steps"):
        run(model, with_callback(context, Enough()))


def test_mixed_precision_reaches_the_denoiser(model, context_of, tmp_path):
    modules: list[Plain] = []
    mixed = run(
        model, context_of(tmp_path / "a"), precision="bf16-mixed", prepare=modules.append, steps=1
    )
    full = run(model, context_of(tmp_path / "b"), prepare=modules.append, steps=1)
    assert [module.dtype for module in modules] == [torch.bfloat16, torch.float32]
    assert set(mixed.weights) == set(full.weights)
    assert mixed.identity != full.identity


def test_a_frozen_copy_has_weights_of_its_own(model):
    twin, evaluations = model.frozen_copy(), model.unet_evaluations
    assert not any(p.requires_grad for p in twin.parameters())
    assert all(p.requires_grad for p in model.parameters())
    prompts = model.encode_prompts(["a red boat"])
    noise = torch.randn(1, *model.latent_shape, generator=keyed_generator("x"))
    wanted = twin.predict_noise(noise, torch.tensor([500]), prompts)
    for weight in twin.parameters():
        weight.data.zero_()
    assert (twin.unet_evaluations, model.unet_evaluations) == (1, evaluations)
    found = model.predict_noise(noise, torch.tensor([500]), prompts)
    assert torch.equal(found, wanted)


def test_turns_take_every_element_once_a_round():
    drawn = [k for step in range(6) for k in shuffled_indices("x", 0, step, batch=4, count=6)]
    rounds = [drawn[start : start + 6] for start in range(0, 24, 6)]
    assert all(sorted(one) == list(range(6)) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert drawn[:6] == shuffled_indices("x", 0, 0, batch=6, count=6), (
        "the batch does not decide the order"
    )
    assert drawn[:6] != shuffled_indices("x", 1, 0, batch=6, count=6)
