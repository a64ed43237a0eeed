import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from dori_lightning.metrics.image_distances import KernelDistance
from dori_lightning.metrics.statistics import holm, paired
from dori_lightning.metrics.utility import Comparison as UtilityComparison
from dori_lightning.report import pages
from dori_lightning.report.comparison import (
    SOURCES,
    Comparison,
    _threshold_note,
    compare,
    headline_rows,
    published_for,
)
from dori_lightning.report.figures import rate_against_radius, rates_against_steps, sweep_figures
from dori_lightning.report.findings import sweep_findings, sweep_verdict
from dori_lightning.report.pages import render_sweep_page, write_table
from dori_lightning.report.record import read_run
from dori_lightning.report.tables import (
    cells_parquet,
    cells_table,
    headline_parquet,
    headline_tables,
    markdown_table,
    remarks,
    rich_table,
    tables_markdown,
)
from dori_lightning.types import Scale
from support import fake_reports as fakes
from support.fake_audits import loss_cost, write_audit
from support.fake_reports import PROMPT, dori

SIZES = {"vm": 6, "tm": 2, "control": 4}
UTILITY = replace(
    loss_cost(1.03, 1.01, 1.05),
    ordinary=UtilityComparison(
        prompts=3, pictures_each=1, kid=KernelDistance(0.004, 0.001, 3, 3, 1), fid=None,
        features="autoencoder", similarity=0.8, similarity_mad=0.1, similarity_ci95=(0.7, 0.9),
        alignment=None,
    ),
)  # fmt: skip
EDIT = {
    "identity": "e", "key": "k", "made": True,
    "cost": {"unet_evaluations": 1234, "seconds": 5.5},
    "changed_weights": 5280, "counts": {"a": 55},
}  # fmt: skip


def sims(hits: int, n: int = 6) -> list[float]:
    return [0.9] * hits + [0.2] * (n - hits)


def audits(folder: Path) -> Comparison:
    """No mitigation, one that hides, one that removes: prompt, then 1, 10 and 50 steps."""
    for name, hits in {"none": (6, 6, 6, 6), "nemo": (0, 3, 5, 6), "gone": (0, 0, 0, 0)}.items():
        conditions: dict[Any, Any] = {
            condition: {"vm": sims(count), "tm": sims(1, 2)}
            for condition, count in zip((PROMPT, dori(1), dori(10), dori(50)), hits, strict=True)
        }
        conditions[dori(50, "random")] = {"vm": sims(hits[-1])}
        write_audit(
            folder / name, name, reproduced=conditions, sizes=SIZES,
            utility=None if name == "none" else UTILITY, edit=None if name == "none" else EDIT,
        )  # fmt: skip
    return compare([read_run(folder / name) for name in ("none", "nemo", "gone")])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    return audits(tmp_path_factory.mktemp("audits"))


@pytest.fixture(scope="module")
def rows(compared):
    return headline_rows(compared)


def test_one_row_for_each_mitigation_at_its_full_budget(rows):
    assert [(r.mitigation, r.norm, r.eps, r.steps) for r in rows] == [
        (name, "none", None, 50) for name in ("none", "nemo", "gone")
    ]
    nemo = rows[1]
    cells = {("vm", None): 0, ("vm", "prompt"): 6, ("control", "prompt"): 0}
    assert {key: nemo.cells[key].hits for key in cells} == cells
    assert nemo.inits == ("prompt", "random")
    assert (nemo.loss_ratio, nemo.loss_ratio_ci95) == (1.03, (1.01, 1.05))
    assert (nemo.kid, nemo.unet_evaluations, nemo.weights_changed) == (0.004, 1234, 5280)
    assert math.isnan(rows[0].loss_ratio)


def test_each_row_is_compared_pair_by_pair(rows):
    none, nemo, gone = rows
    assert not any(other == "none" for _, other in none.tests)
    prompts = nemo.tests[None, "none"]
    assert (prompts.lost, prompts.gained) == (6, 0)
    assert prompts.p == pytest.approx(2 / 64)
    assert prompts.p_holm == pytest.approx(4 / 64), "two mitigations in the family"
    assert nemo.tests["prompt", "none"].p == 1
    assert nemo.tests["prompt", "prompt"].lost == 0
    assert nemo.tests["prompt", "prompt"].gained == 6
    assert gone.tests["prompt", "none"].p_holm == pytest.approx(4 / 64)


def test_pairs_that_diverged_under_either_are_not_compared():
    test = paired(
        {"a": True, "b": None, "c": True, "d": False}, {"a": False, "b": True, "c": None}
    )
    assert (test.n, test.lost, test.gained, test.p) == (1, 1, 0, 1.0)
    assert paired({"a": None}, {"a": True}) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([0.04], [0.04]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.5, 0.9, 0.01], [1.0, 1.0, 0.03]),
    ],
)
def test_holm(values, expected):
    assert holm(values) == pytest.approx(expected)


def test_without_an_attack_there_is_still_a_row(tmp_path):
    write_audit(tmp_path / "none")
    (row,) = headline_rows(compare([read_run(tmp_path / "none")]))
    assert (row.steps, row.inits, row.attacked("vm")) == (0, (), None)
    found = sweep_findings([row])
    assert (found.tried, found.valid, found.tone) == ((), True, "doubt")
    assert sweep_verdict([row]).answer == "No mitigation was attacked."


def test_a_grid_has_a_row_for_each_ball_from_narrow_to_wide(tmp_path):
    for eps in (3.5, None, 1.25):
        ball = {"norm": "l2", "eps": eps} if eps else {}
        write_audit(
            tmp_path / str(eps), reproduced={PROMPT: {"vm": 0.9}, dori(50, **ball): {"vm": 0.9}}
        )
    found = headline_rows(compare([read_run(p) for p in sorted(tmp_path.iterdir())]))
    assert [row.eps for row in found] == [1.25, 3.5, None]
    assert [row.published is not None for row in found] == [False, False, True], (
        "the paper has no ball"
    )
    table = headline_tables(found)[0]
    assert table.header[:2] == ("mitigation", "attack")
    assert [row[1] for row in table.rows] == ["50 steps, l2 1.25", "50 steps, l2 3.5", "50 steps"]
    assert rate_against_radius(found) is not None


# --- the paper's numbers


@pytest.mark.parametrize(
    ("mitigation", "checkpoint", "prompt", "attacked"),
    [
        ("none", "dori_tiny", 0.98, None),
        ("nemo", "sd14", 0.20, 0.99),
        ("nemo_all_layers", "sd14", 0.20, 0.99),
        ("nemo", "sd20_base", 0.06, 1.00),
        ("wanda", "dori_tiny", 0.00, 0.72),
        ("wanda_10", "dori_tiny", None, 0.01),
        ("esd_x", "dori_tiny", None, 0.98),
        ("siss", "dori_tiny", None, 0.39),
        ("adversarial_finetuning", "sd14", None, 0.02),
        ("adversarial_finetuning", "sd21", None, 0.06),
    ],
)
def test_published_numbers(mitigation, checkpoint, prompt, attacked):
    row = published_for(mitigation, checkpoint=checkpoint)
    assert (row.prompt and row.prompt.rate, row.attacked and row.attacked.rate) == (
        prompt and pytest.approx(prompt),
        attacked and pytest.approx(attacked),
    )
    assert all(f.source in SOURCES for f in (row.prompt, row.attacked) if f)


@pytest.mark.parametrize(
    "mitigation",
    ["random_pruning", "prompt_adjustment", "adversarial_finetuning_lora",
     "adversarial_finetuning_redirect", "nemonic", "wandalike"],
)  # fmt: skip
def test_no_number_where_the_paper_gives_none(mitigation):
    assert published_for(mitigation, checkpoint="sd14") is None


def test_changed_settings_are_not_the_papers(tmp_path):
    write_audit(tmp_path / "none")
    for k in (1, 2):
        write_audit(tmp_path / f"w{k}", "wanda", settings={"fraction": k})
    found = headline_rows(compare([read_run(p) for p in sorted(tmp_path.iterdir())]))
    assert [row.published is None for row in found] == [False, True, True]


# --- what is written


def test_tables_show_hits_intervals_and_the_papers_numbers(rows):
    back, checks, tests, work = headline_tables(rows)
    line = dict(zip(back.header, back.rows[1], strict=True))
    assert line == {
        "mitigation": "nemo",
        "prompt": "0/6  0 % [0, 39]",
        "+ DoRI": "6/6  100 % [61, 100]",
        "+ DoRI, random start": "6/6  100 % [61, 100]",
        "paper: prompt": "20 % C",
        "paper: + DoRI": "99 % C",
    }
    assert back.rows[0][-1] == "-", "the paper does not say"
    line = dict(zip(checks.header, checks.rows[1], strict=True))
    assert line["controls"] == "0/4 → 0/4"
    assert line["templates"] == "1/2 → 1/2"
    assert line["similarity"] == "0.20 → 0.90"
    assert line["denoising loss"] == "× 1.030 [1.010, 1.050]"
    assert line["UNet evaluations"] == "1,234"
    line = dict(zip(tests.header, tests.rows[1], strict=True))
    assert line["+ DoRI, against its prompt"] == "-0 +6  p 0.031"
    assert dict(zip(work.header, work.rows[1], strict=True)) == {
        "mitigation": "nemo", "UNet evaluations": "123,456", "prompts encoded": "1,021",
        "images encoded": "72", "images decoded": "312",
    }  # fmt: skip


def test_columns_without_any_value_are_left_out(tmp_path):
    write_audit(tmp_path / "none", sizes={"vm": 2, "control": 2})
    tables = headline_tables(headline_rows(compare([read_run(tmp_path / "none")])))
    assert [table.header for table in tables] == [
        ("mitigation", "prompt", "paper: prompt"),
        ("mitigation", "similarity", "controls"),
        ("mitigation", "UNet evaluations", "prompts encoded", "images encoded", "images decoded"),
    ]


def test_diverged_pairs_are_shown(tmp_path):
    write_audit(tmp_path / "none", reproduced={PROMPT: {"vm": [0.9, math.nan, 0.1, 0.1]}})
    table = headline_tables(headline_rows(compare([read_run(tmp_path / "none")])))[0]
    assert table.rows[0][1].startswith("1/3 +1 failed  33 %")


def test_a_row_of_an_invalid_audit_is_marked_and_clears_nobody(tmp_path):
    audits(tmp_path)
    path = tmp_path / "gone" / "report.json"
    document = json.loads(path.read_text())
    flag = {"name": "edit_changes_nothing", "severity": "invalid", "text": "Its edit is empty."}
    path.write_text(json.dumps({**document, "flags": [flag], "invalid": [flag["name"]]}))
    compared = compare([read_run(tmp_path / name) for name in ("none", "nemo", "gone")])
    rows = headline_rows(compared)
    assert [row.invalid for row in rows] == [(), (), ("edit_changes_nothing",)]
    tables = headline_tables(rows)
    assert all(table.rows[2][0] == "gone (INVALID)" for table in tables)
    found = sweep_findings(rows)
    assert (found.tried, found.holding, found.clear) == (("nemo",), ("nemo",), ())
    assert (found.invalid, found.valid, found.tone) == (("gone",), False, "doubt")
    assert sweep_verdict([rows[0], rows[2]]).answer == "No mitigation has a valid audit."
    assert any("gone on tiny" in text and "Its edit is empty." in text
               for text in remarks(compared, rows))  # fmt: skip
    table = pd.read_parquet(io.BytesIO(headline_parquet(rows)))
    assert table["invalid"].fillna("").tolist() == ["", "", "edit_changes_nothing"]


def test_remarks_name_what_is_missing_and_whose_numbers_these_are(compared, rows):
    said = remarks(replace(compared, unfinished=("siss",), missing=("tiny, x: y",)), rows)
    assert said[0] == "Without a result: siss."
    assert said[1] == "Missing: tiny, x: y."
    assert any(text.startswith("Edits: 2 made, 0 read") for text in said)
    assert any("The paper's numbers are of SD 1.4. C: the authors' page" in text for text in said)


def test_markdown_holds_every_row(compared, rows):
    text = tables_markdown(headline_tables(rows), remarks(compared, rows))
    assert text.count("### ") == 4
    assert text.count("| nemo |") == 4
    # without this rule under its header, a table is shown as a paragraph of bars
    assert len(re.findall(r"^\| --- \|(?: ---:? \|)+$", text, re.MULTILINE)) == 4
    assert "| mitigation | prompt |" in text
    assert "- tiny: all rows are counted under one threshold" in text


def test_thresholds_of_the_images_are_not_called_one():
    rule = replace(fakes.calibration(), scales={"cat": Scale(0.1, 0.9)}, threshold=0.5)
    run = SimpleNamespace(report=SimpleNamespace(calibration=rule))
    assert "each image's own threshold, median 0.500" in _threshold_note("tiny", [run], rule)


def test_parquet_holds_the_rows_and_every_cell(compared, rows):
    frame = pd.read_parquet(io.BytesIO(headline_parquet(rows))).set_index("mitigation")
    nemo = frame.loc["nemo"]
    assert (nemo.vm_prompt_hits, nemo.vm_dori_prompt_hits, nemo.vm_dori_random_n) == (0, 6, 6)
    assert nemo.vm_dori_prompt_mr_low == pytest.approx(0.6097, abs=1e-3)
    assert nemo.dori_prompt_vs_prompt_gained == 6
    assert nemo.prompt_vs_none_p_holm == pytest.approx(4 / 64)
    assert (nemo.published_attacked_mr, nemo.published_attacked_source) == (0.99, "C")
    assert pd.isna(frame.loc["none"].loss_ratio)
    assert pd.isna(nemo.vm_dori_control_prompt_hits)
    cells = pd.read_parquet(io.BytesIO(cells_parquet(compared)))
    assert len(cells) == len(compared.cells) == 3 * 5 * 3
    assert set(cells.threshold) == {0.5}


@pytest.fixture(scope="module")
def written(compared, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    paths = write_table(compared, rows, folder)
    assert paths[-1] == folder / "report.html"
    return folder


def test_the_files_of_a_table(written):
    names = {"table.parquet", "cells.parquet", "table.md", "report.html"}
    assert {path.name for path in written.iterdir()} == names


def test_the_page_loads_nothing_and_says_the_answer(written):
    text = (written / "report.html").read_text()
    said = text.replace("\u00a0", " ")
    assert "The attack still finds images under 1 of 2 mitigations." in said
    loads = re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    assert all(url.startswith(("data:image/", "#")) for url in loads)
    assert not re.search(r"url\((?!#)|@import|https?:", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert text.count("<figure") == 3, "before and after, against steps, and the cost"
    assert 'class="verdict found"' in text


def test_an_incomplete_table_says_so_on_the_page(compared, rows, monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "sweep_figures", lambda *_, **__: {})
    incomplete = replace(compared, unfinished=("mitigation=<siss>",))
    text = render_sweep_page(incomplete, rows, tmp_path)
    assert "Not complete" in text
    assert 'class="verdict doubt"' in text
    assert "mitigation=&lt;siss&gt;" in text


def test_hidden_is_told_from_gone(rows):
    found = sweep_findings(rows)
    assert (found.tried, found.holding, found.hiding) == (("nemo", "gone"), ("nemo",), ("nemo",))
    assert (found.clear, found.loss_ratio, found.tone) == (("gone",), 1.03, "found")
    verdict = sweep_verdict(rows)
    assert "draws all of 6 images" in verdict.plain
    assert "Neither brought any image back after gone, which raises" in verdict.plain
    assert "by 3.0 %." in verdict.plain
    assert "tiny reproduces 6 of 6 suspected images from their prompts" in verdict.numbers
    assert "(paired test, p < 0.05): nemo." in verdict.numbers


def test_an_attack_that_paints_controls_is_doubted(tmp_path):
    painted = {PROMPT: {"vm": 0.9}, dori(): {"vm": 0.9, "control": 0.9}}
    for name in ("none", "wanda"):
        write_audit(tmp_path / name, name, reproduced=painted)
    found = headline_rows(compare([read_run(tmp_path / n) for n in ("none", "wanda")]))
    assert sweep_findings(found).painting == ("none", "wanda")
    assert sweep_findings(found).tone == "doubt"
    assert "reproduces controls under none, wanda" in sweep_verdict(found).numbers


def test_figures_with_nothing_to_show_are_left_out(compared, rows):
    drawn = sweep_figures(rows, compared.cells)
    assert set(drawn) == {"before_and_after", "rates_against_steps", "removal_against_cost"}, (
        "all attacks had one radius"
    )
    one_count = [c for c in compared.cells if c.condition.budget.steps in (0, 50)]
    assert rates_against_steps(rows, one_count) is None, "two points are no curve"


@pytest.mark.parametrize("width", [120, 100])
def test_a_narrow_console_loses_no_column_and_no_name(width):
    budget, mitigation = "50 steps, linf 0.0123", "adversarial_finetuning_cheap"
    attacked = fakes.dori(50, "control_prompt", norm="linf", eps=0.0123)
    cells = [
        fakes.cell("vm", condition, 15, 16, failed=1, mitigation=name)
        for name in ("none", mitigation)
        for condition in (fakes.PROMPT, attacked)
    ]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(rich_table(cells_table(cells)))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    columns = ["".join(part) for part in zip(*(re.split("[│┃]", x) for x in lines if x[0] in "│┃"),
                                             strict=True)]  # fmt: skip
    shown = [re.sub(r"\s", "", column) for column in columns[1:-1]]
    assert len(shown) == 9
    assert mitigation in shown[0]
    assert shown[4].count(budget.replace(" ", "")) == 2
    assert "threshold" in shown[-1]


def test_both_tables_hold_every_number():
    cells = [
        fakes.cell("control", fakes.dori(50, norm="l2", eps=2.5), 1, 30),
        fakes.cell("vm", fakes.PROMPT, 19, 20, failed=2, median=0.91),
        fakes.cell("tm", fakes.PROMPT, 0, 0, failed=1),
    ]
    markdown = markdown_table(cells_table(cells))
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(rich_table(cells_table(cells, title="Audit")))
    for text in (markdown, console.export_text()):
        assert "19/20 +2 failed" in text
        assert "95 % (76 to 99.1 %)" in text
        assert "0.91 ± 0.04" in text
        assert "50 steps, l2 2.5" in text
        assert "n/a" in text
    lines = markdown.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| vm", "| tm", "| control"]
    assert "mitigation" not in lines[0]
    wanda = fakes.cell("vm", fakes.PROMPT, 1, 20, mitigation="wanda")
    both = markdown_table(cells_table([*cells, wanda]))
    assert both.startswith("| mitigation |")
