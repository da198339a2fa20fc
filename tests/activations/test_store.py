import json
import shutil

import pytest
import torch

from visae.activations.store import ActivationStore
from visae.errors import ModelError, StoreError
from visae.storage.records import to_plain
from visae.storage.tensors import file_ref, write_tensors

SPECIAL = ("cls", "register0")


@pytest.fixture(scope="module")
def tables():
    generator = torch.Generator().manual_seed(0)
    return {
        "residual@3": torch.randn(40, 8, 5, generator=generator),
        "mlp@1": torch.randn(40, 8, 3, generator=generator),
    }


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, store_of, tables):
    folder = tmp_path_factory.mktemp("pristine") / "store"
    store_of(folder, tables, special=SPECIAL, grid=(2, 3), tokens="all", shard_bytes=1)
    return folder


@pytest.fixture
def folder(tmp_path, pristine):
    """A copy of a store of 40 images in shards of 16, to be damaged."""
    shutil.copytree(pristine, tmp_path / "store")
    return tmp_path / "store"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_contents(folder, **changes):
    """Change what ``store.json`` says of what was gathered."""
    contents = json.loads((folder / "store.json").read_text())["contents"]
    edit(folder / "store.json", contents=contents | changes)


def store_files(folder, index):
    return json.loads((folder / "shards.json").read_text())["shards"][index]["files"]


def edit_listed(folder, index, **changes):
    """Change what ``shards.json`` says of a shard, and make the checksum agree."""
    shards = json.loads((folder / "shards.json").read_text())["shards"]
    shards[index] |= changes
    edit(folder / "shards.json", shards=shards)
    edit_contents(folder, shards=to_plain(file_ref(folder, "shards.json")))


# Reading


def test_a_shard_is_read_whole(pristine, tables):
    shard = ActivationStore(pristine).shard("mlp@1", 1)
    assert shard.first_image == 16
    assert torch.equal(shard.activations, tables["mlp@1"][16:32])


@pytest.mark.parametrize("images", [slice(0, 3), slice(7, 8), slice(10, 16), slice(16)])
def test_some_rows_are_read_alone(pristine, tables, images):
    rows = ActivationStore(pristine).rows("residual@3", 1, images)
    assert torch.equal(rows, tables["residual@3"][16:32][images])


@pytest.mark.parametrize(("policy", "kept"), [("patches", slice(2, 8)), ("special", slice(2))])
def test_tokens_of_a_policy_are_read_alone(pristine, tables, policy, kept):
    store, table = ActivationStore(pristine), tables["mlp@1"][:, kept]
    assert torch.equal(torch.cat([s.activations for s in store.shards("mlp@1", policy)]), table)
    assert torch.equal(store.rows("mlp@1", 0, slice(4), policy), table[:4])
    assert store.n_tokens("mlp@1", policy) == table[..., 0].numel()
    torch.testing.assert_close(
        store.statistics("mlp@1", policy).mean, table.double().mean((0, 1)), rtol=1e-12, atol=0
    )


def test_tokens_that_were_not_recorded_are_refused(tmp_path, store_of, tables):
    store = store_of(tmp_path / "s", tables, special=SPECIAL, grid=(2, 3), tokens="patches")
    with pytest.raises(ModelError, match="all tokens were not recorded"):
        store.shard("mlp@1", 0, "all")


def test_the_statistics_are_those_of_the_tables(pristine, tables):
    store = ActivationStore(pristine)
    for site, table in tables.items():
        found = store.statistics(site)
        torch.testing.assert_close(found.mean, table.double().mean((0, 1)), rtol=1e-12, atol=1e-15)
        spread = (table.double() - found.mean).square().mean().sqrt()
        assert found.scale == pytest.approx(float(spread), rel=1e-12)


def test_sites_whose_names_begin_alike_are_kept_apart(tmp_path, store_of):
    tables = {"blocks.1": torch.randn(5, 2, 3), "blocks.1.mlp": torch.randn(5, 2, 3)}
    store = store_of(tmp_path / "s", tables)
    for site, table in tables.items():
        torch.testing.assert_close(
            store.statistics(site).mean.float(), table.mean((0, 1)), rtol=1e-5, atol=1e-6
        )


def test_the_only_site_needs_no_name(tmp_path, store_of, tables):
    store = store_of(tmp_path / "s", {"mlp@1": tables["mlp@1"]})
    assert store.only_site() == "mlp@1"


def test_one_of_several_sites_must_be_named(pristine):
    with pytest.raises(StoreError, match=r"several sites.*--site: residual@3, mlp@1"):
        ActivationStore(pristine).only_site()


def test_an_unknown_site_names_those_there_are(pristine):
    with pytest.raises(StoreError, match=r"no site residual@2 .*residual@3"):
        ActivationStore(pristine).statistics("residual@2")


def test_the_model_is_found_beside_a_moved_workspace(tmp_path, pristine):
    workspace = tmp_path / "ws"
    shutil.copytree(pristine, workspace / "activations" / "store")
    path = workspace / "activations" / "store" / "store.json"
    edit(path, weights="../../models/weights.safetensors")
    workspace.rename(tmp_path / "moved")
    model = ActivationStore(tmp_path / "moved" / "activations" / "store").model
    assert model.weights == tmp_path / "moved" / "models" / "weights.safetensors"
    assert (model.model, model.title) == ("test/table", "table")


# The digest


def test_equal_recordings_have_equal_digests(tmp_path, pristine, folder, store_of, tables):
    digest = ActivationStore(pristine).digest
    assert ActivationStore(folder).digest == digest
    changed = {site: table.clone() for site, table in tables.items()}
    changed["mlp@1"][39, 7, 2] += 1e-6
    options = {"special": SPECIAL, "grid": (2, 3), "tokens": "all", "shard_bytes": 1}
    assert store_of(tmp_path / "same", tables, **options).digest == digest
    assert store_of(tmp_path / "other", changed, **options).digest != digest


# Damage


def test_a_whole_store_is_verified(pristine):
    ActivationStore(pristine).verify()


FILES = ["residual@3/00001.safetensors", "mlp@1/00002.safetensors"]
GATHERED = ["statistics.safetensors", "images.parquet", "shards.json"]


@pytest.mark.parametrize("name", [*FILES, *GATHERED, "shards/00000.json"])
@pytest.mark.parametrize("place", [0, 8, 100, -1])
def test_a_flipped_bit_is_found(folder, name, place):
    data = bytearray((folder / name).read_bytes())
    data[place] ^= 4
    (folder / name).write_bytes(data)
    with pytest.raises(StoreError, match="checksum differs") as caught:
        ActivationStore(folder).verify()
    assert name in caught.value.where


@pytest.mark.parametrize("name", [*FILES, *GATHERED])
def test_a_truncated_file_is_found(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    with pytest.raises(StoreError, match=f"{len(data) - 1} bytes instead of {len(data)}"):
        ActivationStore(folder).verify()


@pytest.mark.parametrize("name", [*FILES, *GATHERED])
def test_a_missing_file_is_found(folder, name):
    (folder / name).unlink()
    with pytest.raises(StoreError, match="missing"):
        ActivationStore(folder).verify()


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("shards.json", ActivationStore),
        ("statistics.safetensors", lambda folder: ActivationStore(folder).statistics("mlp@1")),
        ("images.parquet", lambda folder: ActivationStore(folder).images),
    ],
)
def test_what_was_gathered_is_never_used_when_altered(folder, name, use):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(StoreError, match="checksum differs"):
        use(folder)


def test_a_changed_label_is_found(folder):
    path = folder / "shards" / "00001.json"
    record = json.loads(path.read_text())
    edit(path, labels=["cat", *record["labels"][1:]])
    with pytest.raises(StoreError, match="bytes instead of"):
        ActivationStore(folder).verify()


@pytest.mark.parametrize("n_bytes", [0, 50, 400])
def test_a_truncated_shard_is_not_read(folder, n_bytes):
    path = folder / "mlp@1" / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:n_bytes])
    store = ActivationStore(folder)
    with pytest.raises(StoreError, match="whole s"):
        store.shard("mlp@1", 1)
    with pytest.raises(StoreError, match="not a whole shard"):
        store.rows("mlp@1", 1, slice(0, 2))
    assert store.shard("residual@3", 1).first_image == 16


def test_shards_that_changed_places_are_not_read(folder):
    shutil.copy(folder / "mlp@1" / "00002.safetensors", folder / "mlp@1" / "00001.safetensors")
    store = ActivationStore(folder)
    with pytest.raises(
        StoreError, match=r"holds \(8, 8, 3\) instead of \(16, 8, 3\).*record again"
    ):
        store.shard("mlp@1", 1)
    with pytest.raises(StoreError, match="holds 0 of 4 images"):
        store.rows("mlp@1", 1, slice(10, 14))


def test_values_that_are_no_numbers_are_found(folder):
    store = ActivationStore(folder)
    activations = store.shard("mlp@1", 0).activations.clone()
    activations[3, 2, 1] = float("nan")
    ref = write_tensors(folder, "mlp@1/00000.safetensors", {"activations": activations})
    edit_listed(folder, 0, files=store_files(folder, 0) | {"mlp@1": to_plain(ref)})
    with pytest.raises(StoreError, match="NaN or infinite"):
        ActivationStore(folder).verify()


def test_a_digest_that_is_not_that_of_the_files_is_found(folder):
    edit_contents(folder, digest="0" * 64)
    with pytest.raises(StoreError, match="digest"):
        ActivationStore(folder).verify()


def test_a_list_of_shards_of_another_recording_is_refused(folder):
    edit_listed(folder, 0, files={})
    with pytest.raises(StoreError, match="another recording"):
        ActivationStore(folder)


def test_a_missing_shard_is_named(folder):
    (folder / "shards" / "00001.json").unlink()
    with pytest.raises(StoreError, match=r"1 of 3 shards are missing \(1\).*it resumes"):
        ActivationStore(folder)


def test_many_missing_shards_are_counted(folder):
    edit(folder / "store.json", n_images_in_source=16 * 9)
    with pytest.raises(StoreError, match=r"6 of 9 shards are missing \(3, 4, 5, 6, 7…\)"):
        ActivationStore(folder)


def test_a_store_that_was_never_finished_is_refused(folder):
    edit(folder / "store.json", contents=None)
    with pytest.raises(StoreError, match="incomplete: its recording was interrupted"):
        ActivationStore(folder)


def test_a_folder_without_a_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"no activation store here.*visae record"):
        ActivationStore(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, r"Format 2 is newer.*Upgrade visae"),
        ({"kind": "sae"}, "This is sae, not activation store"),
        ({"dtype": "int8"}, "dtype"),
        ({"unheard_of": 1}, "unknown key unheard_of"),
        ({"sites": []}, "another recording"),
    ],
)
def test_an_altered_store_json_is_refused(folder, changes, said):
    edit(folder / "store.json", **changes)
    with pytest.raises(StoreError, match=said):
        ActivationStore(folder)


def test_a_truncated_json_is_refused(folder):
    text = (folder / "store.json").read_text()
    (folder / "store.json").write_text(text[: len(text) // 2])
    with pytest.raises(StoreError, match="not valid JSON"):
        ActivationStore(folder)
