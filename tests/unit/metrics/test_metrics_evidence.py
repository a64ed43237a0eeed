"""Error bounds of verdicts on single images."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dori_lightning.metrics.evidence import (
    COPY,
    EvidenceSettings,
    ImageEvidence,
    LossEvidence,
    UnseenImage,
    conformal_p_values,
    discoveries,
    fewest_together,
    find_futile,
    image_evidence,
    judge,
    null_scores,
    nulls_needed,
    origin_of,
    unseen_images,
)
from dori_lightning.metrics.replication import PairResult
from dori_lightning.types import (
    MARGIN,
    Budget,
    Calibration,
    Condition,
    InputError,
    Kind,
    Pair,
    Scale,
    Status,
)


def test_a_score_runs_from_the_null_to_the_ceiling() -> None:
    scale = Scale(null=0.2, ceiling=0.8)
    assert scale.threshold == pytest.approx(0.5)
    assert [scale.score(s) for s in (0.2, 0.5, 0.8)] == pytest.approx([0, 0.5, 1])


@pytest.mark.parametrize(
    ("null", "ceiling"),
    [(0.3, 0.3 + MARGIN - 0.01), (0.5, 0.2), (math.nan, 0.9), (0.1, math.nan)],
)
def test_an_image_whose_ceiling_does_not_clear_its_null_is_judged_by_nothing(
    null: float, ceiling: float
) -> None:
    scale = Scale(null, ceiling)
    assert not scale.auditable
    assert math.isnan(scale.threshold)
    assert math.isnan(scale.score(0.99))


def test_an_image_is_searched_where_its_losses_stand_out_from_enough_controls() -> None:
    controls = {f"control{k:02d}": 1.0 - 0.01 * k for k in range(20)}
    lowest = sorted(controls)[-4:]
    ratios = controls | {"held": 0.4, "between": 0.815, "unseen": 1.1, "unknown": math.nan}
    assert {*ratios} - find_futile(ratios, set(controls), 0.05) == {
        "held", "between", "unknown", *lowest[-2:],
    }, "one control that does as well is no reason"  # fmt: skip
    assert {*ratios} - find_futile(ratios, set(controls), 4 / 21) == {
        "held", "between", "unknown", *lowest,
    }  # fmt: skip
    assert find_futile({"held": 0.4, "unseen": 1.0}, set(), 0.05) == frozenset()
    few = {"held": 0.4, "a": 1.0, "b": 1.1, "c": 1.2}
    assert find_futile(few, {"a", "b", "c"}, 0.05) == {"c"}


@pytest.mark.parametrize("suspects", [1, 5])
def test_error_rates_hold_where_only_some_images_are_searched(suspects: int) -> None:
    """Suspects and 20 controls of one kind; a search raises a score that losses tell of."""
    rng, level, runs = np.random.default_rng(0), 0.1, 2000 // suspects
    names = [f"suspect{k}" for k in range(suspects)] + [f"control{k}" for k in range(20)]
    controls, searched, stood_out = set(names[suspects:]), 0, 0
    for _ in range(runs):
        ratios = dict(zip(names, np.exp(rng.normal(0, 0.1, len(names))), strict=True))
        futile = find_futile(ratios, controls, level)
        scores = {
            name: rng.normal() + (0 if name in futile else 3 - 5 * ratios[name]) for name in names
        }
        nulls = [scores[name] for name in controls]
        own = [name for name in names if name not in controls]
        searched += sum(name not in futile for name in own)
        stood_out += sum(conformal_p_values([scores[name] for name in own], nulls) <= level)
    noise = 3 * math.sqrt(level * (1 - level) / (runs * suspects))
    assert 0 < searched / (runs * suspects) <= level + noise
    assert 0 < stood_out / (runs * suspects) <= level + noise


def test_p_values_count_the_nulls_at_least_as_high() -> None:
    nulls = [0.1, 0.2, 0.3, math.nan]
    values = conformal_p_values([0.4, 0.3, 0.15, 0.0, math.nan], nulls)
    assert values[:4] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1])
    assert math.isnan(values[4])


def test_without_nulls_nothing_is_evidence() -> None:
    assert conformal_p_values([5.0], []).tolist() == [1.0]


def test_the_false_discovery_rate_holds_on_average() -> None:
    rng, rate, shares = np.random.default_rng(0), 0.1, []
    for _ in range(400):
        held = rng.random(30) < 0.3
        scores = rng.normal(size=30) + np.where(held, 4.0, 0.0)
        found = discoveries(conformal_p_values(scores, rng.normal(size=200)), rate)
        shares.append((found & ~held).sum() / max(1, found.sum()))
    assert np.mean(shares) <= rate
    assert np.mean(shares) > 0.02  # the simulation does make false discoveries


def test_a_missing_value_is_no_part_of_the_family() -> None:
    assert discoveries([0.04, math.nan], 0.05).tolist() == [True, False]
    assert discoveries([math.nan], 0.05).tolist() == [False]


@pytest.mark.parametrize(
    ("suspects", "found", "needed"), [(16, None, 19), (16, 16, 19), (16, 8, 39), (1, 1, 19)]
)
def test_the_nulls_needed_are_the_fewest_that_can_do(
    suspects: int, found: int | None, needed: int
) -> None:
    assert nulls_needed(suspects, 0.05, found=found) == needed
    stand_out = found or suspects
    for nulls in (needed - 1, needed):
        p_values = [1 / (nulls + 1)] * stand_out + [1.0] * (suspects - stand_out)
        assert discoveries(p_values, 0.05).any() == (nulls >= needed)


@pytest.mark.parametrize("nulls", [18, 19, 20, 199, 398, 399])
def test_the_fewest_that_can_be_found_together(nulls: int) -> None:
    fewest = fewest_together(20, nulls, 0.05)
    for count in range(1, 21):
        p_values = [1 / (nulls + 1)] * count + [1.0] * (20 - count)
        possible = fewest is not None and count >= fewest
        assert discoveries(p_values, 0.05).any() == possible


def test_a_rate_that_was_asked_for_and_cannot_be_supported_is_refused_with_the_number() -> None:
    asked = EvidenceSettings(0.05)
    asked.check_nulls({"vm": 16, "control": 19}, reference=False)
    asked.check_nulls({"control": 1}, reference=False)
    few: dict[Kind, int] = {"vm": 12, "tm": 4, "control": 8}
    with pytest.raises(InputError, match=r"at least 19 .* this audit has 8[^/]*1/9[\s\S]*add 11"):
        asked.check_nulls(few, reference=False)
    asked.check_nulls(few, reference=True)  # 8 here, 24 on the reference
    EvidenceSettings().check_nulls(few, reference=False)
    EvidenceSettings(0.112).check_nulls(few, reference=False)  # what the message proposes


@pytest.mark.parametrize("rate", [0.0, 1.0, "often"])
def test_an_impossible_rate_is_refused(rate: Any) -> None:
    with pytest.raises(InputError, match=r"false_discovery_rate must lie between 0 and 1, or be"):
        EvidenceSettings(rate)


PROMPT, ATTACK = Condition("prompt"), Condition("dori", "prompt", Budget(steps=50))
RANDOM = Condition("dori", "random", Budget(steps=50))


def result(name: str, kind: Kind, statistic: float, condition: Condition = ATTACK) -> PairResult:
    pair = Pair(name, kind, name, Path(f"{name}.png"))
    status: Status = "diverged" if math.isnan(statistic) else "ok"
    return PairResult(pair, condition, status, statistic, statistic, None, None, None)


def controls(count: int = 40, highest: float = 0.3) -> list[PairResult]:
    values = np.linspace(0, highest, count)
    return [result(f"control_{k}", "control", float(v)) for k, v in enumerate(values)]


def rule(results: Iterable[PairResult], **scales: Scale) -> Calibration:
    known = {r.pair.id: Scale(0.1, 0.9) for r in results}
    return Calibration("local", 0.5, "calibrated", (), (), math.nan, (), known | scales)


def judged(results: list[PairResult], **options: Any) -> dict[str, ImageEvidence]:
    calibration = rule([*results, *options.get("reference", ())], **options.pop("scales", {}))
    unseen = unseen_images(results, calibration, **options)
    options.pop("reference_losses", None)
    rows = image_evidence(results, calibration, unseen, rate=0.05, **options)
    return {row.id: row for row in rows}


def test_each_image_has_its_own_answer_and_reason() -> None:
    suspects = [result(f"held_{k}", "vm", 0.8) for k in range(6)]
    suspects += [result("safe", "vm", 0.2), result("failed", "tm", math.nan)]
    suspects += [result("wheel", "vm", 0.39)]
    rows = judged(suspects + controls(), scales={"wheel": Scale(0.3, 0.38)})
    answers = {name: (row.answer, row.reason) for name, row in rows.items()}
    assert answers == {
        **{f"held_{k}": ("yes", "copy") for k in range(6)},
        "safe": ("no", "nothing_came_back"),
        "failed": ("cannot_tell", "no_result"),
        "wheel": ("cannot_tell", "not_auditable"),
    }
    assert rows["held_0"].p_image == pytest.approx(1 / 41)
    assert rows["held_0"].score == pytest.approx(0.7 / 0.8)


def test_with_few_nulls_a_copy_has_to_beat_every_one_of_them_and_says_so() -> None:
    rows = judged([result("held", "vm", 0.8), *controls(5)])
    assert (rows["held"].answer, rows["held"].reason) == ("yes", "copy_few_nulls")
    rows = judged([result("held", "vm", 0.8), *controls(5, highest=0.85)])
    assert (rows["held"].answer, rows["held"].reason) == ("cannot_tell", "not_above_nulls")


@pytest.mark.parametrize(
    ("controls_of", "ratio", "answer"),
    [
        (40, 0.5, ("dormant", "held_by_loss")),
        (8, 0.5, ("cannot_tell", "loss_few_nulls")),
        (8, 0.95, ("no", "nothing_came_back")),
        (0, 0.5, ("no", "nothing_came_back")),
    ],
)
def test_an_image_that_stands_out_by_its_loss_is_never_answered_no(
    controls_of: int, ratio: float, answer: tuple[str, str]
) -> None:
    """Not where the nulls are too few for an error rate either; one of them has a ratio of .9."""
    unseen = [UnseenImage(f"c{k}", "control", 0.1, 0.9 + 0.01 * k) for k in range(controls_of)]
    (found,) = judge([0.2], [ratio], unseen, rate=0.05)
    assert (found.answer, found.reason) == answer


def test_without_controls_only_prompts_count() -> None:
    results = [result("held", "vm", 0.8, PROMPT), result("painted", "vm", 0.8)]
    rows = judged(results)
    assert (rows["held"].answer, rows["held"].reason) == ("yes", "copy_few_nulls")
    assert (rows["painted"].answer, rows["painted"].reason) == ("cannot_tell", "no_result")


def test_only_conditions_that_controls_were_tried_under_count() -> None:
    held = [result(f"held_{k}", "vm", 0.8, RANDOM) for k in range(3)]
    rows = judged([*held, *[result(f"held_{k}", "vm", 0.2) for k in range(3)], *controls()])
    assert {row.answer for row in rows.values()} == {"no"}
    tried = [replace(one, condition=RANDOM) for one in controls()]
    rows = judged([*held, *controls(), *tried])
    assert {(row.answer, row.condition) for row in rows.values()} == {("yes", RANDOM)}


def test_what_the_reference_draws_too_proves_nothing_alone() -> None:
    suspects = [result(f"held_{k}", "vm", 0.8) for k in range(4)]
    unseen = [replace(one, statistic=0.15) for one in suspects]
    before = judged(suspects + controls(), reference=unseen)
    unseen[0] = replace(unseen[0], statistic=0.85)
    after = judged(suspects + controls(), reference=unseen)
    assert {row.answer for row in before.values()} == {"yes"}
    assert (after["held_0"].answer, after["held_0"].reason) == ("cannot_tell", "painted")
    assert [after[f"held_{k}"].answer for k in (1, 2, 3)] == ["yes"] * 3
    assert after["held_0"].reference_similarity == 0.85
    everything = suspects + controls()
    images = unseen_images(everything, rule([*everything, *unseen]), reference=unseen)
    assert Counter(image.group for image in images) == {"control": 40, "reference": 4}
    assert max(null_scores(images)) < COPY < max(image.score for image in images)
    assert len(null_scores(images)) == 43


def test_an_image_that_cannot_be_audited_moves_no_other_answer() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 12))
        results = [
            result(f"suspect_{k}", "vm", float(rng.uniform(0, 0.9))) for k in range(count)
        ] + [
            result(f"control_{k}", "control", float(rng.uniform(0, 0.4)))
            for k in range(int(rng.integers(1, 60)))
        ]
        kind: Kind = "vm" if rng.random() < 0.5 else "control"
        wheel = result("wheel", kind, float(rng.uniform(0, 0.5)))
        losses = {
            one.pair.id: LossEvidence(float(rng.uniform(0.3, 1.2)), "prompt")
            for one in [*results, wheel]
        }
        beside = judged([*results, wheel], losses=losses, scales={"wheel": Scale(0.3, 0.38)})
        del losses["wheel"]
        for name, row in judged(results, losses=losses).items():
            assert beside[name].answer == row.answer
            assert beside[name].p_image == row.p_image
            assert beside[name].p_loss == row.p_loss


def test_an_image_held_but_never_drawn_is_dormant() -> None:
    suspects = [result(f"held_{k}", "vm", 0.2) for k in range(3)]
    losses = {one.pair.id: LossEvidence(0.4, "empty") for one in suspects}
    losses |= {one.pair.id: LossEvidence(0.95, "prompt") for one in controls()}
    losses["held_2"] = LossEvidence(1.0, "prompt")
    rows = judged(suspects + controls(), losses=losses)
    assert [rows[f"held_{k}"].answer for k in range(3)] == ["dormant", "dormant", "no"]
    assert rows["held_0"].p_loss == pytest.approx(1 / 41)
    assert rows["held_0"].loss_ratio == 0.4


@pytest.mark.parametrize(
    ("answer", "base", "origin"),
    [
        ("yes", "yes", "base"),
        ("no", "yes", "base"),
        ("cannot_tell", "dormant", "base"),
        ("yes", "no", "tuning"),
        ("dormant", "no", "tuning"),
        ("no", "no", "neither"),
        ("cannot_tell", "no", "cannot_tell"),
        ("yes", "cannot_tell", "cannot_tell"),
        ("no", "cannot_tell", "cannot_tell"),
    ],
)
def test_where_an_image_is_from_follows_from_both_answers(answer, base, origin) -> None:
    assert origin_of(answer, base) == origin
