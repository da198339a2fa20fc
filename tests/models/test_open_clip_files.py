import json
import shutil

import open_clip
import pytest
from open_clip import pretrained
from safetensors.torch import load_file

from visae.activations.format import RecordConfig
from visae.activations.record import record
from visae.errors import ModelError
from visae.models.config import ModelConfig
from visae.models.loading import load_model, load_text_tower
from visae.models.open_clip_files import find_open_clip


def find(name, **options):
    with find_open_clip(ModelConfig(model=f"open_clip/{name}", **options), name) as source:
        return source


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"")
    return path


@pytest.fixture
def tiny_built_in(open_clip_folder, tmp_path):
    """An architecture that open_clip knows by name, and a file with its weights."""
    folder = open_clip_folder("vit")
    settings = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    path = tmp_path / "visae-tiny.json"
    path.write_text(json.dumps(settings))
    open_clip.add_model_config(path)
    yield "visae-tiny", folder / "open_clip_model.safetensors"
    open_clip.factory._MODEL_CONFIG_PATHS.remove(path)
    del open_clip.factory._MODEL_CONFIGS["visae-tiny"]


def test_a_known_architecture_takes_a_weights_file(tiny_built_in):
    name, weights = tiny_built_in
    model = load_model(ModelConfig(model=f"open_clip/{name}", weights=weights), device="cpu")
    assert model.identity.name == "open_clip/visae-tiny"
    assert model.preprocessing.mean == open_clip.OPENAI_DATASET_MEAN
    tower = load_text_tower(ModelConfig(model=f"open_clip/{name}", weights=weights), device="cpu")
    assert tower.encode_texts(["a cat"]).shape == (1, 20)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ViT-B-61", r"no open_clip model named ViT-B-61 .*ViT-B-16"),
        ("ViT-B-16/laion2b", r"no weights laion2b of ViT-B-16 .*laion2b_s34b_b88k"),
        ("ViT-B-16", r"without weights.*open_clip/ViT-B-16/TAG: openai, .*--weights"),
    ],
)
def test_an_unknown_name_gives_the_nearest(name, said):
    with pytest.raises(ModelError, match=said):
        find(name)


def test_a_file_alone_has_the_preprocessing_of_which_all_weights_agree(file):
    source = find("ViT-B-16-SigLIP", weights=file)
    assert source.preprocessing["mean"] == (0.5, 0.5, 0.5)
    assert source.preprocessing["resize_mode"] == "squash"
    assert source.revision is None


def test_a_file_alone_is_refused_where_weights_disagree(file):
    with pytest.raises(ModelError, match=r"differ in how images are made.*open_clip/ViT-L-14/TAG"):
        find("ViT-L-14", weights=file)
    assert find("ViT-L-14/openai", weights=file).name == "ViT-L-14/openai"


def test_weights_have_the_activation_function_they_were_trained_with(file):
    """ViT-B-16 has another GELU than OpenAI's weights for it; open_clip only warns."""
    assert find("ViT-B-16/openai", weights=file).model["quick_gelu"] is True
    assert not find("ViT-B-16/laion2b_s34b_b88k", weights=file).model.get("quick_gelu")


def test_every_tag_of_the_library_can_be_found(file):
    for architecture, tag in pretrained.list_pretrained():
        if architecture in open_clip.list_models():
            assert find(f"{architecture}/{tag}", weights=file).name == f"{architecture}/{tag}"


@pytest.mark.parametrize("name", ["weights.npz", "weights.ckpt", "none.safetensors"])
def test_other_files_than_weights_are_refused(tmp_path, name):
    if name != "none.safetensors":
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=r"is missing|is no weights file"):
        find("ViT-B-16-SigLIP", weights=tmp_path / name)


@pytest.fixture
def hub(monkeypatch, tmp_path, open_clip_folder):
    """A hub with one repository, ``lab/clip``, in the client's own cache."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--lab--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(open_clip_folder("vit"), repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return commit


def test_a_repository_is_read_from_the_cache_without_a_network(hub, open_clip_folder):
    config = ModelConfig(model="open_clip/hf-hub:lab/clip")
    model = load_model(config, device="cpu")
    assert (model.identity.name, model.identity.revision) == ("open_clip/lab/clip", hub)
    folder = ModelConfig(model=str(open_clip_folder("vit")))
    assert model.identity.same_weights(load_model(folder, device="cpu").identity)
    tower = load_text_tower(config, device="cpu")
    assert tower.encode_texts(["a cat"]).shape == (1, 20)


def test_a_repository_is_read_at_a_revision(hub):
    config = ModelConfig(model="open_clip/hf-hub:lab/clip", revision=hub)
    assert load_model(config, device="cpu").identity.revision == hub
    with pytest.raises(ModelError, match="lab/clip is not in the local cache"):
        load_model(ModelConfig(model="open_clip/hf-hub:lab/clip", revision="v2"), device="cpu")


def test_a_tag_is_read_from_its_repository(hub, monkeypatch, open_clip_folder):
    settings = {"hf_hub": "lab/clip/", "mean": (0.1, 0.2, 0.3)}
    monkeypatch.setitem(pretrained._PRETRAINED["ViT-B-16"], "lab", settings)
    with find_open_clip(ModelConfig(model="open_clip/ViT-B-16/lab"), "ViT-B-16/lab") as source:
        assert source.revision == hub
        weights = open_clip_folder("vit") / "open_clip_model.safetensors"
        assert load_file(source.weights).keys() == load_file(weights).keys()


def test_an_unreachable_hub_is_said(hub):
    with pytest.raises(ModelError, match=r"imageomics/bioclip is not in the local cache and the"):
        find("hf-hub:imageomics/bioclip")
    with pytest.raises(ModelError, match=r"laion/CLIP.* is not in the local cache and the model"):
        find("ViT-B-16/laion2b_s34b_b88k")


def test_a_store_is_bound_to_the_commit_it_was_recorded_from(hub, tmp_path, numbered_images):
    config = ModelConfig(model="open_clip/hf-hub:lab/clip")
    store = record(
        numbered_images(3),
        load_model(config, device="cpu"),
        tmp_path / "store",
        config=RecordConfig(sites=("residual@1",)),
        model_config=config,
    )
    assert store.model.revision == hub
    again = load_model(store.model, device="cpu")
    assert again.identity.revision == hub
