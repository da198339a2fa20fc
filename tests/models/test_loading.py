import csv
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from visae.errors import ConfigError, ModelError
from visae.models.config import ModelConfig
from visae.models.loading import choose_device, load_model
from visae.storage import hub

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def network():
    """A small network with a head of seven classes (timm's own has a thousand)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("test_vit", num_classes=7)


@pytest.fixture
def write_weights(tmp_path, network):
    def write(name="weights.safetensors", **changes):
        state = {k: v.clone() for k, v in network.state_dict().items()} | changes
        path = tmp_path / name
        safetensors.torch.save_file({k: v for k, v in state.items() if v is not None}, path)
        return path

    return write


def load(**config):
    return load_model(ModelConfig(**config), device="cpu")


@pytest.mark.parametrize("name", ["test_vit", "timm/test_vit", "test_vit.r160_in1k"])
def test_local_weights_are_loaded_whole(write_weights, network, name):
    model = load(model=name, weights=write_weights())
    assert model.identity.name == "timm/" + name.removeprefix("timm/")
    pixels = torch.randn(2, 3, *model.preprocessing.size)
    with torch.no_grad():
        expected = network.eval()(pixels)
    assert torch.equal(model.trace(pixels, ["residual@1"]).output.logits, expected)


def test_the_title_is_the_name_unless_given(write_weights):
    assert load(model="test_vit", weights=write_weights()).identity.title == "test_vit"
    titled = load(model="test_vit", weights=write_weights(), title="A test")
    assert titled.identity.title == "A test"


def test_weights_without_a_head_give_no_logits(write_weights):
    path = write_weights(**{"head.weight": None, "head.bias": None})
    model = load(model="test_vit", weights=path)
    assert model.trace(torch.zeros(1, 3, 160, 160), ["residual@0"]).output.logits is None


def test_weights_with_two_heads_are_loaded(tmp_path):
    name = "deit_tiny_distilled_patch16_224"
    state = timm.create_model(name, num_classes=3).state_dict()
    safetensors.torch.save_file(state, tmp_path / "two.safetensors")
    model = load(model=name, weights=tmp_path / "two.safetensors")
    assert model.trace(torch.zeros(1, 3, 224, 224), ["residual@0"]).output.logits.shape == (1, 3)


def test_weights_in_half_precision_run_in_single(write_weights, network):
    half = {k: v.half() for k, v in network.state_dict().items()}
    model = load(model="test_vit", weights=write_weights(**half))
    assert model.trace(torch.zeros(1, 3, 160, 160), ["residual@0"]).output.tokens.dtype == (
        torch.float32
    )


def test_an_image_size_changes_the_input_and_the_grid(write_weights):
    model = load(model="test_vit", weights=write_weights(), image_size=96)
    assert model.preprocessing.size == (96, 96)
    assert model.layout("residual@0").grid == (6, 6)
    assert model.trace(torch.zeros(1, 3, 96, 96), ["residual@0"]).output.logits.shape == (1, 7)


def test_an_image_size_of_a_convolutional_network(tmp_path):
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    safetensors.torch.save_file(state, tmp_path / "resnet.safetensors")
    model = load(model="test_resnet", weights=tmp_path / "resnet.safetensors", image_size=64)
    assert model.preprocessing.size == (64, 64)


@pytest.mark.parametrize("image_size", [0, -16, 8])
def test_an_impossible_image_size_is_refused(write_weights, image_size):
    with pytest.raises((ModelError, ConfigError)):
        load(model="test_vit", weights=write_weights(), image_size=image_size)


def test_the_model_is_frozen_and_holds_its_weights_once(write_weights):
    model = load(model="test_vit", weights=write_weights())
    assert not any(p.requires_grad for p in model.architecture.network.parameters())
    assert not any(module.training for module in model.architecture.network.modules())
    assert "state_dict" not in model.architecture.network.pretrained_cfg


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"blocks.3.mlp.fc1.bias": None}, r"Missing key.*blocks\.3\.mlp\.fc1\.bias"),
        ({"extra": torch.zeros(2)}, r"Unexpected key.*extra"),
        ({"norm.weight": torch.zeros(3)}, r"size mismatch for norm\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(write_weights, changes, named):
    path = write_weights(**changes)
    with pytest.raises(ModelError, match=f"Cannot build test_vit.*{named}.*own tensor names"):
        load(model="test_vit", weights=path)


def test_weights_of_another_architecture_are_refused(write_weights):
    with pytest.raises(ModelError, match=r"Cannot build test_resnet.*Missing key"):
        load(model="test_resnet", weights=write_weights())


@pytest.mark.parametrize("name", ["weights.pth", "weights.bin", "weights"])
def test_other_files_than_safetensors_are_never_opened(write_weights, name):
    with pytest.raises(ModelError, match=r"safetensors files only.*pickles are never opened"):
        load(model="test_vit", weights=write_weights(name))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(write_weights, share):
    path = write_weights()
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load(model="test_vit", weights=path)


def test_missing_weights_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"missing .*none\.safetensors"):
        load(model="test_vit", weights=tmp_path / "none.safetensors")


def test_a_folder_instead_of_weights_is_refused(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load(model="test_vit", weights=tmp_path / "folder.safetensors")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_tiny_patch16_22", "no timm model named vit_tiny_patch16_22 .*vit_tiny_patch16_224"),
        ("timm/resnet_18", "no timm model named resnet_18 .*resnet18"),
        ("resnet18.a1in1k", r"no weights a1in1k of resnet18 .*resnet18\.a1_in1k"),
        ("", "no timm model named"),
    ],
)
def test_an_unknown_name_gives_the_nearest(name, said):
    with pytest.raises(ModelError, match=said):
        load(model=name)


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("timm.models._hub._HF_CACHE_DIR", None, raising=False)


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.usefixtures("empty_cache")
def test_an_unreachable_hub_is_said(monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "_answers", lambda _endpoint: False)
    with pytest.raises(ModelError, match=r"the model hub cannot be reached.*--weights"):
        load(model="test_vit")
    assert offline == constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("kind", [ConnectionResetError, TimeoutError, *HfHubHTTPError.__bases__])
def test_a_download_that_breaks_off_is_said(monkeypatch, kind):
    def create(*_, **__):
        raise kind("it broke off")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(ModelError, match=r"could not be downloaded: it broke off.*Try again"):
        load(model="test_vit")


def test_auto_is_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ModelError, match=r"Cannot use device .*--device cpu or auto"):
        choose_device(device)


@pytest.mark.slow
def test_a_real_model_recognises_real_images():
    if not DATA.is_dir():
        pytest.skip("the folder shared/data with DeiT-Tiny and ImageNet images is not here")
    weights = DATA / "deit_tiny" / "deit_tiny_patch16_224.safetensors"
    model = load(model="deit_tiny_patch16_224", weights=weights)
    with (DATA / "imagenet_sample" / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[::10]
    views = [
        model.preprocessing.view(Image.open(path).convert("RGB"))
        for row in rows
        for path in DATA.glob(f"imagenet_sample/**/{row['file']}")
    ]
    classes = torch.tensor([int(row["class_index"]) for row in rows])
    logits = model.trace(model.preprocessing.pixels(views), ["residual@11"]).output.logits
    assert len(views) == 100
    assert (logits.argmax(dim=1) == classes).float().mean() >= 0.7


@pytest.fixture
def cached(monkeypatch, tmp_path, network):
    """A hub client's cache with one model of timm's, at one commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--timm--test_vit.r160_in1k"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    whole = timm.create_model("test_vit")
    path = repository / "snapshots" / commit / "model.safetensors"
    safetensors.torch.save_file(whole.state_dict(), path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return commit


@pytest.mark.parametrize("revision", [None, "main", "0123456789abcdef0123456789abcdef01234567"])
def test_the_commit_of_the_weights_is_known(cached, revision):
    assert load(model="test_vit", revision=revision).identity.revision == cached


def test_local_weights_have_no_commit(cached, write_weights):
    assert load(model="test_vit", weights=write_weights()).identity.revision is None


def test_another_revision_is_not_taken_from_the_cache(cached):
    with pytest.raises(ModelError, match="not in the local cache"):
        load(model="test_vit", revision="v2")


# Random weights


def test_random_weights_are_those_of_the_seed_and_leave_the_generator_alone():
    before = torch.random.get_rng_state()
    first, again, other = (load(model=f"random:{seed}:test_vit") for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.identity.name == "random:3:timm/test_vit"
    assert first.identity.title == "test_vit, random weights"
    assert first.identity == again.identity
    assert not first.identity.same_weights(other.identity)
    assert first.preprocessing == other.preprocessing


@pytest.mark.parametrize(
    "config",
    [
        {"model": "random:test_vit"},
        {"model": "random:-1:test_vit"},
        {"model": "random:0:test_vit", "weights": Path("a.safetensors")},
        {"model": "random:0:test_vit", "revision": "main"},
    ],
)
def test_random_weights_are_named_by_seed_and_model_alone(config):
    with pytest.raises(ModelError, match="named by a seed") as caught:
        load(**config)
    assert "random:0:vit_small" in str(caught.value)


def test_an_unknown_model_has_no_random_weights_either():
    with pytest.raises(ModelError, match="no timm model named test_vitt"):
        load(model="random:0:test_vitt")
