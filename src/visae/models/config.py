"""Which model to load: what the command line and every file about a model say."""

import dataclasses
from pathlib import Path

__all__ = ["ModelConfig", "ModelIdentity"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model to load, and how."""

    model: str
    """Model name: a timm name, with or without the prefix ``timm/``."""
    weights: Path | None = None
    """Local safetensors file with the model's own tensor names; without it, the model hub."""
    image_size: int | None = None
    """Side of the square input in pixels; without it, the model's own."""
    title: str | None = None
    """What to call the model in figures and reports."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Which model it is, for every file derived from it."""

    name: str
    """Adapter and architecture: ``timm/vit_small_patch14_dinov2``."""
    title: str
    """What to call it in figures and reports."""
    weights_sha256: str
    """Hash over names, dtypes, shapes and bytes of every tensor of the model."""

    def same_weights(self, other: "ModelIdentity") -> bool:
        """Whether both have the same tensors."""
        return self.weights_sha256 == other.weights_sha256
