import json
import logging
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from visae.activations.format import RecordConfig
from visae.activations.record import record
from visae.activations.store import ActivationStore
from visae.errors import ModelError
from visae.models.config import ModelConfig
from visae.models.loading import load_model
from visae.models.transformers_files import quiet

NAMES = [
    "clip",
    "clip-vision",
    "siglip",
    "siglip2",
    "dinov2",
    "dinov2-classifier",
    "dinov2-registers",
    "dinov3",
    "vit",
    "vit-classifier",
    "vit-mae",
    "llava",
]
CLS = ("cls",)
SPECIAL = {
    "siglip": (),
    "siglip2": (),
    "dinov2-registers": (*CLS, "register0", "register1", "register2"),
    "dinov3": (*CLS, "register0", "register1"),
}


def load(folder, **options):
    if folder.name == "siglip2":
        options = {"image_size": 32} | options
    return load_model(ModelConfig(model=str(folder), **options), device="cpu")


def pixels_of(model, n_images=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n_images, 3, *model.preprocessing.size, generator=generator)


def library_network(folder):
    """The library's own, as it loads it."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    network_class = getattr(transformers, architecture)
    with quiet():
        return network_class.from_pretrained(folder).eval().requires_grad_(False)


def tower_of(network):
    for path in ("model.vision_tower", "vision_model", "vit", "dinov2"):
        try:
            return network.get_submodule(path)
        except AttributeError:
            continue
    return network


def library_output(folder, pixels):
    """The library's tokens after the last norm, logits and image features."""
    network = library_network(folder)
    tower = tower_of(network)
    arguments = {"pixel_values": pixels}
    if folder.name == "siglip2":
        processed = transformers.models.siglip2.image_processing_siglip2
        patches = torch.stack([processed.convert_image_to_patches(image, 8) for image in pixels])
        arguments = {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(len(pixels), 16, dtype=torch.int32),
            "spatial_shapes": torch.tensor([[4, 4]] * len(pixels)),
        }
    if folder.name == "vit-mae":
        tower.config.mask_ratio = 0.0
        arguments["noise"] = torch.arange(16.0).expand(len(pixels), -1)
    with torch.no_grad():
        tokens = tower(**arguments).last_hidden_state
        if folder.name in ("clip", "clip-vision", "llava"):
            tokens = tower.post_layernorm(tokens)
        has_head = folder.name.endswith("classifier")
        logits = network(**arguments).logits if has_head else None
        has_texts = folder.name in ("clip", "siglip", "siglip2")
        features = network.get_image_features(**arguments).pooler_output if has_texts else None
    return tokens, logits, features


def same(ours, theirs):
    return ours is theirs is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_the_output_is_that_of_the_library(transformers_folder, name):
    folder = transformers_folder(name)
    model = load(folder)
    pixels = pixels_of(model)
    output = model.trace(pixels, ["residual@0"]).output
    tokens, logits, features = library_output(folder, pixels)
    assert same(output.tokens, tokens)
    assert same(output.logits, logits)
    assert same(output.embedding, features)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_edited_and_the_tower_resumed(transformers_folder, name):
    model = load(transformers_folder(name))
    pixels = pixels_of(model)
    sites = ["heads@1", "residual@2", "mlp@1", "attention@0", "residual@0", "heads@2.1"]
    trace = model.trace(pixels, sites)
    for site in sites:
        assert trace.tokens[site].shape == (3, model.layout(site).n_tokens, model.d_model(site))
        assert torch.equal(model.tokens(pixels, [site])[site], trace.tokens[site])
        again = model.resume(trace, site, trace.tokens[site])
        for ours, theirs in zip(again, trace.output, strict=True):
            assert same(ours, theirs)
        edited = model.resume(trace, site, trace.tokens[site].flip(2))
        assert not torch.allclose(edited.tokens, trace.output.tokens)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("vit-mae", "siglip2")])
def test_residuals_are_the_hidden_states_of_the_library(transformers_folder, name):
    folder = transformers_folder(name)
    model = load(folder)
    pixels = pixels_of(model)
    with torch.no_grad():
        states = tower_of(library_network(folder))(pixels, output_hidden_states=True).hidden_states
    tokens = model.trace(pixels, ["residual@0", "residual@1"]).tokens
    assert torch.equal(tokens["residual@0"], states[1])
    assert torch.equal(tokens["residual@1"], states[2])


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_of_a_block_add_up(transformers_folder, name):
    model = load(transformers_folder(name))
    sites = ["residual@0", "attention@1", "mlp@1", "residual@1"]
    before, attention, mlp, after = model.trace(pixels_of(model), sites).tokens.values()
    torch.testing.assert_close(before + attention + mlp, after)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("patch", [0, 6, 15])
def test_special_tokens_come_first_and_patches_follow_row_by_row(transformers_folder, name, patch):
    """One changed patch changes its own token most (ViT-MAE's own order is random)."""
    model = load(transformers_folder(name))
    layout = model.layout("residual@0")
    assert (layout.special, layout.grid) == (SPECIAL.get(name, CLS), (4, 4))
    row, column = divmod(patch, 4)
    blank = torch.zeros(1, 3, 32, 32)
    planted = blank.clone()
    planted[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 5.0
    given, plain = (model.tokens(p, ["residual@0"])["residual@0"] for p in (planted, blank))
    assert int((given - plain).norm(dim=2).argmax()) == layout.n_special + patch


def test_the_masked_autoencoder_sees_every_patch_each_time(transformers_folder):
    model = load(transformers_folder("vit-mae"))
    pixels = pixels_of(model)
    first, second = (model.tokens(pixels, ["residual@2"])["residual@2"] for _ in range(2))
    assert first.shape == (3, 17, 32)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_size_changes_the_grid(transformers_folder, name):
    model = load(transformers_folder(name), image_size=48)
    assert model.layout("residual@1").grid == (6, 6)
    trace = model.trace(pixels_of(model), ["residual@1"])
    again = model.resume(trace, "residual@1", trace.tokens["residual@1"])
    assert torch.equal(again.tokens, trace.output.tokens)


def tensors_of(folder):
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state


def test_of_a_vision_language_model_only_the_tower_is_read(transformers_folder, tmp_path):
    """A shard without a tensor of the tower may be missing, for it is never fetched."""
    whole = transformers_folder("llava")
    places = {
        name: "tower.safetensors" if "vision_tower" in name else "language.safetensors"
        for name in tensors_of(whole)
    }
    assert set(places.values()) == {"tower.safetensors", "language.safetensors"}
    tower = {k: v for k, v in tensors_of(whole).items() if "vision_tower" in k}
    save_file(tower, tmp_path / "tower.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for file in ("config.json", "preprocessor_config.json"):
        shutil.copy(whole / file, tmp_path)
    model = load(tmp_path)
    assert model.identity.same_weights(load(whole).identity)
    n_weights = sum(p.numel() for p in model.architecture.network.parameters())
    assert n_weights == sum(p.numel() for p in tower_of(library_network(whole)).parameters())


def test_the_tower_of_an_older_checkpoint_is_read(transformers_folder, tmp_path):
    """Before transformers 5 the tower's own names had one more part."""
    whole = transformers_folder("llava")
    older = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in tensors_of(whole).items()
    }
    save_file(older, tmp_path / "model.safetensors")
    for file in ("config.json", "preprocessor_config.json"):
        shutil.copy(whole / file, tmp_path)
    assert load(tmp_path).identity.same_weights(load(whole).identity)


def test_siglip2_needs_one_size_for_all_images(transformers_folder):
    folder = transformers_folder("siglip2")
    for size in (None, 30, 4):
        with pytest.raises(ModelError, match=r"any aspect, 8 pixels a patch.*--image-size 32"):
            load(folder, image_size=size)
    assert load(folder).preprocessing.crop == "squash"


@pytest.mark.parametrize("name", [n for n in NAMES if n != "siglip2"])
@pytest.mark.parametrize("shape", [(40, 91), (91, 40), (32, 32), (300, 207)])
def test_pixels_are_those_of_the_image_processor(transformers_folder, name, shape):
    """But for how torchvision and Pillow round a resize: one level of 255, seldom two."""
    folder = transformers_folder(name)
    preprocessing = load(folder).preprocessing
    smooth = np.random.default_rng(0).normal(size=(*shape, 3)).cumsum(0).cumsum(1)
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min()) * 255
    image = Image.fromarray(smooth.astype(np.uint8))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    theirs = processor(images=image, return_tensors="pt").pixel_values[0]
    ours = preprocessing.pixels([preprocessing.view(image)])[0]
    std = torch.tensor(preprocessing.std).view(3, 1, 1)
    levels = (ours - theirs).mul(std * 255).abs()
    assert levels.max() < 2.01
    assert levels.mean() < 0.5


def test_an_odd_margin_is_halved_as_by_the_library(transformers_folder):
    """43 pixels wide, 32 of them kept: transformers leaves out 5 at the left, torchvision 6."""
    preprocessing = load(transformers_folder("clip")).preprocessing
    scaled = Image.new("RGB", (43, 36))
    scaled.putdata([(column, 0, 0) for _ in range(36) for column in range(43)])
    assert preprocessing.view(scaled).getpixel((0, 0))[0] == 5


def changed(folder, copy, **changes):
    copy = shutil.copytree(folder, copy / folder.name)
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copy


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"do_resize": False}, "does not resize"),
        ({"do_pad": True}, "pads"),
        ({"rescale_factor": 1 / 127.5}, "rescales by"),
        ({"do_center_crop": False}, "does not crop"),
        ({"resample": 4}, "4"),
        ({"crop_size": {"height": 40, "width": 40}}, "crops"),
        ({"image_mean": [0.5]}, "normalises"),
        ({"image_processor_type": "DonutImageProcessor"}, "DonutImageProcessor is not among"),
        ({"image_processor_type": "NoSuchProcessor"}, "Unrecognized image processor"),
    ],
)
def test_what_cannot_be_expressed_is_refused(transformers_folder, tmp_path, changes, said):
    folder = changed(transformers_folder("dinov2"), tmp_path, **changes)
    with pytest.raises(ModelError, match=f"cannot be expressed: .*{said}"):
        load(folder)


def test_normalisation_may_be_left_out(transformers_folder, tmp_path):
    folder = changed(transformers_folder("vit"), tmp_path, do_normalize=False, size=32)
    preprocessing = load(folder).preprocessing
    assert (preprocessing.mean, preprocessing.std) == ((0.0,) * 3, (1.0,) * 3)


def test_the_identity_names_the_folder_and_hashes_the_tower(transformers_folder):
    identity = load(transformers_folder("clip")).identity
    assert (identity.name, identity.title, identity.revision) == ("transformers/clip", "clip", None)
    assert not identity.same_weights(load(transformers_folder("vit")).identity)


def test_a_file_replaces_the_weights_of_the_folder(transformers_folder, tmp_path):
    folder = transformers_folder("vit")
    state = load_file(folder / "model.safetensors")
    half = {name: tensor.half() for name, tensor in state.items()}
    save_file(half, tmp_path / "half.safetensors")
    model = load(folder, weights=tmp_path / "half.safetensors")
    assert not model.identity.same_weights(load(folder).identity)
    assert model.trace(pixels_of(model), ["residual@0"]).output.tokens.dtype == torch.float32
    with pytest.raises(ModelError, match=r"safetensors files only.*pickles are never opened"):
        load(folder, weights=tmp_path / "half.bin")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layernorm.weight": None}, r"1 tensors are missing: layernorm\.weight"),
        (
            {"layernorm.weight": torch.zeros(3)},
            r"layernorm\.weight has shape \(3,\) instead of \(32,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(transformers_folder, tmp_path, change, said):
    folder = shutil.copytree(transformers_folder("vit"), tmp_path / "vit")
    path = folder / "model.safetensors"
    state = load_file(path) | change
    save_file({k: v for k, v in state.items() if v is not None}, path)
    with pytest.raises(ModelError, match=f"Cannot build ViTModel with these weights: {said}"):
        load(folder)


def test_truncated_or_missing_weights_are_refused(transformers_folder, tmp_path):
    folder = shutil.copytree(transformers_folder("vit"), tmp_path / "vit")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load(folder)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"vit has no model\.safetensors.*never opened"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no transformers model"),
        ('{"architecture": "vit_base_patch16_224"}', "no transformers model"),
        ('{"model_type": "bert"}', r"no vision tower of a known family: it is bert.*dinov2"),
        ('{"model_type": "swin"}', r"of a known family: it is swin"),
    ],
)
def test_another_configuration_is_refused(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=said):
        load(tmp_path)


def test_an_unreachable_hub_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = ModelConfig(model="transformers/facebook/dinov2-base")
    with pytest.raises(ModelError, match=r"facebook/dinov2-base is not in the local cache and the"):
        load_model(config, device="cpu")


def test_without_the_package_the_extra_is_named(transformers_folder, monkeypatch):
    folder = transformers_folder("vit")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r'pip install "visae\[transformers\]"'):
        load(folder)


def test_a_store_finds_the_folder_again(transformers_folder, tmp_path, numbered_images):
    """Recorded, moved with its workspace, and loaded from the store alone."""
    workspace = tmp_path / "workspace"
    folder = shutil.copytree(transformers_folder("dinov2"), workspace / "models" / "dinov2")
    config = ModelConfig(model=str(folder))
    record(
        numbered_images(3),
        load(folder),
        workspace / "activations" / "numbers",
        config=RecordConfig(sites=("residual@1", "heads@2")),
        model_config=config,
    )
    moved = workspace.rename(tmp_path / "moved")
    store = ActivationStore(moved / "activations" / "numbers")
    model = load_model(store.model, device="cpu")
    assert model.identity.same_weights(store.record.identity)


def test_nothing_is_said_about_towers_that_are_not_used(transformers_folder, monkeypatch, caplog):
    read, logger = transformers.AutoConfig.from_pretrained, logging.getLogger("transformers")

    def grumble(*args, **options):
        logger.warning("vocabulary")
        return read(*args, **options)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", grumble)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    load_model(ModelConfig(model=str(transformers_folder("siglip"))), device="cpu")
    assert not caplog.records
