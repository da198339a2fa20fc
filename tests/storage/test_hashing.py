"""Hashes: stable across runs and machines, sensitive to content and to nothing else."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visae.storage.hashing import hash_bytes, hash_file, hash_json, hash_tensors

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_known_values():
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_bytes(b"abc") == hash_bytes(memoryview(b"abc")) == abc
    assert hash_json({"b": [1, 2.5, None], "a": "ä"}) == hash_bytes(
        '{"a":"ä","b":[1,2.5,null]}'.encode()
    )
    tensor = torch.tensor([[1.0, 2.0]], dtype=torch.float32)
    expected = b"w:torch.float32:(1, 2);" + bytes.fromhex("0000803f00000040")
    assert hash_tensors({"w": tensor}) == hashlib.sha256(expected).hexdigest()


def test_a_file_has_the_hash_of_its_bytes(tmp_path):
    data = bytes(range(256)) * 5_000
    (tmp_path / "a.bin").write_bytes(data)
    assert hash_file(tmp_path / "a.bin") == hash_bytes(data)


@given(JSON)
def test_equal_plain_data_has_an_equal_hash_in_any_key_order(value):
    def reverse(data):
        if isinstance(data, dict):
            return {key: reverse(data[key]) for key in reversed(data)}
        return [reverse(entry) for entry in data] if isinstance(data, list) else data

    assert hash_json(reverse(value)) == hash_json(value)


def test_different_plain_data_has_different_hashes():
    values = [{}, [], None, 0, "0", [0], {"a": 0}, {"a": "0"}, {"a": [0]}, [{"a": 0}], ["a", 0]]
    assert len({hash_json(value) for value in values}) == len(values)


BASE = torch.arange(6, dtype=torch.float32)


@pytest.mark.parametrize(
    "other",
    [
        {"v": BASE},
        {"w": BASE.double()},
        {"w": BASE.view(torch.int32)},
        {"w": BASE.view(2, 3)},
        {"w": BASE + torch.tensor([0, 0, 0, 0, 0, 1e-6])},
        {"w": BASE, "empty": torch.zeros(0)},
        {},
    ],
    ids=["name", "dtype", "dtype of the same bytes", "shape", "one bit", "one more", "none"],
)
def test_a_tensor_hash_depends_on(other):
    assert hash_tensors(other) != hash_tensors({"w": BASE})


def test_a_tensor_hash_does_not_depend_on_order_or_strides():
    first, second = torch.randn(4, 3), torch.randn(2)
    expected = hash_tensors({"a": first, "b": second})
    assert hash_tensors({"b": second, "a": first}) == expected
    assert hash_tensors({"a": first.T.contiguous().T, "b": second}) == expected
    spaced = torch.zeros(4)
    spaced[::2] = second
    assert hash_tensors({"a": first, "b": spaced[::2].requires_grad_()}) == expected


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int64, torch.uint8, torch.complex64]
)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0, 3)])
def test_every_dtype_and_shape_can_be_hashed(dtype, shape):
    zeros, ones = torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    assert (hash_tensors({"w": zeros}) == hash_tensors({"w": ones})) == (zeros.numel() == 0)
