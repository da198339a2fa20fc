import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from visae.features.examples import choose_examples, merge_strongest, strongest
from visae.features.thinning import FeatureSample

N_FEATURES = 4
MAXIMA = st.dictionaries(
    st.tuples(st.integers(0, N_FEATURES - 1), st.integers(0, 40)),
    st.sampled_from([0.5, 1.0, 1.5, 2.0, 7.25]),
    max_size=90,
)


def sample_of(maxima):
    keys = sorted(maxima, key=lambda key: (key[1], key[0]))
    return FeatureSample(
        features=torch.tensor([feature for feature, _ in keys], dtype=torch.int64),
        rows=torch.tensor([row for _, row in keys], dtype=torch.int64),
        values=torch.tensor([maxima[key] for key in keys], dtype=torch.float32),
    )


def ranked(maxima, feature):
    """(row, maximum) of a feature's images, strongest first, of equal ones the earlier."""
    own = [(row, value) for (f, row), value in maxima.items() if f == feature]
    return sorted(own, key=lambda pair: (-pair[1], pair[0]))


def rows_of(table, feature):
    found = zip(table.images[feature].tolist(), table.maxima[feature].tolist(), strict=True)
    pairs = list(found)
    n_found = sum(row >= 0 for row, _ in pairs)
    assert all(pair == (-1, 0.0) for pair in pairs[n_found:])
    return pairs[:n_found]


@given(MAXIMA)
def test_the_strongest_are_the_first_of_the_ranking(maxima):
    table = strongest(sample_of(maxima), n_features=N_FEATURES, n_kept=3)
    for feature in range(N_FEATURES):
        assert rows_of(table, feature) == ranked(maxima, feature)[:3]


@given(MAXIMA, st.integers(0, 41))
def test_parts_merge_to_the_whole(maxima, cut):
    parts = [
        {key: value for key, value in maxima.items() if (key[1] < cut) == is_first}
        for is_first in (True, False)
    ]
    tables = [strongest(sample_of(part), n_features=N_FEATURES, n_kept=3) for part in parts]
    merged = merge_strongest(*tables)
    whole = strongest(sample_of(maxima), n_features=N_FEATURES, n_kept=3)
    assert torch.equal(merged.images, whole.images)
    assert torch.equal(merged.maxima, whole.maxima)


@given(MAXIMA, st.integers(0, 5))
def test_bands_are_drawn_from_thirds_of_the_rest(maxima, seed):
    sample = sample_of(maxima)
    top = strongest(sample, n_features=N_FEATURES, n_kept=2)
    bands = choose_examples(top, sample, seed=seed)
    assert list(bands) == ["top", "upper", "middle", "low", "random_active"]
    for feature in range(N_FEATURES):
        ranking = ranked(maxima, feature)
        rest = ranking[2:]
        for number, band in enumerate(("upper", "middle", "low")):
            third = [pair for rank, pair in enumerate(rest) if rank * 3 // len(rest) == number]
            chosen = rows_of(bands[band], feature)
            assert len(chosen) == min(2, len(third))
            assert set(chosen) <= set(third)
            assert chosen == sorted(chosen, key=lambda pair: (-pair[1], pair[0]))
        drawn = rows_of(bands["random_active"], feature)
        assert len(drawn) == min(2, len(ranking))
        assert set(drawn) <= set(ranking)
        assert len({row for row, _ in drawn}) == len(drawn)


def test_the_seed_changes_what_is_drawn_but_not_the_strongest():
    generator = np.random.default_rng(0)
    maxima = {(0, row): float(value) for row, value in enumerate(generator.random(300))}
    sample = sample_of(maxima)
    top = strongest(sample, n_features=1, n_kept=9)
    one, same, other = (choose_examples(top, sample, seed=seed) for seed in (0, 0, 1))
    for band in one:
        assert torch.equal(one[band].images, same[band].images)
    assert torch.equal(one["top"].images, other["top"].images)
    for band in ("upper", "middle", "low", "random_active"):
        assert not torch.equal(one[band].images, other[band].images)


def test_random_active_images_are_an_even_sample():
    maxima = {(feature, row): 1.0 + row for feature in range(4) for row in range(41)}
    sample = sample_of(maxima)
    top = strongest(sample, n_features=N_FEATURES, n_kept=5)
    drawn = [
        row
        for seed in range(60)
        for feature in range(4)
        for row, _ in rows_of(choose_examples(top, sample, seed=seed)["random_active"], feature)
    ]
    counts = np.bincount(drawn, minlength=41)
    expected = len(drawn) / 41
    assert abs(counts - expected).max() < 5 * expected**0.5
