"""Small activation stores with known contents, and SAEs made by hand."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from visae.activations.completing import complete
from visae.activations.format import ShardRecord, SiteRecord, StoreRecord
from visae.activations.planning import recording_id
from visae.activations.statistics import SiteStatistics, token_kinds
from visae.activations.store import ActivationStore
from visae.evaluation.tokens import EvaluatedTokens
from visae.models.config import ModelIdentity
from visae.models.layout import Layout, TokenPolicy
from visae.models.preprocessing import Preprocessing
from visae.saes.checkpoint import Provenance, save_sae
from visae.saes.config import SAEConfig
from visae.saes.sae import SAE
from visae.saes.sparsity import ReLU, Sparsity, TopK
from visae.storage.records import write_record
from visae.storage.tensors import write_tensors

SITE = "residual@1"
GRID = (2, 2)
CLASSES = ("ant", "bee", "cat")


def write_store(
    folder: Path,
    activations: torch.Tensor,
    *,
    labels: Sequence[str | None] | None = None,
    groups: Sequence[str | None] | None = None,
    shard_sizes: Sequence[int] | None = None,
    tokens: TokenPolicy = "patches",
    special: tuple[str, ...] = (),
) -> ActivationStore:
    """A complete store of activations (image, token, d_model) on a grid of 2 × 2 patches.

    Shards smaller than the largest one have lost images that could not be read.
    """
    n_images = len(activations)
    sizes = list(shard_sizes or [n_images])
    assert sum(sizes) == n_images
    layout = Layout(special=special, grid=GRID)
    plan = StoreRecord(
        visae_version="0",
        model="timm/tiny",
        weights=None,
        image_size=None,
        identity=ModelIdentity(name="timm/tiny", title="Tiny", weights_sha256="ab" * 32),
        preprocessing=Preprocessing(size=(8, 8)),
        images="none",
        n_images_in_source=max(sizes) * (len(sizes) - 1) + sizes[-1],
        images_per_shard=max(sizes),
        tokens=tokens,
        dtype="float32",
        sites=(SiteRecord(name=SITE, d_model=activations.shape[2], layout=layout),),
    )
    first = 0
    for index, size in enumerate(sizes):
        part = activations[first : first + size].contiguous()
        name = f"{index:05d}"
        sums = {}
        for kind, at in token_kinds(layout, tokens).items():
            sums |= SiteStatistics.of(part[:, at]).tensors(f"{SITE}/{kind}/")
        shard = ShardRecord(
            recording=recording_id(plan),
            index=index,
            content_ids=tuple(f"image-{i}" for i in range(first, first + size)),
            refs=tuple(str(i) for i in range(first, first + size)),
            labels=tuple((labels or [None] * n_images)[first : first + size]),
            groups=tuple((groups or [None] * n_images)[first : first + size]),
            skipped=(("lost", "unreadable"),) * (max(sizes) - size) * (index + 1 < len(sizes)),
            files={
                SITE: write_tensors(folder, f"{SITE}/{name}.safetensors", {"activations": part})
            },
            statistics=write_tensors(folder, f"shards/{name}.safetensors", sums),
            rounding={SITE: (0.0,) * part.shape[1]},
        )
        write_record(folder / "shards" / f"{name}.json", shard)
        first += size
    write_record(folder / "store.json", plan)
    complete(folder, plan, batch_size=32)
    return ActivationStore(folder)


@dataclasses.dataclass(frozen=True)
class Planted:
    """Activations made of known directions, and the SAE that knows them."""

    store: ActivationStore
    activations: torch.Tensor
    labels: tuple[str, ...]
    sae: SAE

    @property
    def tokens(self) -> EvaluatedTokens:
        return EvaluatedTokens(self.store, SITE, "patches")


def planted_activations(n_images: int, seed: int) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Images of three classes; feature c of an orthonormal basis is on in images of class c.

    Every image also has two of five features without a class at each patch, and a common offset.
    """
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 3, n_images)
    codes = np.zeros((n_images, 4, 12))
    codes[np.arange(n_images), rng.integers(0, 4, n_images), classes] = rng.uniform(3, 5, n_images)
    for image in range(n_images):
        for patch in range(4):
            codes[image, patch, rng.choice(5, 2, replace=False) + 3] = rng.uniform(1, 2, 2)
    noise = rng.normal(0, 0.02, codes.shape)
    offset = np.linspace(-2, 2, 12)
    activations = torch.tensor(codes + noise + offset, dtype=torch.float32)
    return activations, tuple(CLASSES[c] for c in classes)


def basis_sae(sparsity: Sparsity, *, offset: torch.Tensor | None = None, bias: float = 0.0) -> SAE:
    """Feature j reads and writes dimension j of 12; four features more are never active."""
    sae = SAE(SAEConfig(d_model=12, n_features=16, sparsity=sparsity))
    with torch.no_grad():
        rows = torch.cat([torch.eye(12), -torch.eye(12)[:4]])
        sae.W_enc.copy_(rows)
        sae.W_dec.copy_(rows)
        sae.b_enc.fill_(bias)
        sae.b_enc[12:] = -100.0
        if offset is not None:
            sae.mean.copy_(offset)
    return sae


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    activations, labels = planted_activations(160, seed=0)
    folder = tmp_path_factory.mktemp("planted")
    store = write_store(folder, activations, labels=labels, shard_sizes=(60, 60, 40))
    sae = basis_sae(ReLU(), offset=torch.linspace(-2, 2, 12), bias=-0.3)
    return Planted(store, activations, labels, sae)


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., ActivationStore]:
    def make(activations: torch.Tensor, **options: object) -> ActivationStore:
        n_made = len(list(tmp_path.glob("store*")))
        return write_store(tmp_path / f"store{n_made}", activations, **options)

    return make


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[[SAE, ActivationStore], Path]:
    """Write an SAE as one made for a store; gives its folder, called ``sae``."""

    def write(sae: SAE, store: ActivationStore) -> Path:
        folder = tmp_path_factory.mktemp("saes") / "sae"
        provenance = Provenance.of_store(
            store, SITE, tokens="patches", n_tokens=1, seed=0, control="none", recipe={}
        )
        reference = store.shard(SITE, 0).activations.flatten(0, 1)[:64]
        save_sae(sae, folder, provenance=provenance, reference=reference, metrics={})
        return folder

    return write


@pytest.fixture
def random_sae() -> Callable[..., SAE]:
    """An SAE of random weights, for comparisons with naive formulae."""

    def make(d_model: int = 12, n_features: int = 20, seed: int = 0, k: int = 5) -> SAE:
        generator = torch.Generator().manual_seed(seed)
        sae = SAE(SAEConfig(d_model=d_model, n_features=n_features, sparsity=TopK(k=k)))
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / d_model**0.5)
            sae.mean.copy_(torch.randn(d_model, generator=generator))
            sae.scale.fill_(1.7)
        return sae

    return make
