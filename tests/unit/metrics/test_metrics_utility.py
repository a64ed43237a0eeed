import json
import math
from pathlib import Path

import pytest
import torch

from dori_lightning.metrics.utility import (
    LossRow,
    PictureRow,
    Utility,
    UtilitySettings,
    compare_losses,
    compare_pictures,
    count_replicas,
    replicated_before,
)
from dori_lightning.types import InputError


def losses(*couples, draws=1):
    return [
        LossRow(f"corpus_{k:04d}", "a cat", r, 10, before, after)
        for k, (before, after) in enumerate(couples)
        for r in range(draws)
    ]


def picture(name, similarity=1.0, **more):
    values = {
        "kind": "neighbour", "id": name, "group": name, "prompt": "a cat", "seed": 2,
        "similarity": similarity, "original_unmitigated": 0.0, "original_mitigated": 0.0,
        "alignment_unmitigated": None, "alignment_mitigated": None,
        "unmitigated": Path("a.png"), "mitigated": Path("b.png"),
    }  # fmt: skip
    return PictureRow(**{**values, **more})


def features(count, seed=0):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def test_equal_losses_cost_exactly_nothing():
    found = compare_losses(losses((0.3, 0.3), (0.7, 0.7), (0.1, 0.1), draws=2))
    assert found.ratio == 1.0
    assert found.ratio_ci95 == (1.0, 1.0)
    assert (found.examples, found.draws) == (3, 2)


def test_the_ratio_is_of_the_means_not_the_mean_of_ratios():
    found = compare_losses(losses((0.1, 0.2), (0.9, 0.9)))
    assert found.ratio == pytest.approx(1.1)
    assert (found.unmitigated, found.mitigated) == (pytest.approx(0.5), pytest.approx(0.55))


def test_the_interval_is_paired():
    """Examples differ a hundredfold, each costs about 10 %: pairing keeps the interval narrow."""
    values = [10.0 ** (k % 3 - 2) for k in range(30)]
    rows = losses(*((v, v * (1.1 + 0.001 * (k % 2))) for k, v in enumerate(values)))
    low, high = compare_losses(rows).ratio_ci95
    assert 1.099 < low < high < 1.102


def test_one_broken_loss_breaks_the_ratio():
    found = compare_losses(losses((0.3, 0.3), (0.7, math.nan)))
    assert math.isnan(found.ratio)
    assert math.isnan(found.mitigated)
    assert all(map(math.isnan, found.ratio_ci95))
    infinite = compare_losses(losses((0.3, 0.3), (0.7, math.inf)))
    assert math.isnan(infinite.ratio)


def test_similarity_is_the_median_over_prompts_of_the_median_over_seeds():
    rows = [
        *(picture("a", s) for s in (0.1, 0.2, 0.9)),
        *(picture("b", s) for s in (0.4, 0.4, 0.4)),
        *(picture("c", s) for s in (1.0, 1.0, 0.0)),
    ]
    found = compare_pictures(rows, features(9), features(9), features="three, 3 features")
    assert found.similarity == pytest.approx(0.4)
    assert found.similarity_mad == pytest.approx(0.2)
    assert (found.prompts, found.pictures_each) == (3, 3)
    assert found.similarity_ci95 == (pytest.approx(0.2), pytest.approx(1.0))
    assert found.kid is None, "three groups are too few"
    assert found.fid is not None
    assert found.alignment is None


def test_alignment_is_left_out_unless_every_picture_has_it():
    scored = [
        picture(str(k), alignment_unmitigated=0.3, alignment_mitigated=0.3 - 0.01 * k)
        for k in range(4)
    ]
    found = compare_pictures(scored, features(4), features(4), features="").alignment
    assert (found.unmitigated, found.mitigated) == (0.3, pytest.approx(0.285))
    assert found.change == pytest.approx(-0.015)
    assert found.change_ci95[0] < -0.015 < found.change_ci95[1] <= 0
    mixed = [*scored[:3], picture("3")]
    assert compare_pictures(mixed, features(4), features(4), features="").alignment is None


def test_intervals_resample_groups_not_prompts():
    """Prompts of one pair agree, so counting them as independent would fake certainty."""
    alone = [picture(f"{k}_{j}", 0.1 * k, group=f"{k}_{j}") for k in range(8) for j in range(5)]
    grouped = [picture(f"{k}_{j}", 0.1 * k, group=str(k)) for k in range(8) for j in range(5)]
    narrow, wide = (
        compare_pictures(rows, features(40), features(40), features="").similarity_ci95
        for rows in (alone, grouped)
    )
    assert wide[1] - wide[0] > narrow[1] - narrow[0]


def test_a_replica_exceeds_the_threshold_by_its_closest_image():
    rows = [
        *(
            picture("a", original_unmitigated=v, original_mitigated=w)
            for v, w in ((0.9, 0.1), (0.1, 0.2), (0.1, 0.5))
        ),
        *(picture("b", original_unmitigated=0.8, original_mitigated=0.9) for _ in range(3)),
    ]
    found = count_replicas(rows, threshold_of=lambda _: 0.5)
    assert (found.prompts, found.unmitigated, found.mitigated) == (2, 2, 1)
    assert found.unmitigated_ci95[1] == 1.0
    assert replicated_before(rows, threshold_of=lambda _: 0.5) == {"a", "b"}


def utility():
    rows = [picture(str(k), 0.8) for k in range(8)]
    sets = compare_pictures(rows, features(8), features(8, 1), features="three, 3 features")
    return Utility(
        descriptor="ncc",
        denoising_loss=compare_losses(losses((0.5, 0.6), (0.4, 0.4))),
        ordinary=sets,
        neighbours=sets,
        replicas=count_replicas(rows, threshold_of=lambda _: 0.5),
        left_out={"alignment": "no CLIP"},
        loss_rows=tuple(losses((0.5, 0.6))),
        picture_rows=tuple(rows),
    )


def test_the_record_is_plain_and_has_the_promised_keys():
    found = utility().to_dict()
    assert json.loads(json.dumps(found))["left_out"] == {"alignment": "no CLIP"}
    assert found["denoising_loss"].keys() >= {
        "unmitigated", "mitigated", "ratio", "ratio_ci95",
    }  # fmt: skip
    assert found["kid"].keys() >= {"mean", "std", "features"}
    assert found["fid"] == pytest.approx(found["neighbours"]["fid"])
    assert found["similarity_to_unmitigated"] == 0.8
    assert found["alignment"] is None
    assert found["neighbours"].keys() >= {
        "kid", "fid", "similarity_to_unmitigated", "alignment", "replicating",
    }  # fmt: skip
    assert found["neighbours"]["replicating"]["prompts"] == 8


def test_what_was_left_out_is_none_under_the_same_keys():
    whole = utility()
    empty = Utility("ncc", None, None, None, None, {"ordinary": "no corpus"}).to_dict()
    assert empty.keys() | {
        "features", "similarity_to_unmitigated_mad", "similarity_to_unmitigated_ci95",
    } == whole.to_dict().keys()  # fmt: skip
    assert empty["denoising_loss"] is None
    assert empty["neighbours"] is None
    assert empty["kid"] is None


@pytest.mark.parametrize(
    "wrong", [{"examples": -1}, {"draws": 0}, {"pictures": 0}, {"neighbour_pictures": 0}]
)
def test_bad_sizes_are_refused(wrong):
    with pytest.raises(InputError, match="utility needs"):
        UtilitySettings(**wrong)


def test_zero_asks_for_nothing():
    assert UtilitySettings().asked
    assert not UtilitySettings(examples=0, prompts=0, neighbours=0).asked
    assert UtilitySettings(examples=0, prompts=0, neighbours=1).asked
