import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visae.errors import FeatureIndexError
from visae.features.codes_files import read_codes, read_tokens, write_codes
from visae.saes.codes import SparseCodes
from visae.storage.tensors import write_tensors

NAME = "codes/00000.safetensors"


def random_codes(n_tokens=12, n_features=5, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(n_tokens, n_features, generator=generator)
    dense[3] = -1.0  # a token at which nothing fires
    return SparseCodes.from_dense(dense)


def assert_equal(one, other):
    for mine, yours in zip(one, other, strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(yours))


@pytest.fixture
def codes_path(tmp_path):
    write_codes(tmp_path, NAME, random_codes())
    return tmp_path / NAME


def test_codes_come_back(codes_path):
    assert_equal(read_codes(codes_path, n_tokens=12, n_features=5), random_codes())


@settings(max_examples=30)
@given(start=st.integers(0, 12), n=st.integers(0, 12))
def test_a_run_of_tokens_is_that_part_of_the_whole(tmp_path_factory, start, n):
    folder = tmp_path_factory.getbasetemp() / "run_of_tokens"
    if not (folder / NAME).is_file():
        write_codes(folder, NAME, random_codes())
    stop = min(12, start + n)
    found = read_tokens(folder / NAME, slice(start, stop), n_features=5)
    expected = random_codes().dense()[start:stop]
    assert torch.equal(found.dense(), expected)


def test_tokens_beyond_the_end_are_refused(codes_path):
    with pytest.raises(FeatureIndexError, match="cut short"):
        read_tokens(codes_path, slice(10, 14), n_features=5)


def test_a_missing_or_truncated_file_is_refused(codes_path):
    data = codes_path.read_bytes()
    codes_path.write_bytes(data[:-8])
    with pytest.raises(FeatureIndexError, match="not a whole"):
        read_codes(codes_path, n_tokens=12, n_features=5)
    with pytest.raises(FeatureIndexError, match="not a whole"):
        read_tokens(codes_path, slice(0, 2), n_features=5)
    codes_path.unlink()
    with pytest.raises(FeatureIndexError, match="missing"):
        read_codes(codes_path, n_tokens=12, n_features=5)


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": torch.tensor([0, 2])},
        {"offsets": torch.arange(13).flip(0)},
        {"features": torch.full((12,), 5, dtype=torch.int32)},
        {"features": torch.full((12,), -1, dtype=torch.int32)},
        {"values": torch.full((12,), torch.nan)},
        {"values": torch.ones(11)},
        {"more": torch.ones(1)},
    ],
    ids=["few tokens", "falling", "feature too large", "negative", "nan", "few values", "more"],
)
def test_codes_that_cannot_be_are_refused(tmp_path, change):
    sound = {
        "offsets": torch.arange(13),
        "features": torch.zeros(12, dtype=torch.int32),
        "values": torch.ones(12),
    }
    write_tensors(tmp_path, NAME, sound)
    read_codes(tmp_path / NAME, n_tokens=12, n_features=5)
    write_tensors(tmp_path, NAME, sound | change)
    with pytest.raises(FeatureIndexError, match="delete it and run visae index again"):
        read_codes(tmp_path / NAME, n_tokens=12, n_features=5)
