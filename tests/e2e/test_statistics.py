import json

import pytest

from dori_lightning.mitigations.activations import ActivationStatistics, activation_statistics
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.types import InputError
from support.context import write_captions
from support.runs import on_tiny, run_task


def test_statistics_of_a_checkpoint_are_stored_and_layers_weighed(material, tmp_path, capsys):
    captions = write_captions(tmp_path / "captions.txt")
    overrides = on_tiny(
        material, "task=statistics", "task.prompts=20", "task.influence_prompts=2",
        "corpus=captions", f"corpus.path={captions}", "sampling.steps=2",
    )  # fmt: skip
    folder = tmp_path / "run"
    run_task(folder, *overrides)
    path = folder / "statistics.safetensors"
    assert str(path) in capsys.readouterr().err
    model = load_checkpoint(name="tiny", source=str(material / "checkpoint"), device="cpu")
    stored = ActivationStatistics.load(path, model)
    summary = json.loads((folder / "statistics.json").read_text())
    assert summary["identity"] == stored.identity
    assert summary["checkpoint"]["fingerprint"] == model.fingerprint
    layers = list(model.layers("cross_attention.value"))
    assert [row["layer"] for row in summary["layers"]] == layers
    assert set(stored.means) == set(stored.stds) == set(layers)
    assert all(row["share"] > 0 and row["neurons"] == 8 for row in summary["layers"])
    words = list(dict.fromkeys(captions.read_text().splitlines()))
    assert len(words) > 20
    assert stored.prompts == 20
    run_task(folder, *overrides)
    assert ActivationStatistics.load(path, model).identity == stored.identity
    with pytest.raises(InputError, match=r"task\.prompts: 20 there, 21 now"):
        run_task(folder, *overrides, "task.prompts=21")
    assert activation_statistics(model, ["a cat", "a boat"]).identity != stored.identity
