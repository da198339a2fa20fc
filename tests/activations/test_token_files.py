import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from visae.activations import token_files
from visae.activations.token_files import TokenFile, TokenReader, tensor_file
from visae.errors import StoreError

WIDTH = 3


def write(path, values, *, before=0):
    """Values (image, stored token, width) as bytes after some others."""
    path.write_bytes(b"\xff" * before + values.numpy().tobytes())
    return TokenFile(path, before, len(values), values[0].nbytes if len(values) else 0)


def read(files, images, *, skip, n_tokens, dtype=torch.float32, n_threads=2):
    token_bytes = WIDTH * dtype.itemsize
    into = torch.full((len(images), n_tokens, WIDTH), float("nan"), dtype=dtype)
    reader = TokenReader(files, skip_bytes=skip * token_bytes, image_bytes=n_tokens * token_bytes)
    with ThreadPoolExecutor(n_threads) as threads:
        reader.read(np.array(images, dtype=np.int64), into, threads)
    return into


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    n_stored=st.integers(1, 4),
    before=st.sampled_from([0, 1, 9]),
    largest_gap=st.sampled_from([0, 2**16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_images_and_tokens_are_read_exactly(
    tmp_path_factory, sizes, n_stored, before, largest_gap, dtype, data
):
    folder = tmp_path_factory.mktemp("files")
    values = torch.randn(sum(sizes), n_stored, WIDTH).to(dtype)
    parts = values.split(sizes)
    raw = [part.view(torch.int16 if dtype == torch.bfloat16 else torch.int32) for part in parts]
    files = [write(folder / str(i), part, before=before) for i, part in enumerate(raw)]
    skip = data.draw(st.integers(0, n_stored - 1))
    n_tokens = data.draw(st.integers(1, n_stored - skip))
    images = sorted(data.draw(st.sets(st.integers(0, max(0, sum(sizes) - 1)))))
    images = images if sum(sizes) else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "_LARGEST_GAP", largest_gap)
        patch.setattr(token_files, "_IMAGES_PER_READ", 2)
        found = read(files, images, skip=skip, n_tokens=n_tokens, dtype=dtype)
    assert torch.equal(found, values[images, skip : skip + n_tokens])


@pytest.mark.parametrize("n_stored", [2, 4])
@pytest.mark.parametrize("most", [1, 5, 24, 25, 70])
def test_reads_that_give_less_than_asked_are_continued(tmp_path, monkeypatch, n_stored, most):
    values = torch.randn(20, n_stored, WIDTH)
    files = [write(tmp_path / "a", values)]
    preadv = os.preadv

    def short(descriptor, pieces, position):
        kept, left = [], most
        for piece in pieces:
            kept.append(piece[: min(left, len(piece))])
            left -= len(kept[-1])
            if left == 0:
                break
        return preadv(descriptor, kept, position)

    monkeypatch.setattr(os, "preadv", short)
    assert torch.equal(read(files, range(20), skip=0, n_tokens=2), values[:, :2])


def test_neighbours_are_read_at_once(tmp_path, monkeypatch):
    """The reads of a store that keeps more tokens than are wanted stay large."""
    files = [write(tmp_path / name, torch.randn(30, 5, WIDTH)) for name in "ab"]
    asked, preadv = [], os.preadv

    def counted(descriptor, pieces, position):
        asked.append(sum(len(piece) for piece in pieces))
        return preadv(descriptor, pieces, position)

    monkeypatch.setattr(os, "preadv", counted)
    image, token = 5 * WIDTH * 4, WIDTH * 4
    read(files, [*range(3, 12), 20, *range(28, 40)], skip=1, n_tokens=4, n_threads=1)
    assert asked == [9 * image - token, image - token, 2 * image - token, 10 * image - token]
    asked.clear()
    read(files, range(60), skip=0, n_tokens=5, n_threads=1)
    assert asked == [30 * image] * 2


def test_wide_gaps_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "_LARGEST_GAP", 8)
    files = [write(tmp_path / "a", torch.randn(7, 5, WIDTH))]
    asked, preadv = [], os.preadv

    def counted(descriptor, pieces, position):
        asked.append([len(piece) for piece in pieces])
        return preadv(descriptor, pieces, position)

    monkeypatch.setattr(os, "preadv", counted)
    read(files, range(7), skip=0, n_tokens=1)
    assert asked == [[WIDTH * 4]] * 7


# Files that are not whole


def test_a_file_that_ends_too_early_is_named(tmp_path):
    files = [write(tmp_path / "a", torch.randn(4, 2, WIDTH))]
    os.truncate(tmp_path / "a", 80)
    with pytest.raises(StoreError, match=r"This shard ends too early .*a\)"):
        read(files, range(4), skip=0, n_tokens=2)


def test_a_file_that_is_gone_is_named(tmp_path):
    files = [TokenFile(tmp_path / "gone", 0, 4, 24)]
    with pytest.raises(StoreError, match=r"cannot be opened: No such file.*gone"):
        read(files, range(4), skip=0, n_tokens=2)


def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch):
    files = [write(tmp_path / "a", torch.randn(4, 2, WIDTH))]

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StoreError, match=r"cannot be read: Input/output error.*Check the disk"):
        read(files, range(4), skip=0, n_tokens=2)


# Safetensors headers


@pytest.fixture
def shard(tmp_path):
    values = torch.randn(6, 4, WIDTH)
    save_file({"activations": values, "other": torch.zeros(5)}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors", values


def test_a_header_says_where_the_tensor_is(shard):
    path, values = shard
    file = tensor_file(path, "activations", (6, 4, WIDTH), "float32")
    assert (file.path, file.n_images, file.stride) == (path, 6, 4 * WIDTH * 4)
    assert torch.equal(read([file], [1, 2, 5], skip=1, n_tokens=2), values[[1, 2, 5], 1:3])


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "said"),
    [
        ("activations", (6, 4, 4), "float32", r"holds F32 \(6, 4, 3\) instead of F32 \(6, 4, 4\)"),
        ("activations", (6, 4, 3), "bfloat16", r"holds F32 .* instead of BF16"),
        ("rows", (6, 4, 3), "float32", "not a whole shard: KeyError 'rows'"),
    ],
)
def test_another_tensor_is_refused(shard, name, shape, dtype, said):
    with pytest.raises(StoreError, match=said):
        tensor_file(shard[0], name, shape, dtype)


@pytest.mark.parametrize("n_bytes", [0, 4, 8, 40])
def test_a_cut_header_is_refused(shard, n_bytes):
    os.truncate(shard[0], n_bytes)
    with pytest.raises(StoreError, match="not a whole shard"):
        tensor_file(shard[0], "activations", (6, 4, WIDTH), "float32")


def test_a_cut_file_is_refused(shard):
    size = shard[0].stat().st_size
    os.truncate(shard[0], size - 30)
    with pytest.raises(StoreError, match=rf"ends after {size - 30} of"):
        tensor_file(shard[0], "activations", (6, 4, WIDTH), "float32")


@pytest.mark.parametrize(
    "header", [b"[1]", b'{"activations": 3}', b"\xff\xfe", b'{"activations": {}}']
)
def test_a_header_that_is_none_is_refused(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(StoreError, match="not a whole shard"):
        tensor_file(path, "activations", (1, 1, 1), "float32")
