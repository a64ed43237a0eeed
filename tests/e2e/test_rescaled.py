"""Checkpoints that hold what the embedded benchmark holds, and on which a search goes wrong."""

import runpy
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dori_lightning.models.loading import resolve_source
from support.records import report_json
from support.runs import run_task

RESCALE = runpy.run_path(
    str(Path(__file__).parents[2] / "experiments" / "005-evidence" / "rescale.py")
)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["values_x30", "values_d30", "timesteps_x30", "timesteps_d30"])
def test_no_image_that_is_still_held_is_answered_no(case, tmp_path):
    """It comes back, or the audit says that it could not have seen it."""
    file, change = RESCALE["CASES"][case]
    folder = tmp_path / case
    shutil.copytree(resolve_source("package:dori_tiny"), folder)
    tensors = load_file(folder / file)
    save_file({name: change(name, own) for name, own in tensors.items()}, folder / file)
    run_task(
        tmp_path / "run",
        "pairs=dori_tiny_sweep",
        "pairs.parts.0.limit=6",
        "attack.inits=[random]",
        "attack.other_inits=[random]",
        f"checkpoint.source={folder}",
        f"checkpoint.name={case}",
        "checkpoint.device=cpu",
        "trainer=cpu",
        "report.images=none",
        experiment="audit",
    )
    answers = [row["answer"] for row in report_json(tmp_path / "run")["images"]]
    assert len(answers) >= 6
    assert "no" not in answers
