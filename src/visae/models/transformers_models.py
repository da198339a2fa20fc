"""Vision towers of transformers: CLIP, SigLIP, DINOv2, DINOv3, ViT, ViT-MAE, and LLaVA's."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from visae.errors import ModelError, nearest_names
from visae.models.architecture import Architecture, Block, Heads
from visae.models.config import ModelConfig
from visae.models.files import ModelFiles
from visae.models.hooked import HookedModel, identify
from visae.models.hooks import reading
from visae.models.preprocessing import Preprocessing
from visae.models.processors import read_patch_processor, read_processor
from visae.models.protocol import Output
from visae.models.transformers_families import FAMILIES, Family
from visae.models.transformers_files import (
    build_from_tensors,
    find_transformers,
    read_config,
    read_some_tensors,
)

__all__ = ["load_transformers", "transformers_architecture"]

_TOWER_PREFIXES = (
    "vision_tower.vision_model.",
    "model.vision_tower.vision_model.",
    "vision_tower.",
    "model.vision_tower.",
    "model.vision_model.",
    "vision_model.",
)
_NOT_OF_THE_TOWER = ("text_model.", "text_projection.", "decoder.", "logit_")


class _Part(NamedTuple):
    """The vision tower within a model."""

    family: Family
    config: Any
    kind: str  # class to build
    is_inner: bool  # whether it is the tower of a model that is not built


def load_transformers(config: ModelConfig, name: str, device: torch.device) -> HookedModel:
    """The vision tower of a transformers model, frozen, in float32.

    ``Output.embedding`` is what ``get_image_features`` gives, not normalised, where the model has
    a text tower; ``Output.logits`` are those of an image classifier.

    Raises:
        ModelError: for an unknown repository or family, weights that do not fit or are missing, a
            hub that cannot be reached, or a preprocessing that cannot be expressed.
    """
    with find_transformers(config, name) as files:
        part = _vision_part(read_config(files), files)
        preprocessing = _preprocessing(files, part, config.image_size)
        network = _network(files, config, part)
    identity = identify(
        network,
        name=f"transformers/{files.name}",
        title=config.title or files.name,
        revision=None if config.weights else files.revision,
    )
    return HookedModel(
        transformers_architecture(network.to(device), part.family, size=preprocessing.size),
        identity=identity,
        preprocessing=preprocessing,
    )


def _vision_part(config: Any, files: ModelFiles) -> _Part:
    """Which tower of which family a configuration describes.

    Raises:
        ModelError: when it has no vision tower of a known family.
    """
    family = FAMILIES.get(config.model_type)
    inner = getattr(config, "vision_config", None)
    if family is None and inner is not None and inner.model_type in FAMILIES:
        family = FAMILIES[inner.model_type]
        kind = family.tower.removesuffix("WithProjection")
        return _Part(family, inner, kind, is_inner=True)
    if family is None:
        found = config.model_type if inner is None else inner.model_type
        raise ModelError(
            f"{files.name} has no vision tower of a known family: it is {found}",
            where="--model",
            fix=f"Use one of these families: {', '.join(sorted(FAMILIES))} "
            f"(nearest: {nearest_names(str(found), FAMILIES, count=1)}), or wrap it yourself: "
            "--model python:MODULE:FUNCTION",
        )
    if inner is not None:
        inner.projection_dim = getattr(config, "projection_dim", None)
    architectures = config.architectures or ()
    classifier = family.classifier if family.classifier in architectures else None
    kind = "CLIPVisionModel" if "CLIPVisionModel" in architectures else family.tower
    return _Part(family, inner or config, classifier or kind, is_inner=False)


def _preprocessing(files: ModelFiles, part: _Part, image_size: int | None) -> Preprocessing:
    if part.family.tower == "Siglip2VisionModel":
        return read_patch_processor(files, image_size)
    found = read_processor(files)
    if image_size is None:
        return found
    return dataclasses.replace(found, size=(image_size, image_size))


def _network(files: ModelFiles, config: ModelConfig, part: _Part) -> nn.Module:
    options = {"add_pooling_layer": False} if part.kind == "ViTModel" else {}
    if part.family.tower == "ViTMAEModel":
        part.config.mask_ratio = 0.0
    tensors = read_some_tensors(files, config.weights, _wanted(part))
    if part.is_inner:
        tensors = _without_prefix(tensors)
    return build_from_tensors(part.kind, part.config, tensors, **options)


def _wanted(part: _Part) -> Callable[[str], bool]:
    """Which of a checkpoint's tensors belong to the tower."""
    if part.is_inner:
        return lambda name: name.startswith(_TOWER_PREFIXES)
    return lambda name: not name.startswith(_NOT_OF_THE_TOWER)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower's tensors under the names that the tower alone gives them."""
    for prefix in _TOWER_PREFIXES:
        inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if inside:
            return inside
    return tensors


def transformers_architecture(
    network: nn.Module, family: Family, *, size: tuple[int, int]
) -> Architecture:
    """What a tower is made of; ``size`` is its input's height and width in pixels."""
    tower = _tower(network)
    config = cast(Any, tower).config
    patch = config.patch_size
    patch_rows, patch_columns = (patch, patch) if isinstance(patch, int) else patch
    return Architecture(
        network=network,
        forward=_forward(network, family, size),
        blocks=tuple(
            _block(block, family, config.num_attention_heads)
            for block in cast(Any, tower.get_submodule(family.parts.blocks))
        ),
        is_chain=True,
        stem=tower.get_submodule(family.parts.stem),
        special=_special(config, family),
        grids=((size[0] // patch_rows, size[1] // patch_columns),),
        patch_size=(patch_rows, patch_columns),
    )


def _tower(network: nn.Module) -> nn.Module:
    """The network itself, or what its projection or classifier is put on."""
    for name in ("vision_model", "vit", "dinov2", "dinov2_with_registers"):
        inner = getattr(network, name, None)
        if isinstance(inner, nn.Module):
            return inner
    return network


def _block(block: nn.Module, family: Family, n_heads: int) -> Block:
    return Block(
        module=block,
        mlp=block.get_submodule(family.parts.mlp),
        attention=block.get_submodule(family.parts.attention),
        heads=Heads(projection=block.get_submodule(family.parts.projection), n_heads=n_heads),
    )


def _special(config: Any, family: Family) -> tuple[str, ...]:
    n_registers = getattr(config, "num_register_tokens", 0)
    registers = tuple(f"register{index}" for index in range(n_registers))
    return ("cls", *registers) if family.has_cls else ()


def _forward(
    network: nn.Module, family: Family, size: tuple[int, int]
) -> Callable[[Tensor], Output]:
    """The network's own pass."""
    tower = _tower(network)
    norm = tower.get_submodule(family.norm) if family.norm else nn.Identity()
    arguments = _arguments(tower, family, size)

    def run(pixels: Tensor) -> Output:
        seen: list[Any] = []
        with reading(tower, "output", seen.append):
            given = network(**arguments(pixels))
        return Output(
            tokens=norm(seen[0].last_hidden_state),
            logits=getattr(given, "logits", None),
            embedding=getattr(given, family.embedding, None) if family.embedding else None,
        )

    return run


def _arguments(
    tower: nn.Module, family: Family, size: tuple[int, int]
) -> Callable[[Tensor], dict[str, Any]]:
    """What a pass is given besides pixels: every patch is seen, in order, at this size."""
    config = cast(Any, tower).config
    if family.tower == "Siglip2VisionModel":
        return lambda pixels: _as_patches(pixels, config.patch_size)
    options: dict[str, Any] = {}
    if family.keeps_its_size:
        usual = config.image_size
        usual = (usual, usual) if isinstance(usual, int) else tuple(usual)
        options["interpolate_pos_encoding"] = usual != size
    if family.tower != "ViTMAEModel":
        return lambda pixels: {"pixel_values": pixels, **options}
    n_patches = (size[0] // config.patch_size) * (size[1] // config.patch_size)

    def in_order(pixels: Tensor) -> dict[str, Any]:
        noise = torch.arange(float(n_patches), device=pixels.device).expand(len(pixels), -1)
        return {"pixel_values": pixels, "noise": noise, **options}

    return in_order


def _as_patches(pixels: Tensor, side: int) -> dict[str, Any]:
    """What SigLIP 2 takes: pixels patch by patch, and how many rows and columns they are."""
    n_images, n_channels, height, width = pixels.shape
    rows, columns = height // side, width // side
    cut = pixels.reshape(n_images, n_channels, rows, side, columns, side)
    patches = cut.permute(0, 2, 4, 3, 5, 1).reshape(n_images, rows * columns, -1)
    shapes = torch.tensor([[rows, columns]]).expand(n_images, -1)
    return {"pixel_values": patches, "pixel_attention_mask": None, "spatial_shapes": shapes}
