"""The vision towers of transformers that are known, by the ``model_type`` of their configuration.

Each family says which class it is, where its blocks are, and what a block's parts are called; the
tower of a LLaVA-style model is one of these too.
"""

import dataclasses
from typing import Literal

__all__ = ["FAMILIES", "Family", "Parts"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Module paths within a tower, and within one of its blocks."""

    blocks: str
    """The tower's blocks."""
    stem: str
    """What makes patches of pixels."""
    projection: str
    """A block's attention output projection."""
    attention: str
    """What gives that which a block's attention adds to the residual stream."""
    mlp: str
    """What gives that which a block's MLP adds to the residual stream."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family of vision towers."""

    tower: str
    """Class of the network."""
    config: str
    """Class of its configuration."""
    parts: Parts
    """Where its modules are."""
    has_cls: bool = True
    """Whether a class token comes first."""
    norm: str | None = None
    """The last norm, where the tower does not apply it to all tokens."""
    classifier: str | None = None
    """Class with a classification head around the tower."""
    keeps_its_size: bool = True
    """Whether another input size than the configured one must be asked for in each pass."""
    embedding: Literal["image_embeds", "pooler_output"] | None = None
    """Where its output has the vector that is compared with texts."""


_CLIP_PARTS = Parts(
    blocks="encoder.layers",
    stem="embeddings.patch_embedding",
    projection="self_attn.out_proj",
    attention="self_attn.out_proj",
    mlp="mlp",
)
_DINO_PARTS = Parts(
    blocks="encoder.layer",
    stem="embeddings.patch_embeddings",
    projection="attention.o_proj",
    attention="layer_scale1",
    mlp="layer_scale2",
)
_VIT_PARTS = Parts(
    blocks="layers",
    stem="embeddings.patch_embeddings",
    projection="attention.o_proj",
    attention="attention.o_proj",
    mlp="mlp",
)

_CLIP = Family(
    parts=_CLIP_PARTS,
    tower="CLIPVisionModelWithProjection",
    config="CLIPVisionConfig",
    norm="post_layernorm",
    embedding="image_embeds",
)
_SIGLIP = Family(
    parts=_CLIP_PARTS,
    tower="SiglipVisionModel",
    config="SiglipVisionConfig",
    has_cls=False,
    embedding="pooler_output",
)
_SIGLIP2 = Family(
    parts=_CLIP_PARTS,
    tower="Siglip2VisionModel",
    config="Siglip2VisionConfig",
    has_cls=False,
    keeps_its_size=False,
    embedding="pooler_output",
)
FAMILIES = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "dinov2": Family(
        parts=_DINO_PARTS,
        tower="Dinov2Model",
        config="Dinov2Config",
        classifier="Dinov2ForImageClassification",
        keeps_its_size=False,
    ),
    "dinov2_with_registers": Family(
        parts=_DINO_PARTS,
        tower="Dinov2WithRegistersModel",
        config="Dinov2WithRegistersConfig",
        classifier="Dinov2WithRegistersForImageClassification",
        keeps_its_size=False,
    ),
    "dinov3_vit": Family(
        parts=dataclasses.replace(_DINO_PARTS, blocks="model.layer"),
        tower="DINOv3ViTModel",
        config="DINOv3ViTConfig",
        keeps_its_size=False,
    ),
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2": _SIGLIP2,
    "siglip2_vision_model": _SIGLIP2,
    "vit": Family(
        parts=_VIT_PARTS,
        tower="ViTModel",
        config="ViTConfig",
        classifier="ViTForImageClassification",
    ),
    "vit_mae": Family(parts=_VIT_PARTS, tower="ViTMAEModel", config="ViTMAEConfig"),
}
"""Every family by ``model_type``."""
