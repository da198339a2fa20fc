"""Images come in order whoever reads them, and nothing keeps running when the reader ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visae.activations.decoding import (
    DecodedImage,
    Decoding,
    decoded_images,
    default_workers,
)
from visae.errors import ImageError
from visae.images.source import ImageEntry, LoadedImage
from visae.models.layout import Layout
from visae.models.patch_labels import patch_labels
from visae.models.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(size=(4, 4), interpolation="nearest")
WORKERS = [0, 1, 3]


class Squares:
    """Image i is grey i; its mask has two classes, left and right."""

    location = "squares:"

    def __init__(self, n_images, *, broken=(), deadly=(), entry=None):
        self.entries = tuple(ImageEntry(ref=str(i), label=f"l{i}") for i in range(n_images))
        self.broken, self.deadly, self.entry = set(broken), set(deadly), entry

    def load(self, ref):
        if int(ref) in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if int(ref) in self.broken:
            raise ImageError(f"Image {ref} is broken", where=ref, fix="Mend it")
        grey = Image.new("RGB", (8, 8), (int(ref),) * 3)
        values = np.repeat([[3, 3, 3, 3, 3, 3, 5, 5]], 8, axis=0).astype(np.int32)
        return LoadedImage(f"id{ref}", grey, Image.fromarray(values), f"mask{ref}", self.entry)


def decode(source, **options):
    decoding = Decoding(source=source, preprocessing=PREPROCESSING, **options)
    with decoded_images(decoding, source.entries) as images:
        return list(images)


@pytest.mark.parametrize("workers", WORKERS)
def test_images_come_in_order_with_their_failures(workers):
    found = decode(Squares(30, broken={4, 29}), workers=workers, n_ahead=7)
    assert len(found) == 30
    for i, image in enumerate(found):
        if i in (4, 29):
            assert isinstance(image, ImageError)
            assert (image.what, image.where, image.fix) == (
                f"Image {i} is broken",
                str(i),
                "Mend it",
            )
        else:
            assert isinstance(image, DecodedImage)
            assert (image.entry.label, image.content_id) == (f"l{i}", f"id{i}")
            assert image.view.shape == (4, 4, 3)
            assert (image.view == i).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_masks_are_labelled_on_every_grid(workers):
    layouts = tuple(Layout(special=(), grid=grid) for grid in ((2, 2), (1, 4)))
    (image,) = decode(Squares(1), workers=workers, layouts=layouts)
    seen = np.repeat([[3, 3, 3, 5]], 4, axis=0).astype(np.int32)
    assert image.mask_id == "mask0"
    assert set(image.patch_labels) == {(2, 2), (1, 4)}
    for grid, found in image.patch_labels.items():
        expected = patch_labels(seen, grid)
        assert np.array_equal(found.label, expected.label)
        assert np.array_equal(found.purity, expected.purity)


def test_patches_that_leave_pixels_out_are_labelled_by_what_they_see():
    layout = Layout(special=(), grid=(3, 3), covered=(3, 3))
    (image,) = decode(Squares(1), layouts=(layout,))
    seen = np.repeat([[3, 3, 3, 5]], 4, axis=0).astype(np.int32)
    assert image.patch_labels[3, 3].label.tolist() == seen[:3, :3].flatten().tolist()
    assert (image.patch_labels[3, 3].purity == 1).all()


def test_masks_are_left_alone_where_no_grid_is_asked_for():
    (image,) = decode(Squares(1))
    assert image.patch_labels == {}


def test_what_reading_told_takes_the_place_of_what_was_listed():
    known = ImageEntry(ref="0", label="seen", metadata={"place": "here"})
    (image,) = decode(Squares(1, entry=known))
    assert image.entry == known


def test_a_worker_that_dies_is_named():
    with pytest.raises(ImageError, match=r"process that reads images died.*--workers 0; it resum"):
        decode(Squares(40, deadly={17}), workers=2)


def test_a_reader_that_stops_early_leaves_nothing_running():
    source = Squares(200)
    decoding = Decoding(source=source, preprocessing=PREPROCESSING, workers=2, n_ahead=20)
    with decoded_images(decoding, source.entries) as images:
        next(images)
        children = child_processes(os.getpid())
        assert len(children) == 2
    assert not set(children) & set(child_processes(os.getpid()))


ENDLESS = """
import sys, time
import numpy as np
from PIL import Image
from visae.activations.decoding import Decoding, decoded_images
from visae.images.source import ImageEntry, LoadedImage
from visae.models.preprocessing import Preprocessing

class Slow:
    location = "slow:"
    entries = tuple(ImageEntry(ref=str(i)) for i in range(10000))
    def load(self, ref):
        time.sleep(0.05)
        return LoadedImage(ref, Image.new("RGB", (4, 4)))

decoding = Decoding(source=Slow(), preprocessing=Preprocessing(size=(4, 4)), workers=2)
with decoded_images(decoding, Slow.entries) as images:
    for image in images:
        print("now", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_worker_outlives_its_parent(blow):
    command = [sys.executable, "-c", ENDLESS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"now\n"
        workers = child_processes(process.pid)
        assert len(workers) == 2
        os.kill(process.pid, blow)
        process.wait(10)
    for _ in range(100):
        alive = [worker for worker in workers if is_alive(worker)]
        if not alive:
            break
        time.sleep(0.05)
    assert not alive


@pytest.mark.parametrize(
    ("on_gpu", "n_processes", "expected"),
    [(False, 1, 0), (True, 1, 7), (True, 2, 3), (True, 99, 1)],
)
def test_a_gpu_is_fed_by_all_cores_but_one(monkeypatch, on_gpu, n_processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert default_workers(on_gpu=on_gpu, n_processes=n_processes) == expected


def child_processes(parent):
    """The processes that one has started and that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        state = process_state(folder.name)
        if state is not None and state[1] == parent and state[0] != "Z":
            found.append(int(folder.name))
    return found


def is_alive(process):
    state = process_state(process)
    return state is not None and state[0] != "Z"


def process_state(process):
    """State and parent of a process."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1])
