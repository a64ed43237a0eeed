import os
import subprocess

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from dori_lightning.models.convert import convert, main
from dori_lightning.types import InputError


class Callback:
    """What a training leaves in its checkpoint besides weights."""

    loaded = 0

    def __init__(self):
        self.best = {"score": 1.0}

    def __setstate__(self, state):
        Callback.loaded += 1


class Evil:
    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return (self.function, ("print('ran')",))


def test_of_a_lightning_checkpoint_only_the_weights_are_kept(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save(
        {
            "state_dict": {"model.diffusion_model.out.2.weight": weight, "betas": weight[0]},
            "epoch": 3,
            "callbacks": {Callback: Callback()},
            "hyper_parameters": OmegaConf.create({"lr": 1e-4, "parts": [1, 2]}),
            "optimizer_states": [{"state": {0: {"exp_avg": weight}}}],
        },
        tmp_path / "last.ckpt",
    )
    made = convert(tmp_path / "last.ckpt", tmp_path / "last.safetensors")
    held = load_file(tmp_path / "last.safetensors")
    assert made.tensors == 2
    assert set(made.dropped) == {"epoch", "callbacks", "hyper_parameters", "optimizer_states"}
    assert torch.equal(held["model.diffusion_model.out.2.weight"], weight)
    assert Callback.loaded == 0


def test_the_parts_of_a_delta_keep_their_names(tmp_path):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    torch.save({"unet": {name: torch.ones(2)}, "text_encoder": {"x": torch.ones(1)}},
               tmp_path / "delta.bin")  # fmt: skip
    convert(tmp_path / "delta.bin", tmp_path / "delta.safetensors")
    assert set(load_file(tmp_path / "delta.safetensors")) == {f"unet.{name}", "text_encoder.x"}


@pytest.mark.parametrize(
    "function",
    [exec, eval, print, getattr, subprocess.getoutput, os.system],
    ids=lambda function: function.__name__,
)
def test_a_file_that_asks_for_code_is_refused(tmp_path, capsys, function):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Evil(function)}, path)
    with pytest.raises(InputError, match="not a plain file of tensors"):
        convert(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    assert not capsys.readouterr().out


def test_the_command_says_what_it_wrote_and_what_it_left_out(tmp_path, capsys):
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "last.ckpt")
    target = tmp_path / "out.safetensors"
    assert main([str(tmp_path / "last.ckpt"), str(target)]) == 0
    assert capsys.readouterr().out == f"tensors written to {target}: 1\nleft out: epoch\n"
    assert main([str(tmp_path / "nothing.ckpt"), str(target)]) == 2
    assert main([]) == 2


@pytest.mark.parametrize("content", [b"", b"not a pickle", None])
def test_what_is_no_file_of_tensors_is_refused(tmp_path, content):
    path = tmp_path / "model.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError):
        convert(path, tmp_path / "out.safetensors")
