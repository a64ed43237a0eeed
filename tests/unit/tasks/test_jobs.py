from pathlib import Path

import pytest

from dori_lightning.tasks.status import jobs_of
from dori_lightning.types import InputError


def job(sweep: Path, *overrides: str, finished: bool = True) -> Path:
    """A job's folder as Hydra leaves it, which writes true as True."""
    folder = sweep / ",".join(overrides).replace("/", ".")
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {o}\n" for o in overrides))
    if finished:
        (folder / "report.json").write_text("{}")
    return folder


def asked(sweep: Path, params: dict[str, str], *overrides: str) -> None:
    """What Hydra notes of the sweep's last command."""
    sweep.mkdir(parents=True, exist_ok=True)
    listed = "".join(f"      {key}: {value}\n" for key, value in params.items())
    given = "".join(f"    - {override}\n" for override in overrides)
    (sweep / "multirun.yaml").write_text(
        f"hydra:\n  sweeper:\n    params:\n{listed}  overrides:\n    task:\n{given}"
    )


def test_a_sweep_stands_for_its_jobs_in_their_order(tmp_path: Path) -> None:
    asked(tmp_path, {"mitigation": "none,wanda"}, "+experiment=x", "seed=1,2")
    for mitigation in ("none", "wanda"):
        for seed in (1, 2):
            job(tmp_path, f"mitigation={mitigation}", "+experiment=x", f"seed={seed}")
    found = jobs_of([tmp_path])
    assert [f.name for f in found.folders] == [
        "mitigation=none,+experiment=x,seed=1",
        "mitigation=none,+experiment=x,seed=2",
        "mitigation=wanda,+experiment=x,seed=1",
        "mitigation=wanda,+experiment=x,seed=2",
    ]
    assert (found.unstarted, found.others, found.sweeps) == ((), 0, (tmp_path.name,))


def test_jobs_that_never_began_are_named(tmp_path: Path) -> None:
    asked(tmp_path, {"mitigation": "none,wanda,nemo"}, "+experiment=x")
    job(tmp_path, "mitigation=none", "+experiment=x")
    failed = job(tmp_path, "mitigation=wanda", "+experiment=x", finished=False)
    found = jobs_of([tmp_path])
    assert found.folders[1] == failed.resolve(), "a job without a result is one all the same"
    assert found.unstarted == ("mitigation=nemo",)


def test_the_command_line_decides_over_the_file(tmp_path: Path) -> None:
    asked(tmp_path, {"mitigation": "none,wanda,nemo"}, "mitigation=none,wanda")
    job(tmp_path, "mitigation=none")
    job(tmp_path, "mitigation=wanda")
    found = jobs_of([tmp_path])
    assert len(found.folders) == 2
    assert not found.unstarted


def test_runs_of_other_sweeps_in_the_folder_are_left_out(tmp_path: Path) -> None:
    asked(tmp_path, {"mitigation": "none"}, "attack.budget.steps=10")
    mine = job(tmp_path, "mitigation=none", "attack.budget.steps=10")
    job(tmp_path, "mitigation=none")
    found = jobs_of([tmp_path])
    assert found.folders == (mine.resolve(),)
    assert found.others == 1


def test_a_dry_run_in_the_folder_neither_hides_nor_joins_the_runs(tmp_path: Path) -> None:
    asked(tmp_path, {"mitigation": "none,wanda"}, "+task.dry_run=true")
    for name in ("none", "wanda"):
        job(tmp_path, f"mitigation={name}")
        job(tmp_path, f"mitigation={name}", "+task.dry_run=True", finished=False)
    assert [f.name for f in jobs_of([tmp_path]).folders] == ["mitigation=none", "mitigation=wanda"]
    planned = jobs_of([tmp_path], planned=True)
    assert [f.name for f in planned.folders] == [
        "mitigation=none,+task.dry_run=True",
        "mitigation=wanda,+task.dry_run=True",
    ]


def test_run_folders_stand_for_themselves_and_are_counted_once(tmp_path: Path) -> None:
    a, b = job(tmp_path, "a"), job(tmp_path, "b")
    (tmp_path / "notes").mkdir()
    assert jobs_of([b, a, b]).folders == (b.resolve(), a.resolve())
    assert jobs_of([tmp_path]).folders == (a.resolve(), b.resolve())
    assert jobs_of([tmp_path]).sweeps == (tmp_path.name,)


def test_a_sweep_that_cannot_be_worked_out_stands_for_all_its_folders(tmp_path: Path) -> None:
    asked(tmp_path, {"mitigation": "glob(*)"})
    a = job(tmp_path, "mitigation=none")
    job(tmp_path, "mitigation=none", "task.dry_run=true", finished=False)
    assert jobs_of([tmp_path]).folders == (a.resolve(),)


@pytest.mark.parametrize(("make", "part"), [(True, "holds no run"), (False, "no folder")])
def test_a_place_without_runs_is_refused(tmp_path: Path, make: bool, part: str) -> None:
    place = tmp_path / "x"
    if make:
        place.mkdir()
    with pytest.raises(InputError, match=part) as refused:
        jobs_of([place])
    assert str(place) in str(refused.value)
    assert "task.runs=[FOLDER,FOLDER]" in str(refused.value)
