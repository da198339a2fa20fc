"""Which model to load: what the command line and every file about a model say."""

import dataclasses
from pathlib import Path

__all__ = ["ModelConfig"]


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
