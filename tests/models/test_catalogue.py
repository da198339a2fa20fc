import open_clip
import pytest

from visae.errors import ModelError
from visae.models.catalogue import find_models, summarise, summarise_name


def test_a_pattern_is_part_of_a_name_or_has_wildcards():
    assert "timm/vit_small_patch14_dinov2" in find_models("SMALL_patch14")
    assert find_models("open_clip/*-SigLIP-384") == find_models("*-siglip-384")
    assert set(find_models("*-siglip-384")) == {
        "open_clip/ViT-B-16-SigLIP-384",
        "open_clip/ViT-L-16-SigLIP-384",
        "open_clip/ViT-SO400M-14-SigLIP-384",
    }


def test_a_whole_name_is_that_model_alone():
    """Others that contain it, as resnet50d does, are not meant."""
    assert find_models("resnet50") == ["timm/resnet50"]
    assert find_models("open_clip/ViT-B-16") == ["open_clip/ViT-B-16"]


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", "timm/vit_tiny_patch16_224.augreg_in21k"),
        ("timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k"),
        ("open_clip/ViT-B-32/openai", "open_clip/ViT-B-32/openai"),
    ],
)
def test_a_name_with_the_tag_of_its_weights_is_that_model(pattern, name):
    assert find_models(pattern) == [name]
    assert summarise_name(name).sites


def test_every_adapter_is_listed():
    names = find_models()
    assert {name.partition("/")[0] for name in names} == {"timm", "open_clip", "transformers"}
    assert len(find_models("open_clip/")) == len(open_clip.list_models())
    assert len(find_models("transformers/")) == 8


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("resnt50", "resnet50"),
        ("dinov22", "vit_base_patch14_dinov2"),
        ("timm/vit_bse_patch16_224", "vit_base_patch16_224"),
        ("*siglop*", "siglip"),
    ],
)
def test_a_pattern_without_a_match_gives_the_nearest(pattern, near):
    with pytest.raises(ModelError, match=rf"No model's name fits.*{near}"):
        find_models(pattern)


def test_a_transformer_is_summarised_without_weights():
    summary = summarise_name("timm/vit_small_patch14_reg4_dinov2")
    assert (summary.size, summary.n_blocks, summary.widths) == ((518, 518), 12, "384")
    assert summary.tokens == "cls + 4 registers + 37 × 37"
    assert summary.kinds == "residual, mlp, attention, heads @ 0\N{EN DASH}11"
    assert [site.name for site in summary.sites[:4]] == [
        "residual@0",
        "mlp@0",
        "attention@0",
        "heads@0",
    ]


def test_a_convolutional_network_is_summarised_by_its_stages():
    summary = summarise_name("timm/resnet18")
    assert (summary.n_blocks, summary.widths) == (0, "64\N{EN DASH}512")
    assert summary.tokens == "112 × 112 to 7 × 7"
    assert summary.kinds == "act1, layer1, layer2, layer3, layer4"


@pytest.mark.parametrize(
    ("name", "widths", "tokens"),
    [
        ("open_clip/ViT-B-32", "768", "cls + 7 × 7"),
        ("open_clip/coca_ViT-B-32", "768", "cls + 7 × 7"),
        ("open_clip/roberta-ViT-B-32", "768", "cls + 7 × 7"),
        ("open_clip/ViT-B-16-SigLIP", "768", "14 × 14"),
        ("open_clip/RN50", "256\N{EN DASH}2048", "56 × 56 to 7 × 7"),
        ("open_clip/MobileCLIP-S1", "64\N{EN DASH}512", "64 × 64 to 8 × 8"),
    ],
)
def test_image_towers_are_summarised_without_weights(name, widths, tokens):
    summary = summarise_name(name)
    assert not summary.problem
    assert (summary.widths, summary.tokens) == (widths, tokens)


@pytest.mark.parametrize("name", find_models("transformers/"))
def test_families_are_summarised_without_weights(name):
    summary = summarise_name(name)
    assert not summary.problem
    assert summary.n_blocks == 12
    assert summary.kinds.startswith("residual, mlp, attention, heads @")


def test_a_model_that_cannot_be_used_says_why():
    summary = summarise_name("timm/coat_mini")
    assert summary.sites == ()
    assert "list of features" in summary.kinds


def test_a_loaded_model_is_summarised(tiny_vit):
    summary = summarise(tiny_vit)
    assert (summary.name, summary.n_blocks) == ("timm/tiny", 3)
    assert len(summary.sites) == 12
    assert summary.tokens == "cls + 2 registers + 4 × 4"
