"""Rows and entries of sparse codes, against the dense matrix."""

import pytest
import torch

from visae.saes.codes import SparseCodes, active_entries

DENSE = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.5, 0.0, 4.0]])


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [3, 0], [1], [2, 2, 1, 0], []])
def test_take_gives_the_rows_in_order(rows):
    chosen = torch.tensor(rows, dtype=torch.int64)
    taken = SparseCodes.from_dense(DENSE).take(chosen)
    assert taken.n_tokens == len(rows)
    assert torch.equal(taken.dense(), DENSE[chosen])


def test_cpu_keeps_the_codes():
    codes = SparseCodes.from_dense(DENSE)
    assert torch.equal(codes.cpu().dense(), DENSE)


@pytest.mark.parametrize("shape", [(0, 3), (5, 1), (40, 30)])
def test_active_entries_are_those_of_nonzero(shape):
    active = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.2
    for found, expected in zip(
        active_entries(active), torch.nonzero(active, as_tuple=True), strict=True
    ):
        assert torch.equal(found, expected)


def test_active_entries_of_a_view_that_is_not_contiguous():
    active = (torch.arange(12).view(3, 4) % 5 == 0).T
    tokens, features = active_entries(active)
    assert list(zip(tokens.tolist(), features.tolist(), strict=True)) == [
        (int(t), int(f)) for t, f in torch.nonzero(active)
    ]
