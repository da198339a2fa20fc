import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visae.features.thinning import FeatureSample, join_samples, keep_shares, places_hash, thin


def sample_of(features, rows):
    values = torch.arange(len(features), dtype=torch.float32)
    return FeatureSample(features=torch.tensor(features), rows=torch.tensor(rows), values=values)


def entries(sample):
    return set(zip(sample.features.tolist(), sample.rows.tolist(), strict=True))


def test_everything_stays_when_it_fits():
    shares = keep_shares(torch.tensor([5, 0, 7]), budget=12)
    assert shares.tolist() == [1.0, 1.0, 1.0]


def test_beyond_the_budget_no_feature_keeps_more_than_its_part():
    counts = torch.tensor([1000, 10, 0, 400])
    shares = keep_shares(counts, budget=400)
    assert shares.tolist() == [0.1, 1.0, 1.0, 0.25]
    assert float((shares * counts).sum()) <= 400


@given(st.permutations(range(300)), st.integers(1, 299), st.integers(0, 2**40))
def test_the_sample_is_the_same_for_every_order_and_division(order, cut, seed):
    features = [place % 3 for place in range(300)]
    rows = [place * 17 for place in range(300)]
    shares = torch.tensor([0.3, 0.8, 1.0], dtype=torch.float64)
    whole = thin(sample_of(features, rows), shares, seed=seed)
    parts = [
        thin(sample_of([features[i] for i in part], [rows[i] for i in part]), shares, seed=seed)
        for part in (order[:cut], order[cut:])
    ]
    assert entries(join_samples(parts)) == entries(whole)
    assert {row for feature, row in entries(whole) if feature == 2} == set(rows[2::3])


def test_an_even_share_stays():
    n = 20_000
    sample = sample_of([0, 1] * n, [row for row in range(n) for _ in range(2)])
    kept = thin(sample, torch.tensor([0.1, 0.5], dtype=torch.float64), seed=3)
    counts = torch.bincount(kept.features).tolist()
    assert counts[0] == pytest.approx(0.1 * n, abs=5 * (0.09 * n) ** 0.5)
    assert counts[1] == pytest.approx(0.5 * n, abs=5 * (0.25 * n) ** 0.5)
    middle = float(kept.rows[kept.features == 1].double().mean())
    assert middle == pytest.approx(n / 2, rel=0.03)


def test_hashes_of_neighbouring_places_differ_in_every_bit_half_the_time():
    rows = np.arange(4096)
    one = places_hash(np.zeros(4096, dtype=np.int64), rows, seed=0)
    for other in (
        places_hash(np.zeros(4096, dtype=np.int64), rows + 1, seed=0),
        places_hash(np.ones(4096, dtype=np.int64), rows, seed=0),
        places_hash(np.zeros(4096, dtype=np.int64), rows, seed=1),
    ):
        flipped = (one ^ other)[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)
        assert np.abs(flipped.mean(0) - 0.5).max() < 0.05
