import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from visae.errors import ModelError
from visae.models.config import ModelConfig
from visae.models.loading import load_model, load_text_tower
from visae.models.protocol import TextTower
from visae.models.transformers_files import quiet

TEXTS = ["a photo of a cat", "two dogs", "snow"]
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "photo", "of", "cat", "two", "dogs", "snow"]
TOWERS = ["clip", "siglip", "siglip2"]


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer that knows a few words; id 2 ends a text."""
    unknown = {"unk_token": "<unk>"}
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, **unknown))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


@pytest.fixture
def folder_of(transformers_folder, tokenizer, tmp_path):
    def make(name):
        folder = shutil.copytree(transformers_folder(name), tmp_path / name)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def load(folder):
    return load_text_tower(ModelConfig(model=str(folder)), device="cpu")


@pytest.mark.parametrize("name", TOWERS)
def test_texts_are_encoded_as_by_the_library(folder_of, name):
    folder = folder_of(name)
    tower = load(folder)
    assert isinstance(tower, TextTower)
    with quiet():
        network = transformers.AutoModel.from_pretrained(folder).eval().requires_grad_(False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding="max_length", max_length=16, return_tensors="pt")
    expected = network.get_text_features(input_ids=tokens["input_ids"]).pooler_output
    assert torch.equal(tower.encode_texts(TEXTS), expected)
    assert tower.logit_scale == pytest.approx(float(network.logit_scale.exp()))
    is_clip = name == "clip"
    assert tower.kind == ("softmax" if is_clip else "sigmoid")
    assert tower.logit_bias == (0 if is_clip else pytest.approx(float(network.logit_bias)))


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_scores_are_those_of_the_library(folder_of, tokenizer, name):
    folder = folder_of(name)
    model, tower = load_model(ModelConfig(model=str(folder)), device="cpu"), load(folder)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = model.trace(pixels, ["residual@0"]).output.embedding
    cosines = torch.nn.functional.cosine_similarity(
        images[:, None], tower.encode_texts(TEXTS)[None], dim=2
    )
    with quiet():
        network = transformers.AutoModel.from_pretrained(folder).eval().requires_grad_(False)
    tokens = tokenizer(TEXTS, padding="max_length", max_length=16, return_tensors="pt")
    given = network(input_ids=tokens["input_ids"], pixel_values=pixels)
    scores = cosines * tower.logit_scale + tower.logit_bias
    torch.testing.assert_close(scores, given.logits_per_image)


def test_many_and_long_texts_are_encoded(folder_of, monkeypatch):
    tower = load(folder_of("clip"))
    whole = tower.encode_texts(TEXTS)
    monkeypatch.setattr("visae.models.transformers_texts._TEXTS_AT_ONCE", 2)
    torch.testing.assert_close(tower.encode_texts(TEXTS), whole)
    assert tower.encode_texts(["cat " * 100]).shape == (1, 20)
    with pytest.raises(ModelError, match="no texts"):
        tower.encode_texts([])


def test_a_missing_tokenizer_is_said(transformers_folder):
    with pytest.raises(ModelError, match=r"clip has no tokenizer_config\.json or"):
        load(transformers_folder("clip"))


@pytest.mark.parametrize("name", ["dinov2", "clip-vision", "llava"])
def test_a_model_without_a_text_tower_is_refused(transformers_folder, name):
    with pytest.raises(ModelError, match=f"{name} has no text tower.*clip, siglip"):
        load(transformers_folder(name))


def test_weights_without_a_bias_are_refused(folder_of):
    folder = folder_of("siglip")
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "logit_bias"}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="lack the scale or bias"):
        load(folder)


def test_a_broken_tokenizer_is_said(folder_of):
    folder = folder_of("clip")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer of clip cannot be loaded"):
        load(folder)
