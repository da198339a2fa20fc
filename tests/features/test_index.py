"""Reading an index: heat maps lie on their patches, and what is damaged is refused."""

import json

import pytest
import torch

from visae.errors import FeatureIndexError
from visae.features.index import FeatureIndex
from visae.saes.checkpoint import read_sae_record


def test_a_heat_map_is_the_activation_at_every_patch(small_index, dense):
    for image in (0, 15, 16, 37):
        for feature in range(6):
            expected = dense[image, 1:, feature].view(2, 3)
            assert torch.equal(small_index.heat_map(feature, image), expected)


def test_heat_maps_of_several_images_come_in_their_order(small_index, dense):
    found = small_index.heat_maps(2, [37, 0, 20])
    assert torch.equal(found, dense[[37, 0, 20], 1:, 2].view(3, 2, 3))
    assert small_index.heat_maps(2, []).shape == (0, 2, 3)


def test_the_codes_of_an_image_are_those_of_its_tokens(small_index, dense):
    assert torch.equal(small_index.codes(17).dense(), dense[17])


def test_image_maxima_are_the_largest_over_all_tokens(small_index, dense):
    found = small_index.image_max()
    assert found.n_tokens == small_index.n_images
    assert torch.equal(found.dense(), dense.amax(1))


def test_names_and_sizes(small_index):
    assert small_index.name(3) == "identity:3"
    assert (small_index.n_features, small_index.n_images) == (6, 38)
    assert small_index.classes == ("cat", "dog")
    assert small_index.images.labels[3] is None


@pytest.mark.parametrize("feature", [-1, 6])
@pytest.mark.parametrize("ask", ["row", "examples", "heat_map"])
def test_a_feature_out_of_range_is_refused_with_the_range(small_index, feature, ask):
    arguments = (feature, 0) if ask == "heat_map" else (feature,)
    with pytest.raises(FeatureIndexError, match=rf"no feature {feature}.* from 0 to 5"):
        getattr(small_index, ask)(*arguments)


@pytest.mark.parametrize("image", [-1, 38])
def test_an_image_out_of_range_is_refused_with_the_range(small_index, image):
    with pytest.raises(FeatureIndexError, match=rf"no image {image}.* from 0 to 37"):
        small_index.heat_map(0, image)


def test_a_thumbnail_of_an_unknown_image_is_refused(small_index):
    with pytest.raises(FeatureIndexError, match=r"has not looked at image '../index'"):
        small_index.thumbnail("../index")


def test_special_tokens_alone_have_no_heat_maps(build, small_store, identity_sae, tmp_path):
    sae = identity_sae(tmp_path / "saes/cls", small_store, tokens="special")
    index = build(tmp_path / "index", sae=sae)
    assert index.row(0).position_r2 is None
    with pytest.raises(FeatureIndexError, match="special tokens only"):
        index.heat_map(0, 0)


def test_only_its_own_sae_is_accepted(small_index, workspace, small_store, identity_sae, tmp_path):
    small_index.require_sae(read_sae_record(workspace / "saes/identity"))
    other = identity_sae(tmp_path / "other", small_store, n_features=3)
    with pytest.raises(FeatureIndexError, match=r"made from another SAE.*from identity"):
        small_index.require_sae(read_sae_record(other))


def test_a_folder_without_index_is_refused_with_the_command(tmp_path):
    with pytest.raises(FeatureIndexError, match=r"no feature index here.*visae index --sae"):
        FeatureIndex(tmp_path)


def test_a_record_of_something_else_is_refused(tmp_path):
    (tmp_path / "index.json").write_text('{"kind": "sae", "format": 1}')
    with pytest.raises(FeatureIndexError, match="This is sae, not feature index"):
        FeatureIndex(tmp_path)


def test_a_newer_format_is_refused(own_index):
    record = json.loads((own_index / "index.json").read_text())
    (own_index / "index.json").write_text(json.dumps(record | {"format": 2}))
    with pytest.raises(FeatureIndexError, match="Format 2 is newer"):
        FeatureIndex(own_index)


@pytest.mark.parametrize(
    "name",
    ["codes/00001.safetensors", "features.parquet", "examples.safetensors", "images.parquet"],
)
def test_missing_and_truncated_files_are_refused_when_opened(own_index, name):
    path = own_index / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    sizes = f"{len(data) - 1} bytes instead of {len(data)}"
    with pytest.raises(FeatureIndexError, match=rf"{name} has {sizes}.*again"):
        FeatureIndex(own_index)
    path.unlink()
    with pytest.raises(FeatureIndexError, match=rf"{name} is missing.*again"):
        FeatureIndex(own_index)


def test_a_sound_index_verifies(small_index):
    small_index.verify()


@pytest.mark.parametrize(
    "name",
    ["codes/00001.safetensors", "features.parquet", "examples.safetensors", "images.parquet"],
)
def test_an_altered_file_is_found(own_index, name):
    path = own_index / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x01
    path.write_bytes(data)
    with pytest.raises(FeatureIndexError, match="checksum differs"):
        FeatureIndex(own_index).verify()


def test_a_damaged_thumbnail_is_found(own_index):
    min((own_index / "thumbnails").iterdir()).write_bytes(b"no picture")
    with pytest.raises(FeatureIndexError, match="thumbnail is missing or damaged"):
        FeatureIndex(own_index).verify()


def test_tables_of_other_lengths_are_found(own_index):
    record = json.loads((own_index / "index.json").read_text())
    (own_index / "index.json").write_text(json.dumps(record | {"n_images": 37}))
    with pytest.raises(FeatureIndexError, match="other lengths"):
        FeatureIndex(own_index).verify()


def test_a_damaged_table_of_images_is_refused(own_index):
    path = own_index / "images.parquet"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(FeatureIndexError, match="not whole Parquet"):
        _ = FeatureIndex(own_index).images


def test_damaged_examples_are_refused(own_index):
    path = own_index / "examples.safetensors"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(FeatureIndexError, match="examples cannot be read"):
        FeatureIndex(own_index).examples(0)
