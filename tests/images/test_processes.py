"""Every source can be sent to another process, and used by forked ones at once."""

import multiprocessing
import sys

import numpy as np
import pytest
from PIL import Image

from visae.images.opening import open_images

KINDS = ["folder", "manifest", "bundled", "segmentation", "webdataset"]


@pytest.fixture(params=KINDS)
def source(request, tmp_path, write_image, encode):
    """A source of each kind that needs no package besides."""
    if request.param == "bundled":
        return open_images("bundled:cifar10")
    for i in range(12):
        write_image(tmp_path / f"set/images/{i:02d}.png", seed=i)
        (tmp_path / "set/masks").mkdir(exist_ok=True)
        Image.new("L", (4, 3), i).save(tmp_path / f"set/masks/{i:02d}.png")
    if request.param == "webdataset":
        import tarfile

        with tarfile.open(tmp_path / "set.tar", "w") as tar:
            for path in sorted((tmp_path / "set/images").iterdir()):
                tar.add(path, path.name)
    if request.param == "manifest":
        rows = [f"images/{i:02d}.png" for i in range(12)]
        (tmp_path / "set/list.csv").write_text("\n".join(["path", *rows]))
    places = {
        "folder": "{}/set/images",
        "manifest": "{}/set/list.csv",
        "segmentation": "seg:{}/set",
        "webdataset": "{}/set.tar",
    }
    return open_images(places[request.param].format(tmp_path))


def shown(image):
    mask = None if image.mask is None else np.asarray(image.mask).tolist()
    return image.content_id, np.asarray(image.pixels).tolist(), image.mask_id, mask, image.entry


def test_a_copy_gives_the_same_images(source, sent):
    copy = sent(source)
    assert (copy.location, copy.entries) == (source.location, source.entries)
    for entry in source.entries[:3]:
        assert shown(copy.load(entry.ref)) == shown(source.load(entry.ref))


def _read_all(source, refs, results):
    results.put([source.load(ref).content_id for ref in refs])


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_forked_processes_do_not_disturb_each_other(source):
    refs = [entry.ref for entry in source.entries[:12]]
    expected = [source.load(ref).content_id for ref in refs]
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    workers = [
        fork.Process(target=_read_all, args=(source, refs * 5, results), daemon=True)
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    assert found == [expected * 5] * 2
