"""Options of ``train`` about its tokens: which of a store's, or which images and model instead."""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from visae.activations.token_filter import TokenFilter
from visae.errors import ConfigError

if TYPE_CHECKING:
    from visae.images.source import ImageSource
    from visae.models.protocol import VisionModel

__all__ = ["FilterOptions", "LiveOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Which tokens of a store take part; every condition that is given must hold."""

    labels: tuple[str, ...] = ()
    """Images of one of these classes."""
    groups: tuple[str, ...] = ()
    """Images of one of these groups."""
    side: Literal["all", "discovery", "confirmation"] = "all"
    """Images on one side of the division."""
    patch_labels: tuple[str, ...] = ()
    """Patches of one of these classes, by the masks."""
    least_purity: float = 0.5
    """Share of a patch that must be of its class, where patch-labels are given."""
    patch_rows: tuple[int, int] | None = None
    """Patches from this row of the grid, counted from 0, to before that row."""
    patch_columns: tuple[int, int] | None = None
    """Patches from this column of the grid, counted from 0, to before that column."""

    def token_filter(self) -> TokenFilter:
        """The conditions as a filter."""
        return TokenFilter(
            labels=self.labels,
            groups=self.groups,
            side=None if self.side == "all" else self.side,
            patch_labels=self.patch_labels,
            least_purity=self.least_purity,
            patch_rows=self.patch_rows,
            patch_columns=self.patch_columns,
        )

    def require_none(self) -> None:
        """Refuse conditions where there is no store.

        Raises:
            ConfigError: when one is given.
        """
        if not self.token_filter().is_empty:
            raise ConfigError(
                "Tokens can be chosen by label, side or place only from a store",
                where="--images",
                fix="Record the images first, or leave the conditions out",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiveOptions:
    """Images, and a model that runs on them while training, instead of a store."""

    images: str | None = None
    """Images to train on without a store: folder, manifest, hf://owner/dataset …"""
    model: str | None = None
    """Model to run on them."""
    weights: Path | None = None
    """Local safetensors file with the model's own tensor names, instead of the hub."""
    revision: str | None = None
    """Commit, tag or branch of the hub's repository, instead of the newest."""
    image_size: int | None = None
    """Side of the square input in pixels, instead of the model's own."""
    images_per_forward: int = 32
    """Images that the model sees at a time."""
    workers: int = 0
    """Processes that read images; 0 for threads."""

    def require_none(self) -> None:
        """Refuse images and models beside a store.

        Raises:
            ConfigError: when one is given.
        """
        if self.images is not None or self.model is not None:
            raise ConfigError(
                "A store was given, and images or a model besides",
                where="--store, --images, --model",
                fix="Give --store, or --images and --model",
            )

    def words(self) -> str:
        """The same images and model as they are typed for another verb."""
        asked = {
            "images": self.images,
            "model": self.model,
            "weights": self.weights,
            "revision": self.revision,
            "image-size": self.image_size,
        }
        given = [(name, value) for name, value in asked.items() if value is not None]
        return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in given)

    def open(self, *, device: str) -> "tuple[ImageSource, VisionModel]":
        """The images, and the model on a device.

        Raises:
            ConfigError: when one of them is not given.
        """
        from visae.images.opening import open_images
        from visae.models.config import ModelConfig
        from visae.models.loading import load_model

        if self.images is None or self.model is None:
            raise ConfigError(
                "There is nothing to train on",
                where="--store, --images, --model",
                fix="Give a store with --store, or images and a model with --images and --model",
            )
        config = ModelConfig(
            model=self.model,
            weights=self.weights,
            revision=self.revision,
            image_size=self.image_size,
        )
        return open_images(self.images), load_model(config, device=device)
