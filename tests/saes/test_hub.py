"""SAEs named by ``hf://…``: found, cached, loaded and proven like those of a folder."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest
import torch

from visae.errors import CheckpointError
from visae.saes.checkpoint import Provenance, load_sae, read_sae_record, save_sae
from visae.saes.codes import SparseCodes
from visae.saes.config import SAEConfig
from visae.saes.hub import find_sae
from visae.saes.pull import pull_sae
from visae.saes.sae import SAE
from visae.saes.sparsity import BatchTopK
from visae.storage import hub
from visae.storage.atomic import leftovers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Positive:
    """A user's own kind: keeps what is above zero."""

    kind: Literal["positive"] = "positive"
    uses_threshold = False
    compares_features = False

    def select(self, pre):
        return SparseCodes.from_dense(pre.relu())

    def penalty(self, values, norms, n_tokens):
        return values.new_zeros(())


def save(folder, sparsity, seed=0):
    from visae.models.config import ModelIdentity
    from visae.models.layout import Layout

    generator = torch.Generator().manual_seed(seed)
    sae = SAE(SAEConfig(d_model=6, n_features=32, sparsity=sparsity))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.threshold.fill_(0.4)
    provenance = Provenance(
        model=ModelIdentity(name="timm/tiny", title="Tiny", weights_sha256="0" * 64),
        site="residual@1",
        layout=Layout(special=(), grid=(2, 3)),
        preprocessing=None,
        tokens="patches",
        store_digest="1" * 64,
        n_tokens=1000,
        seed=seed,
        control="none",
        recipe={},
    )
    x = torch.randn(80, 6, generator=generator)
    save_sae(sae, folder, provenance=provenance, reference=x, metrics={})
    return sae


@pytest.fixture
def shared(model_hub, tmp_path):
    """Put an SAE on the hub at ``ada/saes/first``; gives it."""
    from huggingface_hub import HfApi

    sae = save(tmp_path / "made", BatchTopK(k=3))
    HfApi(endpoint=model_hub.endpoint, token="hf_owner").create_repo("ada/saes")  # noqa: S106
    put(model_hub, tmp_path / "made")
    return sae


def put(model_hub, folder, *, under="first", **more):
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | more
    changes = {f"{under}/{name}": content for name, content in files.items()}
    return model_hub.repositories["ada/saes"].commit(changes, "put")


@pytest.mark.parametrize("kind", [str, Path])
def test_an_sae_of_the_hub_is_loaded(shared, kind):
    loaded = load_sae(kind("hf://ada/saes/first"))
    x = torch.randn(50, 6)
    assert torch.equal(loaded.encode(x), shared.encode(x))
    assert read_sae_record(kind("hf://ada/saes/first")).provenance.site == "residual@1"


def test_it_is_found_at_its_commit(model_hub, shared):
    found = find_sae("hf://ada/saes/first")
    commit = model_hub.repositories["ada/saes"].refs["main"]
    assert found.name == "first"
    assert str(found.place) == f"hf://ada/saes/first@{commit}"
    assert found.portable(Path("workspace/features/x")) == str(found.place)


def test_a_folder_is_taken_as_it_is(tmp_path):
    found = find_sae(tmp_path / "saes" / "first" / ".." / "other")
    assert (found.name, found.place) == ("other", None)
    assert found.portable(tmp_path / "features" / "x") == "../../saes/other"


def test_a_revision_is_loaded(model_hub, shared, tmp_path):
    first = find_sae("hf://ada/saes/first").place
    other = save(tmp_path / "other", BatchTopK(k=3), seed=1)
    put(model_hub, tmp_path / "other")
    assert torch.equal(load_sae("hf://ada/saes/first").W_dec, other.W_dec)
    assert torch.equal(load_sae(str(first)).W_dec, shared.W_dec)


def test_without_a_hub_the_copy_is_loaded(model_hub, shared, monkeypatch):
    load_sae("hf://ada/saes/first")
    monkeypatch.setattr(hub, "_answers", lambda _endpoint: False)
    assert torch.equal(load_sae("hf://ada/saes/first").W_dec, shared.W_dec)
    with pytest.raises(CheckpointError, match="cannot be reached, and there is no copy"):
        load_sae("hf://ada/saes/second")


def test_what_does_not_reproduce_its_codes_is_refused(model_hub, shared, tmp_path):
    save(tmp_path / "other", BatchTopK(k=3), seed=1)
    put(model_hub, tmp_path / "other", **{"sae.json": (tmp_path / "made/sae.json").read_bytes()})
    with pytest.raises(CheckpointError, match="bytes instead of"):
        load_sae("hf://ada/saes/first")


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("hf://ada", r"no place on the model hub.*Write hf://owner/repository"),
        ("hf://ada/saes/../x", "no place on the model hub"),
        ("hf://ada/none", "no such repository"),
        ("hf://ada/saes/first@v9", "no revision v9"),
        ("hf://ada/saes/second", r"no sae\.json and no sae\.safetensors here"),
    ],
)
def test_what_cannot_be_found_is_named(shared, location, said):
    with pytest.raises(CheckpointError, match=said):
        load_sae(location)


# Copies of one's own


def test_a_pulled_sae_is_whole_and_one_s_own(model_hub, shared, tmp_path):
    card = {"report_card.json": b"{}", "README.md": b"# First", "other.txt": b"x"}
    put(model_hub, tmp_path / "made", **card)
    found = pull_sae("hf://ada/saes/first", tmp_path / "saes" / "theirs")
    assert found.name == "first"
    files = {path.name: path for path in (tmp_path / "saes" / "theirs").iterdir()}
    assert set(files) == {"sae.json", "sae.safetensors", "report_card.json", "README.md"}
    assert not any(path.is_symlink() for path in files.values())
    assert torch.equal(load_sae(tmp_path / "saes" / "theirs").W_dec, shared.W_dec)


def test_nothing_is_pulled_over_something(shared, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sae.json").write_text("mine")
    for out in (tmp_path / "mine", tmp_path / "mine" / "sae.json"):
        with pytest.raises(CheckpointError, match=r"something here already.*new folder"):
            pull_sae("hf://ada/saes/first", out)
    assert (tmp_path / "mine" / "sae.json").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    pull_sae("hf://ada/saes/first", tmp_path / "empty")


def test_a_damaged_sae_is_not_pulled(model_hub, shared, tmp_path):
    record = json.loads((tmp_path / "made" / "sae.json").read_text())
    record["sparsity"] = {"kind": "topk", "k": 1}
    put(model_hub, tmp_path / "made", **{"sae.json": json.dumps(record).encode()})
    with pytest.raises(CheckpointError, match="does not reproduce its own codes"):
        pull_sae("hf://ada/saes/first", tmp_path / "saes" / "theirs")
    assert not (tmp_path / "saes").exists() or leftovers(tmp_path / "saes") == []
    assert not (tmp_path / "saes" / "theirs").exists()


def test_a_kind_of_one_s_own_is_pulled_with_its_class(model_hub, shared, tmp_path):
    save(tmp_path / "own", Positive())
    put(model_hub, tmp_path / "own", under="own")
    with pytest.raises(CheckpointError, match=r"Unknown sparsity kind positive.*kinds="):
        pull_sae("hf://ada/saes/own", tmp_path / "out")
    pull_sae("hf://ada/saes/own", tmp_path / "out", kinds=[Positive])
    assert load_sae(tmp_path / "out", kinds=[Positive]).n_features == 32
