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
    report = fakes.report(tmp_path)

    def draw() -> dict[str, tuple[bytes, str]]:
        return {
            name: (figures.png_bytes(figure), figures.svg_element(figure, name))
            for name, figure in figures.audit_figures(report).items()
        }

    first = draw()
    assert set(first) == {
        "rate_against_steps", "similarity_histograms", "roc", "memorization_against_repeats",
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
