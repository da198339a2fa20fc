"""Tiny random open_clip and transformers models, in folders as their libraries lay them out."""

import json

import pytest

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
DECODER = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


def timm_tower(name, **options):
    settings = {"timm_pool": "", "timm_proj": "linear", "image_size": 160}
    return {"timm_model_name": name} | settings | options


OPEN_CLIP = {
    "vit": {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT},
    "vit-pool-first": {
        "embed_dim": 20,
        "vision_cfg": VISION
        | {"ls_init_value": 0.3, "final_ln_after_pool": True, "pool_type": "avg"},
        "text_cfg": TEXT,
    },
    "vit-own-attention": {
        "embed_dim": 20,
        "vision_cfg": VISION | {"qk_norm": True, "scale_attn": True},
        "text_cfg": TEXT,
    },
    "coca": {
        "embed_dim": 20,
        "vision_cfg": VISION
        | {
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "attn_pooler_queries": 5,
            "output_tokens": True,
        },
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": DECODER | {"attn_pooler_heads": 2},
        "custom_text": True,
    },
    "resnet": {
        "embed_dim": 20,
        "vision_cfg": {
            "image_size": 64,
            "layers": [1, 1, 1, 1],
            "width": 8,
            "head_width": 16,
            "patch_size": None,
        },
        "text_cfg": TEXT,
    },
    "siglip": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": timm_tower("test_vit", timm_proj="none", timm_pool="avg"),
        "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last"},
    },
    "convnext": {
        "embed_dim": 20,
        "vision_cfg": timm_tower("test_convnext"),
        "text_cfg": TEXT,
    },
}


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory):
    """Make a folder in open_clip's hub layout; by name, once a session."""
    import torch
    from safetensors.torch import save_file

    from visae.models.open_clip_models import build_open_clip

    made = {}
    preprocessing = {
        "mean": [0.1, 0.2, 0.3],
        "std": [0.3, 0.2, 0.1],
        "resize_mode": "shortest",
        "interpolation": "bilinear",
    }

    def make(name):
        if name in made:
            return made[name]
        folder = tmp_path_factory.mktemp("open_clip") / name
        folder.mkdir()
        settings = {"model_cfg": OPEN_CLIP[name], "preprocess_cfg": preprocessing}
        (folder / "open_clip_config.json").write_text(json.dumps(settings))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = build_open_clip(OPEN_CLIP[name]).requires_grad_(False)
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.1)
        state = {k: v.clone().contiguous() for k, v in network.state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors")
        made[name] = folder
        return folder

    return make


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 8,
}
WORDS = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DINO = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
MAE = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
LANGUAGE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
}
PLAIN = {"size": {"height": 32, "width": 32}}
CROPPED = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}


def transformers_networks():
    """By name: a network's class, its configuration, its image processor's class and settings."""
    import transformers as t

    sized = SIZES | {"image_size": 32}
    clip = {"vision_config": sized, "text_config": WORDS, "projection_dim": 20}
    siglip = {"vision_config": sized, "text_config": WORDS | {"projection_size": 32}}
    naflex = siglip | {"vision_config": SIZES | {"num_patches": 16}}
    llava = {
        "vision_config": t.CLIPVisionConfig(**sized),
        "text_config": t.LlamaConfig(**LANGUAGE),
    }
    dino = DINO | {"image_size": 48}  # larger than the processor's, as DINOv2's own
    bit, vit = (t.BitImageProcessor, CROPPED), (t.ViTImageProcessor, PLAIN)
    return {
        "clip": (t.CLIPModel, t.CLIPConfig(**clip), t.CLIPImageProcessor, CROPPED),
        "clip-vision": (
            t.CLIPVisionModel,
            t.CLIPVisionConfig(**sized),
            t.CLIPImageProcessor,
            CROPPED,
        ),
        "siglip": (t.SiglipModel, t.SiglipConfig(**siglip), t.SiglipImageProcessor, PLAIN),
        "siglip2": (
            t.Siglip2Model,
            t.Siglip2Config(**naflex),
            t.Siglip2ImageProcessor,
            {"patch_size": 8, "max_num_patches": 16},
        ),
        "dinov2": (t.Dinov2Model, t.Dinov2Config(**dino), *bit),
        "dinov2-classifier": (
            t.Dinov2ForImageClassification,
            t.Dinov2Config(**dino, num_labels=5),
            *bit,
        ),
        "dinov2-registers": (
            t.Dinov2WithRegistersModel,
            t.Dinov2WithRegistersConfig(**dino, num_register_tokens=3),
            *bit,
        ),
        "dinov3": (
            t.DINOv3ViTModel,
            t.DINOv3ViTConfig(**sized, num_register_tokens=2),
            t.DINOv3ViTImageProcessor,
            PLAIN,
        ),
        "vit": (t.ViTModel, t.ViTConfig(**sized), *vit),
        "vit-classifier": (t.ViTForImageClassification, t.ViTConfig(**sized, num_labels=5), *vit),
        "vit-mae": (t.ViTMAEForPreTraining, t.ViTMAEConfig(**sized, **MAE), *vit),
        "llava": (
            t.LlavaForConditionalGeneration,
            t.LlavaConfig(**llava),
            t.CLIPImageProcessor,
            CROPPED,
        ),
    }


@pytest.fixture(scope="session")
def transformers_folder(tmp_path_factory):
    """Make a folder as ``save_pretrained`` does, LLaVA's in shards; by name, once a session."""
    import torch

    from visae.models.transformers_files import quiet

    made = {}

    def make(name):
        if name in made:
            return made[name]
        kind, config, processor, settings = transformers_networks()[name]
        folder = tmp_path_factory.mktemp("transformers") / name
        with torch.random.fork_rng(), quiet():
            torch.manual_seed(0)
            network = kind(config).requires_grad_(False)
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.2)
            network.save_pretrained(folder, max_shard_size="20KB" if name == "llava" else "1GB")
            processor(**settings).save_pretrained(folder)
        made[name] = folder
        return folder

    return make
