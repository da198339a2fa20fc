import pytest
from hypothesis import given
from hypothesis import strategies as st

from visae.errors import ConfigError
from visae.saes.config import ArchetypesConfig, SAEConfig
from visae.saes.prefixes import matryoshka_prefixes
from visae.saes.sparsity import TopK


@given(st.integers(1, 4096))
def test_matryoshka_groups_are_a_sixteenth_an_eighth_a_quarter_and_the_rest(sixteenth):
    n_features = 16 * sixteenth
    ends = matryoshka_prefixes(n_features)
    sizes = [b - a for a, b in zip((0, *ends), ends, strict=False)]
    assert [size / n_features for size in sizes] == [1 / 16, 1 / 8, 1 / 4, 9 / 16]
    SAEConfig(d_model=4, n_features=n_features, sparsity=TopK(k=1), prefixes=ends)


@pytest.mark.parametrize("n_features", [1, 15, 17, 100])
def test_features_that_do_not_divide_into_groups_are_refused(n_features):
    with pytest.raises(ConfigError, match=f"n_features {n_features}.*multiple of 16"):
        matryoshka_prefixes(n_features)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"d_model": 0}, "must be positive"),
        ({"n_features": 0, "sparsity": TopK(k=1)}, "must be positive"),
        ({"sparsity": TopK(k=33)}, "k is 33 and n_features is 32"),
        ({"prefixes": (8, 4, 32)}, "must ascend"),
        ({"prefixes": (8, 8, 32)}, "must ascend"),
        ({"prefixes": (0, 32)}, "must ascend"),
        ({"prefixes": (8, 16)}, "end with n_features"),
        ({"prefixes": (8, 64)}, "end with n_features"),
    ],
)
def test_an_impossible_shape_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        SAEConfig(**{"d_model": 4, "n_features": 32, **changes})


@pytest.mark.parametrize(
    ("setting", "said"),
    [({"n_centroids": 1}, "n_centroids is 1"), ({"delta": -1.0}, "delta is -1")],
)
def test_impossible_archetypes_are_refused(setting, said):
    with pytest.raises(ConfigError, match=said):
        ArchetypesConfig(**setting)
