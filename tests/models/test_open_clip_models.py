import json
import shutil
import sys

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from visae.errors import ModelError
from visae.models.config import ModelConfig
from visae.models.loading import load_model

TOWERS = ["vit", "vit-pool-first", "vit-own-attention", "coca", "resnet", "siglip", "convnext"]
FUSED = {"vit", "vit-pool-first", "coca"}


def load(folder, **options):
    return load_model(ModelConfig(model=str(folder), **options), device="cpu")


def pixels_of(model, n_images=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n_images, 3, *model.preprocessing.size, generator=generator)


def library_network(folder, **options):
    """The library's own, frozen as ours: torch rounds otherwise where weights could learn."""
    return open_clip.create_model(f"local-dir:{folder}", **options).eval().requires_grad_(False)


def encoded(network, pixels):
    with torch.no_grad():
        return network.encode_image(pixels, normalize=False)


@pytest.fixture
def copy_of(tmp_path, open_clip_folder):
    """A folder of one's own, to change."""

    def copy(name):
        return shutil.copytree(open_clip_folder(name), tmp_path / name)

    return copy


@pytest.mark.parametrize("tower", TOWERS)
def test_the_embedding_is_what_the_library_encodes(open_clip_folder, tower):
    folder = open_clip_folder(tower)
    model = load(folder)
    pixels = pixels_of(model)
    output = model.trace(pixels, list(model.sites)[:1]).output
    assert torch.equal(output.embedding, encoded(library_network(folder), pixels))
    assert output.logits is None


@pytest.mark.parametrize("tower", TOWERS)
def test_tokens_are_edited_and_the_tower_resumed(open_clip_folder, tower):
    model = load(open_clip_folder(tower))
    pixels = pixels_of(model)
    sites = [model.sites[-1], *list(model.sites)[:4]]
    trace = model.trace(pixels, sites)
    for site in sites:
        assert trace.tokens[site].shape == (3, model.layout(site).n_tokens, model.d_model(site))
        assert torch.equal(model.tokens(pixels, [site])[site], trace.tokens[site])
        same = model.resume(trace, site, trace.tokens[site])
        assert torch.equal(same.tokens, trace.output.tokens)
        assert torch.equal(same.embedding, trace.output.embedding)
        edited = model.resume(trace, site, trace.tokens[site].flip(2))
        assert not torch.allclose(edited.embedding, trace.output.embedding)


@pytest.mark.parametrize("tower", TOWERS)
def test_an_edit_is_that_of_a_plain_hook(open_clip_folder, tower):
    """The library's own network, with the module's output replaced in the plainest way."""
    folder = open_clip_folder(tower)
    model, network = load(folder), library_network(folder)
    site = {"resnet": "layer2", "convnext": "trunk.stages.1"}.get(tower, "residual@1")
    path = {"siglip": "visual.trunk.blocks.1"}.get(tower, "visual.transformer.resblocks.1")
    pixels = pixels_of(model)
    trace = model.trace(pixels, [site])
    mapped = "." in site or "@" not in site
    module = network.get_submodule(f"visual.{site}" if mapped else path)
    handle = module.register_forward_hook(lambda _module, _inputs, output: output * 0.5)
    expected = encoded(network, pixels)
    handle.remove()
    edited = model.resume(trace, site, trace.tokens[site] * 0.5)
    assert torch.equal(edited.embedding, expected)


@pytest.mark.parametrize("tower", ["vit", "coca", "siglip"])
def test_the_class_token_is_first_and_patches_follow_row_by_row(open_clip_folder, tower):
    """One changed patch changes its own token, and no other before attention mixes them."""
    model = load(open_clip_folder(tower))
    layout = model.layout("residual@0")
    assert layout.special == ("cls",)
    (rows, columns), side = layout.grid, model.preprocessing.size[0] // layout.grid[0]
    blank = torch.zeros(1, 3, *model.preprocessing.size)
    row, column = rows - 2, 1
    planted = blank.clone()
    planted[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side] = 3.0
    changes = (
        model.tokens(planted, ["residual@0"])["residual@0"]
        - model.tokens(blank, ["residual@0"])["residual@0"]
    )
    assert int(changes.norm(dim=2).argmax()) == 1 + row * columns + column


@pytest.mark.parametrize("tower", TOWERS)
def test_heads_are_sites_where_attention_is_not_fused(open_clip_folder, tower):
    model = load(open_clip_folder(tower))
    if tower in FUSED:
        assert not any(site.startswith("heads") for site in model.sites)
        with pytest.raises(ModelError, match="fused"):
            model.layout("heads@0")
    elif tower in ("siglip", "vit-own-attention"):
        assert "heads@0" in model.sites
        assert model.d_model("heads@0.1") < model.d_model("heads@0")


def test_coca_final_tokens_are_those_before_its_pool(open_clip_folder):
    model = load(open_clip_folder("coca"))
    trace = model.trace(pixels_of(model), ["residual@2"])
    assert torch.equal(trace.output.tokens, trace.tokens["residual@2"])


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("shape", [(40, 90), (91, 40), (32, 32), (300, 207)])
def test_pixels_are_those_of_the_library(copy_of, mode, interpolation, shape):
    folder = copy_of("vit")
    path = folder / "open_clip_config.json"
    settings = json.loads(path.read_text())
    settings["preprocess_cfg"] |= {"resize_mode": mode, "interpolation": interpolation}
    path.write_text(json.dumps(settings))
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(picture)
    preprocessing = load(folder).preprocessing
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    ours = preprocessing.pixels([preprocessing.view(image)])[0]
    torch.testing.assert_close(ours, transform(image), rtol=0, atol=1e-6)


def test_an_image_padded_to_the_longest_side_is_refused(copy_of):
    folder = copy_of("vit")
    path = folder / "open_clip_config.json"
    path.write_text(path.read_text().replace("shortest", "longest"))
    with pytest.raises(ModelError, match=r"preprocessing of vit is not supported.*longest"):
        load(folder)


def test_an_image_size_changes_the_grid(open_clip_folder):
    model = load(open_clip_folder("vit"), image_size=48)
    assert model.layout("residual@0").grid == (6, 6)
    network = library_network(open_clip_folder("vit"), force_image_size=48)
    pixels = pixels_of(model)
    output = model.trace(pixels, ["residual@0"]).output
    assert torch.equal(output.embedding, encoded(network, pixels))


def test_an_image_size_of_a_timm_tower(open_clip_folder):
    model = load(open_clip_folder("siglip"), image_size=96)
    assert model.layout("residual@0").grid == (6, 6)
    assert model.preprocessing.size == (96, 96)


def test_the_identity_names_the_folder_and_hashes_the_tower(open_clip_folder, copy_of):
    identity = load(open_clip_folder("vit")).identity
    assert (identity.name, identity.title, identity.revision) == ("open_clip/vit", "vit", None)
    folder = copy_of("vit")
    weights = folder / "open_clip_model.safetensors"
    state = load_file(weights)
    save_file(state | {"logit_scale": state["logit_scale"] + 1}, weights)
    assert load(folder).identity.same_weights(identity)
    save_file(state | {"visual.proj": state["visual.proj"] + 1}, weights)
    assert not load(folder).identity.same_weights(identity)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_tensors_alone_are_read_from_pickles(copy_of, open_clip_folder, suffix):
    folder = copy_of("vit")
    weights = folder / "open_clip_model.safetensors"
    torch.save(load_file(weights), folder / f"weights{suffix}")
    weights.unlink()
    model = load(folder, weights=folder / f"weights{suffix}")
    assert model.identity.same_weights(load(open_clip_folder("vit")).identity)


def test_code_in_a_pickle_is_never_run(copy_of, tmp_path):
    folder, trace = copy_of("vit"), tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return exec, (f"open({str(trace)!r}, 'w')",)

    torch.save({"visual.proj": Trap()}, folder / "weights.pt")
    with pytest.raises(ModelError, match="more than tensors is never opened"):
        load(folder, weights=folder / "weights.pt")
    assert not trace.exists()


def test_weights_that_do_not_fit_are_refused(copy_of):
    folder = copy_of("vit")
    weights = folder / "open_clip_model.safetensors"
    state = load_file(weights)
    save_file({k: v for k, v in state.items() if k != "visual.proj"}, weights)
    with pytest.raises(ModelError, match=r"Cannot build vit.*visual\.proj.*own tensor names"):
        load(folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="Cannot build vit"):
        load(folder)
    weights.unlink()
    with pytest.raises(ModelError, match=r"vit has no open_clip_model\.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "no table of keys"),
        ("{}", "has no model_cfg"),
        ('{"model_cfg": {}}', "Cannot build"),
        ('{"model_cfg": {"embed_dim": 4, "vision_cfg": {"n": 1}, "text_cfg": {}}}', "Cannot build"),
    ],
)
def test_a_broken_configuration_is_refused(copy_of, text, said):
    folder = copy_of("vit")
    (folder / "open_clip_config.json").write_text(text)
    with pytest.raises(ModelError, match=said):
        load(folder)


def test_without_the_package_the_extra_is_named(open_clip_folder, monkeypatch):
    folder = open_clip_folder("vit")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ModelError, match=r'pip install "visae\[clip\]"'):
        load(folder)
