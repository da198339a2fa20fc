import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from visae.evaluation.probes import (
    average_precision,
    average_precision_of,
    best_feature_per_class,
    rank_codes,
    weighted_scores,
)
from visae.saes.codes import SparseCodes


def naive(dense: np.ndarray, classes: np.ndarray, n_classes: int) -> np.ndarray:
    """scikit-learn's score of every feature and class, over labelled images."""
    labelled = classes >= 0
    dense, classes = dense[labelled], classes[labelled]
    return np.array(
        [
            [
                average_precision_score(classes == c, column) if (classes == c).any() else np.nan
                for c in range(n_classes)
            ]
            for column in dense.T
        ]
    )


@st.composite
def problems(draw):
    """Image-level activations with ties, silent images and features, and some labels missing."""
    n_images, n_features = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    n_classes = draw(st.integers(1, 4))
    level = st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0, 3.0])
    dense = draw(
        st.lists(
            st.lists(level, min_size=n_features, max_size=n_features),
            min_size=n_images,
            max_size=n_images,
        )
    )
    classes = draw(
        st.lists(st.integers(-1, n_classes - 1), min_size=n_images, max_size=n_images).filter(
            lambda labels: max(labels) >= 0
        )
    )
    return torch.tensor(dense), torch.tensor(classes), n_classes


@given(problem=problems())
def test_average_precision_is_scikit_learns(problem):
    dense, classes, n_classes = problem
    found = average_precision(SparseCodes.from_dense(dense), classes, n_classes)
    expected = naive(dense.numpy(), classes.numpy(), n_classes)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-38, 1.0, 1e30])
def test_average_precision_of_many_images_is_scikit_learns(scale):
    rng = np.random.default_rng(0)
    dense = rng.random((300, 15)) * (rng.random((300, 15)) < 0.3) * scale
    classes = rng.integers(-1, 5, 300)
    codes = SparseCodes.from_dense(torch.tensor(dense, dtype=torch.float32))
    found = average_precision(codes, torch.tensor(classes), 5)
    single = np.asarray(dense, dtype=np.float32)
    np.testing.assert_allclose(found, naive(single, classes, 5), atol=1e-12)


def test_a_range_of_features_gives_those_rows():
    rng = np.random.default_rng(1)
    codes = SparseCodes.from_dense(torch.tensor(rng.random((40, 9)) * (rng.random((40, 9)) < 0.5)))
    classes = torch.tensor(rng.integers(0, 3, 40))
    whole = average_precision(codes, classes, 3)
    parts = [
        average_precision(codes, classes, 3, features=range(start, min(start + 4, 9)))
        for start in (0, 4, 8)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_a_constant_predictor_scores_the_share_of_the_class(value):
    classes = torch.tensor([0] * 6 + [1] * 2)
    codes = SparseCodes.from_dense(torch.full((8, 1), value))
    assert average_precision(codes, classes, 2).tolist() == [[0.75, 0.25]]


def test_random_activations_score_close_to_the_share_of_the_class():
    rng = np.random.default_rng(2)
    codes = SparseCodes.from_dense(torch.tensor(rng.random((2000, 20))))
    classes = torch.tensor(rng.permutation(np.repeat([0, 0, 0, 1], 500)))
    found = average_precision(codes, classes, 2).mean(0)
    assert found.tolist() == pytest.approx([0.75, 0.25], abs=0.01)


def test_more_classes_than_fit_short_integers():
    classes = torch.tensor([0, 40_000, 40_000, 7])
    codes = SparseCodes.from_dense(torch.tensor([[1.0], [2.0], [0.5], [0.0]]))
    found = average_precision(codes, classes, 40_001)
    assert found[0, 40_000] == pytest.approx((1 + 2 / 3) / 2)
    assert found[0, 7] == pytest.approx(1 / 4)


def test_the_best_feature_is_the_first_of_equal_ones_and_none_without_images():
    nan = float("nan")
    scores = torch.tensor([[0.1, 0.5, nan], [0.7, 0.5, nan], [0.7, 0.2, nan]], dtype=torch.float64)
    assert best_feature_per_class(scores).tolist() == [1, 0, -1]


def naive_top(values: np.ndarray, positive: np.ndarray, weights: np.ndarray, n_top: int) -> float:
    """Expected precision of the top when equal activations come in random order."""
    repeat = weights.astype(int)
    values, positive = np.repeat(values, repeat), np.repeat(positive, repeat)
    n_top = min(n_top, len(values))
    share = np.array([positive[values == value].mean() for value in values])
    order = np.argsort(-values, kind="stable")
    return float(share[order][:n_top].mean())


@pytest.mark.parametrize("n_top", [1, 4, 16, 500])
@pytest.mark.parametrize("tied", [False, True])
def test_weighted_scores_are_those_of_repeated_images(n_top, tied):
    rng = np.random.default_rng(3)
    dense = rng.random((40, 3)) * (rng.random((40, 3)) < [0.0, 0.4, 1.0])
    dense = np.ceil(dense * 4) / 4 if tied else dense
    positive = rng.random(40) < 0.3
    weights = rng.integers(0, 4, (7, 40)).astype(float)
    ranked = rank_codes(SparseCodes.from_dense(torch.tensor(dense)))
    for feature in range(3):
        average, top = weighted_scores(ranked.column(feature), positive, weights, n_top=n_top)
        for row, weight in enumerate(weights):
            expected = average_precision_score(positive, dense[:, feature], sample_weight=weight)
            assert average[row] == pytest.approx(expected)
            expected = naive_top(dense[:, feature], positive, weight, n_top)
            assert top[row] == pytest.approx(expected)


def test_a_class_without_weight_has_no_score():
    ranked = rank_codes(SparseCodes.from_dense(torch.tensor([[1.0], [2.0], [0.0]])))
    weights = np.array([[1.0, 0.0, 1.0]])
    average, top = weighted_scores(
        ranked.column(0), np.array([False, True, False]), weights, n_top=2
    )
    assert np.isnan(average[0])
    assert np.isnan(top[0])


def test_one_sorting_serves_any_labelling():
    rng = np.random.default_rng(4)
    dense = rng.random((50, 6)) * (rng.random((50, 6)) < 0.5)
    ranked = rank_codes(SparseCodes.from_dense(torch.tensor(dense)))
    for seed in range(3):
        classes = np.random.default_rng(seed).integers(0, 4, 50)
        np.testing.assert_allclose(
            average_precision_of(ranked, classes, 4), naive(dense, classes, 4), atol=1e-12
        )
