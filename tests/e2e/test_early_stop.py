"""Attacks that stop at their first success find what whole attacks find, for less."""

import statistics
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors import safe_open

from dori_lightning.attacks import embedding_attack, model_check
from dori_lightning.audit.loss_evidence import LOSS_ROWS
from dori_lightning.models import generation, memory
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.runtime.signals import Interrupted
from dori_lightning.types import InputError
from support.processes import PROGRAM, ended
from support.records import report_json, results
from support.runs import ORDINARY, SMALL, on_tiny, run_task, write_material

NOISES, SAMPLER, IMAGES, WIDTH = 2, 2, 2, 4
LOOKED_AT = (1, 2, 4)
PAIRS, CONTROLS = 10, 5
THRESHOLD = "metrics.descriptors.local_correlation.threshold"
AUDIT = (
    *SMALL, "attack.budget.steps=4", "attack.snapshots=[1,2]", f"attack.noise_batch={NOISES}",
    f"sampling.steps={SAMPLER}", f"sampling.images_per_pair={IMAGES}",
    f"attack.pairs_per_forward={WIDTH}",
    # random weights hold no image: steps so long, and a threshold so low, that some similarities
    # pass it, at various steps
    "attack.lr=3", f"{THRESHOLD}=0.03",
)  # fmt: skip
STOP = "attack.early_stop=true"
SEQUENTIAL = (STOP, "attack.one_image=true", "attack.futility=0.34")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return write_material(
        tmp_path_factory.mktemp("material"), vm=PAIRS - CONTROLS, control=CONTROLS
    )


def run(material, folder, *more):
    run_task(folder, *on_tiny(material, *AUDIT, *more))
    return folder


@pytest.fixture(scope="module")
def whole(material, tmp_path_factory):
    return run(material, tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def stopped(material, tmp_path_factory):
    return run(material, tmp_path_factory.mktemp("runs") / "stopped", STOP)


@pytest.fixture(scope="module")
def sequential(material, tmp_path_factory):
    return run(material, tmp_path_factory.mktemp("runs") / "sequential", *SEQUENTIAL)


def rows(folder):
    return pd.read_parquet(folder / "pairs.parquet")


def firsts(folder):
    """Pair to the first step at which it came back."""
    found = rows(folder)
    own = found[found.attack == "dori"].groupby("pair_id").first_success_steps.first()
    return {name: None if pd.isna(value) else int(value) for name, value in own.items()}


def attacks(folder):
    found = {}
    for path in sorted(folder.glob("attacks/**/*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found[path.name] = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    return found


def test_pairs_come_back_at_various_steps_or_not_at_all(whole):
    """What the other tests rest on, and the first success counted by hand."""
    steps = firsts(whole)
    assert set(steps.values()) == {1, 2, 4, None}
    found = rows(whole)
    best = found[found.attack == "dori"].groupby(["pair_id", "steps"])
    best = best.similarity_local_correlation.max().unstack()
    copies = best > 0.03
    assert steps == {
        name: next((k for k in LOOKED_AT if copies.loc[name, k]), None) for name in copies.index
    }
    assert (copies[1] & ~copies[4]).any(), "some are lost again: the two rates differ"


def test_the_cumulative_rate_and_the_first_success_are_the_same(whole, stopped):
    assert firsts(stopped) == firsts(whole)
    cells = [report_json(folder)["cells"] for folder in (whole, stopped)]
    assert [c["first_success"] for c in cells[0]] == [c["first_success"] for c in cells[1]]
    for own, other in zip(*cells, strict=True):
        assert own["counted"] == "at_budget"
        if own["attack"] == "prompt":
            assert own == other
            continue
        steps = own["budget"]["steps"]
        kinds = [
            k
            for name, k in firsts(whole).items()
            if (int(name.removeprefix("pair")) < PAIRS - CONTROLS) == (own["kind"] == "vm")
        ]
        back = sorted(k for k in kinds if k is not None and k <= steps)
        assert own["first_success"]["pairs"] == len(back)
        assert own["first_success"]["median_steps"] == (statistics.median(back) if back else None)
        assert other["hits"] == len(back), "stopped rows count at every later budget"
        assert other["n"] == own["n"] == len(kinds), "and in its denominator"
        earlier = any(k < steps for k in back)
        assert other["counted"] == ("up_to_budget" if earlier else "at_budget")
    at_end = [c for c in cells[0] if c["attack"] == "dori" and c["budget"]["steps"] == 4]
    assert any(c["hits"] < c["first_success"]["pairs"] for c in at_end)


def test_trajectories_are_the_same_up_to_where_they_stop(whole, stopped):
    full, cut = attacks(whole), attacks(stopped)
    for name, first in firsts(whole).items():
        ours, theirs = cut[f"{name}.r0.safetensors"], full[f"{name}.r0.safetensors"]
        taken = first or 4
        assert torch.equal(ours["losses"], theirs["losses"][:taken])
        assert torch.equal(ours["embeddings"], theirs["embeddings"][: LOOKED_AT.index(taken) + 1])
        assert ("mean" in ours) == (taken < 4), "what is not at its end can go on"


def test_stopped_rows_have_the_images_that_stopped_them(whole, stopped):
    found = rows(stopped)
    carried = found[found.stopped_at.notna()]
    assert (carried.stopped_at < carried.steps).all()
    assert (carried.stopped_at == carried.first_success_steps).all()
    columns = ["pair_id", "seed", "similarity_local_correlation", "loss_last", "displacement"]
    then = rows(whole)
    for row in carried.itertuples():
        same = then[(then.attack == "dori") & (then.steps == row.stopped_at)]
        same = same[(same.pair_id == row.pair_id) & (same.seed == row.seed)]
        assert same[columns].iloc[0].tolist() == [getattr(row, name) for name in columns]
        assert f"_s{int(row.stopped_at)}/" in row.image
    assert rows(whole).stopped_at.isna().all()


@pytest.fixture
def solved(monkeypatch):
    """Searches that were made: where each ended, and whom it held."""
    made: list[tuple[int, tuple[str, ...]]] = []
    solve: Callable[..., Any] = embedding_attack.solve

    def counted(model, problem, **options):
        made.append((options["stop_at"], problem.ids))
        return solve(model, problem, **options)

    monkeypatch.setattr(embedding_attack, "solve", counted)
    return made


EACH = SAMPLER * 2  # evaluations of an image: guided
CHECK = {"with gradient": model_check.IMAGES, "forward": 3 * model_check.IMAGES}
"""What the check of a model before its search takes."""


@pytest.fixture
def rows_of(monkeypatch):
    """Rows that went through the denoiser; none of them only fills up a pass."""
    counted = {"with gradient": 0, "forward": 0}
    unet = StableDiffusion._denoise

    def denoise(self, noised, *args):
        counted["with gradient" if torch.is_grad_enabled() else "forward"] += len(noised)
        return unet(self, noised, *args)

    # what a checkpoint is asked when it is loaded is no part of a run's work
    monkeypatch.setattr("dori_lightning.models.loading.check_answers", lambda *_: None)
    monkeypatch.setattr(StableDiffusion, "_denoise", denoise)
    monkeypatch.setattr(memory, "PARALLEL_PAIRS", 1)
    monkeypatch.setattr(generation, "CPU_IMAGES", IMAGES)
    monkeypatch.setattr(generation, "fixed_batches", lambda items, _: [(items, len(items))])
    return counted


def test_evaluations_are_counted_and_passes_stay_full(material, tmp_path, solved, rows_of):
    folder = run(material, tmp_path / "run", STOP)
    effort, steps = report_json(folder)["effort"], firsts(folder)
    spent = [first or 4 for first in steps.values()]
    each = IMAGES * EACH
    looks = [LOOKED_AT.index(k) + 1 for k in spent]
    assert effort == {
        "attack": NOISES * sum(spent),
        "attack_saved": NOISES * (4 * PAIRS - sum(spent)),
        "pictures": each * sum(looks),
        "pictures_saved": each * (len(LOOKED_AT) * PAIRS - sum(looks)),
    }
    assert effort["attack_saved"] > 0
    prompts = each * (PAIRS + ORDINARY)
    assert rows_of == {
        "with gradient": effort["attack"] + CHECK["with gradient"],
        "forward": effort["pictures"] + prompts + CHECK["forward"],
    }
    for begin, end in ((0, 1), (1, 2), (2, 4)):
        left = sum(first is None or first > begin for first in steps.values())
        full, rest = divmod(left, WIDTH)
        widths = [len(ids) for until, ids in solved if until == end]
        assert widths == [WIDTH] * full + [rest] * (rest > 0)


def test_a_run_that_ended_between_snapshots_goes_on(
    material, stopped, tmp_path, monkeypatch, solved
):
    real: Callable[..., Any] = embedding_attack.solve

    def interrupted(model, problem, **options):
        if [until for until, _ in solved].count(2):
            raise Interrupted(15)
        return real(model, problem, **options)

    with monkeypatch.context() as patched:
        patched.setattr(embedding_attack, "solve", interrupted)
        with pytest.raises(Interrupted):
            run(material, tmp_path / "run", STOP)
    done = list(solved)
    assert [until for until, _ in done] == [1, 1, 1, 2]
    solved.clear()
    run(material, tmp_path / "run", STOP)
    assert results(tmp_path / "run") == results(stopped)
    assert all(until > 1 for until, _ in solved), "nobody takes the first steps again"
    assert not {name for until, ids in solved if until == 2 for name in ids} & {*done[-1][1]}


@pytest.mark.slow
def test_under_another_threshold_attacks_go_on_from_where_they_were_stopped(
    material, stopped, tmp_path, solved
):
    run(material, tmp_path / "run", STOP, f"{THRESHOLD}=-0.9")
    assert [until for until, _ in solved] == [1, 1, 1], "all are copies at once"
    solved.clear()
    run(material, tmp_path / "run", STOP)
    assert results(tmp_path / "run") == results(stopped)
    assert {until for until, _ in solved} == {2, 4}


def test_a_folder_holds_attacks_of_one_way_only(material, whole):
    with pytest.raises(InputError, match=r"attack\.early_stop: None there, True now"):
        run(material, whole, STOP)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["stopped", "sequential"])
def test_two_processes_stop_the_same_attacks(material, tmp_path, request, way):
    settings = (STOP,) if way == "stopped" else SEQUENTIAL
    ended(
        tmp_path, PROGRAM, *on_tiny(material, *AUDIT, *settings), "trainer=ddp",
        "trainer.accelerator=cpu", f"paths.output={tmp_path}", "name=run",
    )  # fmt: skip
    assert results(tmp_path / "run") == results(request.getfixturevalue(way))


def searches(folder):
    """One row for each attack: where it ended, and how many images were drawn there."""
    found = rows(folder)
    found = found[found.attack == "dori"]
    found = found[found.steps == found.steps.max()]
    return found.groupby("pair_id").agg(
        kind=("kind", "first"),
        stop=("stopped_at", "first"),
        first=("first_success_steps", "first"),
        drawn=("seed", "count"),
        image=("image", "first"),
    )


def test_a_sequential_search_ends_at_a_copy_or_does_not_begin(whole, sequential):
    found = searches(sequential)
    left_out = found[found["first"].isna() & found.stop.notna()]
    assert set(left_out.kind) == {"vm", "control"}
    assert set(left_out.stop) == {0}
    assert set(left_out.drawn) == {IMAGES}, "of the prompt, which stands for the search"
    copies = found[found["first"].notna()]
    assert (copies.stop.fillna(4) == copies["first"]).all()
    assert (copies.stop == 0).any(), "some by their prompts"
    last, then = rows(sequential), rows(whole)
    last = last[(last.attack == "dori") & (last.steps == 4)]
    for row in last.itertuples():
        at = 4 if pd.isna(row.stopped_at) else int(row.stopped_at)
        same = then[(then.pair_id == row.pair_id) & (then.seed == row.seed) & (then.steps == at)]
        assert row.similarity_local_correlation == same.similarity_local_correlation.iloc[0], (
            "the image that a whole attack has there"
        )
    flags = [flag["name"] for flag in report_json(sequential)["flags"]]
    assert flags.count("search_sequential") == 1


def test_evaluations_of_a_sequential_search_are_counted(material, tmp_path, rows_of):
    folder = run(material, tmp_path / "run", *SEQUENTIAL)
    effort, found = report_json(folder)["effort"], searches(folder)
    assert 0 < effort["attack"] == NOISES * found.stop.fillna(4).sum()
    prompted = (rows(folder).attack == "prompt").sum()
    assert prompted < PAIRS * IMAGES, "of some the first image is enough"
    assert rows_of["with gradient"] == effort["attack"] + CHECK["with gradient"]
    losses = (
        2 * PAIRS * LOSS_ROWS
    )  # under the empty and the own prompt: they choose who is searched
    wanted = effort["pictures"] + losses + CHECK["forward"]
    wanted += EACH * (prompted + ORDINARY * IMAGES)
    # an odd image takes a batch of two: prompts twice, and three looks
    assert rows_of["forward"] - wanted in range(0, EACH * 6, EACH)
    drawn = list(folder.glob("pictures/dori_*/*/*.png"))
    assert effort["pictures"] == EACH * len(drawn)


def test_a_sequential_search_that_was_interrupted_goes_on(
    material, sequential, tmp_path, monkeypatch, solved
):
    real: Callable[..., Any] = embedding_attack.solve

    def interrupted(model, problem, **options):
        if options["stop_at"] == 4:
            raise Interrupted(15)
        return real(model, problem, **options)

    with monkeypatch.context() as patched:
        patched.setattr(embedding_attack, "solve", interrupted)
        with pytest.raises(Interrupted):
            run(material, tmp_path / "run", *SEQUENTIAL)
    solved.clear()
    run(material, tmp_path / "run", *SEQUENTIAL)
    assert {until for until, _ in solved} == {4}, "nobody takes a step again"
    assert results(tmp_path / "run") == results(sequential)
