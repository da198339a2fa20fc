"""Which model to load: what the command line and every file about a model say."""

import dataclasses
from pathlib import Path

__all__ = ["ModelConfig", "ModelIdentity"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model to load, and how."""

    model: str
    """Model name: ``NAME`` or ``timm/NAME``, ``open_clip/NAME[/TAG]``, ``transformers/OWNER/NAME``,
    ``python:MODULE:FUNCTION``, ``random:SEED:NAME`` for a timm model with random weights, or a
    folder that holds an open_clip or transformers model."""
    weights: Path | None = None
    """Local safetensors file with the model's own tensor names; without it, the model hub."""
    revision: str | None = None
    """Commit, tag or branch of the hub's repository; without it, the newest."""
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
    """Hash over names, dtypes, shapes and bytes of every tensor of the model; empty: unknown."""
    revision: str | None = None
    """Commit of the hub's repository that the weights came from, where it is known."""

    def same_weights(self, other: "ModelIdentity") -> bool:
        """Whether both have the same tensors; where neither says, whether the same name."""
        if not self.weights_sha256 and not other.weights_sha256:
            return self.name == other.name
        return self.weights_sha256 == other.weights_sha256
