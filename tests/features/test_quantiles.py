import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from visae.features.quantiles import N_BINS, feature_histograms, feature_quantiles
from visae.features.thinning import FeatureSample

ENTRIES = st.lists(st.tuples(st.integers(0, 3), st.floats(0.0078125, 50, width=32)), max_size=60)


@given(ENTRIES)
def test_quantiles_are_those_of_numpy(entries):
    features = torch.tensor([f for f, _ in entries], dtype=torch.int64)
    values = torch.tensor([v for _, v in entries], dtype=torch.float32)
    sample = FeatureSample(features=features, rows=torch.zeros_like(features), values=values)
    found = feature_quantiles(sample, (0.0, 0.5, 0.9, 0.99, 1.0), n_features=4)
    for feature in range(4):
        own = values[features == feature].double().numpy()
        expected = np.quantile(own, (0, 0.5, 0.9, 0.99, 1)) if len(own) else np.zeros(5)
        np.testing.assert_allclose(found[feature], expected, rtol=1e-12)


@given(ENTRIES)
def test_histograms_count_every_value_once(entries):
    features = torch.tensor([f for f, _ in entries], dtype=torch.int64)
    values = torch.tensor([v for _, v in entries], dtype=torch.float32)
    largest = torch.zeros(4).scatter_reduce_(0, features, values, "amax")
    found = feature_histograms(features, values, largest)
    assert found.shape == (4, N_BINS)
    for feature in range(4):
        own = values[features == feature].double().numpy()
        top = float(largest[feature])
        place = np.minimum((own / top * N_BINS).astype(int), N_BINS - 1) if len(own) else []
        assert found[feature].tolist() == np.bincount(place, minlength=N_BINS).tolist()


def test_the_largest_value_is_in_the_last_bin():
    found = feature_histograms(torch.tensor([0, 0]), torch.tensor([4.0, 1.0]), torch.tensor([4.0]))
    assert found[0, -1] == 1
    assert found[0, N_BINS // 4] == 1
