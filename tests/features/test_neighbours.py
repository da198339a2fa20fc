import torch

from visae.features.neighbours import N_NEIGHBOURS, nearest_features


def test_neighbours_are_the_largest_cosines(monkeypatch):
    monkeypatch.setattr("visae.features.neighbours._BLOCK", 7)
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) * 3
    features, cosines = nearest_features(rows)
    exact = torch.nn.functional.cosine_similarity(
        rows.double()[:, None], rows.double()[None], dim=2
    ).fill_diagonal_(-2.0)
    expected = exact.topk(N_NEIGHBOURS, dim=1)
    assert torch.equal(features, expected.indices)
    torch.testing.assert_close(cosines.double(), expected.values, rtol=1e-5, atol=1e-6)


def test_few_features_have_few_neighbours():
    features, cosines = nearest_features(torch.eye(2))
    assert features.tolist() == [[1, -1, -1, -1, -1], [0, -1, -1, -1, -1]]
    assert not cosines.any()
    assert nearest_features(torch.ones(1, 3))[0].tolist() == [[-1] * N_NEIGHBOURS]


def test_a_row_of_zeros_is_near_nothing():
    features, cosines = nearest_features(torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.1]]))
    assert features[0, 0] == 2
    assert cosines[1].tolist() == [0.0] * N_NEIGHBOURS
