"""Small indexes whose codes are known: the SAE is the identity with a ReLU."""

import shutil

import pytest
import torch

LABELS = (["cat", "dog", "cat", None] * 10)[:38]


def planted_tokens(n_images=38, n_tokens=7, n_features=6, *, seed=0):
    """Tokens (image, token, feature), about a third above zero; the last feature never fires."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(n_images, n_tokens, n_features, generator=generator) - 0.4
    tokens[..., -1] = -1.0
    return tokens


@pytest.fixture(scope="session")
def make_tokens():
    return planted_tokens


@pytest.fixture(scope="session")
def identity_sae():
    """Save an SAE whose feature i is dimension i of the store's activations, above zero."""

    def save(folder, store, *, site="residual@0", tokens=None, n_features=None):
        from visae.saes.checkpoint import Provenance, save_sae
        from visae.saes.config import SAEConfig
        from visae.saes.sae import SAE
        from visae.saes.sparsity import ReLU

        d_model = store.site(site).d_model
        n = n_features or d_model
        sae = SAE(SAEConfig(d_model=d_model, n_features=n, sparsity=ReLU()))
        with torch.no_grad():
            sae.W_enc.copy_(torch.eye(n, d_model))
            sae.W_dec.copy_(torch.eye(n, d_model))
        provenance = Provenance.of_store(
            store,
            site,
            tokens=tokens or store.record.tokens,
            n_tokens=0,
            seed=0,
            control="none",
            recipe={},
        )
        reference = torch.eye(d_model)
        save_sae(sae, folder, provenance=provenance, reference=reference, metrics={})
        return folder

    return save


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, store_of, identity_sae):
    """A store of 38 images with a class token and 2 × 3 patches, and its SAE; do not change it."""
    root = tmp_path_factory.mktemp("workspace")
    store = store_of(
        root / "activations/small",
        {"residual@0": planted_tokens()},
        special=("cls",),
        grid=(2, 3),
        labels=LABELS,
        tokens="all",
        shard_bytes=1,
    )
    assert store.n_shards == 3
    identity_sae(root / "saes/identity", store)
    return root


@pytest.fixture(scope="session")
def small_store(workspace):
    from visae.activations.store import ActivationStore

    return ActivationStore(workspace / "activations/small")


@pytest.fixture(scope="session")
def build(workspace, small_store, numbered_images):
    """Build an index of the workspace's SAE; options are those of ``IndexConfig``."""

    def make(out, *, store=small_store, sae=workspace / "saes/identity", **options):
        from visae.features.build import build_index
        from visae.features.config import IndexConfig

        images = numbered_images(store.n_images)
        return build_index(sae, store, out, config=IndexConfig(**options), images=images)

    return make


@pytest.fixture(scope="session")
def small_index(workspace, build):
    """The index of all images; do not change it."""
    return build(workspace / "features/identity@small", examples_per_band=2)


@pytest.fixture
def own_index(small_index, tmp_path):
    """The folder of a copy of the index, to be damaged."""
    return shutil.copytree(small_index.folder, tmp_path / "features/identity@small")


@pytest.fixture(scope="session")
def dense(make_tokens):
    """The feature activations of the workspace (image, token, feature)."""
    return make_tokens().clamp_min(0.0)
