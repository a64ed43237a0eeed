import math
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dori_lightning.report import figures
from dori_lightning.report.images import attack_grid, thumbnail
from dori_lightning.report.pages import write_audit_page
from dori_lightning.types import InputError
from support import fake_reports as fakes

PNG = b"\x89PNG\r\n\x1a\n"


def test_figures_repeat_bit_for_bit_and_take_the_pages_colours(tmp_path):
    report = fakes.with_evidence(fakes.report(tmp_path))

    def draw() -> dict[str, tuple[bytes, str]]:
        return {
            name: (figures.png_bytes(figure), figures.svg_element(figure, name))
            for name, figure in figures.audit_figures(report).items()
        }

    first = draw()
    assert set(first) == {
        "image_scores", "rate_against_steps", "similarity_histograms", "roc",
        "memorization_against_repeats",
    }  # fmt: skip
    for png, svg in first.values():
        assert png.startswith(PNG)
        assert "var(--" in svg
        assert not re.search(r"#[0-9a-f]{6}\b", svg), "a colour that knows no dark page"
    assert first == draw()


def test_figures_without_data_are_left_out(tmp_path):
    report = fakes.report(tmp_path, vm=0)
    rule = report.calibration
    prompts = [fakes.PROMPT]
    assert figures.rate_against_steps([fakes.cell("vm", fakes.PROMPT, 1, 2)]) is None
    assert figures.roc(replace(rule, roc=())) is None
    results = report.pair_results
    drawn = figures.memorization_against_repeats(results, conditions=prompts, threshold=0.7)
    assert drawn is None
    assert figures.similarity_histograms([], conditions=prompts, calibration=rule) is None


@pytest.mark.parametrize(
    "missing", [(), ("unseen",), ("power",), ("unseen", "power")], ids="-".join
)
def test_scores_of_all_groups_share_one_axis_whichever_is_missing(tmp_path, missing):
    report = fakes.with_evidence(fakes.report(tmp_path), controls=110, copies=40, reference=0)
    empty = {"unseen": (), "power": None}
    report = replace(report, **{name: empty[name] for name in missing})
    rows = {row.label: len(row.filled) + len(row.hollow) for row in figures.score_rows(report)}
    groups = {
        "suspected images": 4, "altered copies of the suspects": 40, "controls": 110,
        "positive controls, planted for the test": 3,
    }  # fmt: skip
    assert rows == {
        name: count
        for name, count in groups.items()
        if not ("unseen" in missing and name in ("controls", "altered copies of the suspects"))
        and not ("power" in missing and name.startswith("positive"))
    }
    (axes,) = figures.image_scores(report).axes
    marks = [len(marks.get_offsets()) for marks in axes.collections]
    assert sum(marks) == sum(rows.values())
    assert {marks.get_offsets()[:, 0].max() <= axes.get_xlim()[1] for marks in axes.collections
            if len(marks.get_offsets())} == {True}  # fmt: skip


def test_marks_of_equal_scores_do_not_cover_each_other(tmp_path):
    report = fakes.with_evidence(fakes.report(tmp_path))
    alike = tuple(replace(image, score=0.1) for image in report.unseen)
    (axes,) = figures.image_scores(replace(report, unseen=alike)).axes
    for marks in axes.collections:
        places = {tuple(place) for place in marks.get_offsets().round(3).tolist()}
        assert len(places) == len(marks.get_offsets())


def test_without_scores_of_suspects_there_is_no_figure_of_scores(tmp_path):
    report = fakes.with_evidence(fakes.report(tmp_path))
    unknown = tuple(replace(row, score=math.nan) for row in report.images)
    assert figures.image_scores(replace(report, images=unknown)) is None


def test_bounded_and_random_attacks_get_their_own_panels():
    cells = [
        fakes.cell("vm", fakes.PROMPT, 1, 4),
        fakes.cell("vm", fakes.dori(50, "random"), 2, 4),
        fakes.cell("vm", fakes.dori(50, norm="linf", eps=0.1), 2, 4),
        fakes.cell("vm", fakes.dori(50), 0, 0, failed=4),
        fakes.cell("vm", fakes.dori(50, "control_prompt"), 0, 0, failed=4),
    ]
    figure = figures.rate_against_steps(cells)
    shown = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 3, "where every pair failed there is no rate"


def test_figure_files_follow_the_disclosure(tmp_path):
    report = fakes.report(tmp_path)
    for images in ("full", "none"):
        write_audit_page(report, tmp_path / images, images=images)
    shown, hidden = (
        {path.name for path in (tmp_path / images / "figures").iterdir()}
        for images in ("full", "none")
    )
    assert shown - hidden == {"picture_grid.png"}
    assert len(hidden) == 4


def test_a_grid_has_a_row_for_each_pair_and_frames_replicas(tmp_path):
    report = fakes.report(tmp_path)
    grid = attack_grid(report, fakes.dori(50), images="full")
    prompts = attack_grid(report, None, images="full")
    assert grid.height == prompts.height > 8 * 128
    assert grid.width - prompts.width > 128
    red = (192, 32, 47)
    count = sum(grid.getpixel((x, 60)) == red for x in range(grid.width))
    assert count == 2 * 2 * 3, "prompt and attack of a replica: two sides of three pixels each"
    assert attack_grid(report, fakes.dori(50), images="none") is None
    assert attack_grid(replace(report, outcomes=()), None, images="full") is None


def test_blurring_throws_the_detail_away(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "sharp.png"
    Image.fromarray(rng.integers(0, 256, (128, 128, 3), np.uint8)).save(path)
    blurred = thumbnail(path, "blurred")
    assert blurred is not None
    assert np.asarray(blurred, float).std() < 10
    full = thumbnail(path, "full")
    assert max(full.size) <= 192
    assert thumbnail(path, "none") is None
    with pytest.raises(InputError, match="images=none"):
        thumbnail(tmp_path / "gone.png", "full")
