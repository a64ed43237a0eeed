from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hydra.utils import instantiate

from dori_lightning import config
from dori_lightning.mitigations.base import Context, settings_fingerprint
from dori_lightning.mitigations.baselines import NoMitigation, RandomPruning
from dori_lightning.mitigations.edits import Edit, MaskEdit, Origin, PairMaskEdit, WeightEdit
from dori_lightning.mitigations.nemo import NeMo
from dori_lightning.models.protocol import TextToImage
from dori_lightning.types import InputError, Pair
from support.runs import configuration


@dataclass(frozen=True)
class Fixed:
    """Prunes the first rows of one layer and some single weights of another."""

    scope: str = "pair"
    name: str = "fixed"

    def apply(self, model: TextToImage, pairs: Sequence[Pair], context: Context) -> Edit:
        del context
        rows, weights = list(model.layers("cross_attention.value").values())[:2]
        names = {id(p): n for n, p in model.denoiser().named_parameters()}
        single = torch.zeros(weights.weight.shape, dtype=torch.bool)
        single[0, :5] = True
        origin, masks = Origin(model.fingerprint), []
        for k in range(len(pairs)):
            own = torch.arange(len(rows.weight)) <= k
            masks.append({names[id(rows.weight)]: own, names[id(weights.weight)]: single})
        if self.scope == "union":
            return MaskEdit(origin, masks[-1])
        if self.scope == "weights":
            return WeightEdit(origin, {names[id(rows.weight)]: torch.zeros_like(rows.weight)})
        return PairMaskEdit(origin, dict(zip([p.id for p in pairs], masks, strict=True)))


def test_each_pair_loses_as_many_of_each_parameter_but_others(model, context, suspected):
    like = context.find(Fixed(), model, suspected).edit
    edit = RandomPruning(Fixed()).apply(model, suspected, context)
    assert isinstance(edit, PairMaskEdit)
    assert isinstance(like, PairMaskEdit)
    different = False
    for pair, own in like.masks.items():
        assert set(own) == set(edit.masks[pair])
        for name, mask in own.items():
            mine = edit.masks[pair][name]
            assert mine.shape == mask.shape
            assert int(mine.sum()) == int(mask.sum())
            different = different or not torch.equal(mine, mask)
    assert different
    assert edit.origin.notes == {"like": "fixed", "like_edit": like.identity}


def test_a_mask_for_everybody_stays_one(model, context, suspected):
    like = Fixed("union")
    edit = RandomPruning(like).apply(model, suspected, context)
    assert isinstance(edit, MaskEdit)
    assert edit.counts() == context.find(like, model, suspected).edit.counts()
    assert not context.find(like, model, suspected).made


def test_the_seed_decides_the_draw(model, context, suspected):
    edits = [
        RandomPruning(Fixed()).apply(model, suspected, replace(context, seed=seed)).identity
        for seed in (0, 0, 1)
    ]
    assert edits[0] == edits[1] != edits[2]


@pytest.mark.parametrize("like", [NoMitigation(), Fixed("weights")])
def test_a_method_that_does_not_prune_is_refused(model, context, suspected, like):
    with pytest.raises(InputError, match=r"needs a method that prunes.*\n.*mitigation\.like"):
        RandomPruning(like).apply(model, suspected, context)


def test_the_preset_matches_nemo_and_any_other_method_on_request():
    for preset, like in (("random_pruning_nemo", "nemo"), ("random_pruning", "nemo_replication")):
        cfg = configuration(f"mitigation={preset}")
        config.check_signatures(cfg)
        found = instantiate(cfg.mitigation)
        assert isinstance(found, RandomPruning)
        assert found.like == instantiate(configuration(f"mitigation={like}").mitigation)
    other = configuration(
        "mitigation=random_pruning", "mitigation@mitigation.like=nemo_union"
    ).mitigation
    assert instantiate(other).like == NeMo(name="nemo_union", scope="union")


def test_presets_of_nemo_are_the_defaults_but_for_what_their_names_say():
    assert instantiate(configuration("mitigation=nemo").mitigation) == NeMo()
    assert instantiate(configuration("mitigation=nemo_all_layers").mitigation) == NeMo(
        name="nemo_all_layers", stages=("down", "mid", "up")
    )


def test_statistics_that_were_written_anew_make_another_edit(tmp_path):
    file = tmp_path / "statistics.safetensors"
    method = RandomPruning(NeMo(statistics=str(file)))
    with pytest.raises(InputError, match="cannot read the statistics"):
        settings_fingerprint(method)
    file.write_bytes(b"one")
    first = settings_fingerprint(method)
    file.write_bytes(b"two")
    assert settings_fingerprint(method) != first
