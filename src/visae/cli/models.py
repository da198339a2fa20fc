"""The verb ``models``: which models there are, and what each offers."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from visae.cli.output import Screen

if TYPE_CHECKING:
    from visae.models.catalogue import ModelSummary

__all__ = ["ModelsCommand"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelsCommand:
    """List models with their width, blocks, token layout and sites; nothing is downloaded."""

    pattern: tyro.conf.Positional[str | None] = None
    """Part of a name or a wildcard pattern; a whole name, folder or python:MODULE:FUNCTION shows
    every site."""
    weights: Path | None = None
    """Local weights file of the model named."""
    image_size: int | None = None
    """Side of the square input in pixels, instead of the model's own."""
    limit: int = 8
    """How many of the models that match are shown with details."""

    def run(self, screen: Screen) -> None:
        """Print one model in detail, or a table of those that match."""
        from visae.models.catalogue import find_models, summarise_name
        from visae.models.names import is_folder

        named = self.pattern or ""
        is_loaded = is_folder(named) or named.startswith(("python:", "random:"))
        if named and (self.weights or self.image_size or is_loaded):
            self._show_loaded(screen)
            return
        names = find_models(self.pattern)
        shown = [summarise_name(name) for name in names[: self.limit]]
        if len(names) == 1:
            _show_one(screen, shown[0])
            return
        for line in _lines(shown):
            screen.say(line)
        if len(names) > len(shown):
            screen.say(f"… and {len(names) - len(shown):,} more: give a longer pattern, or --limit")

    def _show_loaded(self, screen: Screen) -> None:
        """The model itself, with its weights."""
        from visae.models.catalogue import summarise
        from visae.models.config import ModelConfig
        from visae.models.loading import load_model

        config = ModelConfig(
            model=str(self.pattern), weights=self.weights, image_size=self.image_size
        )
        model = load_model(config, device="cpu")
        _show_one(screen, summarise(model))
        screen.say(f"weights: sha256 {model.identity.weights_sha256}")


def _show_one(screen: Screen, model: "ModelSummary") -> None:
    """Every site of a model."""
    height, width = model.size
    screen.say(f"{model.name}: input {height} × {width} pixels, {model.n_blocks} blocks")
    if model.problem:
        screen.say(model.problem)
    rows = [("site", "width", "special tokens", "patch grid")]
    for site in model.sites:
        grid = f"{site.layout.grid[0]} × {site.layout.grid[1]}"
        special = ", ".join(site.layout.special) or "none"
        rows.append((site.name, str(site.d_model), special, grid))
    for line in _aligned(rows):
        screen.say(line)
    if not model.n_blocks:
        screen.say("Any module that gives a feature map is a site too, such as layer3.0.conv2.")


def _lines(models: "list[ModelSummary]") -> list[str]:
    rows = [("model", "width", "blocks", "tokens", "sites")]
    rows += [
        (model.name, model.widths, str(model.n_blocks or "none"), model.tokens, model.kinds)
        for model in models
    ]
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """One line a row with its columns below one another, however wide the terminal is."""
    widths = [max(len(text) for text in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
