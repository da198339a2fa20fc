"""Image towers of open_clip: CLIP, SigLIP, CoCa, MobileCLIP and their convolutional relatives."""

import copy
import dataclasses
import pickle
from collections.abc import Callable, Mapping
from typing import Any, cast, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from visae.errors import ModelError
from visae.models.architecture import Architecture, Block, Heads
from visae.models.config import ModelConfig
from visae.models.hooked import HookedModel, identify
from visae.models.hooks import reading
from visae.models.open_clip_files import OpenClipSource, find_open_clip, require_open_clip
from visae.models.preprocessing import Interpolation, Preprocessing
from visae.models.protocol import Output
from visae.models.shapes import flatten
from visae.models.timm_models import timm_architecture
from visae.storage.hub import first_lines

__all__ = ["build_open_clip", "load_open_clip", "load_open_clip_network", "open_clip_architecture"]

_FUSED = "its attention is fused (torch.nn.MultiheadAttention)"
_DEFAULTS = {"interpolation": "bicubic", "resize_mode": "shortest"}
_CANNOT_BUILD = (
    RuntimeError,
    ValueError,
    AssertionError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
)


def load_open_clip(config: ModelConfig, name: str, device: torch.device) -> HookedModel:
    """The image tower of an open_clip model, frozen, in float32.

    Its ``Output.embedding`` is what ``encode_image`` gives, not normalised.

    Raises:
        ModelError: for an unknown name, weights that do not fit or are missing, a hub that cannot
            be reached, or a preprocessing that cannot be expressed.
    """
    with find_open_clip(config, name) as source:
        tower = cast(Any, load_open_clip_network(source, image_size=config.image_size)).visual
        preprocessing = _preprocessing(source, tower)
    identity = identify(
        tower,
        name=f"open_clip/{source.name}",
        title=config.title or source.name,
        revision=source.revision,
    )
    return HookedModel(
        open_clip_architecture(tower.to(device)),
        identity=identity,
        preprocessing=preprocessing,
    )


def load_open_clip_network(source: OpenClipSource, *, image_size: int | None) -> nn.Module:
    """Both towers, with their weights, on the CPU.

    Raises:
        ModelError: when the weights do not fit, or hold more than tensors.
    """
    open_clip = require_open_clip()
    try:
        network = build_open_clip(source.model, image_size=image_size)
        open_clip.load_checkpoint(network, str(source.weights), strict=True, weights_only=True)
        if image_size is not None and "timm_model_name" in source.model["vision_cfg"]:
            cast(Any, network).visual.set_input_size(image_size)
    except _CANNOT_BUILD as failure:
        raise ModelError(
            f"Cannot build {source.name} with these weights: {first_lines(failure)}",
            where=source.weights,
            fix="Give weights with this model's own tensor names and shapes (a pickle that holds "
            "more than tensors is never opened), and an image size it can take",
        ) from failure
    return network.eval()


def build_open_clip(model: Mapping[str, Any], *, image_size: int | None = None) -> nn.Module:
    """Both towers as a configuration describes them, with random weights."""
    open_clip = require_open_clip()
    settings = copy.deepcopy(dict(model))
    settings["vision_cfg"]["timm_model_pretrained"] = False
    if image_size is not None:
        settings["vision_cfg"]["image_size"] = image_size
    has_hub_text = "hf_model_name" in settings["text_cfg"]
    if has_hub_text:
        settings["text_cfg"]["hf_model_pretrained"] = False
    if not settings.pop("custom_text", False) and not has_hub_text:
        network: nn.Module = open_clip.CLIP(**settings)
    elif "multimodal_cfg" in settings:
        network = open_clip.CoCa(**settings)
    else:
        network = open_clip.CustomTextCLIP(**settings)
    return network


def _preprocessing(source: OpenClipSource, tower: nn.Module) -> Preprocessing:
    """open_clip's own evaluation transform."""
    constants = require_open_clip().constants
    settings = _DEFAULTS | dict(source.preprocessing)
    mode, interpolation = settings["resize_mode"], settings["interpolation"]
    size = _pair(cast(Any, tower).image_size)
    if interpolation == "random" or (mode == "shortest" and size[0] != size[1]):
        interpolation = "bicubic"  # as open_clip does
    if mode not in ("shortest", "squash") or interpolation not in get_args(Interpolation):
        raise ModelError(
            f"The preprocessing of {source.name} is not supported",
            where=f"resize mode {mode}, interpolation {interpolation}",
            fix="Choose a model that crops at the centre or squashes its images",
        )
    return Preprocessing(
        size=size,
        crop="center" if mode == "shortest" else "squash",
        interpolation=cast(Interpolation, interpolation),
        mean=_three(settings.get("mean") or constants.OPENAI_DATASET_MEAN),
        std=_three(settings.get("std") or constants.OPENAI_DATASET_STD),
    )


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _three(values: float | tuple[float, ...] | list[float]) -> tuple[float, float, float]:
    if isinstance(values, int | float):
        return (float(values),) * 3
    return float(values[0]), float(values[1]), float(values[2])


def open_clip_architecture(tower: nn.Module) -> Architecture:
    """What an image tower is made of.

    Raises:
        ModelError: for a tower of an unknown kind.
    """
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(tower, VisionTransformer):
        return _transformer(tower)
    if isinstance(tower, TimmModel):
        return _timm_trunk(tower)
    if isinstance(tower, ModifiedResNet):
        return Architecture(
            network=tower,
            forward=_forward(tower, tower.layer4),
            stages=("layer1", "layer2", "layer3", "layer4"),
        )
    raise ModelError(
        f"The image tower is of an unknown kind: {type(tower).__name__}",
        where="--model",
        fix="Wrap it yourself: --model python:MODULE:FUNCTION",
    )


def _transformer(tower: Any) -> Architecture:
    """open_clip's own ViT; with an attention pool, final tokens are those before the pool."""
    pools_first = tower.attn_pool is not None or tower.final_ln_after_pool
    return Architecture(
        network=tower,
        forward=_forward(tower, tower.transformer if pools_first else tower.ln_post),
        blocks=tuple(_block(block) for block in tower.transformer.resblocks),
        is_chain=True,
        stem=tower.conv1,
        special=("cls",),
        grids=(_pair(tower.grid_size),),
        patch_size=_pair(tower.patch_size),
        no_heads=_FUSED,
    )


def _block(block: Any) -> Block:
    """LayerScale, or the identity in its place, gives what is added to the residual stream."""
    is_fused = isinstance(block.attn, nn.MultiheadAttention)
    heads = (
        None if is_fused else Heads(projection=block.attn.out_proj, n_heads=block.attn.num_heads)
    )
    return Block(module=block, mlp=block.ls_2, attention=block.ls_1, heads=heads)


def _forward(tower: nn.Module, last: nn.Module) -> Callable[[Tensor], Output]:
    """The tower's own pass; final tokens are what the module ``last`` gives."""

    def run(pixels: Tensor) -> Output:
        seen: list[Tensor] = []
        with reading(last, "output", seen.append):
            given = tower(pixels)
        embedding = given[0] if isinstance(given, tuple) else given
        tokens = seen[0] if seen[0].ndim == 3 else flatten(seen[0], "channels first")
        return Output(tokens=tokens, logits=None, embedding=embedding)

    return run


def _timm_trunk(tower: Any) -> Architecture:
    """A timm network with open_clip's projection behind it."""
    trunk = timm_architecture(tower.trunk, _pair(tower.image_size))

    def run(pixels: Tensor) -> Output:
        features = tower.trunk.forward_features(pixels)
        form = "tokens" if features.ndim == 3 else trunk.usual_form
        embedding = tower.head(tower.trunk.forward_head(features))
        return Output(tokens=flatten(features, form), logits=None, embedding=embedding)

    return dataclasses.replace(
        trunk,
        network=tower,
        forward=run,
        stages=tuple(f"trunk.{stage}" for stage in trunk.stages),
        layouts={f"trunk.{path}": layout for path, layout in trunk.layouts.items()},
    )
