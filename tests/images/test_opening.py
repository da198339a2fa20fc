import dataclasses
import re
from pathlib import Path

import pytest

from visae.errors import ImageError
from visae.images.bundled import BundledImages
from visae.images.folder import FolderImages
from visae.images.hub_address import HubOptions
from visae.images.manifest import ManifestImages, ManifestOptions
from visae.images.masks import MaskOptions
from visae.images.opening import open_images
from visae.images.segmentation import SegmentationOptions
from visae.images.webdataset import WebDatasetOptions


def test_a_folder_opens_from_text_or_path(tmp_path, write_image):
    write_image(tmp_path / "cat/a.png")
    for location in (tmp_path, str(tmp_path), f"{tmp_path}/"):
        source = open_images(location)
        assert isinstance(source, FolderImages)
        assert open_images(source.location).entries == source.entries


@pytest.mark.parametrize("location", ["", "  "])
def test_no_location_is_refused_rather_than_the_current_folder(location):
    with pytest.raises(ImageError, match=r"No location of images is given\. Give one of: a folder"):
        open_images(location)


@pytest.mark.parametrize("name", ["labels.csv", "labels.CSV"])
def test_a_manifest_opens_with_its_options(tmp_path, write_image, name):
    write_image(tmp_path / "images/a.png")
    (tmp_path / name).write_text("file,name\na.png,great white shark\n")
    source = open_images(f"{tmp_path}/{name}?label=name&root=images")
    assert isinstance(source, ManifestImages)
    assert source.entries[0].label == "great white shark"
    assert open_images(source.location).entries == source.entries


def test_a_folder_with_the_suffix_of_a_manifest_is_a_folder(tmp_path, write_image):
    write_image(tmp_path / "set.csv/a.png")
    assert isinstance(open_images(tmp_path / "set.csv"), FolderImages)


def test_the_bundled_images_open():
    source = open_images("bundled:cifar10")
    assert isinstance(source, BundledImages)
    counts = {}
    for entry in source.entries:
        counts[entry.label] = counts.get(entry.label, 0) + 1
    assert len(counts) == 10
    assert set(counts.values()) == {300}
    last = source.load(str(len(source.entries) - 1))
    assert last.pixels.size == (32, 32)


def test_an_unknown_option_names_the_nearest(tmp_path):
    (tmp_path / "labels.csv").write_text("path\na.png\n")
    with pytest.raises(ImageError, match=r"unknown key lable \(did you mean: label"):
        open_images(f"{tmp_path}/labels.csv?lable=name")


def test_a_folder_takes_no_options(tmp_path, write_image):
    write_image(tmp_path / "a.png")
    with pytest.raises(ImageError, match="Remove what follows the question mark"):
        open_images(f"{tmp_path}?label=name")


FORMS = ["a folder", ".csv or .parquet", "seg:", "wds:", "bundled:", "hf://owner/dataset"]


def test_nothing_under_a_name_lists_the_forms_and_the_nearest_names(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ImageError) as caught:
        open_images(tmp_path / "imags")
    assert "nothing of this name" in str(caught.value)
    assert all(form in caught.value.fix for form in FORMS)
    assert caught.value.fix.endswith("holds: images")


@pytest.mark.parametrize("name", ["a.png", "notes.txt"])
def test_a_file_that_lists_no_images_lists_the_forms(tmp_path, write_image, name):
    with pytest.raises(ImageError) as caught:
        open_images(write_image(tmp_path / name))
    assert "no list of images" in str(caught.value)
    assert all(form in caught.value.fix for form in FORMS)


def test_another_scheme_is_refused():
    with pytest.raises(ImageError, match="Give one of: a folder"):
        open_images("s3://bucket/images")


DOCUMENT = Path(__file__).parents[2] / "docs/tasks/images.md"
MASK_OPTIONS = {field.name for field in dataclasses.fields(MaskOptions)}


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("`FILE.csv`", ManifestOptions),
        ("`seg:FOLDER`", SegmentationOptions),
        ("`FILE.tar`", WebDatasetOptions),
        ("`hf://owner/dataset:split`", HubOptions),
    ],
)
def test_the_document_names_every_option(form, options):
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in lines if line.startswith(f"| {form}")]
    named = set(re.findall(r"`(\w+)`", row.split("|")[4]))
    assert named | MASK_OPTIONS == {field.name for field in dataclasses.fields(options)}


def test_the_document_names_every_option_of_masks():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)=", text, re.MULTILINE)) == MASK_OPTIONS
