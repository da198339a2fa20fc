import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visae.activations.format import RecordConfig
from visae.activations.record import record
from visae.activations.source import RecordedImages
from visae.activations.store import ActivationStore
from visae.errors import ImageError, StoreError
from visae.images.opening import open_images
from visae.images.source import ImageSource
from visae.models.config import ModelConfig, ModelIdentity
from visae.models.layout import Layout
from visae.models.preprocessing import Preprocessing
from visae.models.protocol import Output, Trace


class MeanColours:
    """A model whose tokens are the mean colours of four patches."""

    identity = ModelIdentity(name="test/colours", title="colours", weights_sha256="0" * 64)
    preprocessing = Preprocessing(size=(4, 4))
    sites = ("residual@0",)

    def layout(self, site):
        return Layout(special=(), grid=(2, 2))

    def d_model(self, site):
        return 3

    def tokens(self, pixels, sites):
        return self.trace(pixels, sites).tokens

    def trace(self, pixels, sites):
        tokens = torch.nn.functional.avg_pool2d(pixels, 2).flatten(2).transpose(1, 2)
        return Trace(dict.fromkeys(sites, tokens), {}, Output(tokens, None))

    def resume(self, trace, site, tokens):
        return Output(tokens, None)


def write_images(folder: Path, seed: int = 0) -> Path:
    for i in range(4):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng([seed, i]).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def record_images(location: str, out: Path) -> ActivationStore:
    return record(
        open_images(location),
        MeanColours(),
        out,
        config=RecordConfig(sites=("residual@0",), dtype="float32"),
        model_config=ModelConfig(model="test/colours"),
    )


@pytest.fixture
def workspace(tmp_path):
    write_images(tmp_path / "ws" / "images" / "small")
    record_images(str(tmp_path / "ws/images/small"), tmp_path / "ws/activations/small")
    return tmp_path / "ws"


def test_the_images_come_back_in_row_order(workspace):
    store = ActivationStore(workspace / "activations/small")
    source = store.source()
    assert isinstance(source, ImageSource)
    assert [entry.ref for entry in source.entries] == list(store.images.refs)
    assert [entry.label for entry in source.entries] == list(store.images.labels)
    loaded = [source.load(entry.ref).content_id for entry in source.entries]
    assert loaded == list(store.images.content_ids)


def test_a_moved_workspace_finds_its_images(workspace, tmp_path):
    workspace.rename(tmp_path / "elsewhere")
    source = ActivationStore(tmp_path / "elsewhere/activations/small").source()
    assert source.location == (tmp_path / "elsewhere/images/small").as_posix()


def test_a_moved_workspace_finds_its_segmentation_folder(tmp_path):
    for half in ("images", "masks"):
        write_images(tmp_path / "ws/images/seg" / half)
    for path in (tmp_path / "ws/images/seg/masks").rglob("*.png"):
        Image.new("L", (4, 4), 1).save(path)
    record_images(f"seg:{tmp_path}/ws/images/seg?ignore=9", tmp_path / "ws/activations/seg")
    (tmp_path / "ws").rename(tmp_path / "elsewhere")
    source = ActivationStore(tmp_path / "elsewhere/activations/seg").source()
    assert source.location == f"seg:{tmp_path}/elsewhere/images/seg?ignore=9"


def test_a_manifest_keeps_its_options(tmp_path):
    folder = write_images(tmp_path / "ws/images/small")
    manifest = folder / "list.csv"
    manifest.write_text("path,kind\nclass0/0.png,a\nclass1/1.png,b\n")
    record_images(f"{manifest}?label=kind", tmp_path / "ws/activations/small")
    source = ActivationStore(tmp_path / "ws/activations/small").source()
    assert [entry.label for entry in source.entries] == ["a", "b"]


def test_images_that_moved_are_asked_for_and_found(workspace, tmp_path):
    shutil.move(workspace / "images/small", tmp_path / "moved")
    store = ActivationStore(workspace / "activations/small")
    with pytest.raises(StoreError, match=r"cannot be opened.*--images"):
        store.source()
    assert len(store.source(tmp_path / "moved").entries) == 4


def test_missing_and_exchanged_images_are_refused(workspace, tmp_path):
    store = ActivationStore(workspace / "activations/small")
    others = write_images(tmp_path / "others", seed=1)
    with pytest.raises(StoreError, match=r"not the image that was recorded.*--images"):
        store.source(others)
    (workspace / "images/small/class1/3.png").unlink()
    with pytest.raises(StoreError, match=r"1 of the 4 recorded images .* class1/3.png.*--images"):
        store.source()


def test_an_image_that_changed_later_is_refused_when_loaded(workspace):
    source = ActivationStore(workspace / "activations/small").source()
    path = workspace / "images/small/class1/3.png"
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(StoreError, match="content differs"):
        source.load("class1/3.png")


def test_a_mask_that_changed_later_is_refused_when_loaded(tmp_path):
    for half in ("images", "masks"):
        write_images(tmp_path / "ws/images/seg" / half)
        for path in (tmp_path / "ws/images/seg/masks").rglob("*.png"):
            Image.new("L", (4, 4), 1).save(path)
    store = record_images(f"seg:{tmp_path}/ws/images/seg", tmp_path / "ws/activations/seg")
    source = store.source()
    assert source.load("class1/3.png").mask is not None
    Image.new("L", (4, 4), 2).save(tmp_path / "ws/images/seg/masks/class1/3.png")
    with pytest.raises(StoreError, match=r"mask of this image .* content differs"):
        source.load("class1/3.png")
    plain = store.source(tmp_path / "ws/images/seg/images")
    assert plain.load("class1/3.png").mask is None


def test_a_first_image_that_cannot_be_read_is_refused(workspace):
    store = ActivationStore(workspace / "activations/small")
    (workspace / "images/small" / store.images.refs[0]).write_bytes(b"no image")
    with pytest.raises(StoreError, match=r"cannot be read: .*--images"):
        store.source()


def test_an_image_that_was_not_recorded_is_refused(workspace):
    source = open_images(workspace / "images/small")
    store = ActivationStore(workspace / "activations/small")
    recorded = RecordedImages(store.images, source)
    with pytest.raises(ImageError, match="not recorded"):
        recorded.load("class1/9.png")
