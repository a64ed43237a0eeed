"""Whole audits of tiny random checkpoints of other families: nothing comes back or crashes."""

import pytest
from safetensors import safe_open

from dori_lightning.types import InputError
from support.families import FAMILIES, folder_of
from support.records import report_json
from support.runs import SMALL, on_tiny, run_task, write_pairs

PARTS = {
    "sdxl": ["sequence", "pooled", "time_ids"],
    "sd3": ["clip", "t5", "pooled"],
    "flux": ["t5", "pooled"],
    "pixart": ["t5", "mask"],
}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "sd"])
def test_a_random_checkpoint_is_audited(tmp_path, family):
    write_pairs(tmp_path / "pairs")
    sampling = FAMILIES[family].sampling[-1]
    run_task(
        tmp_path / "run",
        "checkpoint=custom", f"checkpoint.family={family}",
        *on_tiny(tmp_path, "corpus=none", *SMALL),
        f"checkpoint.source={folder_of(family)}", "checkpoint.resolution=32",
        "attack.inits=[prompt,random]",
        f"sampling.sampler={sampling.sampler}", f"sampling.guidance={sampling.guidance}",
        f"+sampling.distilled_guidance={sampling.distilled_guidance or 'null'}",
        "mitigation=wanda", "mitigation.fraction=0.1", "mitigation.steps=2",
    )  # fmt: skip
    report = report_json(tmp_path / "run")
    assert {cell["mitigation"] for cell in report["cells"]} == {"none", "wanda"}
    assert {cell["init"] for cell in report["cells"]} == {None, "prompt", "random"}
    assert not any(cell["mr"] for cell in report["cells"])
    with safe_open(next((tmp_path / "run").rglob("random/*.r0.safetensors")), "pt") as trigger:
        parts = trigger.metadata()["parts"].split(", ")
    assert [part.split()[0] for part in parts] == PARTS[family]


@pytest.mark.parametrize(
    ("experiment", "asked"),
    [
        ("audit", ("mitigation=nemo",)),
        (
            "locality",
            (
                "attack.inits=[prompt,random]",
                "attack.restarts=3",
                "task.images=1",
                "task.control_images=1",
            ),
        ),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_is_loaded(tmp_path, experiment, asked):
    write_pairs(tmp_path / "pairs")
    chosen = on_tiny(tmp_path, "corpus=none", *SMALL)
    with pytest.raises(InputError, match="value layers of Stable Diffusion 3"):
        run_task(
            tmp_path / "run", "checkpoint=custom", "checkpoint.family=sd3", *chosen,
            f"checkpoint.source={tmp_path / 'missing'}", *asked, experiment=experiment,
        )  # fmt: skip
