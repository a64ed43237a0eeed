import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dori_lightning.runtime import job_status, logging
from dori_lightning.runtime.artifacts import one_writer
from dori_lightning.runtime.job_status import read_status, status_of
from dori_lightning.runtime.signals import Interrupted
from dori_lightning.tasks.status import Job, job_of, jobs_of, summary, time_left
from dori_lightning.types import InputError
from support.runs import run_task

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_a_job_says_how_far_it_is_and_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_status, "EVERY_SECONDS", 0.0)
    with status_of(tmp_path) as file, logging.listening(file.progress):
        with logging.progress_bar("attack", 10) as advance:
            advance(3)
        said = read_status(tmp_path)
        assert said is not None
        assert (said.state, said.stage, said.done, said.total) == ("running", "attack", 3, 10)
    said = read_status(tmp_path)
    assert said is not None
    assert (said.state, said.error) == ("done", "")


@pytest.mark.parametrize(
    ("error", "state", "line"),
    [
        (InputError("row 3: no such picture\n  where: x"), "failed", "row 3: no such picture"),
        (RuntimeError(), "failed", "RuntimeError"),
        (Interrupted(15), "interrupted", "Interrupted"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
    ],
)
def test_what_ends_a_job_is_kept(
    tmp_path: Path, error: BaseException, state: str, line: str
) -> None:
    with pytest.raises(type(error)), status_of(tmp_path):
        raise error
    said = read_status(tmp_path)
    assert said is not None
    assert (said.state, said.error) == (state, line)


def write(folder: Path, state: str, *, seconds: int = 60, error: str = "", pairs: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    said = {
        "state": state,
        "started": (NOW - timedelta(seconds=seconds)).isoformat(),
        "changed": NOW.isoformat(),
        "stage": "generate",
        "done": 4,
        "total": 8,
        "error": error,
    }
    (folder / "status.json").write_text(json.dumps(said))
    for k in range(pairs):
        for init in ("prompt", "random"):
            (folder / "attacks" / init).mkdir(parents=True, exist_ok=True)
            (folder / "attacks" / init / f"pair{k}.r0.safetensors").write_bytes(b"")
    return folder


def test_states_follow_from_what_was_said_and_who_lives(tmp_path: Path) -> None:
    done = job_of(write(tmp_path / "a", "done", pairs=3), NOW)
    assert (done.state, done.pairs, done.seconds) == ("done", 3, 60.0)
    failed = job_of(write(tmp_path / "b", "failed", error="no such luck"), NOW)
    assert (failed.state, failed.error) == ("failed", "no such luck")
    killed = write(tmp_path / "c", "running")
    assert job_of(killed, NOW).state == "stopped"
    assert job_of(write(tmp_path / "d", "interrupted"), NOW).state == "stopped"
    with one_writer(killed):
        running = job_of(killed, NOW + timedelta(seconds=5))
    assert (running.state, running.seconds, running.stage) == ("running", 65.0, "generate 4/8")
    (tmp_path / "e").mkdir()
    assert job_of(tmp_path / "e", NOW).state == "waiting"


def test_the_time_left_is_that_of_jobs_like_those_done() -> None:
    done = [Job("a", "done", seconds=100.0, pairs=5), Job("b", "done", seconds=200.0, pairs=5)]
    running = [Job("c", "running", seconds=50.0), Job("d", "running", seconds=500.0)]
    waiting = [Job("e", "waiting"), Job("f", "stopped", seconds=10.0)]
    # 100 s of c and 150 s each of e and f, two at a time
    assert time_left([*done, *running, *waiting]) == timedelta(seconds=200)
    assert time_left(waiting) is None
    failed = Job("g", "failed", error="x")
    assert summary([*done, failed]) == "2 done, 1 failed of 3 jobs; 10 pairs attacked."
    assert "about 0:05:00 left" in summary([*done, *waiting])
    assert "no job is done yet" in summary(waiting)


def test_the_task_shows_a_sweeps_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    asked(sweep, {}, "seed=1,2,3")
    write(job(sweep, "seed=1"), "done")
    write(job(sweep, "seed=2"), "failed", error="out of [red]memory")
    run_task(tmp_path / "status", "task=status", f"task.runs={sweep}")
    shown = capsys.readouterr().err
    assert "1 done, 1 waiting, 1 failed of 3 jobs" in shown
    assert "out of [red]memory" in shown
    assert "seed=3" in shown
    with pytest.raises(InputError, match="no folder"):
        run_task(tmp_path / "status", "task=status", f"task.runs={tmp_path / 'nowhere'}")


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
