import csv
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from visae.activations.format import RecordConfig
from visae.activations.record import record
from visae.errors import ImageError, ModelError
from visae.images.opening import open_images
from visae.models.config import ModelConfig

MODEL_CONFIG = ModelConfig(model="test/table")
SPECIAL = ("cls", "register0")

# Images that cannot be read


def test_unreadable_images_are_left_out_and_listed(run, tmp_path, numbered_images):
    store = run(tmp_path / "s", source=numbered_images(50, unreadable={40, 2, 17}))
    with (tmp_path / "s" / "skipped.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["ref", "reason"], *([str(i), f"Image {i} is broken"] for i in (2, 17, 40))]
    assert store.n_images == 47


def test_a_complete_store_lists_that_nothing_was_skipped(run, tmp_path):
    run(tmp_path / "s")
    assert (tmp_path / "s" / "skipped.csv").read_text() == "ref,reason\n"


def test_broken_files_of_a_folder_are_skipped(tmp_path, planted_folder, tiny_vit):
    folder = tmp_path / "images"
    shutil.copytree(planted_folder, folder)
    (folder / "red" / "broken.png").write_bytes(b"no image")
    cut = (folder / "red" / "01.png").read_bytes()
    (folder / "blue" / "cut.png").write_bytes(cut[: len(cut) // 2])
    Image.new("RGB", (200_000, 1)).save(folder / "blue" / "long.png")
    store = record(
        open_images(folder),
        tiny_vit,
        tmp_path / "s",
        config=RecordConfig(sites=("residual@0",)),
        model_config=ModelConfig(model="timm/tiny"),
    )
    assert store.n_images == 20
    with (tmp_path / "s" / "skipped.csv").open(newline="") as file:
        skipped = {row["ref"]: row["reason"] for row in csv.DictReader(file)}
    assert list(skipped) == ["blue/cut.png", "blue/long.png", "red/broken.png"]
    assert "truncated" in skipped["blue/cut.png"]
    assert "elongated" in skipped["blue/long.png"]


def test_images_of_mixed_sizes_are_each_scaled_alone(tmp_path, tiny_vit):
    sizes = [(40, 36), (32, 32), (300, 41), (7, 90), (33, 64)]
    for i, size in enumerate(sizes):
        noise = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "images" / f"{i}.png")
    source = open_images(tmp_path / "images")
    store = record(
        source,
        tiny_vit,
        tmp_path / "s",
        config=RecordConfig(sites=("residual@0",), dtype="float32", batch_size=5),
        model_config=ModelConfig(model="timm/tiny"),
    )
    for row, entry in enumerate(source.entries):
        view = tiny_vit.preprocessing.view(source.load(entry.ref).pixels)
        alone = tiny_vit.tokens(tiny_vit.preprocessing.pixels([view]), ["residual@0"])
        expected = alone["residual@0"][0, store.site("residual@0").layout.kept("patches")]
        torch.testing.assert_close(store.image("residual@0", row), expected, rtol=1e-4, atol=1e-4)


def test_a_worker_that_dies_leaves_what_is_written(run, tmp_path, numbered_images, files):
    class Deadly(numbered_images):
        def load(self, ref):
            if ref == "40":
                os.kill(os.getpid(), signal.SIGKILL)
            return super().load(ref)

    with pytest.raises(ImageError, match=r"process that reads images died.*resumes"):
        run(tmp_path / "s", source=Deadly(50), workers=1)
    assert (tmp_path / "s" / "shards" / "00000.json").is_file()
    run(tmp_path / "s", workers=1)
    run(tmp_path / "whole")
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_strict_stops_at_the_first_broken_image(run, tmp_path, numbered_images):
    source = numbered_images(50, unreadable={20, 30})
    with pytest.raises(ImageError, match="Image 20 is broken"):
        run(tmp_path / "s", source=source, options={"strict": True})


def test_strict_refuses_what_was_left_out_before(run, tmp_path, numbered_images, stop_after):
    source, strict = numbered_images(50, unreadable={3}), {"strict": True}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", source=source, options=stop_after(40))
    for _ in range(2):
        with pytest.raises(ImageError, match=r"1 of 50 images were left out .*without --strict"):
            run(tmp_path / "s", source=source, options=strict)
    assert run(tmp_path / "s", source=source).n_images == 49
    assert run(tmp_path / "whole", options=strict).n_images == 50


def test_nothing_readable_is_an_error_and_leaves_the_way_free(run, tmp_path, numbered_images):
    source = numbered_images(50, unreadable=range(50))
    with pytest.raises(ImageError, match=r"None of the 50 images can be read.*Image 0 is broken"):
        run(tmp_path / "s", source=source)
    assert (tmp_path / "s" / "skipped.csv").read_text().count("\n") == 51
    assert run(tmp_path / "s", source=numbered_images(50)).n_images == 50


def test_no_images_are_refused(run, tmp_path, numbered_images):
    with pytest.raises(ImageError, match="There are no images"):
        run(tmp_path / "s", source=numbered_images(0))
    assert not (tmp_path / "s").exists()


# Activations that cannot be stored


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_no_numbers_name_image_and_site(run, tmp_path, value, tables):
    made = tables(50)
    made["mlp@1"][33, 4, 1] = value
    with pytest.raises(ModelError, match=r"NaN or infinite activations at mlp@1 for image 33"):
        run(tmp_path / "s", given=made)


def test_what_wrote_nothing_gives_way_to_what_its_error_advises(run, tmp_path, tables):
    given = tables(50)
    given["mlp@1"][:, 0, 0] = 1e5
    with pytest.raises(ModelError, match="try --dtype bfloat16"):
        run(tmp_path / "s", given=given, dtype="float16")
    assert run(tmp_path / "s", given=given, dtype="bfloat16").dtype == "bfloat16"


def test_an_overflow_of_half_precision_is_named(run, tmp_path, tables):
    made = tables(50)
    made["residual@3"][20, 0, 0] = 70_000.0
    with pytest.raises(ModelError, match=r"residual@3 for image 20.*--dtype bfloat16"):
        run(tmp_path / "s", given=made, dtype="float16")
    assert run(tmp_path / "t", given=made, dtype="bfloat16").n_images == 50
