import base64
import itertools
import json
import pickle

import numpy as np
import pytest
import torch

from visae.activations.loaders import OrderedTokens, ShuffledTokens
from visae.activations.opening import open_store
from visae.activations.saev_shards import SaevShards
from visae.activations.store import ActivationStore
from visae.activations.stored import StoredTokens
from visae.errors import ModelError, StoreError
from visae.evaluation.card import evaluate
from visae.saes.checkpoint import read_sae_record
from visae.saes.sparsity import TopK
from visae.training.config import RunConfig, TrainConfig
from visae.training.loop import train

N_IMAGES, LAYERS, N_PATCHES, D_MODEL = 11, (2, 5, 6), 6, 8


class Boom:
    """Unpickling this ends the test run."""

    def __reduce__(self):
        return pytest.exit, ("a pickle was decoded",)


def write_saev(folder, activations, *, per_shard=4, cls_token=True, layers=LAYERS, labels=None):
    """The folder that saev's writer makes of (image, layer, token, d_model)."""
    folder.mkdir(parents=True, exist_ok=True)
    n_images, n_layers, n_tokens, d_model = activations.shape
    shards = []
    for number, start in enumerate(range(0, n_images, per_shard)):
        part = activations[start : start + per_shard].astype(np.float32)
        full = np.zeros((per_shard, *part.shape[1:]), np.float32)  # the last file is not shorter
        full[: len(part)] = part
        full.tofile(folder / f"acts{number:06}.bin")
        shards.append({"name": f"acts{number:06}.bin", "n_examples": len(part)})
    metadata = {
        "family": "clip",
        "ckpt": "ViT-B-16/openai",
        "layers": list(layers),
        "content_tokens_per_example": n_tokens - cls_token,
        "cls_token": cls_token,
        "d_model": d_model,
        "n_examples": n_images,
        "max_tokens_per_shard": per_shard * n_layers * n_tokens,
        "data": base64.b64encode(pickle.dumps(Boom())).decode(),
        "dataset": "somewhere/images",
        "pixel_agg": None,
        "dtype": "float32",
        "protocol": "2.1",
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))
    (folder / "shards.json").write_text(json.dumps(shards))
    if labels is not None:
        labels.astype(np.uint8).tofile(folder / "labels.bin")
    return folder


def numbered(n_images=N_IMAGES, n_layers=3, n_tokens=N_PATCHES + 1):
    """Activations that say which they are: (image, layer index, token, noise …)."""
    keys = np.stack(np.indices((n_images, n_layers, n_tokens)), axis=-1).astype(float)
    noise = np.random.default_rng(0).normal(size=(n_images, n_layers, n_tokens, D_MODEL - 3))
    return np.concatenate([keys, noise], axis=-1)


LABELS = np.arange(N_IMAGES * N_PATCHES).reshape(N_IMAGES, N_PATCHES) % 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_saev(tmp_path_factory.mktemp("saev") / "a", numbered(), labels=LABELS)


def change(tmp_path, file="metadata.json", **changes):
    """A small folder, one of its JSON files changed; None removes a key."""
    made = write_saev(tmp_path / "changed", numbered())
    content = json.loads((made / file).read_text())
    if isinstance(content, dict):
        content |= changes
        content = {key: value for key, value in content.items() if value is not ...}
    else:
        content[-1] |= changes
    (made / file).write_text(json.dumps(content))
    return made


# Reading


def test_it_is_opened_as_what_it_is(folder, planted_store):
    assert isinstance(open_store(folder), SaevShards)
    assert isinstance(open_store(folder), StoredTokens)
    assert isinstance(open_store(planted_store.folder), ActivationStore)
    assert isinstance(planted_store, StoredTokens)


@pytest.mark.parametrize(
    ("tokens", "kept"), [("all", slice(None)), ("patches", slice(1, None)), ("special", slice(1))]
)
@pytest.mark.parametrize("index", range(3))
def test_every_layer_and_token_is_read_exactly(folder, index, tokens, kept):
    store = SaevShards(folder)
    expected = torch.tensor(numbered()[:, index, kept], dtype=torch.float32)
    site = f"residual@{LAYERS[index]}"
    found = torch.cat([shard.activations for shard in store.shards(site, tokens)])
    assert torch.equal(found, expected)
    batches = list(OrderedTokens(store, site, tokens=tokens, images_per_batch=3))
    in_order = torch.cat([batch.activations[site] for batch in batches])
    assert torch.equal(in_order, expected.flatten(0, 1))


def test_without_a_class_token_patches_come_first(tmp_path):
    values = numbered(n_layers=1, n_tokens=N_PATCHES)
    store = SaevShards(write_saev(tmp_path / "a", values, cls_token=False, layers=(3,)))
    assert (store.tokens, store.sites) == ("patches", ["residual@3"])
    (shard,) = store.shards("residual@3")
    assert torch.equal(shard.activations, torch.tensor(values[:, 0], dtype=torch.float32))
    with pytest.raises(ModelError, match="no special tokens"):
        store.statistics("residual@3", "special")


@pytest.mark.parametrize(("n_patches", "grid"), [(6, (1, 6)), (9, (3, 3)), (12, (1, 12))])
def test_a_grid_is_known_only_of_a_square(tmp_path, n_patches, grid):
    values = numbered(n_tokens=n_patches + 1)
    store = SaevShards(write_saev(tmp_path / "a", values))
    layout = store.site("residual@5").layout
    assert (layout.grid, layout.special) == (grid, ("cls",))
    (shard,) = store.shards("residual@5", "patches")
    assert shard.activations[4, :, 2].tolist() == list(range(1, n_patches + 1))


def test_an_empty_last_shard_is_no_harm(tmp_path):
    """saev writes one when the images fill the shard before it."""
    made = write_saev(tmp_path / "a", numbered(8))
    shards = json.loads((made / "shards.json").read_text())
    np.zeros(4).tofile(made / "acts000002.bin")
    shards.append({"name": "acts000002.bin", "n_examples": 0})
    (made / "shards.json").write_text(json.dumps(shards))
    store = SaevShards(made)
    assert store.n_images == sum(len(shard.activations) for shard in store.shards("residual@2"))


def test_large_files_are_read_in_parts(folder, monkeypatch):
    monkeypatch.setattr("visae.activations.saev_shards._SHARD_BYTES", 3 * 7 * D_MODEL * 4)
    store = SaevShards(folder)
    shards = list(store.shards("residual@5"))
    assert [shard.first_image for shard in shards] == [0, 3, 6, 9]
    found = torch.cat([shard.activations for shard in shards])
    assert torch.equal(found, torch.tensor(numbered()[:, 1], dtype=torch.float32))
    rows = store.rows("residual@5", 2, slice(1, 3), "patches")
    assert rows[:, 0, 0].tolist() == [7, 8]


def test_shuffled_tokens_of_two_layers_come_once_a_pass(folder):
    store = SaevShards(folder)
    some = ShuffledTokens(
        store, "residual@2", "residual@6", tokens="patches", batch_size=11, buffer_bytes=10 * 3072
    )
    batches = list(itertools.islice(iter(some), 6))
    for site, index in (("residual@2", 0), ("residual@6", 2)):
        keys = [tuple(key) for b in batches for key in b.activations[site][:, :3].int().tolist()]
        assert sorted(keys) == list(itertools.product(range(11), [index], range(1, 7)))


def test_statistics_are_those_of_the_tokens(folder):
    store = SaevShards(folder)
    for tokens, kept in (("all", slice(None)), ("patches", slice(1, None)), ("special", slice(1))):
        values = torch.tensor(numbered()[:, 1, kept], dtype=torch.float32).double().flatten(0, 1)
        found = store.statistics("residual@5", tokens)
        torch.testing.assert_close(found.mean, values.mean(0))
        expected = float(values.var(0, correction=0).mean().sqrt())
        assert found.scale == pytest.approx(expected, rel=1e-5)


def test_patch_labels_are_read(folder):
    classes, labels, purity = SaevShards(folder).patch_labels("residual@2")
    assert labels.tolist() == LABELS.tolist()
    assert classes == {value: str(value) for value in range(5)}
    assert purity.unique().tolist() == [1.0]


def test_what_is_unknown_is_said_to_be(folder):
    store = SaevShards(folder)
    assert store.preprocessing is None
    assert store.identity.name == "saev/clip/ViT-B-16/openai"
    assert store.identity.weights_sha256 == ""
    assert store.images.labels == (None,) * N_IMAGES
    assert len(set(store.images.content_ids)) == N_IMAGES


# An SAE of it


def test_an_sae_is_trained_and_evaluated(tmp_path):
    store = SaevShards(write_saev(tmp_path / "a", numbered(60), per_shard=25))
    run = RunConfig(name="sae", n_features=16, sparsity=TopK(k=2))
    config = TrainConfig(n_tokens=2000, batch_size=100, tokens="patches")
    train(store, "residual@5", [run], tmp_path, config=config)
    made = read_sae_record(tmp_path / "sae").provenance
    assert (made.site, made.preprocessing, made.model) == ("residual@5", None, store.identity)
    card = evaluate(tmp_path / "sae", store)
    assert card.n_tokens == 60 * N_PATCHES
    assert card.row("nmse").value.value > 0


# What is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol": "1.1"}, "of protocol 1.1; only saev's protocol 2.1"),
        ({"protocol": ...}, "of protocol None"),
        ({"dtype": "bfloat16"}, "The number format is bfloat16"),
        ({"layers": [5, 2, 6]}, r"out of order \(\[5, 2, 6\]\).*which is which is unknown"),
        ({"layers": [2, 2, 6]}, "out of order"),
        ({"layers": []}, r"The layers are \[\]"),
        ({"layers": ["2"]}, "The layers are"),
        ({"d_model": "8"}, "d_model is '8'"),
        ({"cls_token": 1}, "cls_token is 1"),
        ({"ckpt": ...}, "ckpt is None"),
        ({"d_model": 0}, "Patches, width and images are"),
        ({"n_examples": 12}, "The shards hold 11 of 12 images.*interrupted"),
        ({"d_model": 9}, "This shard ends after"),
    ],
)
def test_other_metadata_is_refused(tmp_path, changes, said):
    with pytest.raises(StoreError, match=said):
        SaevShards(change(tmp_path, **changes))


@pytest.mark.parametrize(
    "changes", [{"name": "../acts000000.bin"}, {"name": 3}, {"n_examples": -1}, {"n_examples": "3"}]
)
def test_strange_shards_are_refused(tmp_path, changes):
    with pytest.raises(StoreError, match="Entry 2 is"):
        SaevShards(change(tmp_path, "shards.json", **changes))


@pytest.mark.parametrize("name", ["metadata.json", "shards.json"])
@pytest.mark.parametrize("text", ["[1, 2", "3", "null"])
def test_files_that_are_no_description_are_refused(tmp_path, name, text):
    made = write_saev(tmp_path / "a", numbered())
    (made / name).write_text(text)
    with pytest.raises(StoreError):
        SaevShards(made)


def test_a_missing_or_short_shard_is_named(tmp_path):
    made = write_saev(tmp_path / "a", numbered())
    path = made / "acts000001.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"This shard ends after 2687 of 2688 bytes .*acts000001"):
        SaevShards(made)
    path.unlink()
    with pytest.raises(StoreError, match=r"A shard is missing .*acts000001"):
        SaevShards(made)


def test_an_unknown_site_and_missing_labels_are_refused(tmp_path, folder):
    with pytest.raises(StoreError, match=r"no site residual@3.*residual@2"):
        SaevShards(folder).site("residual@3")
    made = write_saev(tmp_path / "a", numbered())
    with pytest.raises(StoreError, match="no patch labels"):
        SaevShards(made).patch_labels("residual@2")
    (made / "labels.bin").write_bytes(b"\x00" * 7)
    with pytest.raises(StoreError, match="have 7 bytes instead of"):
        SaevShards(made).patch_labels("residual@2")
