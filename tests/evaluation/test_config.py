import pytest

from visae.errors import ConfigError
from visae.evaluation.config import EvaluateConfig


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_permutations": 19}, "n_permutations is 19"),
        ({"n_resamples": 999}, "at least 1000"),
        ({"n_top": 0}, "n_top is 0"),
        ({"confirmation_share": 1.0}, "confirmation_share is 1.0"),
        ({"level": 0.0}, "level is 0.0"),
        ({"coverage_precision": 2.0}, "coverage_precision is 2.0"),
        ({"baselines": ("untrained", "untrained")}, "named twice"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        EvaluateConfig(**settings)
