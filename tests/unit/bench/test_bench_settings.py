import pytest

from dori_lightning.bench.measure import BenchSettings
from dori_lightning.types import InputError


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"rows": ("attack", "scaling")}, "task.rows.*got attack, scaling"),
        ({"rows": ("attack", "attack")}, "task.rows"),
        ({"rows": ()}, "got none"),
        ({"repeats": 0}, "task.repeats must be >= 1"),
        ({"audit_pairs": 0}, "task.audit_pairs must be >= 1"),
        ({"seconds": 0.0}, "task.seconds must be > 0 or null"),
    ],
)
def test_impossible_settings_are_refused(settings, part):
    with pytest.raises(InputError, match=part):
        BenchSettings(**settings)  # type: ignore[arg-type]
