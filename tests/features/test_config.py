import pytest

from visae.errors import ConfigError
from visae.features.config import IndexConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confirmation_share": 0.0}, "confirmation_share is 0"),
        ({"confirmation_share": 1.0}, "confirmation_share is 1"),
        ({"examples_per_band": 0}, "examples_per_band is 0"),
    ],
)
def test_senseless_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        IndexConfig(**options)
