"""A mended UNet on its base is audited as the whole checkpoint is."""

from dataclasses import dataclass

import pytest
import torch

from dori_lightning.mitigations.edits import MaskEdit, Origin
from support.records import report_json
from support.runs import SMALL, on_tiny, run_task, write_material


@dataclass(frozen=True)
class Pruned:
    """Blocks every other value neuron."""

    name: str = "pruned"

    def apply(self, model, pairs, context):
        return MaskEdit(
            Origin(model.fingerprint),
            {
                f"{name}.weight": torch.arange(layer.out_features) % 2 == 0
                for name, layer in model.layers("cross_attention.value").items()
            },
        )


@pytest.mark.parametrize("base", ["tiny", pytest.param("dori_tiny", marks=pytest.mark.slow)])
def test_an_exported_edits_unet_on_the_base_is_the_exported_checkpoint(tmp_path, base):
    material = write_material(tmp_path)
    source = material / "checkpoint" if base == "tiny" else "package:dori_tiny"
    chosen = on_tiny(material, "corpus=none", f"checkpoint.source={source}")
    run_task(
        tmp_path / "export",
        "task=export", "task.formats=diffusers", "mitigation.name=pruned",
        f"mitigation._target_={__name__}.Pruned", *chosen,
    )  # fmt: skip
    exported = tmp_path / "export" / "diffusers"
    whole, joined = tmp_path / "whole", tmp_path / "joined"
    run_task(whole, *chosen, *SMALL, f"checkpoint.source={exported}")
    run_task(joined, *chosen, *SMALL, f"checkpoint.unet={exported}")
    first, second = report_json(whole), report_json(joined)
    for name in ("cells", "calibration", "pairs", "verdict"):
        assert first[name] == second[name], name
    origins = first["provenance"], second["provenance"]
    assert origins[0]["fingerprint"] == origins[1]["fingerprint"]
    assert origins[0]["replaced"] == []
    (replaced,) = origins[1]["replaced"]
    assert (replaced["part"], replaced["source"]) == ("unet", "diffusers")
    assert 0 < replaced["changed"] < replaced["replaced"] == replaced["total"]
    (digest,) = replaced["files"].values()
    page = (joined / "report.html").read_text()
    assert "with the UNet of diffusers" in page
    assert digest in page
