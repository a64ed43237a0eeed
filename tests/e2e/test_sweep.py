"""A grid of real audits on a tiny checkpoint: its table, its edits, and claims about it."""

import json

import pandas as pd
import pytest

from support.in_process import program_in
from support.records import report_json
from support.runs import SMALL, on_tiny, write_material

METHODS = ("sparse", "sparser")
BUDGETS = ("l2_small", "unbounded")
SETTINGS = (*SMALL, "attack.snapshots=[1]")


def program(*arguments, place):
    """Run the program in this process, as from the command line in ``place``."""
    with program_in(place) as run:
        return run(*arguments, task=None)


def reported(place, name, runs, *more):
    """Make a report of runs; its exit code and its folder."""
    output = place / "outputs"
    arguments = ("task=report", f"name={name}", f"task.runs={runs}", f"paths.output={output}")
    return program(*arguments, *more, place=place), output / name


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, pairs, and two pruning methods of one's own, a yaml each."""
    place = write_material(tmp_path_factory.mktemp("grid"))
    for name, fraction in zip(METHODS, (0.1, 0.2), strict=True):
        path = place / "mine" / "mitigation" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"# of this test\n_target_: dori_lightning.mitigations.wanda.Wanda\n"
            f"_convert_: all\nname: {name}\nfraction: {fraction}\nsteps: 2\n"
        )
    return place


@pytest.fixture(scope="module")
def grid(place):
    """The finished grid's folder."""
    code = program(
        "--config-dir", str(place / "mine"), "+experiment=pruning_grid",
        *on_tiny(place, *SETTINGS), f"mitigation=none,{','.join(METHODS)}",
        f"attack/budget={','.join(BUDGETS)}", place=place,
    )  # fmt: skip
    assert code == 0
    return place / "outputs" / "sweeps" / "pruning_grid"


def test_every_job_of_the_grid_has_its_run_folder(grid):
    runs = sorted(path.parent for path in grid.glob("*/report.json"))
    assert len(runs) == (1 + len(METHODS)) * len(BUDGETS)
    found = {(report_json(r)["mitigation"], _ball(report_json(r))) for r in runs}
    assert found == {(m, b) for m in ("none", *METHODS) for b in ("l2", "none")}


def _ball(document):
    cells = document["cells"]
    assert isinstance(cells, list)
    return next(c["budget"]["norm"] for c in cells if c["attack"] == "dori")


def _unbounded(grid):
    runs = [path.parent for path in grid.glob("*/report.json")]
    return [run for run in runs if _ball(report_json(run)) == "none"]


def test_each_method_prunes_once_and_the_budgets_share_its_edit(grid, place):
    edits = [json.loads(path.read_text()) for path in sorted(grid.glob("*/edit.json"))]
    pruned = [edit for edit in edits if edit["mitigation"] in METHODS]
    checkpoints = 1
    assert len(pruned) == len(METHODS) * len(BUDGETS)
    assert sum(edit["made"] for edit in pruned) == len(METHODS) * checkpoints
    assert len({edit["key"] for edit in pruned}) == len(METHODS) * checkpoints
    cache = place / "outputs" / "cache" / "edits"
    assert len(list(cache.glob("*.safetensors"))) == len(METHODS) * checkpoints
    assert "Edits: 2 made, 2 read from the cache, 2 different ones." in (
        (grid / "table.md").read_text()
    )


def test_the_table_has_a_row_for_each_method_and_ball(grid):
    table = pd.read_parquet(grid / "table.parquet")
    assert list(zip(table.mitigation, table.norm, strict=True)) == [
        (mitigation, norm) for mitigation in ("none", *METHODS) for norm in ("l2", "none")
    ]
    assert (table.steps == 2).all()
    assert (table.vm_dori_prompt_n == 2).all()
    assert (table.control_dori_prompt_n == 3).all()
    cells = pd.read_parquet(grid / "cells.parquet")
    # prompts, and two balls after 1 and 2 steps, for vm and control
    assert len(cells) == 3 * (1 + 2 * 2) * 2
    assert "<figure" in (grid / "report.html").read_text()


def expected(place, grid, *, off):
    """Claims of the measured numbers, ``off`` beside them."""
    cells = pd.read_parquet(grid / "cells.parquet")
    claims = [
        {
            "cell": {
                **{key: row[key] for key in ("checkpoint", "mitigation", "attack", "kind")},
                "init": row["init"], "norm": row["norm"], "steps": int(row["steps"]),
                "eps": None if pd.isna(row["eps"]) else float(row["eps"]),
            },
            "metric": "similarity",
            "value": float(row["similarity_median"]) + off,
            "tol": 1e-6,
        }
        for row in cells.astype({"init": object}).where(cells.notna(), None).to_dict("records")
    ]  # fmt: skip
    path = place / f"expected{off}.json"
    path.write_text(json.dumps(claims))
    return path


def test_recorded_claims_are_held_against_the_table(grid, place, capsys):
    good = expected(place, grid, off=0.0)
    code, folder = reported(place, "right", grid, f"task.expected={good}")
    assert code == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [str(folder)]
    assert "Recorded claims" in captured.err
    assert (folder / "report.html").is_file()
    wrong = expected(place, grid, off=0.01)
    code, _ = reported(place, "wrong", grid, f"task.expected={wrong}")
    assert code == 1, "not 2: input is fine"
    captured = capsys.readouterr()
    assert "dori: 30 of 30 recorded claims do not hold" in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_nothing_claimed_is_said_and_holds(grid, place, capsys):
    (place / "empty.json").write_text("[]")
    assert reported(place, "empty", grid, f"task.expected={place / 'empty.json'}")[0] == 0
    assert "claims nothing about these runs" in capsys.readouterr().err


def test_runs_of_one_budget_alone_make_a_table_too(grid, place):
    code, folder = reported(place, "one", _listed(_unbounded(grid)))
    assert code == 0
    table = pd.read_parquet(folder / "table.parquet")
    assert set(table.norm) == {"none"}
    assert len(table) == 3


def test_one_run_gets_its_own_page(grid, place):
    (alone,) = [r for r in _unbounded(grid) if report_json(r)["mitigation"] == "none"]
    code, folder = reported(place, "alone", _listed([alone]))
    assert code == 0
    text = (folder / "report.html").read_text()
    assert "Memorization audit" in text
    assert "data:image" not in text, "the run kept its images out of its page"
    assert not (folder / "table.parquet").exists()


def _listed(paths):
    """A list of paths that may hold any character, as an override."""
    return f"[{','.join(repr(str(path)) for path in paths)}]"


@pytest.mark.parametrize(
    ("runs", "part"),
    [
        ("{grid}/nowhere", "no folder"),
        ("[]", "task.runs cannot be"),
        ("{place}/pairs", "holds no run"),
    ],
)
def test_unusable_runs_are_refused(grid, place, capsys, runs, part):
    assert reported(place, "bad", runs.format(grid=grid, place=place))[0] == 2
    said = capsys.readouterr().err
    assert part in said
    assert "where: task.runs" in said
