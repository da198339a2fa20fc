import pytest

from visae.progress import size_text


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 kB"),
        (940, "0.94 kB"),
        (999_999, "1000 kB"),
        (310_400_000, "310.4 MB"),
        (2_460_000_000, "2.46 GB"),
    ],
)
def test_sizes_are_told_in_the_unit_that_suits_them(n_bytes, text):
    assert size_text(n_bytes) == text
