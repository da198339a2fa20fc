import math

import pytest
import torch

from visae.features.record import BANDS
from visae.reports.wording import (
    BAND_TITLES,
    FLAG_MEANINGS,
    count,
    feature_facts,
    fixed,
    number,
    percent,
    plural,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (6.2149, "6.21"),
        (0.012345, "0.0123"),
        (9.997, "10.0"),
        (0.09999, "0.100"),
        (-0.5, "−0.500"),
        (123.4, "123"),
        (12345.0, "12 345"),
        (None, "n/a"),
        (math.nan, "n/a"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_other_forms():
    assert number(9.06, 2) == "9.1"
    assert [fixed(1.005001), fixed(-0.25), fixed(None), fixed(math.nan)] == [
        "1.01",
        "−0.25",
        "n/a",
        "n/a",
    ]
    assert [count(0), count(9999), count(10_000)] == ["0", "9999", "10 000"]
    assert [percent(0.0), percent(0.0069), percent(0.1234), percent(None)] == [
        "0 %",
        "0.69 %",
        "12.3 %",
        "n/a",
    ]
    assert [plural(1, "image"), plural(2, "image"), plural(3, "class", "classes")] == [
        "1 image",
        "2 images",
        "3 classes",
    ]


def test_every_band_and_flag_has_words(index):
    from visae.features.places import TokenPlaces
    from visae.features.statistics import flags
    from visae.features.sums import FeatureSums

    assert set(BAND_TITLES) == set(BANDS)
    places = TokenPlaces.of(index.record.layout, "patches")
    (codes,) = index.shards()
    image_max = codes.max_per_image(8)
    sums = FeatureSums.of_shard(codes, image_max, places, torch.zeros(24, dtype=torch.int64), 1)
    assert set(FLAG_MEANINGS) == set(flags(sums, places))


def test_the_facts_of_a_feature_say_what_is_unknown(index):
    facts = dict(feature_facts(index.row(1), index.n_images))
    assert facts["entropy"] == facts["position R²"] == "n/a"
    assert facts["images"] == "0 of 24"
    assert facts["best class (lift)"] == "no class stands out"
    assert facts["flags"] == "dead"
