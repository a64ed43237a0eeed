from dataclasses import replace

from dori_lightning.bench.attack import ALONE
from dori_lightning.bench.measure import Family, Row
from dori_lightning.bench.report import markdown, speed_figure

B1 = Row("B1", "fair", pairs=4, seconds=(8.0, 9.0, 40.0), samples=90, values={"last_loss": 0.5})
OURS = replace(
    B1, name="ours", seconds=(4.0, 3.0, 5.0), flops=2e12, peak_bytes=2**21, planned_bytes=3 * 2**20
)
ALONE_ROW = Row(ALONE, "", pairs=1, seconds=(0.75,))
WAYS = (B1, Row("B2", "", skipped="no compiler"), OURS, ALONE_ROW)
ATTACK = Family("attack", "", WAYS, peak=1e12)
AUDIT = Family("audit", "", (Row("ours", "whole", pairs=2, seconds=(3.0,)),))


def test_one_table_holds_every_family():
    lines = markdown([ATTACK, AUDIT]).splitlines()
    cells = {tuple(line.split(" | ")[:2]): line.strip("| ").split(" | ") for line in lines[2:7]}
    assert len(lines[0].split(" | ")) == len(cells["| attack", "ours"]) == 11
    ours = cells["| attack", "ours"]
    assert ours[2:5] == ["1 [0.75, 1.25]", "2.25", "75%"]
    assert ours[5:9] == ["50.0%", "22.5", "2", "3"]
    assert "no compiler" in cells["| attack", "B2"][2]
    assert cells["| audit", "ours"][2] == "1.5 [1.5, 1.5]"


def test_the_figure_has_what_is_measured_against_the_fair_loop():
    figure = speed_figure([ATTACK, AUDIT])
    assert figure is not None
    assert figure.startswith(b"\x89PNG")
    assert speed_figure([AUDIT]) is None
