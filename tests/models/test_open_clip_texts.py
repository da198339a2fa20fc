import open_clip
import pytest
import torch

from visae.errors import ModelError
from visae.models.config import ModelConfig
from visae.models.loading import load_model, load_text_tower
from visae.models.open_clip_texts import OpenClipTexts
from visae.models.protocol import TextTower

TEXTS = ["a photo of a cat", "two dogs in the snow", "x"]


def load(folder):
    return load_text_tower(ModelConfig(model=str(folder)), device="cpu")


@pytest.mark.parametrize("name", ["vit", "coca", "siglip"])
def test_texts_are_encoded_as_by_the_library(open_clip_folder, name):
    folder = open_clip_folder(name)
    tower = load(folder)
    assert isinstance(tower, TextTower)
    network = open_clip.create_model(f"local-dir:{folder}").eval().requires_grad_(False)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    assert torch.equal(tower.encode_texts(TEXTS), network.encode_text(tokens, normalize=False))
    assert tower.logit_scale == pytest.approx(1 / 0.07)
    is_siglip = name == "siglip"
    assert tower.kind == ("sigmoid" if is_siglip else "softmax")
    assert tower.logit_bias == (-10 if is_siglip else 0)


def test_scores_are_those_of_the_library(open_clip_folder):
    folder = open_clip_folder("siglip")
    model, tower = load_model(ModelConfig(model=str(folder)), device="cpu"), load(folder)
    pixels = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    images = model.trace(pixels, ["residual@0"]).output.embedding
    cosines = torch.nn.functional.cosine_similarity(
        images[:, None], tower.encode_texts(TEXTS)[None], dim=2
    )
    network = open_clip.create_model(f"local-dir:{folder}").eval().requires_grad_(False)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    expected, _ = network.get_logits(pixels, tokens)
    torch.testing.assert_close(cosines * tower.logit_scale + tower.logit_bias, expected)


def test_many_texts_are_encoded_in_parts(open_clip_folder, monkeypatch):
    tower = load(open_clip_folder("vit"))
    whole = tower.encode_texts(TEXTS)
    monkeypatch.setattr("visae.models.open_clip_texts._TEXTS_AT_ONCE", 2)
    torch.testing.assert_close(tower.encode_texts(TEXTS), whole)
    with pytest.raises(ModelError, match="no texts"):
        tower.encode_texts([])


def test_the_tower_holds_no_image_tower(open_clip_folder):
    tower = load(open_clip_folder("vit"))
    assert isinstance(tower, OpenClipTexts)
    assert not any(name.startswith("visual") for name in tower._network.state_dict())


def test_a_missing_tokenizer_is_said(open_clip_folder, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(open_clip_folder("vit"), tmp_path / "vit")
    path = folder / "open_clip_config.json"
    settings = json.loads(path.read_text())
    settings["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "lab/words"
    path.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="tokenizer of vit cannot be loaded"):
        load(folder)


def test_a_timm_model_has_no_text_tower():
    with pytest.raises(ModelError, match=r"test_vit has no text tower.*open_clip or transformers"):
        load_text_tower(ModelConfig(model="test_vit"), device="cpu")
