import pytest
import torch

from dori_lightning.models.conditioning import (
    Spread,
    free_cells,
    matrix_shape,
    pack,
    read_rows,
    stacked,
    unpack,
)
from dori_lightning.types import InputError

PARTS = stacked(("clip", 2, 3), ("t5", 3, 5), ("pooled", 1, 4), ("sizes", 1, 2), fixed=("sizes",))


def values(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        part.name: scale * torch.randn(count, *part.shape, generator=generator)
        for scale, part in zip((1.0, 10.0, 0.1, 5.0), PARTS, strict=True)
    }


def test_parts_are_laid_below_each_other_and_taken_out_again():
    given = values(2)
    matrix = pack(PARTS, given)
    assert matrix.shape == (2, *matrix_shape(PARTS)) == (2, 7, 5)
    assert all(torch.equal(found, given[name]) for name, found in unpack(PARTS, matrix).items())
    outside = torch.ones(7, 5, dtype=torch.bool)
    for part in PARTS:
        part.of(outside).fill_(False)
    assert int(outside.sum()) == 35 - (6 + 15 + 4 + 2)
    assert not matrix[:, outside].any()


def test_only_free_parts_may_be_searched():
    assert int(free_cells(PARTS).sum()) == 6 + 15 + 4
    assert int(free_cells(PARTS, ["pooled"]).sum()) == 4
    for which in (["sizes"], ["nothing"], []):
        with pytest.raises(InputError, match=r"attack\.parts=\[clip,t5,pooled\]"):
            free_cells(PARTS, which)


def test_the_spread_of_each_part_is_measured_in_its_own_units():
    embeddings = pack(PARTS, values(400))
    spread = Spread.measured(PARTS, iter(embeddings))
    for part, wanted in zip(spread.parts, (1.0, 10.0, 0.1), strict=True):
        assert part.of(spread.std).unique().tolist() == pytest.approx([wanted], rel=0.1)
    assert not spread.std[~free_cells(PARTS)].any()
    assert not spread.mean[~free_cells(PARTS)].any()
    # two standard normal vectors of n numbers are about the root of 2n apart
    sizes = torch.tensor([6.0, 15.0, 4.0])
    assert torch.tensor(spread.distances["l2"]).allclose((2 * sizes).sqrt(), rtol=0.25)
    start = spread.start(torch.ones(7, 5), 2.0)
    assert torch.allclose(start, spread.mean + 2 * spread.std)


def test_the_published_start_is_standard_normal():
    parts = stacked(("sequence", 4, 3))
    normal = torch.randn(4, 3)
    spread = Spread.published(parts)
    assert spread.absolute
    assert torch.equal(spread.start(normal, 0.5), 0.5 * normal)


def test_padding_counts_in_no_mean_and_no_spread():
    parts = stacked(("t5", 4, 3), ("mask", 1, 4), masks={"mask": "t5"})
    lengths = torch.arange(400) % 3 + 1
    mask = (torch.arange(4) < lengths[:, None]).float()
    generator = torch.Generator().manual_seed(0)
    states = 5 + 2 * torch.randn(400, 4, 3, generator=generator)
    packed = pack(parts, {"t5": states, "mask": mask[:, None]})
    assert torch.equal(packed[:, :4, :3], states * mask[..., None])
    assert torch.equal(read_rows(parts, packed)[:, :4].float(), mask)
    assert [part.free for part in parts] == [True, False]
    with pytest.raises(InputError, match=r"attack\.parts=\[t5\]"):
        free_cells(parts, ["mask"])
    spread = Spread.measured(parts, iter(packed))
    assert torch.allclose(spread.mean[:3, :3], torch.tensor(5.0), atol=0.6)
    assert spread.std[:4, :3].unique().tolist() == pytest.approx([2.0], rel=0.1)
    # one, two or three tokens: two thirds of the prompts have the second one, a third the third
    assert spread.mean[4].tolist() == [1, 1, 0, 0]
