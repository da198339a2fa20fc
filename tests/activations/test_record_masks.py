"""What is recorded beside the activations: patch labels, metadata, what a stream only now knows."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from visae.activations.format import MaskClass, RecordConfig
from visae.activations.record import record
from visae.activations.store import ActivationStore
from visae.errors import ConfigError, StoreError
from visae.images.opening import open_images
from visae.models.config import ModelConfig
from visae.models.patch_labels import patch_labels
from visae.models.preprocessing import Preprocessing

SIZE = (4, 8)
GRIDS = {"early": (1, 8), "late": (1, 4)}


def mask_values(i):
    """Random classes 0 to 3 and ignored pixels; some images have no mask."""
    return None if i % 5 == 2 else np.random.default_rng(i).integers(-1, 4, SIZE, dtype=np.int32)


@pytest.fixture
def masked_images(numbered_images):
    class MaskedImages(numbered_images):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.mask_classes = {0: "sky", 1: "road", 2: "car", 3: "tree"}

        def load(self, ref):
            image, values = super().load(ref), mask_values(int(ref))
            if values is None:
                return image
            return image._replace(mask=Image.fromarray(values), mask_id=f"mask{ref}")

    return MaskedImages


@pytest.fixture
def two_grids(table_model):
    """A model with two sites, of 8 and 4 patches in a row."""
    made = {"early": torch.randn(50, 8, 3), "late": torch.randn(50, 4, 5)}
    model = table_model(made)
    model.preprocessing = Preprocessing(
        size=SIZE, interpolation="nearest", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    return made, model


@pytest.mark.parametrize("workers", [0, 2])
def test_patch_labels_lie_beside_the_activations(run, tmp_path, masked_images, two_grids, workers):
    made, model = two_grids
    source = masked_images(50, unreadable={4, 20})
    store = run(tmp_path / "s", given=made, model=model, source=source, workers=workers)
    rows = [i for i in range(50) if i not in (4, 20)]
    for site, grid in GRIDS.items():
        found = store.patch_labels(site)
        assert found.classes == {0: "sky", 1: "road", 2: "car", 3: "tree"}
        assert found.labels.shape == found.purity.shape == (48, grid[0] * grid[1])
        for row, i in enumerate(rows):
            values = mask_values(i)
            if values is None:
                assert (found.labels[row] == -1).all()
                assert (found.purity[row] == 0).all()
                continue
            expected = patch_labels(values, grid)
            assert np.array_equal(found.labels[row], expected.label)
            assert np.array_equal(found.purity[row], expected.purity)
    ids = [None if mask_values(i) is None else f"mask{i}" for i in rows]
    assert store.images.mask_ids == tuple(ids)
    assert store.record.mask_classes[2] == MaskClass(value=2, name="car")
    store.verify()


def test_classes_without_names_are_called_by_their_values(run, tmp_path, masked_images, two_grids):
    made, model = two_grids
    source = masked_images(50)
    source.mask_classes = {}
    store = run(tmp_path / "s", given=made, model=model, source=source)
    assert store.patch_labels("early").classes == {i: str(i) for i in range(4)}


def test_labelled_recordings_resume_to_equal_files(
    run, tmp_path, masked_images, two_grids, files, stop_after
):
    made, model = two_grids
    options = {"given": made, "model": model, "source": masked_images(50)}
    run(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", **options, options=stop_after(20))
    run(tmp_path / "s", **options, workers=2)
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_an_altered_patch_label_is_found(run, tmp_path, masked_images, two_grids):
    made, model = two_grids
    run(tmp_path / "s", given=made, model=model, source=masked_images(50))
    path = tmp_path / "s" / "labels" / "00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    store = ActivationStore(tmp_path / "s")
    with pytest.raises(StoreError, match="checksum differs"):
        store.patch_labels("late")
    with pytest.raises(StoreError, match="checksum differs"):
        store.verify()


def test_a_store_without_masks_has_no_patch_labels(run, tmp_path):
    store = run(tmp_path / "s")
    assert not (tmp_path / "s" / "labels").exists()
    with pytest.raises(StoreError, match=r"no masks.*Record images with masks"):
        store.patch_labels("mlp@1")


def test_metadata_is_kept_with_its_images(run, tmp_path, numbered_images):
    source = numbered_images(50, unreadable={7}, labels=["x"] * 50)
    source.entries = tuple(
        dataclasses.replace(e, metadata={"year": e.ref, "place": None if i % 2 else "here"})
        for i, e in enumerate(source.entries)
    )
    images = run(tmp_path / "s", source=source).images
    rows = [i for i in range(50) if i != 7]
    assert images.metadata["year"] == tuple(map(str, rows))
    assert images.metadata["place"] == tuple(None if i % 2 else "here" for i in rows)
    assert images.labels == ("x",) * 49


@pytest.fixture
def stream(numbered_images):
    class Stream(numbered_images):
        """Knows labels only once it has read them."""

        is_stream = True
        n_here = 0

        def load(self, ref):
            self.n_here += 1
            known = dataclasses.replace(self.entries[int(ref)], label=f"read{ref}")
            return super().load(ref)._replace(entry=known)

    return Stream(50)


def test_a_stream_is_read_here_and_tells_its_labels(run, tmp_path, stream, monkeypatch):
    monkeypatch.setattr("visae.activations.record.default_workers", lambda **_: 2)
    store = run(tmp_path / "s", source=stream)
    assert store.images.labels == tuple(f"read{i}" for i in range(50))
    assert stream.n_here == 50


def test_workers_for_a_stream_are_refused(run, tmp_path, stream):
    with pytest.raises(ConfigError, match=r"read by one process \(--workers 2\)"):
        run(tmp_path / "s", source=stream, workers=2)


def test_a_mask_of_another_size_is_a_counted_skip(tmp_path, tiny_vit):
    for i in range(6):
        for part, mode in (("images", "RGB"), ("masks", "L")):
            path = tmp_path / "seg" / part / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            size = (30, 30) if (i, part) == (4, "masks") else (40, 36)
            Image.new(mode, size, i).save(path)
    store = record(
        open_images(f"seg:{tmp_path / 'seg'}"),
        tiny_vit,
        tmp_path / "s",
        config=RecordConfig(sites=("residual@0",), workers=2),
        model_config=ModelConfig(model="timm/tiny"),
    )
    assert store.n_images == 5
    skipped = (tmp_path / "s" / "skipped.csv").read_text().splitlines()
    assert len(skipped) == 2
    assert skipped[1].startswith("4.png")
    found = store.patch_labels("residual@0")
    assert found.labels.tolist() == [[i] * 16 for i in (0, 1, 2, 3, 5)]
    assert (found.purity == 1).all()
