import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from dori_lightning.audit.utility import write_utility
from dori_lightning.metrics.image_distances import KernelDistance
from dori_lightning.metrics.utility import (
    Alignment,
    Comparison,
    DenoisingLoss,
    LossRow,
    PictureRow,
    Replicas,
    Utility,
)
from dori_lightning.report.pages import MOST_PROMPTS, render_page, utility_twins
from dori_lightning.report.record import read_record, write_report
from dori_lightning.types import InputError
from support import fake_reports as fakes
from support.records import report_json

pytestmark = pytest.mark.usefixtures("no_figures")
EVIL = '<img src=http://evil.example/a.png> "quoted"'


def shown(folder: Path, place: int, **more: object) -> PictureRow:
    values: dict[str, object] = {
        "kind": "ordinary", "id": f"corpus_{place:04d}", "group": f"prompt {place}",
        "prompt": f"prompt {place}", "seed": 2, "similarity": 0.5 + 0.01 * place,
        "original_unmitigated": None, "original_mitigated": None,
        "alignment_unmitigated": None, "alignment_mitigated": None,
        "unmitigated": fakes.picture(folder / "before" / f"{place}.png", place),
        "mitigated": fakes.picture(folder / "after" / f"{place}.png", place, noise=30),
    }  # fmt: skip
    return PictureRow(**{**values, **more})  # type: ignore[arg-type]


def near(folder: Path, pair: str, k: int, place: int) -> PictureRow:
    return shown(
        folder, place, kind="neighbour", id=f"{pair}_near{k}", group=pair,
        original_unmitigated=0.91, original_mitigated=0.12,
    )  # fmt: skip


def comparison(**more: object) -> Comparison:
    values: dict[str, object] = {
        "prompts": 3, "pictures_each": 1, "kid": KernelDistance(0.0123, 0.0045, 3, 3, 1),
        "fid": None, "features": "autoencoder, 40 features", "similarity": 0.83,
        "similarity_mad": 0.05, "similarity_ci95": (0.78, 0.88), "alignment": None,
    }  # fmt: skip
    return Comparison(**{**values, **more})  # type: ignore[arg-type]


def utility(folder: Path) -> Utility:
    rows = [shown(folder, k) for k in range(3)]
    rows += [near(folder, "vm_00", k, 3 + k) for k in range(2)]
    return Utility(
        descriptor="ncc",
        denoising_loss=DenoisingLoss(0.2, 0.21, 1.05, (1.02, 1.08), 128, 2),
        ordinary=comparison(alignment=Alignment(0.31, 0.29, -0.02, (-0.03, -0.01))),
        neighbours=comparison(kid=None, fid=12.5),
        replicas=Replicas(40, 12, (0.18, 0.45), 1, (0.0, 0.13)),
        left_out={"fid": "needs 160 pictures", "neighbours.kid": "needs 4 independent pairs"},
        loss_rows=(LossRow("corpus_0000", "prompt 0", 0, 7, 0.2, math.nan),),
        picture_rows=tuple(rows),
    )


def test_the_page_has_a_section_only_where_a_cost_was_measured(tmp_path):
    report = fakes.report(tmp_path)
    without = render_page(report)
    assert 'id="cost"' not in without
    assert 'href="#cost"' not in without
    assert "utility.json" not in without
    text = render_page(replace(report, utility=utility(tmp_path)))
    assert 'id="cost"' in text
    assert 'href="#cost"' in text
    assert "utility.json" in text
    firm = text.replace("\u00a0", " ")
    assert "1.050 times the loss without it (95 % interval 1.020 to 1.080)" in firm
    assert "12 brought the original back without the mitigation, 1 with it" in firm
    assert "0.0123 ± 0.0045" in firm
    assert "-0.020 (-0.030 to -0.010)" in firm
    assert "12 of 40 (18 to 45 %)" in firm
    assert "FID of ordinary prompts: needs 160 pictures." in firm
    assert "KID of neighbour prompts: needs 4 independent pairs." in firm


@pytest.mark.parametrize("images", ["full", "blurred", "none"])
def test_pictures_follow_the_disclosure(tmp_path, images):
    report = fakes.report(tmp_path)
    before = render_page(report, images=images).count("data:image/jpeg")
    text = render_page(replace(report, utility=utility(tmp_path)), images=images)
    assert text.count("data:image/jpeg") - before == (0 if images == "none" else 2 * 5)
    assert ("With the mitigation: prompt 0 (blurred)" in text) == (images == "blurred")
    assert ("With the mitigation: prompt 0" in text) == (images != "none")
    assert "0.0123" in text, "numbers are shown whatever happens to pictures"


def test_lost_pictures_are_an_error_unless_none_are_shown(tmp_path):
    found = utility(tmp_path)
    found.picture_rows[0].mitigated.unlink()
    assert utility_twins(found, "none") == []
    with pytest.raises(InputError, match="restore the file"):
        utility_twins(found, "full")


def test_prompts_are_text_not_markup(tmp_path):
    found = utility(tmp_path)
    evil = replace(found.picture_rows[0], prompt=EVIL)
    text = render_page(
        replace(fakes.report(tmp_path), utility=replace(found, picture_rows=(evil,)))
    )
    assert "<img src=http" not in text
    assert "&lt;img src=http" in text


def test_shown_are_the_first_prompts_of_every_group_in_turn(tmp_path):
    rows = [near(tmp_path, f"vm_{p}", k, 0) for p in range(5) for k in range(4)]
    rows = [replace(row, prompt=row.id) for row in rows for _ in range(2)]
    found = replace(utility(tmp_path), picture_rows=tuple(rows))
    (twins,) = utility_twins(found, "full")
    assert (twins.prompts, len(twins.shown)) == (20, MOST_PROMPTS)
    assert [row.prompt for row, _, _ in twins.shown[:6]] == [
        *(f"vm_{p}_near0" for p in range(5)), "vm_0_near1",
    ]  # fmt: skip
    text = render_page(replace(fakes.report(tmp_path), utility=found)).replace("\u00a0", " ")
    assert f"{MOST_PROMPTS} of 20 prompts" in text
    assert "with the original 0.91 without, 0.12 with" in text


def test_a_broken_model_is_called_broken(tmp_path):
    broken = DenoisingLoss(0.2, math.nan, math.nan, (math.nan, math.nan), 128, 2)
    found = Utility("ncc", broken, None, None, None, {})
    text = render_page(replace(fakes.report(tmp_path), utility=found), images="none")
    section = text[text.index('id="cost"') : text.index('id="read"')]
    assert "the model is broken" in section
    assert section.count("not finite") == 2
    assert ">nan" not in section


def test_a_section_in_which_everything_was_left_out(tmp_path):
    nothing = Utility("ncc", None, None, None, None, {"ordinary": "corpus is none"})
    text = render_page(replace(fakes.report(tmp_path), utility=nothing))
    assert "Images of ordinary prompts: corpus is none." in text


def test_the_record_carries_it_under_one_key(tmp_path):
    report = fakes.report(tmp_path)
    write_report(report, tmp_path / "none")
    assert report_json(tmp_path / "none")["utility"] is None
    write_report(replace(report, utility=utility(tmp_path)), tmp_path / "some")
    found = report_json(tmp_path / "some")["utility"]
    assert found["denoising_loss"]["ratio_ci95"] == [1.02, 1.08]
    assert found["neighbours"]["replicating"]["mitigated"] == 1
    assert found["kid"]["features"] == "autoencoder, 40 features"


def test_files_hold_numbers_and_rows(tmp_path):
    found = replace(
        utility(tmp_path),
        denoising_loss=DenoisingLoss(0.2, math.nan, math.nan, (math.nan, math.nan), 1, 1),
    )
    path = write_utility(found, tmp_path / "run")
    document = json.loads(path.read_text())
    assert document["denoising_loss"]["ratio"] is None
    assert document["kid"]["mean"] == 0.0123
    losses = pd.read_parquet(tmp_path / "run" / "utility_losses.parquet")
    assert losses["mitigated"].isna().all()
    pictures = pd.read_parquet(tmp_path / "run" / "utility_pictures.parquet")
    assert len(pictures) == 5
    assert pictures["mitigated"][0] == "../after/0.png"
    assert pictures["original_mitigated"].tolist()[3:] == [0.12, 0.12]
    assert pictures["original_mitigated"].isna().sum() == 3


@pytest.mark.parametrize("missing", ["neighbours", "ordinary", "denoising_loss", "replicas"])
def test_costs_are_read_back_whatever_was_left_out(tmp_path, missing):
    found = replace(utility(tmp_path), **{missing: None})
    write_report(replace(fakes.report(tmp_path), utility=found), tmp_path)
    back = read_record(tmp_path).utility
    assert back == replace(found, loss_rows=(), picture_rows=())
