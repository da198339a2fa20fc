import pytest

from visae.errors import ModelError
from visae.models.names import parse_model_name, portable_model, resolve_model


@pytest.mark.parametrize(
    ("model", "adapter", "name"),
    [
        ("vit_small_patch14_dinov2.lvd142m", "timm", "vit_small_patch14_dinov2.lvd142m"),
        ("timm/resnet50", "timm", "resnet50"),
        ("open_clip/ViT-B-16/openai", "open_clip", "ViT-B-16/openai"),
        ("open_clip/hf-hub:imageomics/bioclip", "open_clip", "hf-hub:imageomics/bioclip"),
        ("transformers/facebook/dinov2-base", "transformers", "facebook/dinov2-base"),
        ("transformers/./folder", "transformers", "./folder"),
        ("python:lab.models:cnn", "python", "python:lab.models:cnn"),
        ("", "timm", ""),
    ],
)
def test_a_name_says_which_adapter_loads_it(model, adapter, name):
    assert parse_model_name(model) == (adapter, name)


@pytest.mark.parametrize(
    ("file", "adapter"),
    [("open_clip_config.json", "open_clip"), ("config.json", "transformers")],
)
def test_a_folder_is_told_by_its_configuration(tmp_path, monkeypatch, file, adapter):
    folder = tmp_path / "lab"
    folder.mkdir()
    (folder / file).write_text("{}")
    assert parse_model_name(str(folder)) == (adapter, str(folder))
    monkeypatch.chdir(tmp_path)
    assert parse_model_name("lab") == (adapter, "lab")
    assert parse_model_name("./lab") == (adapter, "./lab")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"holds no model.*open_clip_config\.json"):
        parse_model_name(str(tmp_path))


def test_a_folder_without_a_model_does_not_hide_a_name(tmp_path, monkeypatch):
    (tmp_path / "resnet50").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_model_name("resnet50") == ("timm", "resnet50")


def test_a_hub_name_without_an_adapter_is_refused():
    with pytest.raises(ModelError, match=r"no adapter named imageomics.*hf-hub:imageomics/bioclip"):
        parse_model_name("imageomics/bioclip")


def test_a_folder_is_written_so_that_a_workspace_can_be_moved(tmp_path, monkeypatch):
    store = tmp_path / "workspace" / "activations" / "photos"
    model = tmp_path / "workspace" / "models" / "clip"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    written = portable_model(str(model), store)
    assert written == "transformers/../../models/clip"
    assert resolve_model(written, store) == f"transformers/{model}"
    monkeypatch.chdir(model.parent)
    assert portable_model("transformers/./clip", store) == written
    moved = tmp_path / "elsewhere" / "activations" / "photos"
    assert resolve_model(written, moved) == f"transformers/{tmp_path}/elsewhere/models/clip"


def test_a_folder_outside_the_workspace_is_written_whole(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    store = tmp_path / "a" / "b" / "c" / "d"
    written = portable_model(f"open_clip/local-dir:{tmp_path}", store)
    assert written == f"open_clip/{tmp_path}"
    assert resolve_model(written, store) == written


@pytest.mark.parametrize(
    "model",
    ["resnet50", "timm/resnet50", "open_clip/hf-hub:a/b", "transformers/a/b", "python:m:f"],
)
def test_other_names_are_written_as_they_are(tmp_path, model):
    assert portable_model(model, tmp_path) == model
    assert resolve_model(model, tmp_path) == model
