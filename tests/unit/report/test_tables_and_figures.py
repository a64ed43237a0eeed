from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dori_lightning.metrics.replication import pair_results
from dori_lightning.report import figures
from dori_lightning.report.figures import write_figures
from dori_lightning.report.pictures import thumbnail
from dori_lightning.report.tables import cells_markdown, cells_table
from dori_lightning.types import InputError

PNG = b"\x89PNG\r\n\x1a\n"


def results_of(report, aggregation="max"):
    return pair_results(report.outcomes, descriptor="ncc", threshold=0.7, aggregation=aggregation)


def test_both_tables_hold_every_number(fakes: SimpleNamespace) -> None:
    cells = [
        fakes.cell("control", fakes.dori(50, norm="l2", eps=2.5), 1, 30),
        fakes.cell("vm", fakes.PROMPT, 19, 20, failed=2, median=0.91),
        fakes.cell("tm", fakes.PROMPT, 0, 0, failed=1),
    ]
    markdown = cells_markdown(cells)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(cells_table(cells, title="Audit"))
    for text in (markdown, console.export_text()):
        assert "19/20 +2 failed" in text
        assert "95 % (76 to 99.1 %)" in text
        assert "0.91 ± 0.04" in text
        assert "50 steps, l2 2.5" in text
        assert "n/a" in text
    lines = markdown.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| vm", "| tm", "| control"]
    assert "mitigation" not in lines[0]
    both = cells_markdown([*cells, fakes.cell("vm", fakes.PROMPT, 1, 20, mitigation="wanda")])
    assert both.startswith("| mitigation |")


def test_restarts_reduce_to_the_best_and_divergence_is_kept(
    tmp_path: Path, fakes: SimpleNamespace
) -> None:
    pair = fakes.report(tmp_path, vm=1, control=0).outcomes[0].pair
    nan = (np.nan,) * 3
    weak = fakes.outcome(pair, fakes.dori(), (0.1, 0.2, 0.3))
    strong = fakes.outcome(pair, fakes.dori(), (0.1, 0.95, 0.3), restart=1)
    lost = fakes.outcome(pair, fakes.dori(), nan, restart=2, status="diverged")
    (best,) = results_of(SimpleNamespace(outcomes=[weak, strong, lost]))
    assert (best.statistic, best.seed, best.reproduced) == (0.95, 12, True)
    (median,) = results_of(SimpleNamespace(outcomes=[weak, strong]), "median")
    assert (median.statistic, median.best, median.reproduced) == (0.3, 0.95, False)
    (none,) = results_of(SimpleNamespace(outcomes=[lost]))
    assert none.status == "diverged"
    assert none.reproduced is None


def test_figures_are_png_and_repeat_bit_for_bit(tmp_path: Path, fakes: SimpleNamespace) -> None:
    report = fakes.report(tmp_path)
    results = results_of(report)
    conditions = [fakes.PROMPT, fakes.dori(50)]

    def draw() -> list[bytes | None]:
        return [
            figures.rate_against_steps(report.cells),
            figures.similarity_histograms(
                results, conditions=conditions, calibration=report.calibration
            ),
            figures.roc(report.calibration),
            figures.memorization_against_repeats(results, conditions=conditions, threshold=0.7),
            figures.picture_grid([(results[0], results[2])], threshold=0.7),
        ]

    first = draw()
    assert all(data is not None and data.startswith(PNG) for data in first)
    assert first == draw()


def test_figures_without_data_are_left_out(tmp_path: Path, fakes: SimpleNamespace) -> None:
    report = fakes.report(tmp_path, vm=0)
    results = results_of(report)
    conditions = [fakes.PROMPT]
    assert figures.rate_against_steps([fakes.cell("vm", fakes.PROMPT, 1, 2)]) is None
    assert figures.roc(replace(report.calibration, roc=())) is None
    assert (
        figures.memorization_against_repeats(results, conditions=conditions, threshold=0.7) is None
    )
    assert figures.similarity_histograms(
        [], conditions=conditions, calibration=report.calibration
    ) is None  # fmt: skip
    assert figures.picture_grid([(None, None)], threshold=0.7) is None


def test_bounded_and_random_attacks_get_their_own_panels(fakes: SimpleNamespace) -> None:
    cells = [
        fakes.cell("vm", fakes.PROMPT, 1, 4),
        fakes.cell("vm", fakes.dori(50, "random"), 2, 4),
        fakes.cell("vm", fakes.dori(50, norm="linf", eps=0.1), 2, 4),
        fakes.cell("vm", fakes.dori(50), 0, 0, failed=4),
    ]
    data = figures.rate_against_steps(cells)
    assert data is not None
    assert data.startswith(PNG)


def test_figure_files_follow_the_disclosure(tmp_path: Path, fakes: SimpleNamespace) -> None:
    report = fakes.report(tmp_path)
    shown = {path.name for path in write_figures(report, tmp_path / "a")}
    hidden = {path.name for path in write_figures(report, tmp_path / "b", images="none")}
    assert shown - hidden == {"picture_grid.png"}


def test_blurring_throws_the_detail_away(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "sharp.png"
    Image.fromarray(rng.integers(0, 256, (128, 128, 3), np.uint8)).save(path)
    blurred = thumbnail(path, "blurred")
    assert blurred is not None
    assert np.asarray(blurred, float).std() < 10
    full = thumbnail(path, "full")
    assert full is not None
    assert max(full.size) <= 192
    assert thumbnail(path, "none") is None
    with pytest.raises(InputError, match="images=none"):
        thumbnail(tmp_path / "gone.png", "full")
