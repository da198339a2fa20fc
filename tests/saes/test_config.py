import pytest

from visae.errors import ConfigError
from visae.saes.config import ArchetypesConfig, SAEConfig
from visae.saes.sparsity import TopK


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
