import pytest
import torch

from visae.saes.orthogonality import orthogonality_loss


def rows_of(n_rows, d_model=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_rows, d_model, generator=generator, dtype=torch.float64)


def naive(rows, chunks):
    """2509.22033: pair by pair."""
    total = 0.0
    for chunk in chunks:
        for i in chunk:
            cosines = [
                torch.nn.functional.cosine_similarity(rows[i], rows[j], dim=0) ** 2
                for j in chunk
                if j != i
            ]
            total = total + max(cosines, default=torch.zeros(()))
    return total / len(rows)


@pytest.mark.parametrize("n_rows", [1, 2, 20, 33])
@pytest.mark.parametrize("chunk", [1024, 11])
def test_the_penalty_is_the_mean_of_the_largest_cosines(n_rows, chunk, monkeypatch):
    monkeypatch.setattr("visae.saes.orthogonality._CHUNK_ROWS", chunk)
    rows = rows_of(n_rows).requires_grad_()
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(5))
    chunks = [c.tolist() for c in order.tensor_split(-(-n_rows // chunk))]
    expected = naive(rows, chunks)
    found = orthogonality_loss(rows, torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64))
    if n_rows > 11:
        (gradient,) = torch.autograd.grad(found, rows)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, rows)[0])
        assert gradient.abs().sum() > 0


def test_orthogonal_features_cost_nothing_and_equal_ones_everything():
    generator = torch.Generator()
    assert float(orthogonality_loss(torch.eye(8) * 3, generator)) == 0.0
    assert float(orthogonality_loss(torch.ones(8, 4), generator)) == pytest.approx(1.0)
    opposite = torch.cat([torch.eye(4), -torch.eye(4)])
    assert float(orthogonality_loss(opposite, generator)) == pytest.approx(1.0)
