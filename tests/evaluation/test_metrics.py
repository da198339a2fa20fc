import numpy as np
import pytest
import torch

from visae.evaluation.metrics import measure
from visae.evaluation.tokens import EvaluatedTokens
from visae.saes.config import SAEConfig
from visae.saes.sae import SAE
from visae.saes.sparsity import TopK

SITE = "residual@1"


@pytest.fixture(scope="module")
def activations():
    return 3 + torch.randn(11, 4, 12, generator=torch.Generator().manual_seed(3))


def naive(sae: SAE, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and reconstruction of float64 activations, by the formulae."""
    w_enc, w_dec = sae.W_enc.detach().double().numpy(), sae.W_dec.detach().double().numpy()
    b_enc, b_dec = sae.b_enc.detach().double().numpy(), sae.b_dec.detach().double().numpy()
    mean, scale = sae.mean.double().numpy(), float(sae.scale)
    p = ((x - mean) / scale - b_dec) @ w_enc.T + b_enc
    k = sae.config.sparsity.k
    floor = np.sort(p, axis=-1)[..., -k][..., None]
    f = np.where(p >= floor, np.maximum(p, 0), 0)
    return f, scale * (f @ w_dec + b_dec) + mean


@pytest.mark.parametrize("shard_sizes", [(11,), (5, 6), (4, 0, 4, 3)])
def test_every_figure_is_the_naive_formula(make_store, random_sae, activations, shard_sizes):
    store = make_store(activations, shard_sizes=shard_sizes)
    sae = random_sae()
    everything = torch.ones(11, dtype=torch.bool)
    found = measure(sae, EvaluatedTokens(store, SITE, "patches"), images=everything)
    x = activations.double().numpy()
    f, rebuilt = naive(sae, x)
    centre = x.mean((0, 1))
    error = ((x - rebuilt) ** 2).sum(2)
    spread = ((x - centre) ** 2).sum(2)
    a, b = x - centre, rebuilt - centre
    cosine = (a * b).sum(2) / np.sqrt((a**2).sum(2) * (b**2).sum(2))
    active = f > 0
    near = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(found.squared_error, error.sum(1), **near)
    np.testing.assert_allclose(found.spread, spread.sum(1), **near)
    np.testing.assert_allclose(found.cosine, cosine.mean(1), **near)
    np.testing.assert_allclose(found.nmse, error.sum() / spread.sum(), **near)
    np.testing.assert_allclose(found.nmse_by_image, error.sum(1) / spread.sum(1), **near)
    np.testing.assert_allclose(found.nmse_by_position, error.sum(0) / spread.sum(0), **near)
    np.testing.assert_allclose(found.l0, active.sum(2).mean(1), **near)
    np.testing.assert_allclose(found.mean_l0, active.sum(2).mean(), **near)
    np.testing.assert_allclose(found.density, active.mean((0, 1)), **near)
    np.testing.assert_array_equal(
        found.l0_histogram, np.bincount(active.sum(2).ravel(), minlength=21)
    )
    assert found.n_tokens == 44
    assert found.dead_share == pytest.approx((~active.any((0, 1))).mean())
    assert found.dense_share == pytest.approx((active.mean((0, 1)) > 0.1).mean())
    np.testing.assert_allclose(found.image_codes.dense(), f.max(1), **near)


@pytest.mark.parametrize("q", [0.0, 0.05, 0.5, 0.9, 1.0])
def test_the_quantile_of_l0_is_numpys(planted, q):
    none = torch.zeros(planted.store.n_images, dtype=torch.bool)
    found = measure(planted.sae, planted.tokens, images=none)
    counts = planted.sae.encode(planted.activations.flatten(0, 1)).gt(0).sum(1).numpy()
    assert found.l0_quantile(q) == np.quantile(counts, q, method="inverted_cdf")


def test_only_the_images_asked_for_keep_their_codes(planted):
    images = torch.zeros(planted.store.n_images, dtype=torch.bool)
    images[[3, 70, 159]] = True
    found = measure(planted.sae, planted.tokens, images=images)
    codes = planted.sae.encode(planted.activations[[3, 70, 159]].flatten(0, 1))
    torch.testing.assert_close(found.image_codes.dense(), codes.view(3, 4, 16).amax(1))


def test_planted_features_are_rebuilt_and_unused_ones_are_dead(planted):
    none = torch.zeros(planted.store.n_images, dtype=torch.bool)
    found = measure(planted.sae, planted.tokens, images=none)
    assert found.nmse < 0.1
    assert found.dead_share == 8 / 16
    assert found.mean_l0 == pytest.approx(2.25)


def test_the_mean_predictor_scores_at_chance(planted):
    sae = SAE(SAEConfig(d_model=12, n_features=16, sparsity=TopK(k=1)))
    sae.mean.copy_(planted.activations.double().mean((0, 1)))
    none = torch.zeros(planted.store.n_images, dtype=torch.bool)
    found = measure(sae, planted.tokens, images=none)
    assert found.nmse == pytest.approx(1, abs=1e-6)
    assert found.cosine.abs().max() < 1e-5
    assert (found.mean_l0, found.dead_share, found.dense_share) == (0, 1, 0)


def test_tokens_the_sae_does_not_read_are_left_out(make_store, random_sae):
    x = torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 100  # the CLS token
    patches = make_store(x[:, 1:])
    everything = make_store(x, tokens="all", special=("cls",))
    images = torch.ones(6, dtype=torch.bool)
    alone, chosen = (
        measure(random_sae(), EvaluatedTokens(store, SITE, "patches"), images=images)
        for store in (patches, everything)
    )
    assert alone.nmse == pytest.approx(chosen.nmse)
    assert alone.n_tokens == chosen.n_tokens == 24


def test_progress_is_told_after_each_shard(planted):
    told: list[int] = []
    none = torch.zeros(planted.store.n_images, dtype=torch.bool)
    measure(planted.sae, planted.tokens, images=none, on_images=told.append)
    assert told == [60, 120, 160]
