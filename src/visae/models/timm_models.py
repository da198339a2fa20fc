"""Every timm network as an ``Architecture``: where its blocks, tokens, stages and head are."""

from typing import Any, cast, get_args

from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.levit import Levit
from timm.models.mvitv2 import MultiScaleVit
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.xcit import Xcit
from torch import Tensor, nn

from visae.errors import ModelError
from visae.models.architecture import Architecture, Block, Heads
from visae.models.hooked import HookedModel, identify
from visae.models.layout import Layout
from visae.models.preprocessing import Interpolation, Preprocessing
from visae.models.protocol import Output
from visae.models.shapes import Form, flatten

__all__ = ["timm_architecture", "timm_model"]

_CHAINS = (Beit, Cait, Eva, NaFlexVit, VisionTransformer, VisionTransformerRelPos, Xcit)
_PARTS = {"mlp": ("drop_path2", "ls2", "mlp"), "attention": ("drop_path1", "ls1", "attn")}
_AFTER_BOTH_NORMS = {"mlp": "norm4", "attention": "norm2"}  # of a block with four norms


def timm_model(
    network: nn.Module,
    *,
    name: str,
    title: str,
    data_config: dict[str, Any],
    revision: str | None = None,
) -> HookedModel:
    """A frozen timm network as a ``VisionModel``, on the device where the network is.

    Raises:
        ModelError: when its preprocessing is not supported or its weights are not finite.
    """
    preprocessing = _preprocessing(data_config, name)
    return HookedModel(
        timm_architecture(network, preprocessing.size),
        identity=identify(network, name=name, title=title, revision=revision),
        preprocessing=preprocessing,
    )


def timm_architecture(network: nn.Module, size: tuple[int, int]) -> Architecture:
    """What a timm network is made of; ``size`` is its input's height and width in pixels."""
    features = getattr(network, "feature_info", None) or []
    layouts = _stage_layouts(network, size)
    trunk = _trunk(network)
    return Architecture(
        network=network,
        forward=lambda pixels: _forward(network, pixels),
        blocks=_blocks(trunk),
        is_chain=isinstance(trunk, _CHAINS),
        stem=_stem(trunk),
        special=_special_tokens(trunk),
        grids=_grids(trunk, size),
        patch_size=_patch_size(trunk),
        stages=tuple(dict.fromkeys((*(str(info["module"]) for info in features), *layouts))),
        usual_form=_usual_form(network),
        layouts=layouts,
    )


def _forward(network: nn.Module, pixels: Tensor) -> Output:
    """Final tokens, and the logits where the network has a head."""
    timm_network = cast(Any, network)
    features = timm_network.forward_features(pixels)
    if not isinstance(features, Tensor):
        raise ModelError(
            f"This architecture gives a {type(features).__name__} of features, not one tensor",
            where=type(network).__name__,
            fix="Choose another architecture, or wrap this one with visae.models.custom.wrap_model",
        )
    has_head = getattr(network, "num_classes", 0) > 0
    logits = timm_network.forward_head(features) if has_head else None
    form: Form = "tokens" if features.ndim == 3 else _usual_form(network)
    return Output(tokens=flatten(features, form), logits=logits)


def _usual_form(network: nn.Module) -> Form:
    """Where this architecture has the channels of its feature maps."""
    last = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
    return "channels last" if last else "channels first"


def _trunk(network: nn.Module) -> nn.Module:
    """The network itself, or the encoder that it puts a head on."""
    encoder = getattr(network, "encoder", None)
    if isinstance(encoder, nn.Module) and isinstance(
        getattr(encoder, "blocks", None), nn.ModuleList
    ):
        return encoder
    return network


def _blocks(network: nn.Module) -> tuple[Block, ...]:
    """The blocks of a residual stream; a convolutional network's groups of blocks are stages."""
    modules = list(getattr(network, "blocks", ()))
    if any(isinstance(module, nn.Sequential) for module in modules):
        return ()
    return tuple(_block(module) for module in modules)


def _block(module: nn.Module) -> Block:
    return Block(
        module=module,
        mlp=_part(module, "mlp"),
        attention=_part(module, "attention"),
        heads=_heads(getattr(module, "attn", None)),
    )


def _part(block: nn.Module, kind: str) -> nn.Module | None:
    """The module whose output is what a block's mlp or attention adds to the residual stream.

    That is what comes out of the module before the sum, after LayerScale and post-norm where a
    block has them; no module gives that where LayerScale is a plain multiplication before the sum.
    """
    if not isinstance(getattr(block, _PARTS[kind][-1], None), nn.Module):
        return None
    four_norms = getattr(block, _AFTER_BOTH_NORMS["mlp"], None)
    if isinstance(four_norms, nn.Module):
        return block.get_submodule(_AFTER_BOTH_NORMS[kind])
    part = next(
        part for name in _PARTS[kind] if isinstance(part := getattr(block, name, None), nn.Module)
    )
    is_scaled_later = any(
        name.startswith("gamma") for name, _ in block.named_parameters(recurse=False)
    )
    return None if is_scaled_later and part is getattr(block, _PARTS[kind][-1]) else part


def _heads(attention: nn.Module | None) -> Heads | None:
    """The heads of an attention that ends in an output projection."""
    projection = getattr(attention, "proj", getattr(attention, "o_proj", None))
    n_heads = getattr(attention, "num_heads", None)
    if not isinstance(projection, nn.Module) or not isinstance(n_heads, int):
        return None
    return Heads(projection=projection, n_heads=n_heads)


def _stem(network: nn.Module) -> nn.Module | None:
    """The module that makes patches of pixels."""
    named = (getattr(network, name, None) for name in ("patch_embed", "embeds", "stem"))
    return next((part for part in named if isinstance(part, nn.Module)), None)


def _special_tokens(network: nn.Module) -> tuple[str, ...]:
    """The names of the special tokens: those with a parameter of their own, then registers."""
    n_special = int(getattr(network, "num_prefix_tokens", 0))
    known = {"cls": "cls_token", "distillation": "dist_token"}
    owners = (network, getattr(network, "embeds", None))
    named = [
        name
        for name, part in known.items()
        if any(getattr(owner, part, None) is not None for owner in owners)
    ]
    named = named[:n_special]
    return (*named, *(f"register{index}" for index in range(n_special - len(named))))


def _stage_layouts(network: nn.Module, size: tuple[int, int]) -> dict[str, Layout]:
    """Layouts of stages that give tokens on ever coarser grids."""
    if isinstance(network, MultiScaleVit):
        special = _special_tokens(network)
        grids = [cast(Any, stage).feat_size for stage in network.stages]
    elif isinstance(network, Levit):
        special = ()
        strides = [int(cast(Any, info)["reduction"]) for info in network.feature_info]
        grids = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in strides]
    else:
        return {}
    return {
        f"stages.{index}": Layout(special=special, grid=(int(rows), int(columns)))
        for index, (rows, columns) in enumerate(grids)
    }


def _grids(network: nn.Module, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """The patch grids that the network may have: as its stem says, whole patches first."""
    patch, known = _patch_size(network), getattr(_stem(network), "grid_size", None)
    counted = (size[0] // patch[0], size[1] // patch[1]) if patch else None
    return tuple((int(grid[0]), int(grid[1])) for grid in (counted, known) if grid)


def _patch_size(network: nn.Module) -> tuple[int, int] | None:
    """Height and width of a patch in pixels, as the stem says."""
    patch = getattr(_stem(network), "patch_size", None)
    rows, columns = (patch, patch) if isinstance(patch, int) else patch or (0, 0)
    return (int(rows), int(columns)) if rows and columns else None


def _preprocessing(data_config: dict[str, Any], name: str) -> Preprocessing:
    """The preprocessing that timm's data configuration describes."""
    crop, interpolation = data_config["crop_mode"], data_config["interpolation"]
    if crop not in ("center", "squash") or interpolation not in get_args(Interpolation):
        raise ModelError(
            f"The preprocessing of {name} is not supported",
            where=f"crop mode {crop}, interpolation {interpolation}",
            fix="Choose a model that crops at the centre or squashes its images",
        )
    return Preprocessing(
        size=tuple(data_config["input_size"][1:]),
        crop_share=float(data_config["crop_pct"]),
        crop=crop,
        interpolation=interpolation,
        mean=tuple(data_config["mean"]),
        std=tuple(data_config["std"]),
    )
