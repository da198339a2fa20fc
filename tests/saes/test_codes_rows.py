"""Rows of sparse codes, against the same rows of the dense matrix."""

import pytest
import torch

from visae.saes.codes import SparseCodes

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
