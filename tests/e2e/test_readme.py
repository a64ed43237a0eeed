"""What the README tells people to write works as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import dori_lightning.mitigations
from dori_lightning import config
from dori_lightning.mitigations.edits import MaskEdit
from support.context import make_context, read_pairs
from support.tiny import tiny_model

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def blocks(section: str, language: str) -> list[str]:
    """Code blocks of a language in a section."""
    text = README.partition(f"# {section}\n")[2]
    text = re.split(r"^#{2,3} ", text, maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_worked_mitigation_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,), (recipe,) = blocks("Add a mitigation", "python"), blocks("Add a mitigation", "yaml")
    assert len([line for line in code.splitlines() if line.strip()]) <= 22
    (tmp_path / "loudest_values.py").write_text(code, "utf-8")
    monkeypatch.setattr(
        dori_lightning.mitigations,
        "__path__",
        [*dori_lightning.mitigations.__path__, str(tmp_path)],
    )
    cfg = OmegaConf.create({"mitigation": OmegaConf.create(recipe)})
    assert isinstance(cfg, DictConfig)
    config.check_targets(cfg)
    config.check_signatures(cfg)
    model = tiny_model(tmp_path / "model")
    before = {name: p.detach().clone() for name, p in model.denoiser().named_parameters()}
    pairs = [pair for pair in read_pairs(tmp_path) if pair.kind != "control"]
    edit = instantiate(cfg.mitigation).apply(model, pairs, make_context(tmp_path, model))
    assert isinstance(edit, MaskEdit)
    with edit.applied(model):
        changed = {
            name: int((p != before[name]).sum()) for name, p in model.denoiser().named_parameters()
        }
    assert {name: count for name, count in changed.items() if count} == edit.counts()
    assert all(torch.equal(p, before[name]) for name, p in model.denoiser().named_parameters()), (
        "the model is put back"
    )
