"""Tensors on disk: exact, and every damage found."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from visae.errors import CheckpointError, StoreError
from visae.storage.hashing import hash_file
from visae.storage.tensors import FileRef, read_tensors, verify_file, write_tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]


@st.composite
def named_tensors(draw):
    names = draw(st.lists(st.text("abz_.@9/", min_size=1), unique=True, min_size=1, max_size=4))
    shapes = st.lists(st.integers(0, 4), max_size=3)
    return {
        name: torch.randint(0, 100, draw(shapes)).to(draw(st.sampled_from(DTYPES)))
        for name in names
    }


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=named_tensors())
def test_what_is_written_is_read(tmp_path, tensors):
    ref = write_tensors(tmp_path, "a.safetensors", tensors)
    verify_file(tmp_path, ref)
    read = read_tensors(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_the_reference_describes_the_file(tmp_path):
    ref = write_tensors(tmp_path, "residual@9/00000.safetensors", {"a": torch.ones(3)})
    path = tmp_path / "residual@9" / "00000.safetensors"
    assert ref == FileRef(
        name="residual@9/00000.safetensors",
        n_bytes=path.stat().st_size,
        sha256=hash_file(path),
    )


def test_equal_tensors_make_equal_files_in_any_order(tmp_path):
    first, second = torch.randn(2, 3), torch.randn(4)
    one = write_tensors(tmp_path, "one", {"a": first, "b": second})
    two = write_tensors(tmp_path, "two", {"b": second, "a": first.T.contiguous().T})
    assert one.sha256 == two.sha256


def test_tensors_that_share_memory_are_each_written(tmp_path):
    base = torch.arange(6.0)
    tensors = {"all": base, "same": base, "head": base[:2], "rows": base.view(2, 3).T}
    write_tensors(tmp_path, "a.safetensors", tensors)
    read = read_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_slice_does_not_bring_the_whole_with_it(tmp_path):
    whole = torch.zeros(100_000)
    assert write_tensors(tmp_path, "a.safetensors", {"a": whole[:3]}).n_bytes < 1_000


@pytest.fixture
def shard(tmp_path):
    return write_tensors(tmp_path, "a.safetensors", {"a": torch.arange(100.0)})


def test_a_truncated_file_is_found_by_reading_and_by_its_size(tmp_path, shard):
    path = tmp_path / shard.name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StoreError, match=r"not a whole safetensors file.*cut short"):
        read_tensors(path)
    wanted = f"has {shard.n_bytes - 10} bytes instead of {shard.n_bytes}.*cut short"
    with pytest.raises(StoreError, match=wanted):
        verify_file(tmp_path, shard)


@pytest.mark.parametrize("position", [0, 10, -1])
def test_one_flipped_bit_is_found_by_the_checksum(tmp_path, shard, position):
    path = tmp_path / shard.name
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"checksum differs.*altered"):
        verify_file(tmp_path, shard)


def test_a_missing_file_is_named(tmp_path, shard):
    path = tmp_path / shard.name
    path.unlink()
    with pytest.raises(StoreError, match=r"missing.*a\.safetensors"):
        read_tensors(path)
    with pytest.raises(StoreError, match=r"missing.*a\.safetensors"):
        verify_file(tmp_path, shard)


@pytest.mark.parametrize("content", [b"", b"no tensors at all", b"\x80\x04\x95pickle"])
def test_another_file_is_no_tensors(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(StoreError, match="not a whole safetensors file"):
        read_tensors(tmp_path / "a.safetensors")


def test_the_caller_chooses_the_error(tmp_path, shard):
    (tmp_path / shard.name).unlink()
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path / shard.name, error=CheckpointError)
    with pytest.raises(CheckpointError):
        verify_file(tmp_path, shard, error=CheckpointError)


def test_wide_numbers_come_first_so_that_every_tensor_is_aligned(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(5, dtype=torch.bfloat16)}
    tensors |= {"c": torch.ones(1, dtype=torch.float64), "d": torch.ones(1)}
    write_tensors(tmp_path, "a.safetensors", tensors)
    data = (tmp_path / "a.safetensors").read_bytes()
    n_header = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:n_header])
    assert list(entries) == ["c", "d", "b", "a"]
    for name, entry in entries.items():
        assert (n_header + entry["data_offsets"][0]) % tensors[name].element_size() == 0
