import pytest

from dori_lightning.bench.measure import BenchSettings, ShapeSettings
from dori_lightning.types import InputError


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"rows": ("attack", "scaling")}, "task.rows.*got attack, scaling"),
        ({"rows": ("attack", "attack")}, "task.rows"),
        ({"rows": ()}, "got none"),
        ({"repeats": 0}, "task.repeats must be >= 1"),
        ({"audit_pairs": 0}, "task.audit_pairs must be >= 1"),
    ],
)
def test_impossible_settings_are_refused(settings, part):
    with pytest.raises(InputError, match=part):
        BenchSettings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"latent": 12}, {"dtype": "fp8"}, {"pairs": 0}])
def test_impossible_shapes_are_refused(settings):
    with pytest.raises(InputError, match=r"task\.sd14"):
        ShapeSettings(**settings)  # type: ignore[arg-type]
