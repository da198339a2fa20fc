import itertools

import numpy as np
import pytest
import torch

from visae.evaluation.stability import live_directions, rotation_null, stability


def directions(n: int, d_model: int, seed: int) -> torch.Tensor:
    rows = torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def test_the_matching_is_the_best_of_all():
    first, second = directions(5, 6, 0), directions(6, 6, 1)
    magnitudes = (first @ second.T).abs().numpy()
    best = max(
        np.mean([magnitudes[i, j] for i, j in enumerate(chosen)])
        for chosen in itertools.permutations(range(6), 5)
    )
    assert stability(first, second).cosine == pytest.approx(best)


def test_the_share_counts_signed_cosines_above_0_7():
    first = torch.eye(4)
    second = torch.stack(
        [torch.tensor([0.8, 0.6, 0, 0]), torch.tensor([0.0, 0, -1, 0]), torch.eye(4)[3]]
    )
    found = stability(first, second)
    assert found.best.tolist() == pytest.approx([0.8, 0.6, 0.0, 1.0])
    assert found.share == 0.5
    # Three of four can be matched: .8 or .6, 1 by magnitude, 1.
    assert found.cosine == pytest.approx((0.8 + 1 + 1) / 3)


def test_the_same_directions_in_another_order_are_fully_stable():
    rows = directions(30, 8, 0)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    found = stability(rows, rows[order])
    assert found.cosine == pytest.approx(1)
    assert found.share == 1


def test_rotations_keep_angles_and_score_as_unrelated_directions_do():
    rows = directions(60, 20, 0)
    rotated = rotation_null(rows, rows, n_rotations=5, seed=0)
    assert len(rotated) == 5
    assert len({each.cosine for each in rotated}) == 5
    unrelated = [stability(rows, directions(60, 20, seed)).cosine for seed in range(1, 11)]
    mean = np.mean([each.cosine for each in rotated])
    assert mean == pytest.approx(np.mean(unrelated), abs=0.02)
    assert max(each.share for each in rotated) < 0.2


def test_rotations_follow_their_seed():
    rows = directions(10, 4, 0)
    first, again = (rotation_null(rows, rows, n_rotations=2, seed=3) for _ in range(2))
    assert [each.cosine for each in first] == [each.cosine for each in again]


def test_only_live_features_are_matched(planted):
    live = torch.zeros(16, dtype=torch.bool)
    live[[2, 5, 7]] = True
    found = live_directions(planted.sae, live, most=16, seed=0)
    assert torch.equal(found, torch.eye(12)[[2, 5, 7]])
    some = live_directions(planted.sae, torch.ones(16, dtype=torch.bool), most=6, seed=0)
    assert len(some.unique(dim=0)) == 6
