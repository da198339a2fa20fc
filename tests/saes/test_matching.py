"""An SAE is used with activations like those it was made for, or refused with the remedy."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from visae.activations.completing import complete
from visae.activations.format import ShardRecord, SiteRecord, StoreRecord
from visae.activations.planning import recording_id
from visae.activations.statistics import SiteStatistics
from visae.activations.store import ActivationStore
from visae.errors import CheckpointError
from visae.models.config import ModelIdentity
from visae.models.layout import Layout
from visae.models.preprocessing import Preprocessing
from visae.saes.checkpoint import Provenance, SAERecord, read_sae_record, save_sae
from visae.saes.config import SAEConfig
from visae.saes.matching import require_match
from visae.saes.sae import SAE
from visae.saes.sparsity import TopK
from visae.storage.records import write_record
from visae.storage.tensors import write_tensors

MODEL = ModelIdentity(name="timm/tiny", title="Tiny", weights_sha256="aaaaaaaabb")
ACTIVATIONS = torch.randn(2, 5, 4)
SITES = ("residual@1", "mlp@1")


def write_store(folder: Path, **changes: object) -> ActivationStore:
    """A store of two images with one special token and four patches."""
    plan = StoreRecord(
        visae_version="0",
        model="timm/tiny",
        weights=None,
        image_size=None,
        identity=MODEL,
        preprocessing=Preprocessing(size=(8, 8)),
        images="none",
        n_images_in_source=2,
        images_per_shard=16,
        tokens="all",
        dtype="float32",
        sites=tuple(
            SiteRecord(name=name, d_model=4, layout=Layout(special=("cls",), grid=(2, 2)))
            for name in SITES
        ),
    )
    files = {
        site: write_tensors(folder, f"{site}/00000.safetensors", {"activations": ACTIVATIONS})
        for site in SITES
    }
    parts = {"special": ACTIVATIONS[:, :1], "patches": ACTIVATIONS[:, 1:]}
    sums = {}
    for site, (kind, part) in itertools.product(SITES, parts.items()):
        sums |= SiteStatistics.of(part).tensors(f"{site}/{kind}/")
    plan = dataclasses.replace(plan, **changes)
    shard = ShardRecord(
        recording=recording_id(plan),
        index=0,
        content_ids=("a", "b"),
        refs=("0", "1"),
        labels=(None, None),
        groups=(None, None),
        skipped=(),
        files=files,
        statistics=write_tensors(folder, "shards/00000.safetensors", sums),
        rounding=dict.fromkeys(SITES, (0.0,) * 5),
    )
    write_record(folder / "shards" / "00000.json", shard)
    write_record(folder / "store.json", plan)
    complete(folder, plan, batch_size=2)
    return ActivationStore(folder)


@pytest.fixture
def store(tmp_path) -> ActivationStore:
    return write_store(tmp_path / "store")


@pytest.fixture
def record(tmp_path, store) -> SAERecord:
    provenance = Provenance.of_store(
        store, "residual@1", tokens="patches", n_tokens=0, seed=0, control="none", recipe={}
    )
    sae = SAE(SAEConfig(d_model=4, n_features=8, sparsity=TopK(k=2)))
    save_sae(sae, tmp_path / "sae", provenance=provenance, reference=ACTIVATIONS[0], metrics={})
    return read_sae_record(tmp_path / "sae")


def test_a_match_gives_the_site(record, store):
    assert require_match(record, store) == "residual@1"
    assert require_match(record, store, "residual@1") == "residual@1"


def test_other_images_of_the_same_recipe_match(record, tmp_path):
    assert require_match(record, write_store(tmp_path / "other", tokens="all")) == "residual@1"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"identity": dataclasses.replace(MODEL, weights_sha256="ffffffff00")},
            "model: Tiny (aaaaaaaa) for the SAE, Tiny (ffffffff) in the store",
        ),
        ({"preprocessing": Preprocessing(size=(8, 8), crop_share=0.5)}, "preprocessing crop_share"),
        ({"tokens": "special"}, "tokens: patches for the SAE, special in the store"),
    ],
)
def test_another_recording_is_refused_naming_what_differs(record, tmp_path, changes, said):
    other = write_store(tmp_path / "other", **changes)
    with pytest.raises(CheckpointError) as caught:
        require_match(record, other)
    assert said in caught.value.what
    assert str(other.folder) in caught.value.where
    assert "Give the store" in caught.value.fix


def test_another_name_for_the_same_weights_matches(record, tmp_path):
    renamed = dataclasses.replace(MODEL, title="Renamed")
    assert require_match(record, write_store(tmp_path / "other", identity=renamed)) == "residual@1"


def test_another_width_is_refused(record, store):
    with pytest.raises(CheckpointError, match="d_model: 5 for the SAE, 4 in the store"):
        require_match(dataclasses.replace(record, d_model=5), store)


def test_another_site_is_refused(record, store):
    with pytest.raises(CheckpointError, match="residual@1 for the SAE, mlp@1 in the store"):
        require_match(record, store, "mlp@1")


def test_a_site_that_was_not_recorded_is_refused(record, store):
    elsewhere = dataclasses.replace(record.provenance, site="residual@7")
    with pytest.raises(CheckpointError) as caught:
        require_match(dataclasses.replace(record, provenance=elsewhere), store)
    assert "residual@7 for the SAE, residual@1, mlp@1 in the store" in caught.value.what
    assert "Record residual@7" in caught.value.fix


def test_a_transcoder_is_refused(record, store):
    """Its decoder writes at another site: an error or an edit here would mean nothing."""
    made = dataclasses.replace(record.provenance, target_site="mlp@1")
    transcoder = dataclasses.replace(record, transcoder=True, provenance=made)
    with pytest.raises(CheckpointError, match=r"transcoder.*activations at mlp@1.*residual@1"):
        require_match(transcoder, store)


def test_unknown_preprocessing_is_no_difference(record, store):
    unknown = dataclasses.replace(record.provenance, preprocessing=None)
    assert require_match(dataclasses.replace(record, provenance=unknown), store) == "residual@1"
