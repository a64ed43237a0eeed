import json
from dataclasses import replace
from pathlib import Path

import pytest

from dori_lightning.bench.report import (
    BenchSettings,
    Family,
    Limits,
    Row,
    ShapeSettings,
    family_of,
    family_table,
    markdown,
    speed_figure,
)
from dori_lightning.types import InputError

B1 = Row("B1", "fair", pairs=4, seconds=(8.0, 9.0, 40.0), warm_up=1.0, samples=90, peak_share=0.2)
OURS = replace(B1, name="ours", seconds=(4.0, 3.0, 5.0), peak_bytes=2**21, alone_share=0.7)
GONE = Row("B2", "compiled", skipped="no C++ compiler")
FAMILY = Family(
    "attack",
    "Attack",
    (B1, GONE, OURS),
    {"pairs": 4},
    Limits(1e11, "float32", 1.0, 0.5),
    (0.1, 1.0),
)
NAMES = [(n, f"{n} {word}") for n in (1, 2) for word in ("pairs", "budgets")]
GROWTH = Family(
    "scaling", "Growth", tuple(Row(name, "", pairs=n, seconds=(float(n),)) for n, name in NAMES)
)


def test_a_row_speaks_of_medians_per_pair() -> None:
    assert B1.median == 9.0
    assert B1.per_pair == 2.25
    assert B1.samples_per_second == 10.0
    rows = FAMILY.as_json()["rows"]
    assert rows[2]["times_as_fast_as_first"] == 2.25
    assert "median_seconds" not in rows[1]


def test_a_family_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "attack.json"
    path.write_text(json.dumps(FAMILY.as_json()))
    assert family_of(path) == FAMILY
    path.write_text(json.dumps({"name": "attack"}))
    with pytest.raises(InputError, match="remove it"):
        family_of(path)


def test_tables_and_figure_show_what_was_measured() -> None:
    text = markdown([FAMILY, GROWTH])
    assert "| ours | 1 [0.75, 1.25] | 2.25 |" in text
    assert "not measured: no C++ compiler" in text
    assert "GFLOP" not in text, "columns without a number are left out"
    assert family_table(FAMILY).row_count == 3
    figure = speed_figure({"attack": FAMILY, "scaling": GROWTH})
    assert figure is not None
    assert figure.startswith(b"\x89PNG")
    assert speed_figure({}) is None


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"rows": ("attack", "speed")}, "task.rows"),
        ({"rows": ()}, "got none"),
        ({"repeats": 0}, "task.repeats must be >= 1"),
        ({"quality_pairs": 17}, "task.quality_pairs"),
        ({"scaling_budgets": (16,)}, "task.scaling_steps=8"),
        ({"scaling_pairs": ()}, "task.scaling_pairs"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], part: str) -> None:
    with pytest.raises(InputError, match=part):
        BenchSettings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"latent": 12}, {"dtype": "fp8"}, {"pairs": 0}])
def test_impossible_shapes_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"task\.sd14"):
        ShapeSettings(**settings)  # type: ignore[arg-type]
