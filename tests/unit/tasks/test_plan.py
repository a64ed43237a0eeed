"""A dry run counts what an audit would do; where it can be checked against the code, it is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate

from dori_lightning import config
from dori_lightning.audit.loss_evidence import LOSS_ROWS
from dori_lightning.mitigations.base import Evaluations
from dori_lightning.mitigations.wanda import Wanda
from dori_lightning.pairs.corpus import ORDINARY_PROMPTS
from dori_lightning.tasks.plan import CHECKPOINTS, UNKNOWN, JobPlan, plan_of, sum_plans
from dori_lightning.tasks.run_record import to_container
from dori_lightning.types import InputError
from support.families import OF_TEXT_STREAMS
from support.runs import configuration, run_task, write_pairs

SMALL = (
    "attack.budget.steps=5",
    "attack.noise_batch=2",
    "attack.inits=[prompt,random]",
    "attack.other_inits=[prompt]",
    "attack.snapshots=[0,2,9]",
    "attack.restarts=2",
    "sampling.steps=3",
    "sampling.images_per_pair=2",
    "utility=none",
)


def planned(*overrides: str) -> JobPlan:
    return plan_of(configuration(*overrides, experiment="audit"))


def dry_run(folder: Path, *overrides: str) -> None:
    run_task(folder, *overrides, "task.dry_run=true", experiment="audit")


def listed(tmp_path: Path) -> tuple[str, ...]:
    if not (tmp_path / "pairs").is_dir():
        write_pairs(tmp_path / "pairs", vm=2, control=3)
    return (
        "pairs=folder", f"pairs.path={tmp_path / 'pairs'}", "pairs.self_controls=[]",
        "evidence.losses=false", "power=none", *SMALL,
    )  # fmt: skip


def test_the_attack_and_its_images_are_counted(tmp_path: Path) -> None:
    job = planned(*listed(tmp_path))
    assert job.mitigation == "none"
    assert "as listed" in job.remarks[0]
    assert job.pairs == {"vm": 2, "tm": 0, "control": 3}
    assert job.attacks == (2 * 2 + 3 * 1) * 2, "vm from two starts, controls from one; 2 restarts"
    assert job.audit.work.attack == job.attacks * 5 * 2
    # prompts once, and each attack after 0, 2 and 5 steps; 9 is beyond the budget
    assert job.audit.work.decoded == (5 + job.attacks * 3) * 2
    assert job.audit.work.forward == job.audit.work.decoded * 3 * 2, (
        "guidance takes two rows a step"
    )
    (ordinary,) = job.shared.values()
    assert ordinary.work.decoded == ORDINARY_PROMPTS * 2


def test_evidence_by_loss_self_controls_and_a_reference_are_priced(tmp_path: Path) -> None:
    one = planned(*listed(tmp_path))
    judged = planned(*listed(tmp_path), "evidence.losses=true")
    # the empty prompt and the own one of five pairs, and seven starts
    assert judged.audit.work.forward - one.audit.work.forward == (2 * 5 + 7) * LOSS_ROWS
    copied = planned(*listed(tmp_path), "pairs.self_controls=auto")
    assert copied.pairs["control"] == 3 + 2 * 2
    assert "with self-controls" in copied.remarks[0]
    seen = planned(*listed(tmp_path), "reference=checkpoint", "reference.source=unseen")
    again = (
        *listed(tmp_path),
        "reference=checkpoint",
        "reference.source=unseen",
        "mitigation=wanda",
    )
    (both,) = {*seen.shared} & {*planned(*again).shared}
    assert seen.shared[both].what == "images of ordinary prompts", "each job attacks a reference"
    ordinary, reference = seen.shared.values()
    assert reference.what == "the reference model"
    assert reference.work == one.audit.work + ordinary.work
    assert any("7 attacked images that the model cannot hold" in text for text in copied.remarks)
    with pytest.raises(InputError, match=r"needs at least 19 .* this audit has 3"):
        planned(*listed(tmp_path), "evidence.false_discovery_rate=0.05")
    powered = planned(*listed(tmp_path), "power=planted", "attack.budget.steps=7")
    assert f"and attacked by {4 * 7 * 2}" in powered.remarks[-1]


def test_a_lora_is_named_and_its_base_priced(tmp_path: Path) -> None:
    lora = "checkpoint.lora=[{path:/a/style.safetensors,scale:0.8}]"
    one, tuned = planned(*listed(tmp_path)), planned(*listed(tmp_path), lora)
    ordinary, base = tuned.shared.values()
    assert base.what == "its base, dori_tiny without LoRA"
    assert base.work == one.audit.work + ordinary.work
    assert tuned.audit.work == one.audit.work
    assert "dori_tiny with LoRA style.safetensors at scale 0.8" in tuned.remarks
    alone = planned(*listed(tmp_path), lora, "checkpoint.base=none")
    assert [part.what for part in alone.shared.values()] == [ordinary.what]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), None),
        (("checkpoint.base=none", "checkpoint.lora=a"), None),
        (("checkpoint.lora=a",), ("package:dori_tiny", None, "dori_tiny without LoRA")),
        (("checkpoint.base=sd14",), ("CompVis/stable-diffusion-v1-4", None, "sd14")),
        (
            ("checkpoint.base=dori_tiny_twin", "checkpoint.lora=a"),
            ("package:dori_tiny", "package:dori_tiny_twin", "dori_tiny_twin"),
        ),
        (("checkpoint.base=/a/base", "checkpoint.unet=b"), ("/a/base", None, "base")),
        (("checkpoint.base=some/body",), ("some/body", None, "body")),
    ],
)
def test_a_base_is_a_checkpoint_by_name_or_source(overrides, expected) -> None:
    composed = to_container(configuration("checkpoint.device=cpu", *overrides))["checkpoint"]
    base = config.base_checkpoint(composed)
    assert expected == (base and (base["source"], base["unet"], base["name"]))
    if base is not None:
        assert (base["lora"], base["device"]) == (None, "cpu")
        assert config.base_checkpoint(base) is None


def test_a_base_of_another_family_is_refused() -> None:
    composed = to_container(configuration("checkpoint.base=sdxl"))["checkpoint"]
    with pytest.raises(InputError, match=r"of the family sdxl, the checkpoint of sd"):
        config.base_checkpoint(composed)


def test_without_guidance_a_step_is_one_row(tmp_path: Path) -> None:
    job = planned(*listed(tmp_path), "sampling.guidance=1")
    assert job.audit.work.forward == job.audit.work.decoded * 3


def test_a_mitigated_audit_also_draws_with_the_model_as_it_is(tmp_path: Path) -> None:
    job = planned(*listed(tmp_path), "mitigation=wanda", "sampling.steps=12")
    _, edit, before = job.shared.values()
    assert edit.what == "edit wanda"
    assert edit.work == Evaluations(forward=(2 + 1) * 10 * 2), "pairs and the empty prompt"
    assert before.work == Evaluations(forward=5 * 2 * 12 * 2, decoded=5 * 2)


def test_utility_is_counted_for_both_models(tmp_path: Path) -> None:
    settings = (
        "utility=light", "utility.examples=7", "utility.draws=3", "utility.prompts=4",
        "utility.pictures=2", "utility.neighbours=1", "utility.neighbour_pictures=5",
    )  # fmt: skip
    without = planned(*listed(tmp_path), "mitigation=wanda")
    job = planned(*listed(tmp_path), "mitigation=wanda", *settings)
    images = 4 * 2 + 2 * 1 * 5
    assert job.audit.work.decoded - without.audit.work.decoded == images
    more = Evaluations(forward=7 * 3 + images * 3 * 2, decoded=images)
    assert job.audit.work == without.audit.work + more
    *_, before = job.shared.values()
    *_, less = without.shared.values()
    assert before.work == less.work + more


def test_an_attack_inside_a_mitigation_is_counted(tmp_path: Path) -> None:
    job = planned(
        *listed(tmp_path), "mitigation=adversarial_finetuning", "mitigation.epochs=3",
        "mitigation.updates=4", "mitigation.adversarial_batch=6", "mitigation.ordinary_batch=5",
        "mitigation.pool.attack.budget.steps=7", "mitigation.pool.attack.noise_batch=2",
        "mitigation.pool.warm=false", "checkpoint=sd14",
    )  # fmt: skip
    parts = {part.what: part for part in job.shared.values()}
    work = parts["edit adversarial_finetuning"].work
    assert work.attack == 3 * 2 * 7 * 2
    assert work.training == 3 * 4 * (6 + 5)
    assert any(what.startswith("edit nemo") for what in parts), "surrogates come from its model"


def test_a_defence_at_inference_makes_every_image_dearer(tmp_path: Path) -> None:
    plain = planned(*listed(tmp_path), "mitigation=wanda")
    job = planned(*listed(tmp_path), "mitigation=prompt_adjustment")
    assert job.audit.work.attack - plain.audit.work.attack == 10 * job.audit.work.decoded


@pytest.mark.parametrize("mitigation", sorted(config.groups()["mitigation"]))
def test_every_mitigation_is_planned_or_said_to_be_unknown(
    tmp_path: Path, mitigation: str
) -> None:
    overrides = (*listed(tmp_path), f"mitigation={mitigation}")
    if mitigation in OF_TEXT_STREAMS:
        overrides += ("checkpoint=dori_tiny_flow", "sampling.sampler=flow_euler")
    job = planned(*overrides)
    edits = [part for part in job.shared.values() if part.what == f"edit {job.mitigation}"]
    assert len(edits) == (mitigation != "none")
    method = instantiate(configuration(*overrides, experiment="audit").mitigation)
    for part in edits:
        assert (part.not_counted == UNKNOWN) == (not hasattr(method, "estimate_cost"))


def test_a_mitigation_without_an_estimate_is_said_to_be_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(Wanda, "estimate_cost")
    dry_run(tmp_path / "run", *listed(tmp_path), "mitigation=wanda")
    assert "not counted: edit wanda: unknown" in capsys.readouterr().err


def test_gradient_of_the_embedding_is_about_as_long_as_the_forward_pass() -> None:
    cost = CHECKPOINTS["sd14"]
    assert cost.tflop(Evaluations(forward=1000)) == pytest.approx(803.3)
    assert cost.tflop(Evaluations(attack=400)) == pytest.approx(667.7, abs=0.1), "one DoRI attack"
    assert cost.hours(Evaluations(attack=400))["H100"] == pytest.approx(667.7 / 296.7 / 3600, 1e-3)
    assert CHECKPOINTS["dori_tiny"].hours(Evaluations(attack=400))["two CPU cores"] == (
        pytest.approx(4 / 3600)
    )


@pytest.mark.parametrize(
    ("name", "pflop", "rows"),
    [
        ("sd3_medium", 8.3, 2 * 28),
        ("sd35_medium", 10.7, 2 * 28),
        ("sd35_large", 27.8, 2 * 28),
        ("flux1_dev", 65.5, 28),  # its guidance is an input
        ("pixart_sigma", 6.15, 2 * 20),
    ],
)
def test_an_attack_on_a_transformer_has_known_cost(name: str, pflop: float, rows: int) -> None:
    cost = CHECKPOINTS[name].tflop(Evaluations(attack=400))
    assert cost == pytest.approx(1000 * pflop, rel=0.005)
    few = "task.assume_pairs={vm: 1, tm: 0, control: 0}"
    job = planned(f"checkpoint={name}", "evidence.losses=false", few)
    assert "of weights in bf16; a noise sample keeps" in " ".join(job.remarks)
    assert job.audit.work.forward == rows * job.audit.work.decoded > 0


@pytest.mark.parametrize("name", ["nemo", "random_pruning", "adversarial_finetuning"])
def test_what_a_family_has_no_meaning_for_is_refused(name: str) -> None:
    few = "task.assume_pairs={vm: 1, tm: 0, control: 0}"
    own = ("checkpoint=custom", "checkpoint.source=nowhere", "checkpoint.family=sd3", few)
    with pytest.raises(InputError, match=r"value layers of Stable Diffusion 3(?s:.)*_text_stream"):
        planned(*own, f"mitigation={name}")
    if name == "adversarial_finetuning":
        planned(*own, f"mitigation={name}", "mitigation.surrogates.source=null")
        planned("checkpoint=sd35_medium", few, f"mitigation={name}")


@pytest.mark.parametrize(
    ("checkpoint", "mitigation", "said"),
    [
        ("sd14", ["nemo_text_stream"], "no stream of text"),
        ("sdxl", ["random_pruning", "mitigation@mitigation.like=nemo_text_stream"], "no stream"),
        ("flux1_dev", ["nemo_text_stream", "mitigation.stages=[double,single]"], "tokens of text"),
        ("flux1_dev", ["wanda", "mitigation.stages=[single]"], "tokens of text and of the image"),
        ("sd3_medium", ["wanda", "mitigation.stages=[mid]"], "has no stage mid"),
        ("flux1_dev", ["nemo_text_stream"], None),
        ("sd3_medium", ["random_pruning", "mitigation@mitigation.like=nemo_text_stream"], None),
    ],
)
def test_neurons_of_a_text_stream_are_searched_where_there_is_one(
    checkpoint: str, mitigation: list[str], said: str | None
) -> None:
    few = "task.assume_pairs={vm: 1, tm: 0, control: 0}"
    chosen = (f"checkpoint={checkpoint}", few, f"mitigation={mitigation[0]}", *mitigation[1:])
    if said is None:
        planned(*chosen)
        return
    with pytest.raises(InputError, match=said):
        planned(*chosen)


# --- what the task leaves


def test_a_dry_run_needs_no_list_no_images_and_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    dry_run(folder, "checkpoint=sd14", "task.assume_pairs={vm: 3, tm: 0, control: 0}")
    said = capsys.readouterr().err
    assert "nothing is computed" in said
    assert "assumed: " in said
    assert "is not given" in said
    assert "0.80 TFLOP forward" in said
    assert "30% of its dense bf16 peak" in said
    assert [p.name for p in folder.iterdir()] == ["plan.json"]
    held = json.loads((folder / "plan.json").read_text())
    assert (held["pairs"]["vm"], held["attacks"]) == (3, 6)


def test_attacks_that_may_stop_early_are_counted_whole_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = planned(*listed(tmp_path))
    early = planned(*listed(tmp_path), "attack.early_stop=true")
    assert replace(early, remarks=whole.remarks) == whole
    for stop in ("true", "false"):
        dry_run(tmp_path / stop, *listed(tmp_path), f"attack.early_stop={stop}")
        assert ("attack.early_stop" in capsys.readouterr().err) == (stop == "true")


def test_a_sequential_search_is_priced_whole_and_as_it_may_be(tmp_path: Path) -> None:
    looks = ("attack.snapshots=[]", "attack.restarts=1", "attack.looks=[1,2,4]")
    job = planned("attack=dori_sequential", *listed(tmp_path), *looks)
    assert job.audit.work.attack == 7 * 5 * 2
    assert job.audit.work.decoded == 5 * 2 + 7 * (3 + 2), "a look draws one image, the end two"
    (text,) = (text for text in job.remarks if text.startswith("attack.futility"))
    image = 3 * 2  # half of the images that are not held are searched: one of two suspects
    one, controls = 5 * 2 + image * (3 + 2), 15 + image * 8
    assert f"about {controls + 2 * (1 * 2 + image):,} evaluations where prompts" in text
    assert f"{2 * one + controls:,} where none is held" in text


def test_an_unreadable_list_is_assumed_and_the_reason_said(tmp_path: Path) -> None:
    job = planned("pairs=folder", f"pairs.path={tmp_path / 'none'}", *SMALL)
    assert job.pairs == {"vm": 112, "tm": 388, "control": 500}
    assert "assumed: pairs.path must be a folder" in job.remarks[0]


@pytest.mark.parametrize("assumed", ["{vm: -1}", "{vm: many}", "{vm: true}"])
def test_impossible_assumptions_are_refused(assumed: str) -> None:
    with pytest.raises(InputError, match=r"task\.assume_pairs cannot be"):
        planned("checkpoint=sd14", f"task.assume_pairs={assumed}")


def test_a_checkpoint_of_unknown_cost_has_no_hours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(tmp_path / "run", *listed(tmp_path), "checkpoint.name=mine")
    said = capsys.readouterr().err
    assert "h, " not in said
    assert "not counted: hours and disk of mine" in said


def test_shared_work_is_summed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = {
        "a": ("mitigation=none",),
        "b": ("mitigation=wanda",),
        "c": ("mitigation=wanda", "attack/budget=l2_small"),
    }
    plans: dict[str, Any] = {}
    for name, overrides in jobs.items():
        folder = tmp_path / "sweep" / name
        dry_run(folder, *listed(tmp_path), *overrides, "sampling.steps=12")
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "overrides.yaml").write_text("[task.dry_run=true]")
        plans[name] = json.loads((folder / "plan.json").read_text())
    capsys.readouterr()
    sum_plans(tmp_path / "sweep")
    said = capsys.readouterr().err
    total = json.loads((tmp_path / "sweep" / "plan.json").read_text())
    shared = plans["b"]["shared"]
    assert shared == plans["c"]["shared"]
    forward = sum(p["audit"]["work"]["forward"] for p in plans.values())
    forward += sum(p["work"]["forward"] for p in shared.values())
    assert total["work"]["forward"] == forward
    assert (total["jobs"], total["without_plan"]) == (3, 0)
    assert said.count("edit wanda, once") == 1
    assert total["hours"]["two CPU cores"] > 0


def test_no_plan_no_sum(tmp_path: Path) -> None:
    (tmp_path / "sweep" / "a" / ".hydra").mkdir(parents=True)
    (tmp_path / "sweep" / "a" / ".hydra" / "overrides.yaml").write_text("[task.dry_run=true]")
    with pytest.raises(InputError, match=r"no job of the sweep left a plan\.json"):
        sum_plans(tmp_path / "sweep")
